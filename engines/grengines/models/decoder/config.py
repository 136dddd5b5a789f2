"""Options of decoder models. No torch import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.options import option


@dataclass
class DecoderConfig:
    """Shape of a decoder-only Transformer with Qwen3's layers. Its tokens are a catalogue's semantic IDs.

    A layer has RMSNorm, grouped-query attention with normalised queries and keys and rotary positions, and SwiGLU.

    Source: Qwen Team, "Qwen3 Technical Report", 2025.
    """

    name: str = option("decoder", "name of the model in records")
    layers: int = option(2, "layers", ge=1, le=256)
    embedding_dim: int = option(64, "width of a token's vector", ge=8, le=16384)
    heads: int = option(2, "query heads", ge=1, le=256)
    kv_heads: int = option(1, "heads of keys and values; divides `heads`", ge=1, le=256)
    head_dim: int = option(32, "width of a head; even, because rotary positions turn pairs", ge=2, le=512)
    mlp_dim: int = option(128, "hidden width of the MLP", ge=8, le=65536)
    rope_theta: float = option(1e6, "base of the rotary positions", gt=1)
    max_positions: int = option(4096, "most tokens of a prompt; the last whole items are kept", ge=8)
    vocabulary: int | None = option(
        None,
        "rows of the token table, over all of which a code's probability is a softmax, such as Qwen3's 151936; null: "
        "the softmax is over the codes of a level, and the table has no other rows",
        ge=2,
        le=2**24,
    )


def too_few_rows(config: DecoderConfig, codes: int) -> str | None:
    """Return None, or why the vocabulary can't have the tokens of this number of codes, of all levels together."""
    if config.vocabulary is None or config.vocabulary > codes:
        return None
    return (
        f"model.vocabulary={config.vocabulary}: {codes} codes and the token of an empty prompt need at least "
        f"{codes + 1}; set model.vocabulary to that or more, or to null for the codes alone"
    )


def contradiction(config: DecoderConfig) -> str | None:
    """Return None, or the options that do not fit together."""
    if config.heads % config.kv_heads:
        return f"model.kv_heads={config.kv_heads}: must divide model.heads={config.heads}"
    if config.head_dim % 2:
        return f"model.head_dim={config.head_dim}: must be even, rotary positions turn pairs"
    return None
