"""A generator by item vectors that teaches one by semantic IDs.

Its probabilities of the next item are more than the one item that followed: they say which others could have. Source:
Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from grbench.config.schema import ConfigError
from grbench.training.networks import product
from grengines.models import header
from grengines.models.hstu import autograd
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.generator import HSTUGenerator
from grengines.semantic.ids import SemanticIds
from grkernels.operators import Operators


class Teacher:
    """The generator of a weights file, as `grbench train task=generate retrieval.levels=1` writes it for HSTU.

    temperature: divides its logits. Raises ConfigError for a file of another model or catalogue.
    """

    def __init__(self, path: Path, ids: SemanticIds, device: torch.device, temperature: float = 1.0) -> None:
        try:
            known = {field.name for field in dataclasses.fields(HSTUConfig)}
            saved = json.loads(header.read(path).metadata.get("model", "{}"))
            options = HSTUConfig(**{key: value for key, value in saved.items() if key in known})
            self._model = HSTUGenerator.build(
                options, (len(ids.codes),), Operators.eager(), seed=0, device=device, dtype=torch.float32,
                weights=str(path),
            )  # fmt: skip
        except ValueError as e:
            raise ConfigError(f"training.teacher: {e}") from None
        self.timed, self._temperature = self._model.timed, temperature
        self._codes = torch.from_numpy(ids.codes).long().to(device)
        self._members = [F.one_hot(self._codes[:, i], size).float().T for i, size in enumerate(ids.sizes)]

    @torch.no_grad()
    def targets(self, items: Tensor, later: Tensor, times: Tensor | None) -> list[Tensor]:
        """Return the probabilities of each level's codes [M, codes] at the M flat places `later` of items [B, n].

        They are those of what follows the items before the place. Those of a later level are among the items with the
        item's own codes of the levels before. times: int64 [B, n], seconds, which a model with a time bias needs.
        """
        hidden = autograd.generator_hidden(self._model, items[:, :-1], times=times)
        before = later - 1 - torch.div(later, items.shape[1], rounding_mode="floor")
        y = autograd.generator_features(self._model, hidden.reshape(-1, hidden.shape[2])[before])
        chances = (product(y, autograd.generator_table(self._model, 0)) / self._temperature).softmax(1)
        own, found = self._codes[items.view(-1)[later]], list[Tensor]()
        for level, members in enumerate(self._members):
            chance = product(chances, members)
            found.append(chance / chance.sum(1, keepdim=True).clamp(min=1e-12))
            chances = chances * (self._codes[:, level] == own[:, level, None])
        return found
