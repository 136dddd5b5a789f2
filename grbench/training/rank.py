"""Training of a ranker: did the user take the task's action on the candidate in this visit?

The last requests of the trace are held out, and those before them choose the epoch. grbench/gate/quality.py ranks the
same held-out requests with an engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from grbench.config.schema import ConfigError
from grbench.quality.labels import labels_of
from grbench.quality.metrics import area_under_curve
from grbench.training.config import TrainConfig
from grbench.workloads.trace import Trace
from grengines.models.hstu import autograd
from grengines.models.hstu.model import HSTURanker
from grengines.models.hstu.weights import save_weights
from grengines.runtime.batch import pack
from grkernels.operators import Operators


class RankTask:
    """Training of HSTURanker on the requests of a trace."""

    def __init__(self, config: TrainConfig, trace: Trace, device: torch.device) -> None:
        self._config, self._requests, self._device = config, trace.requests, device
        tasks = config.model.tasks
        labels = [labels_of(trace, i, tasks) for i in range(len(trace.requests))]
        if labels[0] is None:
            known = ",".join(trace.events.action_names)
            raise ConfigError(
                f"model.tasks={tasks}: the workload does not label them; set 'model.tasks=[{known}]' or some of these"
            )
        self._labels = [one for one in labels if one is not None]
        held = config.held_out
        self.examples = len(trace.requests) - 2 * held
        if self.examples < held:
            raise ConfigError(
                f"held_out={held}: the trace has {len(trace.requests)} requests, and three times held_out are needed"
            )
        self.model = HSTURanker.build(
            config.model, trace.catalogue, Operators.eager(), seed=config.seed, device=device, dtype=torch.float32
        )
        if config.model.weights is None:
            autograd.start(self.model, config.seed)
        self.model.requires_grad_()

    def save(self, path: Path) -> None:
        """Write the weights file. Raises OSError."""
        save_weights(self.model, path)

    def batches(self, epoch: int) -> Iterator[list[int]]:
        order = np.random.default_rng([self._config.seed, epoch]).permutation(self.examples)
        for begin in range(0, self.examples, self._config.training.batch):
            yield order[begin : begin + self._config.training.batch].tolist()

    def loss(self, batch: list[int]) -> Tensor:
        truth = torch.from_numpy(np.concatenate([self._labels[i] for i in batch])).float().to(self._device)
        return F.binary_cross_entropy_with_logits(self._logits(batch, self._config.training.dropout), truth)

    def _logits(self, indices: list[int], dropout: float = 0.0) -> Tensor:
        batch = pack([self._requests[i] for i in indices], self.model.encoding, pin=self._device.type == "cuda")
        return autograd.ranker_logits(self.model, batch.to(self._device), dropout)

    def validate(self) -> dict[str, float]:
        """Return the mean AUC of the tasks over the requests before those held out, and the AUC of each task."""
        return self._areas(range(self.examples, self.examples + self._config.held_out))

    def test(self) -> dict[str, float]:
        """Return the same of the requests that are held out."""
        return self._areas(range(self.examples + self._config.held_out, len(self._requests)))

    def _areas(self, indices: range) -> dict[str, float]:
        size = self._config.training.batch
        found = [self._logits(list(indices[i : i + size])).float().cpu().numpy() for i in range(0, len(indices), size)]
        logits, truth = np.concatenate(found), np.concatenate([self._labels[i] for i in indices])
        tasks = enumerate(self._config.model.tasks)
        areas = {f"auc/{task}": area_under_curve(logits[:, t], truth[:, t]) for t, task in tasks}
        return {"auc": float(np.mean(list(areas.values()))), **areas}
