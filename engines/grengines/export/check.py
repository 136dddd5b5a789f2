"""Does an export compute what the model does? ONNX Runtime on the CPU against the fp32 reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from grengines.api import Catalogue, IncorrectError, Request
from grengines.export.exporter import Export
from grengines.export.module import inputs_of, longest_history
from grengines.hstu.engine import Reference
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.model import zero_attention
from grengines.numerics import SUMMATION_FLOOR, relative_error
from grengines.runtime.batch import Encoding, pack

BATCHES = 6


@dataclass
class Check:
    """Relative errors ||logits - reference|| / ||reference|| over all batches together."""

    passed: bool
    error: float
    tolerance: float  # twice the error of plain PyTorch in the same precision
    zero_attention_error: float  # the reference's own, without attention: what must fail
    batches: int
    longest: int  # tokens of the longest sequence
    runtime: str


def check(export: Export, model: HSTUConfig, catalogue: Catalogue, seed: int) -> Check:
    """Run random jagged batches through the ONNX file: empty and long histories, none and many candidates, users whose
    history is longer than the window, tiles of all sizes.

    Raises IncorrectError where it differs, or where the check itself could not tell.
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
    reference = Reference(model, catalogue, seed, "cpu")
    expected = np.concatenate(reference.scores(requests))
    plain = np.concatenate(reference.scores(requests, precision))
    blind = np.concatenate(reference.scores(requests, attention=zero_attention))
    tolerance = max(2 * relative_error(plain, expected), SUMMATION_FLOOR)
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
        raise CheckError(f"{export.onnx}: logits differ from the fp32 reference by {found:.2e}", result)
    if result.zero_attention_error <= 2 * tolerance:
        raise CheckError(
            f"{export.onnx}: the check can't tell right from wrong in {precision}, attention matters too little to "
            "this model; check its fp32 export",
            result,
        )
    return result


class CheckError(IncorrectError):
    """The export is wrong, or can't be told from one that is; `result` has the figures."""

    def __init__(self, why: str, result: Check) -> None:
        super().__init__(
            f"{why} (relative; allowed {result.tolerance:.2e}, without attention {result.zero_attention_error:.2e})"
        )
        self.result = result


def random_batch(rng: np.random.Generator, catalogue: Catalogue, longest: int) -> list[Request]:
    """One to five requests with histories of 0 to `longest` events, at least one candidate among them."""
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
