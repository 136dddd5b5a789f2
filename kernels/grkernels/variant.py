"""What is known of one implementation of an operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


class Cost(NamedTuple):
    """What an operator must do at least: the roofline's two numbers."""

    flops: int  # mask-exact; a multiply-add is 2
    bytes: int  # each input read once, each output written once


@dataclass(frozen=True)
class KernelVariant:
    """One implementation of an operator family, beside the fp32 reference that it must agree with.

    `fn` and `reference` share the signature that the family's reference module documents. `supports` is
    asked with keyword arguments (hstu_attention: device, dtype, qk_dim, v_dim) and answers None or the
    reason in words why not; engines raise with it and tests skip with it.

    Tolerance: ||fn - reference|| / ||reference|| may be at most `max_error_ratio` times the same error of
    plain PyTorch in the same dtype, because that is what rounding the operands costs anyone.
    """

    family: str
    name: str
    fn: Callable[..., Any]
    reference: Callable[..., Any]
    supports: Callable[..., str | None]
    max_error_ratio: float = 2.0
