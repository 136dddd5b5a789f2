"""Options of the HSTU model. No torch import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.options import option

INTERACTING = 4  # a candidate's vectors that interact: encoded, item, position, time


@dataclass
class HSTUConfig:
    """Shape of an HSTU ranking model (Zhai et al., ICML 2024, section 3; docs/ARCHITECTURE.md has the maths)."""

    name: str = "hstu"
    layers: int = option(2, ge=1, le=256)
    embedding_dim: int = option(64, ge=8, le=16384)
    heads: int = option(2, ge=1, le=256)
    qk_dim: int = option(32, ge=1, le=512)  # of each head
    v_dim: int = option(32, ge=1, le=512)  # of each head
    contextual_seq_len: int = option(0, ge=0, le=64)  # user-feature tokens before the history
    max_attn_len: int = option(0, ge=0)  # sliding window in tokens, 0: unlimited
    alpha: float | None = option(None, gt=0)  # scale of q k^T; null: 1/sqrt(qk_dim)
    scaling_seqlen: int = option(1024, ge=1)  # N: attention is divided by it, the same for every batch
    max_positions: int = option(2048, ge=2)  # rows of the position table; later positions share the last row
    time_buckets: int = option(64, ge=2, le=4096)  # log2-spaced buckets of the gap before each event
    embedding_rows: int = option(1_000_000, ge=1)  # most rows of the item table; more items share rows
    head_dim: int = option(64, ge=1)  # hidden width of the ranking head
    interaction: bool = False  # the head also sees the dot products of a candidate's vectors (DLRM)
    tasks: list[str] = option(["engagement", "retention", "monetisation"])
    weights: str | None = None  # safetensors file; null: random weights from the run's seed

    @property
    def interactions(self) -> int:
        """Dot products that the ranking head sees of each candidate."""
        return INTERACTING * (INTERACTING - 1) // 2 if self.interaction else 0
