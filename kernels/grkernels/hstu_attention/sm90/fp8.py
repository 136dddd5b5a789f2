"""Products in e4m3: scales, SiLU, the rounding of P, and sums in two levels.

fp8_operands.py writes Q, K and V. A row of Q has a scale a, so does a block of K's rows (b) and of V's (c), and no row
of Q or K is longer than LONGEST before it is rounded. So a sum s = q k is at most LONGEST^2 in size, and P at most
twice that, 392 of the 448 that e4m3 has:

    x = r b s   with r = alpha a / 2: one factor for a row, one for a tile
    P = s tanh(x) + s = SiLU(2 x) / (r b)
    O = r sum over tiles of (b c) (P V)

So P is rounded without a largest score and without 1/N, and its scale follows the rows that it is of.

Tensor cores keep about 14 bits of a sum of e4m3 products. P V of each tile is therefore a sum of its own, which is
added to O in fp32. That also takes the tile's factor b c, at no cost. A tile's sums need registers beside those of O,
so the product is made for `Tiles.chunk` columns of V at a time.

P comes from the scores in registers. Of 16 columns, a thread of a quad holds 2, 3 of the first eight and of the last
eight, and WGMMA wants 4 neighbours there. So V has its tokens in the order in which P has its columns: fp8_operands.py
writes token 8 b + 2 t + e of each 16 in place 4 t + 2 b + e.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
from cutlass import Float32, Int32, Int64, cute
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from grkernels.cute_common import Float32Pointer
from grkernels.hstu_attention.sm90.registers import Thread, flat
from grkernels.hstu_attention.sm90.schedule import Batch, Work
from grkernels.hstu_attention.sm90.sizes import SCALED_TOKENS


class Scales(NamedTuple):
    """Scales of Q, K and V in e4m3. Only kernels with `Sizes.products` read them."""

    rows: Float32Pointer  # [rows of Q, heads]: a
    blocks: Float32Pointer  # [heads, blocks, 2]: b and c
    count: Int32  # of blocks


class Factors(NamedTuple):
    """A thread's factors, in registers."""

    rows: cute.Tensor  # [2]: r of its two rows
    waiting: cute.Tensor  # [1]: b c of the tile whose P waits for its V


def no_factors() -> Factors:
    """Return registers for the factors."""
    return Factors(cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(1, Float32))


@cute.jit
def read_rows(factors: Factors, scales: Scales, batch: Batch, work: Work, thread: Thread, half_alpha: Float32) -> None:
    """Set the factors of this thread's rows of a work item. Past its last row, that row's are read."""
    for half in cutlass.range_constexpr(2):
        row = work.q_row + cutlass.min(thread.row + 8 * half, work.rows - 1)
        scale = cute.make_tensor(scales.rows + (Int64(row) * batch.heads + work.head), cute.make_layout(1))
        factors.rows[half] = half_alpha * scale[0]


@cute.jit
def block_of(scales: Scales, work: Work, column: Int32) -> cute.Tensor:
    """Return where the scales b and c of the tile at `column` are."""
    block = work.head * scales.count + (work.kv_row + column) // SCALED_TOKENS
    return cute.make_tensor(scales.blocks + Int64(block) * 2, cute.make_layout(2))


@cute.jit
def silu(
    s: cute.Tensor, factors: Factors, b: Float32, part: cutlass.Constexpr[int], parts: cutlass.Constexpr[int]
) -> None:
    """Replace the part-th of `parts` equal parts of s by s tanh(r b s) + s."""
    scores = flat(s)
    r = [factors.rows[half] * b for half in range(2)]
    count = cute.size(scores) // parts
    for i in cutlass.range_constexpr(part * count, (part + 1) * count):
        scores[i] = scores[i] * cute.math.tanh(scores[i] * r[i // 2 % 2], fastmath=True) + scores[i]


@cute.jit
def convert(s: cute.Tensor, p: cute.Tensor) -> None:
    """Round S into P."""
    scores = flat(s)
    words = cute.recast_tensor(flat(p), Int32)
    for i in cutlass.range_constexpr(cute.size(words)):
        words[i] = _round_four(*[scores[j] for j in scores_of(i)])


def scores_of(word: int) -> tuple[int, int, int, int]:
    """Return which of a thread's scores a word of P has: of a row, two columns of a block of 8 and two of the next."""
    first = word // 2 * 8 + word % 2 * 2
    return first, first + 1, first + 4, first + 5


@cute.jit
def add(o: cute.Tensor, part: cute.Tensor, factors: Factors, chunk: cutlass.Constexpr[int]) -> None:
    """Add a tile's product with the chunk-th columns of V to O."""
    sums, values = flat(o), flat(part)
    for i in cutlass.range_constexpr(cute.size(values)):
        j = chunk * cute.size(values) + i
        sums[j] = values[i] * factors.waiting[0] + sums[j]


@cute.jit
def scale_rows(o: cute.Tensor, factors: Factors) -> None:
    """Multiply O by the factors of its rows."""
    sums = flat(o)
    for i in cutlass.range_constexpr(cute.size(sums)):
        sums[i] = sums[i] * factors.rows[i // 2 % 2]


@dsl_user_op
def _round_four(a: Float32, b: Float32, c: Float32, d: Float32, *, loc: Any = None, ip: Any = None) -> Int32:
    """Return four numbers in e4m3 as one word, the first one in its lowest byte."""
    values = [x.ir_value(loc=loc, ip=ip) for x in (a, b, c, d)]
    asm = """{ .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high}; }"""
    return Int32(llvm.inline_asm(T.i32(), values, asm, "=r,f,f,f,f", loc=loc, ip=ip))
