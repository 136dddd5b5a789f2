"""Comparison of an export, run by ONNX Runtime on the CPU, with the fp32 reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from grengines.api import Catalogue, Request
from grengines.export.exporter import Export
from grengines.export.module import inputs_of, longest_history
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.reference import RankingReference, zero_attention
from grengines.numerics import Comparison, IncorrectError, allowed_error, relative_error, require_contrast
from grengines.runtime.batch import Encoding, pack

BATCHES = 6
MAX_ERROR_RATIO = 2.0  # of what rounding to the same precision costs the reference


@dataclass(kw_only=True)
class Check(Comparison):
    """Relative errors ||logits - reference|| / ||reference|| over all batches together."""

    zero_attention_error: float  # of the reference without attention, which must not pass
    batches: int
    longest: int  # tokens of the longest sequence
    runtime: str


def check(export: Export, model: HSTUConfig, catalogue: Catalogue, seed: int) -> Check:
    """Run random jagged batches through the ONNX file and compare the logits.

    The batches have empty and long histories, none and many candidates, histories longer than the window, and tiles of
    all sizes. Raises IncorrectError, with a Check, if the logits differ or if the check could not have failed.
    """
    import onnxruntime

    precision = export.manifest["precision"]
    encoding, rng = Encoding.of(model, catalogue), np.random.default_rng([seed, 1])
    session = onnxruntime.InferenceSession(str(export.onnx), providers=["CPUExecutionProvider"])
    answers, requests = [], []
    for _ in range(BATCHES):
        batch = random_batch(rng, catalogue, longest=2 * model.max_attn_len + 40)
        packed = pack(batch, encoding).to(torch.device("cpu"))
        columns = longest_history(batch, encoding)
        inputs = inputs_of(packed, columns, tile_rows=int(rng.integers(1, packed.max_q_len + 2)))
        answers.append(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])
        requests += batch
    reference = RankingReference(model, catalogue, seed, "cpu")
    expected = np.concatenate(reference.scores(requests))
    rounded = np.concatenate(reference.scores(requests, precision))
    blind = np.concatenate(reference.scores(requests, attention=zero_attention))
    tolerance = allowed_error(relative_error(rounded, expected), MAX_ERROR_RATIO)
    found = relative_error(np.concatenate(answers), expected)
    result = Check(
        passed=found <= tolerance,
        error=found,
        tolerance=tolerance,
        zero_attention_error=relative_error(blind, expected),
        batches=BATCHES,
        longest=max(encoding.contextual_seq_len + len(r.history_items) + len(r.candidates) for r in requests),
        runtime=f"onnxruntime {onnxruntime.__version__}, CPUExecutionProvider",
    )
    if not result.passed:
        raise IncorrectError(
            f"{export.onnx}: logits differ from the fp32 reference by {found:.2e} "
            f"(relative; allowed {tolerance:.2e}, without attention {result.zero_attention_error:.2e})",
            result,
        )
    require_contrast(
        {"a model without attention": result.zero_attention_error},
        tolerance,
        result,
        subject=f"{export.onnx}: the check",
        advice=f"attention matters too little to this model in {precision}; check its fp32 export",
    )
    return result


def random_batch(rng: np.random.Generator, catalogue: Catalogue, longest: int) -> list[Request]:
    """Return one to five requests with histories of 0 to `longest` events and at least one candidate in all."""
    requests = []
    for i in range(int(rng.integers(1, 6))):
        events = min(int(rng.integers(0, longest + longest // 2)), longest) * int(rng.random() < 0.8)
        times = np.sort(rng.integers(0, 10**6, events))
        requests.append(
            Request(
                request_id=i,
                user_id=int(rng.integers(catalogue.num_users)),
                history_items=rng.integers(0, catalogue.num_items, events),
                history_actions=rng.integers(0, 1 << catalogue.num_actions, events),
                history_weights=rng.random(events, dtype=np.float32),
                history_timestamps=times,
                num_seen=0,
                candidates=rng.integers(0, catalogue.num_items, int(rng.integers(i > 0, 20)) + (i == 0)),
                timestamp=10**6 + int(rng.integers(10**5)),
                arrival_s=0.0,
                deadline_ms=0.0,
            )
        )
    return requests
