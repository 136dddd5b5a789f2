"""Host time of a launch, and of a length that was not seen before.

    python experiments/launches.py

Calls have tensors so small that the device keeps up: the least mean of five times 200 calls, without waiting for the
device. On a GPU, attention and LayerNorm then run with lengths and index tensors that they have not seen, and the rows
say how many kernels were compiled for them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from grkernels.operators import Operators

FAMILIES = ("layer_norm", "norm_gate", "hstu_attention")
EMBEDDING, HEADS, DIM, ROWS = 512, 4, 128, 64
LENGTHS = [(64, 0), (65, 0), (64, 1), (65, 1), (128, 0), (96, 3)]  # rows, and where index tensors begin


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def host_us(call: Callable[[], Any], device: str, calls: int) -> float:
    """Microseconds per call, on the host."""
    least = float("inf")
    for _ in range(5):
        call()
        synchronize(device)
        begun = time.perf_counter()
        for _ in range(calls):
            call()
        least = min(least, (time.perf_counter() - begun) / calls)
        synchronize(device)
    return 1e6 * least


def layer(rows: int, shift: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u, v, q and k as views of a layer's projection; offsets and targets of one sequence.

    The last two begin `shift` numbers into a buffer, as a batch's index tensors do.
    """
    made = torch.randn(rows, 4 * HEADS * DIM, device=device, dtype=torch.bfloat16)
    u, v, q, k = (part.unflatten(1, (HEADS, DIM)) for part in made.split(HEADS * DIM, dim=1))
    packed = torch.zeros(16, dtype=torch.int64, device=device)
    packed[shift + 1 : shift + 3] = torch.tensor([rows, rows // 4], device=device)
    return u.flatten(1), v, q, k, packed[shift : shift + 2], packed[shift + 2 : shift + 3]


def calls_of(operators: Operators, device: str, rows: int = ROWS, shift: int = 0) -> dict[str, Callable[[], Any]]:
    """One call of each operator of a layer."""
    u, v, q, k, offsets, targets = layer(rows, shift, device)
    weight = torch.ones(HEADS * DIM, device=device, dtype=torch.bfloat16)
    sizes = {"max_q_len": rows, "max_kv_len": rows, "scaling_seqlen": 1024, "alpha": 0.1}
    where = {"q_offsets": offsets, "kv_offsets": offsets, "num_targets": targets}
    return {
        "layer_norm": lambda: operators.layer_norm(u, weight, weight, eps=1e-6),
        "norm_gate": lambda: operators.norm_gate(u, v, weight, weight, eps=1e-6),
        "hstu_attention": lambda: operators.hstu_attention(q, k, v, **where, **sizes),
    }


def of(variant: str) -> Operators:
    """The operators of a layer in one variant."""
    return Operators.of(dict.fromkeys(FAMILIES, variant))


def unseen(rows: common.Rows) -> None:
    """A row for each length and beginning that Triton's kernels have not seen."""
    from triton import knobs

    compiled: list[Any] = []
    knobs.runtime.jit_post_compile_hook = lambda *_, **event: compiled.append(event)
    for count, shift in LENGTHS:
        begun = time.perf_counter()
        for call in calls_of(of("triton"), "cuda", count, shift).values():
            call()
        torch.cuda.synchronize()
        took = (time.perf_counter() - begun) * 1e6
        rows.add(variant="triton", call=f"{count} rows, index from {shift}", host_us=took, compiled=len(compiled))
        compiled.clear()


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__ or "", overrides=False)
    parser.add_argument("--calls", type=int, default=200, help="in a row (default: %(default)s)")
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = common.Rows(args, __file__, arguments)
    x = torch.randn(ROWS, EMBEDDING, device=device, dtype=torch.bfloat16)
    weight = torch.randn(4 * HEADS * DIM, EMBEDDING, device=device, dtype=torch.bfloat16)
    for name, call in {"x + x": lambda: x + x, "linear": lambda: F.linear(x, weight)}.items():
        rows.add(variant="PyTorch", call=name, host_us=host_us(call, device, args.calls))
    for variant in ("triton", "cutlass") if device == "cuda" else ("torch",):
        for family, call in calls_of(of(variant), device).items():
            rows.add(variant=variant, call=family, host_us=host_us(call, device, args.calls))
    if device == "cuda":
        unseen(rows)
    rows.close()


if __name__ == "__main__":
    common.run(main)
