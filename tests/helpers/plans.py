"""TensorRT plans of a small model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from grengines.api import Catalogue
from grengines.models.hstu.config import HSTUConfig
from grengines.runtime.batch import Encoding
from grengines.runtime.profile import profiles
from grengines.tensorrt import library as libraries
from grengines.tensorrt import plan as plans
from grengines.tensorrt import sample as samples
from helpers.hstu_oracle import make_requests

CATALOGUE = Catalogue(num_users=20, num_items=300, num_actions=4)
MODEL = HSTUConfig(
    layers=2, embedding_dim=32, heads=2, qk_dim=16, v_dim=16, scaling_seqlen=128, contextual_seq_len=2, max_attn_len=20,
    max_positions=2048,
)  # fmt: skip
SMALL = dataclasses.replace(MODEL, layers=1)
ENCODING = Encoding.of(MODEL, CATALOGUE)
REQUESTS = make_requests(np.random.default_rng(0), CATALOGUE, [3, 37, 12, 44, 20, 8], [6, 1, 9, 8, 5, 4])


def feeds() -> list[dict[str, Any]]:
    """Return calibration inputs of REQUESTS."""
    return samples.feeds(REQUESTS, ENCODING, 3, 64)


def facts_of(
    precision: str, target: str, model: HSTUConfig = MODEL, **options: Any
) -> tuple[plans.Facts, list[dict[str, Any]]]:
    """Return the facts of such a plan and its calibration set."""
    calibration = feeds() if plans.BASE[precision] != precision else []
    facts = plans.Facts.of(
        libraries.find("tensorrt_rtx"), model, CATALOGUE, 0, precision=precision, target=target,
        profiles=profiles(REQUESTS, ENCODING, 4, 2), calibration=samples.digest(calibration), **options,
    )  # fmt: skip
    return facts, calibration


def made(
    precision: str, target: str, folder: Path, progress: plans.Progress | None = None, **options: Any
) -> plans.Plan:
    """Build a plan in a folder."""
    facts, calibration = facts_of(precision, target, **options)
    library = libraries.find("tensorrt_rtx")
    return plans.build(library, facts, MODEL, CATALOGUE, 0, folder, calibration, progress)
