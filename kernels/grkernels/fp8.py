"""Products of e4m3 numbers: rows with a scale each, weights with a scale for each output channel.

A row x [K] of the left operand becomes q [K] and a scale s = max|x| / 448 in fp32, with x near s q (`grkernels.pages`
has the rule). So does each row of the weight [N, K]. A product of two rows is the sum of q q', times both
scales: exact but for the rounding of the operands, the bits of the sum, and the result in bf16.

What writes rows computes their scales in the same pass (`layer_norm`, `norm_gate` and `quantise` with to="fp8"):
nothing is calibrated, nothing waits for the host, and a row's numbers never depend on the rows beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grkernels.pages import quantised

DTYPE = torch.float8_e4m3fn
STEP = 16  # tensor cores take whole groups of 16 numbers
CAPABILITY = (8, 9)  # the first one with e4m3
EMULATED = "emulated by PyTorch in fp32"
# Hopper's tensor cores add e4m3 products with about 14 bits (DeepSeek-V3, section 3.3.2). False: partial sums move to
# fp32 registers time and again. On an H200 a product alone is then 8 to 23% slower, with the same error to two digits
# up to K = 3072, since nearly all of it is the operands'. tests/kernels/test_fp8.py emulates sums up to K = 4096.
FAST_ACCUMULATION = True


@dataclass(frozen=True)
class Scaled:
    """Rows of e4m3 numbers. Row i stands for values[i] * scales[i]."""

    values: Tensor  # float8_e4m3fn [L, K], contiguous
    scales: Tensor  # fp32 [L, 1]

    @classmethod
    def of(cls, x: Tensor) -> Scaled:
        """Round x [L, W], in eager PyTorch. Zeros fill its rows up to a multiple of STEP."""
        values, scales = quantised(torch.nn.functional.pad(x, (0, -x.shape[1] % STEP)), DTYPE)
        return cls(values, scales[:, None])

    @classmethod
    def empty(cls, rows: int, width: int, device: torch.device) -> Scaled:
        """Return unwritten rows, their width a multiple of STEP."""
        values = torch.empty(rows, width + -width % STEP, dtype=DTYPE, device=device)
        return cls(values, torch.empty(rows, 1, dtype=torch.float32, device=device))

    def __getitem__(self, rows: Tensor) -> Scaled:
        """Gather rows (int64 [M])."""
        return Scaled(self.values.view(torch.uint8)[rows].view(DTYPE), self.scales[rows])

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """Return what the rows stand for, [L, K]."""
        return (self.values.float() * self.scales).to(dtype)


def runs_as(device: str) -> str:
    """Return what computes products on this device, cuda or cpu, and how it sums."""
    if device != "cuda":
        return EMULATED
    return "torch._scaled_mm, use_fast_accum" if FAST_ACCUMULATION else "torch._scaled_mm"


def refusal() -> str | None:
    """Return None, or why the GPU of this process has no products of e4m3 numbers."""
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) >= CAPABILITY:
        return None
    least = ".".join(map(str, CAPABILITY))
    return (
        f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, and products of fp8 numbers need "
        f"{least} or higher"
    )


def product(x: Scaled, weight: Tensor, scales: Tensor, bias: Tensor | None, fast: bool = FAST_ACCUMULATION) -> Tensor:
    """Multiply rows x [L, K] with a weight, e4m3 [N, K] with scales fp32 [1, N]: bf16 [L, N] with bias [N].

    On a GPU by torch._scaled_mm, which a CUDA graph can hold. On a CPU the sums are in fp32, which is slow and exact.
    fast: FAST_ACCUMULATION of this product, on a GPU.
    """
    if not x.values.shape[0]:
        return x.scales.new_empty(0, weight.shape[0], dtype=torch.bfloat16)
    if x.values.is_cuda:
        out: Tensor = torch._scaled_mm(
            x.values,
            weight.t(),
            scale_a=x.scales,
            scale_b=scales,
            bias=bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=fast,
        )
        return out
    summed = (x.values.float() @ weight.float().t()) * x.scales * scales
    return (summed if bias is None else summed + bias.float()).to(torch.bfloat16)
