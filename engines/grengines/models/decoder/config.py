"""Options of decoder models. No torch import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.options import option


@dataclass
class DecoderConfig:
    """Shape of a decoder-only Transformer with Qwen3's layers: RMSNorm, grouped-query attention with normalised queries
    and keys and rotary positions, SwiGLU. Its vocabulary is a catalogue's semantic IDs.

    Source: Qwen Team, "Qwen3 Technical Report", 2025.
    """

    name: str = "decoder"
    layers: int = option(2, ge=1, le=256)
    embedding_dim: int = option(64, ge=8, le=16384)
    heads: int = option(2, ge=1, le=256)
    kv_heads: int = option(1, ge=1, le=256)  # heads of keys and values; divides `heads`
    head_dim: int = option(32, ge=2, le=512)  # even: rotary positions turn pairs
    mlp_dim: int = option(128, ge=8, le=65536)
    rope_theta: float = option(1e6, gt=1)
    max_positions: int = option(4096, ge=8)  # tokens of a prompt; the last so many are kept, whole items


def contradiction(config: DecoderConfig) -> str | None:
    """None, or which options don't fit together."""
    if config.heads % config.kv_heads:
        return f"model.kv_heads={config.kv_heads}: must divide model.heads={config.heads}"
    if config.head_dim % 2:
        return f"model.head_dim={config.head_dim}: must be even, rotary positions turn pairs"
    return None
