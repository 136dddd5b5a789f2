"""Training of a ranker: did the user take the task's action on the candidate in this visit?

The last requests of the trace are held out, and those before them choose the epoch. grbench/gate/quality.py ranks the
same held-out requests with an engine. A pipeline is evaluated by each user's last event instead, at any time. So no
visit with such an event is trained on, and none with the very last one chooses the epoch (grbench/quality/protocol.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from grbench.config.schema import ConfigError
from grbench.quality.held_out import HeldOut
from grbench.quality.labels import labels_of
from grbench.quality.metrics import area_under_curve
from grbench.quality.protocol import TEST, VALIDATION, last_events
from grbench.training.config import TrainConfig
from grbench.workloads.trace import Trace
from grengines.api import Float32Array
from grengines.models.hstu import autograd
from grengines.models.hstu.model import HSTURanker
from grengines.models.hstu.weights import save_weights
from grengines.runtime.batch import pack
from grkernels.operators import Operators

Ints = npt.NDArray[np.int64]


class RankTask:
    """Training of HSTURanker on the requests of a trace. A subclass may have another model: `build` and `logits`."""

    def __init__(self, config: TrainConfig, trace: Trace, device: torch.device) -> None:
        self._config, self._requests, self.device = config, trace.requests, device
        tasks = config.model.tasks
        labels = [labels_of(trace, i, tasks) for i in range(len(trace.requests))]
        if labels[0] is None:
            known = ",".join(trace.events.action_names)
            raise ConfigError(
                f"model.tasks=[{','.join(tasks)}]: the workload does not label them; "
                f"set 'model.tasks=[{known}]' or some of these"
            )
        self._labels = [one for one in labels if one is not None]
        held = config.held_out
        count = len(trace.requests)
        if count < 3 * held:
            raise ConfigError(f"held_out={held}: the trace has {count} requests, and three times held_out are needed")
        self._training = _without(trace, range(count - 2 * held), VALIDATION)
        self.validation = _without(trace, range(count - 2 * held, count - held), TEST)
        self._test = np.arange(count - held, count)
        self.examples = len(self._training)
        if not self.examples or not len(self.validation):
            raise ConfigError(
                f"held_out={held}: every request before has one of its user's last events, which are not trained on; "
                "use a workload with longer histories, or another held_out"
            )
        self.model = self.build(trace)
        self.model.requires_grad_()

    def build(self, trace: Trace) -> Any:
        """Return the model, with weights to train from."""
        config = self._config
        model = HSTURanker.build(
            config.model, trace.catalogue, Operators.eager(), seed=config.seed, device=self.device, dtype=torch.float32
        )
        if config.model.weights is None:
            autograd.start(model, config.seed)
        return model

    @property
    def seen_until(self) -> int:
        """Time of the last request that is not held out, in seconds."""
        return int(self._requests.times[self._test[0] - 1])

    def save(self, path: Path) -> None:
        """Write the weights file. Raises OSError."""
        save_weights(self.model, path, facts=HeldOut(last_events=True, seen_until=self.seen_until).metadata())

    def batches(self, epoch: int) -> Iterator[list[int]]:
        order = np.random.default_rng([self._config.seed, epoch]).permutation(self._training)
        for begin in range(0, self.examples, self._config.training.batch):
            yield order[begin : begin + self._config.training.batch].tolist()

    def loss(self, batch: list[int]) -> Tensor:
        truth = torch.from_numpy(np.concatenate([self._labels[i] for i in batch])).float().to(self.device)
        return F.binary_cross_entropy_with_logits(self.logits(batch, self._config.training.dropout), truth)

    def logits(self, indices: list[int], dropout: float = 0.0) -> Tensor:
        """Return the logits [all candidates, tasks] of these requests."""
        batch = pack([self._requests[i] for i in indices], self.model.encoding, pin=self.device.type == "cuda")
        return autograd.ranker_logits(self.model, batch.to(self.device), dropout)

    def validate(self) -> dict[str, float]:
        """Return the mean AUC of the tasks over the requests before those held out, and the AUC of each task."""
        return self._areas(self.validation)

    def baseline(self) -> tuple[str, float]:
        """Return the AUC of any order that knows nothing."""
        return "chance", 0.5

    def test(self) -> dict[str, float]:
        """Return the same of the requests that are held out."""
        return self._areas(self._test)

    def scores(self, indices: Ints) -> list[Float32Array]:
        """Return the logits [candidates, tasks] of each request."""
        size = self._config.training.batch
        found = [
            self.logits(indices[i : i + size].tolist()).float().cpu().numpy() for i in range(0, len(indices), size)
        ]
        ends = np.cumsum([len(self._requests[i].candidates) for i in indices])
        return np.split(np.concatenate(found), ends[:-1])

    def _areas(self, indices: Ints) -> dict[str, float]:
        logits, truth = np.concatenate(self.scores(indices)), np.concatenate([self._labels[i] for i in indices])
        tasks = enumerate(self._config.model.tasks)
        areas = {f"auc/{task}": area_under_curve(logits[:, t], truth[:, t]) for t, task in tasks}
        return {"auc": float(np.mean(list(areas.values()))), **areas}


def _without(trace: Trace, indices: range, part: int) -> Ints:
    """Return those of the requests whose visit has none of its user's last `part` events."""
    before = np.r_[0, np.cumsum(last_events(trace.events, part))]
    own = trace.own[indices.start : indices.stop]
    return np.flatnonzero(before[own[:, 1]] == before[own[:, 0]]) + indices.start
