"""Description of one implementation of an operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


class Cost(NamedTuple):
    """The least work of an operator: the two numbers of a roofline."""

    flops: int  # mask-exact; a multiply-add is 2
    bytes: int  # each input read once, each output written once


class Projected(NamedTuple):
    """Attention of operands that the input projection of a layer writes (hstu_attention/fp8_projection.py)."""

    blocks_of: Callable[..., Any]
    project: Callable[..., Any]
    attend: Callable[..., Any]


@dataclass(frozen=True)
class KernelVariant:
    """One implementation of an operator family, and the fp32 reference that it must agree with.

    `fn` and `reference` have the signature that the family's reference module documents. `supports` takes keyword
    arguments: device, dtype and the family's `FamilySpec.dims`. It returns None, or the reason why the variant can't
    run; engines raise with it and tests skip with it.

    Tolerance: ||fn - reference|| / ||reference|| may be at most `max_error_ratio` times what the reference's own maths
    loses if every result is rounded to the dtype (`grkernels.rounding.rounded`). A variant that rounds to fewer
    bits has the reference with that rounding as its `yardstick`.
    """

    family: str
    name: str
    fn: Callable[..., Any]
    reference: Callable[..., Any]
    supports: Callable[..., str | None]
    max_error_ratio: float = 2.0
    yardstick: Callable[..., Any] | None = None
    projected: Projected | None = None  # of attention that has its operands from the projection, where no cache is
