"""Differences between the HSTU models of their owners, and each owner's choices. No torch import here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """The choices of one owner. The defaults are grbench's own; docs/design/model.md says whose each other value is.

    `HSTUConfig` has an option of each field's name, which replaces the value that the named variant has.
    """

    # A layer.
    silu: str = "u"
    output: str = "concat"
    output_bias: bool = False
    group_norm: bool = False
    eps: float = 1e-6
    alpha: float | None = None
    # Attention.
    position_bias: bool = False
    time_bias: int = 0
    target_group_size: int = 1
    min_full_attn_seq_len: int = 0
    contextual_mask: str = "history"
    # Tokens.
    contextual_from: int = 0
    contextual_missing: str = "none"
    encoder: str = "start"
    actions: str = "bits"
    target_action: bool = False
    # From the last layer to the answer.
    clock: bool = False
    final_norm: str = "layer"
    item_norm: bool = False
    item_tower: str = "none"
    head: str = "silu"
    head_eps: float = 1e-6


DEFAULT = "grbench"
VARIANTS = {
    DEFAULT: Variant(),
    # The serving model of Meta's generative-recommenders, as in MLPerf's DLRM-v3: `modules/`.
    "stu": Variant(
        contextual_mask="causal",
        contextual_from=20,
        contextual_missing="blank",
        encoder="end",
        actions="combinations",
        target_action=True,
        clock=True,
        item_tower="mlp",
        head="swish_norm",
        head_eps=1e-5,
    ),
    # NVIDIA's recsys-examples: `examples/hstu`.
    "nvidia": Variant(
        silu="uvqk",
        output="gate",
        eps=1e-5,
        contextual_from=1,
        final_norm="none",
        head="relu",
        head_eps=1e-5,
    ),
    # The model of the HSTU paper's public experiments: `research/` of Meta's generative-recommenders.
    "research": Variant(
        silu="uvqk",
        output="gate",
        output_bias=True,
        alpha=1.0,
        position_bias=True,
        time_bias=129,
        final_norm="l2",
        item_norm=True,
    ),
}

# Fields that an operator family must have, beside grbench's own.
ATTENTION = ("position_bias", "time_bias", "target_group_size", "min_full_attn_seq_len")
GATE = ("output", "group_norm")
# Fields that an engine must know: alpha is a number that each of them takes.
PARTS = tuple(field.name for field in dataclasses.fields(Variant) if field.name != "alpha")


def differing(variant: Variant, fields: tuple[str, ...] = PARTS) -> tuple[str, ...]:
    """Return "model.key=value" of each field that is not grbench's own. fields: among these only."""
    return tuple(
        f"model.{field.name}={str(value).lower() if isinstance(value, bool) else value}"
        for field in dataclasses.fields(Variant)
        if field.name in fields and (value := getattr(variant, field.name)) != field.default
    )
