"""Options of the HSTU model. No torch import here: configs compose fast."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

from grengines.models.hstu.variant import ATTENTION, DEFAULT, GATE, VARIANTS, Variant, differing
from grengines.options import option

BIASES = ("position_bias", "time_bias")  # of attention scores
# The options that a generator reads. The others are of what ranking has beside the layers.
SIZES = ("layers", "embedding_dim", "heads", "qk_dim", "v_dim", "alpha", "scaling_seqlen", "max_positions")
READ = (*SIZES, *BIASES, "silu", "output", "output_bias", "group_norm", "eps", "final_norm", "head_eps", "item_norm")
INTERACTING = 4  # interacting vectors of a candidate: encoded, item, position, time


@dataclass
class HSTUConfig:
    """Shape of an HSTU ranking model, and whose HSTU it is.

    Source: Zhai et al., ICML 2024. docs/design/model.md has the maths. The options after `variant` replace single
    choices of that variant; null: its own.
    """

    name: str = option("hstu", "name of the model in records")
    layers: int = option(2, "layers", ge=1, le=256)
    embedding_dim: int = option(64, "width of a token's vector", ge=8, le=16384)
    heads: int = option(2, "attention heads", ge=1, le=256)
    qk_dim: int = option(32, "width of a head's queries and keys", ge=1, le=512)
    v_dim: int = option(32, "width of a head's values", ge=1, le=512)
    contextual_seq_len: int = option(0, "user-feature tokens before the history", ge=0, le=64)
    max_attn_len: int = option(0, "sliding window in tokens; 0: unlimited", ge=0)
    alpha: float | None = option(None, "scale of q k^T; null: the variant's, else 1/sqrt(qk_dim)", gt=0)
    scaling_seqlen: int = option(1024, "N, by which attention is divided; the same for every batch", ge=1)
    max_positions: int = option(1024, "rows of the position table; later positions share the last row", ge=2)
    time_buckets: int = option(64, "rows of the time table; later times share the last row", ge=2, le=4096)
    embedding_rows: int = option(1_000_000, "most rows of the item table; more items share rows", ge=1)
    head_dim: int = option(64, "hidden width of the ranking head", ge=1)
    interaction: bool = option(False, "the head also gets the dot products of a candidate's vectors (DLRM)")
    tasks: list[str] = option(["engagement", "retention", "monetisation"], "outputs of the ranking head")
    weights: str | None = option(None, "safetensors file; null: random weights from `seed`", file=True)
    variant: str = option(DEFAULT, "whose HSTU: see docs/design/model.md", choices=tuple(VARIANTS))
    silu: str | None = option(None, "projections with a SiLU", choices=["u", "uvqk"])
    output: str | None = option(
        None, "what is projected after attention: [u, a, u norm(a)], or u norm(a) alone", choices=["concat", "gate"]
    )
    output_bias: bool | None = option(None, "the output projection has a bias")
    group_norm: bool | None = option(None, "attention is normalised head by head, not as a whole")
    eps: float | None = option(None, "eps of a layer's norms", gt=0, le=1)
    position_bias: bool | None = option(
        None, "scores have a bias by the distance, of `max_positions` rows in each layer"
    )
    time_bias: int | None = option(
        None, "rows of a bias by the time from the key to what follows the query; 0: none", ge=0, le=4096
    )
    target_group_size: int | None = option(
        None, "candidates that follow each other and see those before them in their group", ge=1
    )
    min_full_attn_seq_len: int | None = option(
        None, "the candidates and this many last events have no window; 0: all have it", ge=0
    )
    contextual_mask: str | None = option(
        None, "what contextual tokens see: the whole history, or the tokens before them", choices=["history", "causal"]
    )
    contextual_from: int | None = option(
        None, "events from which on a user has contextual tokens; with `blank` tokens candidates count as well", ge=0
    )
    contextual_missing: str | None = option(
        None, "what a user with fewer has in their place: no tokens, or blank ones", choices=["none", "blank"]
    )
    encoder: str | None = option(
        None, "start: positions from the start, log2 of gaps; end: from the end, root of minutes before the request",
        choices=["start", "end"],
    )  # fmt: skip
    actions: str | None = option(
        None, "a vector for each action bit, to be added up, or for each combination", choices=["bits", "combinations"]
    )
    target_action: bool | None = option(None, "candidates have a vector instead of actions")
    clock: bool | None = option(None, "the head also gets the hour and the weekday of the request")
    final_norm: str | None = option(None, "norm after the last layer", choices=["layer", "l2", "none"])
    item_norm: bool | None = option(None, "generators: a product with the next item's vector of length 1")
    item_tower: str | None = option(
        None, "what the head multiplies candidates by: a table's row, or an MLP of the item's vector",
        choices=["none", "table", "mlp"],
    )  # fmt: skip
    head: str | None = option(
        None, "activation of the head; swish_norm: x sigmoid(LayerNorm(x))",
        choices=["silu", "swish_norm", "relu", "gelu"],
    )  # fmt: skip
    head_eps: float | None = option(None, "eps of the norms after the last layer", gt=0, le=1)

    @property
    def interactions(self) -> int:
        """Dot products of each candidate in the input of the ranking head."""
        return INTERACTING * (INTERACTING - 1) // 2 if self.interaction else 0

    @property
    def choices(self) -> Variant:
        """The variant with the options that replace its own."""
        return _replaced(self.variant, *(getattr(self, name) for name in _OF_VARIANT))

    @property
    def score_scale(self) -> float:
        """The factor of q k^T."""
        return self.choices.alpha or 1.0 / math.sqrt(self.qk_dim)

    @property
    def attention_extras(self) -> tuple[str, ...]:
        """Options of attention that are not grbench's own."""
        extras = differing(self.choices, ATTENTION)
        return (*extras, f"model.contextual_from={self.choices.contextual_from}") if self.sparse_contextual else extras

    @property
    def gate_extras(self) -> tuple[str, ...]:
        """Options between attention and the output projection that are not grbench's own."""
        return differing(self.choices, GATE)

    @property
    def sparse_contextual(self) -> bool:
        """True if some users have no contextual tokens."""
        c = self.choices
        return self.contextual_seq_len > 0 and c.contextual_from > 0 and c.contextual_missing == "none"

    @property
    def attended_contextual(self) -> int:
        """Contextual tokens that see the whole history."""
        return self.contextual_seq_len if self.choices.contextual_mask == "history" else 0


