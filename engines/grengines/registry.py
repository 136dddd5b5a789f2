"""Engines by name, imported only when one is built."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from grengines.api import Catalogue, Engine, Retrieval, UnavailableError
from grengines.cache.config import CacheConfig
from grengines.fallback import Chain, options_like
from grengines.tensorrt import library as tensorrt
from grengines.vllm import install as vllm
from grkernels import capabilities

# An engine is one line here: what builds it for each task it has; the first is what it does unless told otherwise.
_TABLE: dict[str, dict[str, str]] = {
    "hstu": {"rank": "grengines.hstu.engine:HSTUEngine", "generate": "grengines.hstu.retriever:HSTURetriever"},
    "hf": {"generate": "grengines.hf.engine:HFEngine"},
    "vllm": {"generate": "grengines.vllm.engine:VLLMEngine"},
    "aoti": {"rank": "grengines.aoti.engine:AOTIEngine"},
    "tensorrt": {"rank": "grengines.tensorrt.engine:TensorRTEngine"},
    "onnxruntime": {"rank": "grengines.onnxruntime.engine:OnnxRuntimeEngine"},
    "pipeline": {"recommend": "grengines.pipeline.engine:build"},
}
# Engines that may stand in for another (`engine.fallback`), with the class of their options.
_FALLBACKS = {
    "hstu": "grengines.hstu.config:HSTUEngineConfig",
    "aoti": "grengines.aoti.config:AOTIEngineConfig",
    "tensorrt": "grengines.tensorrt.config:TensorRTConfig",
    "onnxruntime": "grengines.onnxruntime.config:OnnxRuntimeConfig",
}
_QUEUEING = ("hstu", "aoti")  # engines that take the next batch while the device computes one
_DECODERS = ("hf", "vllm")  # engines that run model=decoder_* too
# The fp32 reference of generation by the class of the model's options.
_REFERENCES = {
    "HSTUConfig": "grengines.hstu.retriever:Reference",
    "DecoderConfig": "grengines.models.decoder.reference:Reference",
}
TASKS = ("rank", "generate", "recommend")


def names() -> list[str]:
    """Every engine."""
    return list(_TABLE)


def tasks(name: str) -> list[str]:
    """What the engine can do, its usual task first. Raises ValueError for an unknown name."""
    return list(_entry(name))


def availability(name: str) -> str | None:
    """None if the engine can run here, else "why not; command that mends it". Raises ValueError for an unknown name."""
    _entry(name)
    if name == "vllm":
        return vllm.missing()
    if name == "hf" and find_spec("transformers") is None:
        return "package transformers is not installed; pip install -e '.[hf]'"
    if name == "aoti":
        return capabilities.compiler()
    if name == "tensorrt":
        return tensorrt.missing() or tensorrt.no_gpu()
    if name == "onnxruntime":
        missing = find_spec("onnxruntime") is None
        return "package onnxruntime is not installed; pip install -e '.[onnx]'" if missing else None
    return None  # hstu needs nothing but torch, which grbench itself depends on


def mismatch(name: str, model: Any) -> str | None:
    """None if the engine runs models with these options, else why not and which engines do."""
    if type(model).__name__ != "DecoderConfig" or name in _DECODERS:
        return None
    return f"model={model.name}: engine {name} runs HSTU only; engines that run decoders: {', '.join(_DECODERS)}"


def one_at_a_time(name: str) -> str | None:
    """None if the engine takes a batch while another is under way, else why not."""
    if name in _QUEUEING:
        return None
    how = "batches by itself" if name == "vllm" else "ends a batch before it takes the next"
    return f"engine {name} {how}; those that don't: {', '.join(_QUEUEING)}"


def build(
    config: Any,
    model: Any,
    kernel: Any,
    catalogue: Catalogue,
    seed: int,
    cache: Any = None,
    *,
    task: str = "rank",
    retrieval: Retrieval | None = None,
) -> Engine:
    """Make the engine `config.name` for a task from its options, the model's, the kernel group's
    (grkernels.config.KernelConfig) and the cache group's.

    retrieval: for tasks that generate. Raises ValueError for an unknown name or a task that the engine hasn't, or what
    the engine raises.
    """
    return make(
        config, model, kernel.requested(), catalogue, seed, cache or CacheConfig(), task=task, retrieval=retrieval
    )


def make(
    config: Any,
    model: Any,
    kernels: dict[str, str],
    catalogue: Catalogue,
    seed: int,
    cache: Any,
    *,
    task: str,
    retrieval: Retrieval | None = None,
) -> Engine:
    """As `build`, given the variant of each operator family."""
    entry = _entry(config.name)
    if task not in entry:
        raise ValueError(f"engine {config.name} can't do task {task}; it can {', '.join(entry)}")
    if problem := mismatch(config.name, model):
        raise ValueError(problem)
    if reason := availability(config.name):
        raise UnavailableError(f"engine {config.name}: {reason}")
    module, _, attribute = entry[task].partition(":")
    extra = {} if task == "rank" else {"retrieval": retrieval}
    engine: Any = getattr(import_module(module), attribute)(config, model, kernels, catalogue, seed, cache, **extra)
    fallback = getattr(config, "fallback", [])
    if wrong := [name for name in fallback if name not in _FALLBACKS or name == config.name]:
        raise ValueError(f"engine.fallback={wrong[0]}: allowed are other engines among {', '.join(_FALLBACKS)}")
    if not fallback:
        return engine

    def stand_in(name: str) -> Any:
        module, _, attribute = _FALLBACKS[name].partition(":")
        options = options_like(getattr(import_module(module), attribute), config)
        return make(options, model, kernels, catalogue, seed, cache, task=task)

    return Chain(engine, fallback, stand_in)


def reference(model: Any, seed: int, retrieval: Retrieval, device: str) -> Any:
    """What engines that generate with this model are held to; has `search` and `prefix_scores`."""
    module, _, attribute = _REFERENCES[type(model).__name__].partition(":")
    return getattr(import_module(module), attribute)(model, seed, retrieval, device)


def _entry(name: str) -> dict[str, str]:
    if name not in _TABLE:
        raise ValueError(f"unknown engine {name!r}; known: {', '.join(_TABLE)}")
    return _TABLE[name]
