"""The entry point vllm.general_plugins, which vLLM calls when it starts: registers our models and attention."""

from __future__ import annotations

import sys


def register() -> None:
    """Register models and attention. May be called again."""
    from transformers import AutoConfig, PretrainedConfig
    from vllm import ModelRegistry
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    class HSTURetrievalConfig(PretrainedConfig):
        model_type = "grbench_hstu"

    AutoConfig.register("grbench_hstu", HSTURetrievalConfig, exist_ok=True)
    ours = sys.modules.get("grengines.vllm.model")  # imported by our engine; otherwise by vLLM, when it needs a model
    for name in ("HSTUForRetrieval", "DecoderForRetrieval"):
        ModelRegistry.register_model(name, getattr(ours, name) if ours else f"grengines.vllm.model:{name}")
    register_backend(AttentionBackendEnum.CUSTOM, "grengines.vllm.hstu_attention.HSTUAttentionBackend")