_OF_VARIANT = tuple(field.name for field in dataclasses.fields(Variant))


@functools.lru_cache(maxsize=64, typed=True)  # asked for at each count of operations
def _replaced(variant: str, *own: Any) -> Variant:
    """Return a variant with options that replace its own, as _OF_VARIANT names them; None: not replaced."""
    options = zip(_OF_VARIANT, own, strict=True)
    return dataclasses.replace(VARIANTS[variant], **{name: value for name, value in options if value is not None})


def contradiction(config: HSTUConfig) -> str | None:
    """Return None, or the options that do not fit together."""
    c = config.choices
    if not config.tasks:
        return "model.tasks=[]: name at least one output of the ranking head"
    if c.encoder == "end" and config.interaction:
        return "model.interaction=true and model.encoder=end: the dot products are grbench's; set one of them otherwise"
    if config.interaction and c.item_tower != "none":
        return f"model.interaction=true and model.item_tower={c.item_tower}: set one of them; the head has one input"
    if config.sparse_contextual and c.contextual_mask == "causal":
        return (
            "model.contextual_missing=none and model.contextual_mask=causal: a causal mask knows no missing tokens; "
            "set model.contextual_missing=blank or model.contextual_mask=history"
        )
    return None


def not_read(task: str) -> tuple[str, ...]:
    """Return the options that a model of the task does not read, those that name it and its variant aside."""
    if task == "rank":
        return ("item_norm",)
    of_both = (*READ, "name", "variant")
    return tuple(field.name for field in dataclasses.fields(HSTUConfig) if field.name not in of_both)


def without_effect(config: HSTUConfig) -> str | None:
    """Return None, or the options that a generator does not have: only ranking reads them."""
    sizes = {name: getattr(config, name) for name in ("contextual_seq_len", "max_attn_len")}
    idle = [f"model.{name}={value}" for name, value in sizes.items() if value]
    idle += differing(config.choices, ("target_group_size", "min_full_attn_seq_len", "encoder"))
    if not idle:
        return None
    return f"{', '.join(idle)}: without effect where a model generates; set task=rank, or leave out what sets it"


def one_level_only(config: HSTUConfig, levels: int) -> str | None:
    """Return None, or why a search over this number of levels can't have the model's attention."""
    bias = config.choices.time_bias
    if levels == 1 or not bias:
        return None
    return (
        f"model.time_bias={bias}: a search over {levels} levels of codes has the prompt's keys in pages, which have no "
        "times; set model.time_bias=0, or retrieval.levels=1"
    )


def stale_states(config: HSTUConfig) -> str | None:
    """Return None if keys and values of a user's history stay valid at their next visit, else why they do not."""
    c, reason = config.choices, ""
    if c.encoder == "end":
        reason = "model.encoder=end counts positions and times back from the request, so each visit changes every token"
    elif c.time_bias:
        reason = f"model.time_bias={c.time_bias} looks at the event that follows a token, which the last one lacks"
    elif c.min_full_attn_seq_len and config.max_attn_len:
        reason = f"model.min_full_attn_seq_len={c.min_full_attn_seq_len} widens the window of a user's last events only"
    elif config.contextual_seq_len and c.contextual_from:
        reason = f"model.contextual_from={c.contextual_from} changes a user's first tokens when there are enough events"
    if not reason:
        return None
    return f"{reason}: states of earlier visits would be stale; set cache=none, or model.variant={DEFAULT}"
