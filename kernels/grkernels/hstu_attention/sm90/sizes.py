"""Sizes that the kernel is compiled for."""

from __future__ import annotations

from dataclasses import dataclass

from cutlass import BFloat16, Float8E4M3FN, Float16, Float32

SHARED_BYTES = 227 * 1024  # of a CTA on Hopper
BARRIER_BYTES = 1024  # at most: barriers, then alignment
WARPGROUP = 128  # threads
PRODUCER_THREADS = 128  # one warp loads, a whole warpgroup gives its registers away
REGISTERS = {1: (56, 256), 2: (24, 240), 3: (32, 160)}  # consumer warpgroups -> a producer's, a consumer's
REGISTERS_OF_BYTES = {1: (120, 256), 2: (72, 216), 3: (56, 152)}  # the same where producers read 8-bit pages
SCALED_TOKENS = 128  # of a sequence that share a scale of K and one of V, in e4m3
PERMUTED_TOKENS = 16  # neighbours in V among which e4m3 products take another order (fp8.py)
SQUARE = (8, 64)  # rows and columns of the part of a tile that a warp converts at once, 1 KiB in half precision


@dataclass(frozen=True)
class Tiles:
    """Tile sizes and the order of work: what tuning chooses."""

    m: int  # query rows of a work item: 64 for each consumer warpgroup
    n: int  # keys of a tile
    stages: int  # tiles of K and of V in shared memory
    take_turns: bool  # warpgroups take turns at the tensor cores
    dynamic: bool  # CTAs take work items from a counter when they are free, instead of fixed shares
    split: bool = False  # several CTAs share the tiles of an item, and the last one to finish adds up their sums
    chunk: int = 0  # of e4m3 products: columns of V whose product with one tile of P is summed at a time


@dataclass(frozen=True)
class Sizes:
    """Element type, head sizes, tiles and page size.

    Raises ValueError for tiles that don't fit in shared memory or into pages, and for turns of other than two
    warpgroups.
    """

    dtype: type[BFloat16] | type[Float16]
    qk_dim: int
    v_dim: int
    tiles: Tiles
    page: int = 0  # tokens of a page, 0 if no keys are in pages
    stored: str = ""  # int8 or fp8: pages are in 8 bits
    products: str = ""  # fp8: Q, K, V and P are in e4m3 (fp8.py)

    def __post_init__(self) -> None:
        t = self.tiles
        if t.take_turns and t.m != 128:
            raise ValueError(f"m={t.m} take_turns=1: turns are for two warpgroups, m=128")
        if self.page and t.n % self.page and self.page % t.n:
            raise ValueError(f"n={t.n}: tiles must be whole pages of {self.page} tokens, or whole parts of one")
        if self.products:
            self._check_products()
        values = t.m * self.qk_dim + t.stages * t.n * (self.qk_dim + self.v_dim)
        shared = values * self.operand.width // 8 + BARRIER_BYTES
        if self.stored:
            self._check_squares()
            shared += t.n * (self.qk_dim + self.v_dim + 4 * Float32.width // 8)  # of each row the scales of two tiles
        if shared > SHARED_BYTES:
            raise ValueError(
                f"m={t.m} n={t.n} stages={t.stages} need {shared} bytes of shared memory; there are {SHARED_BYTES}"
            )

    def _check_products(self) -> None:
        """Raise ValueError for tiles that are not parts of a block of scales, or for chunks that don't fill V."""
        t = self.tiles
        if SCALED_TOKENS % t.n or t.n % PERMUTED_TOKENS:
            raise ValueError(f"n={t.n}: tiles in e4m3 divide {SCALED_TOKENS} tokens, which have one scale")
        if not t.chunk or self.v_dim % t.chunk or self.page:
            raise ValueError(f"chunk={t.chunk}: allowed are divisors of v_dim={self.v_dim}, and no pages")

    def _check_squares(self) -> None:
        """Raise ValueError unless the four producer warps convert equally many squares of each tile."""
        t, (rows, columns) = self.tiles, SQUARE
        for dim in (self.qk_dim, self.v_dim):
            if dim % columns or t.n % rows or t.n // rows * (dim // columns) % 4:
                raise ValueError(f"n={t.n}: tiles of {t.n} x {dim} bytes are not whole squares for each of 4 warps")
        if t.dynamic:
            raise ValueError("dynamic=1: with 8-bit pages every producer warp follows the items, of fixed shares only")

    @property
    def operand(self) -> type[BFloat16] | type[Float16] | type[Float8E4M3FN]:
        """Element type of Q, K, V and P."""
        return Float8E4M3FN if self.products else self.dtype

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a thread of the producer and of a consumer."""
        return (REGISTERS_OF_BYTES if self.stored else REGISTERS)[self.warpgroups]

    @property
    def warpgroups(self) -> int:
        """Consumer warpgroups."""
        return self.tiles.m // 64

    @property
    def page_rows(self) -> int:
        """Rows of a tile that one load takes from a page."""
        return min(self.page, self.tiles.n)
