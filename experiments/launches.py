"""What a call costs the host, and what another length costs: python experiments/launches.py   (seconds, one GPU)

Calls with tensors so small that the device keeps up: the least mean of five times 200 calls, without waiting for the
device. Then attention and LayerNorm with lengths and beginnings of index tensors that they have not seen; what is
compiled for them is told.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from triton import knobs

from grkernels.operators import Operators
from grkernels.registry import FAMILIES

EMBEDDING, HEADS, DIM, ROWS = 512, 4, 128, 64


def host_us(call: Callable[[], Any], calls: int = 200) -> float:
    """Microseconds a call, on the host."""
    least = float("inf")
    for _ in range(5):
        call()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(calls):
            call()
        least = min(least, (time.perf_counter() - begun) / calls)
        torch.cuda.synchronize()
    return 1e6 * least


def layer(rows: int, shift: int) -> tuple[Any, ...]:
    """u, v, q and k as views of a layer's projection; offsets and targets of one sequence, `shift` numbers into a
    buffer."""
    made = torch.randn(rows, 4 * HEADS * DIM, device="cuda", dtype=torch.bfloat16)
    u, v, q, k = (part.unflatten(1, (HEADS, DIM)) for part in made.split(HEADS * DIM, dim=1))
    packed = torch.zeros(16, dtype=torch.int64, device="cuda")
    packed[shift + 1 : shift + 3] = torch.tensor([rows, rows // 4], device="cuda")
    return u.flatten(1), v, q, k, packed[shift : shift + 2], packed[shift + 2 : shift + 3]


def calls(operators: Operators, rows: int = ROWS, shift: int = 0) -> dict[str, Callable[[], Any]]:
    u, v, q, k, offsets, targets = layer(rows, shift)
    weight = torch.ones(HEADS * DIM, device="cuda", dtype=torch.bfloat16)
    sizes = {"max_q_len": rows, "max_kv_len": rows, "scaling_seqlen": 1024, "alpha": 0.1}
    where = {"q_offsets": offsets, "kv_offsets": offsets, "num_targets": targets}
    return {
        "layer_norm": lambda: operators.layer_norm(u, weight, weight, eps=1e-6),
        "norm_gate": lambda: operators.norm_gate(u, v, weight, weight, eps=1e-6),
        "hstu_attention": lambda: operators.hstu_attention(q, k, v, **where, **sizes),
    }


@torch.inference_mode()
def main() -> None:
    x = torch.randn(ROWS, EMBEDDING, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(4 * HEADS * DIM, EMBEDDING, device="cuda", dtype=torch.bfloat16)
    print("| call | us |\n|---|---|")
    print(f"| PyTorch: x + x | {host_us(lambda: x + x):.1f} |")
    print(f"| PyTorch: linear | {host_us(lambda: F.linear(x, weight)):.1f} |")
    for name in ("triton", "cutlass"):
        for family, call in calls(Operators.of(dict.fromkeys(FAMILIES, name))).items():
            print(f"| {name}: {family} | {host_us(call):.1f} |")
    compiled: list[Any] = []
    knobs.runtime.jit_post_compile_hook = lambda *_, **event: compiled.append(event)
    triton = Operators.of(dict.fromkeys(FAMILIES, "triton"))
    for rows, shift in ((64, 0), (65, 0), (64, 1), (65, 1), (128, 0), (96, 3)):
        begun = time.perf_counter()
        for call in calls(triton, rows, shift).values():
            call()
        torch.cuda.synchronize()
        took = (time.perf_counter() - begun) * 1e3
        print(f"{rows} rows, index tensors from number {shift}: {took:.1f} ms, {len(compiled)} kernels compiled")
        compiled.clear()


if __name__ == "__main__":
    main()
