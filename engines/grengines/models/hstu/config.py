"""Options of the HSTU model. No torch import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.options import option

INTERACTING = 4  # interacting vectors of a candidate: encoded, item, position, time


@dataclass
class HSTUConfig:
    """Shape of an HSTU ranking model.

    Source: Zhai et al., ICML 2024, section 3. docs/ARCHITECTURE.md has the maths.
    """

    name: str = option("hstu", "name of the model in records")
    layers: int = option(2, "layers", ge=1, le=256)
    embedding_dim: int = option(64, "width of a token's vector", ge=8, le=16384)
    heads: int = option(2, "attention heads", ge=1, le=256)
    qk_dim: int = option(32, "width of a head's queries and keys", ge=1, le=512)
    v_dim: int = option(32, "width of a head's values", ge=1, le=512)
    contextual_seq_len: int = option(0, "user-feature tokens before the history", ge=0, le=64)
    max_attn_len: int = option(0, "sliding window in tokens; 0: unlimited", ge=0)
    alpha: float | None = option(None, "scale of q k^T; null: 1/sqrt(qk_dim)", gt=0)
    scaling_seqlen: int = option(1024, "N, by which attention is divided; the same for every batch", ge=1)
    max_positions: int = option(1024, "rows of the position table; later positions share the last row", ge=2)
    time_buckets: int = option(64, "log2-spaced buckets of the gap before each event, in seconds", ge=2, le=4096)
    embedding_rows: int = option(1_000_000, "most rows of the item table; more items share rows", ge=1)
    head_dim: int = option(64, "hidden width of the ranking head", ge=1)
    interaction: bool = option(False, "the head also gets the dot products of a candidate's vectors (DLRM)")
    tasks: list[str] = option(["engagement", "retention", "monetisation"], "outputs of the ranking head")
    weights: str | None = option(None, "safetensors file; null: random weights from `seed`", file=True)

    @property
    def interactions(self) -> int:
        """Dot products of each candidate in the input of the ranking head."""
        return INTERACTING * (INTERACTING - 1) // 2 if self.interaction else 0


def contradiction(config: HSTUConfig) -> str | None:
    """Return None, or the options that do not fit together."""
    return None if config.tasks else "model.tasks=[]: name at least one output of the ranking head"
