"""Plans: built from an export for one kind of GPU, kept in a cache, identified by the manifest beside them."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from grengines.api import Catalogue, UnavailableError
from grengines.export import exporter
from grengines.export.identity import digest_of, model_hash
from grengines.export.module import INPUTS, gpu_tile_rows
from grengines.models.hstu.config import HSTUConfig
from grengines.runtime import atomic_io
from grengines.runtime.cache_dir import sha256
from grengines.runtime.profile import Sizes
from grengines.tensorrt.library import Library, logger
from grkernels.cache_folder import cache_folder

FORMAT = "grbench-tensorrt-3"
PLAN_FILE, MANIFEST_FILE = "model.plan", "manifest.json"
BASE = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "int8": "fp16", "fp8": "fp16"}  # precision of the export
Progress = Callable[[str, float], None]  # phase, and its finished share: 0 to 1


@dataclass(frozen=True)
class Facts:
    """Metadata of a plan: everything that decides whether an engine can use it."""

    model_hash: str
    precision: str
    library: str
    version: str
    target: str  # compute capability, for instance 8.9
    profiles: list[Sizes]  # the largest batch of each
    tile_rows: int  # most query rows that attention's body processes at a time
    calibration: str  # digest of the requests that give 8-bit scales; empty for other precisions
    refit: bool
    plugin: bool
    format: str = FORMAT

    @classmethod
    def of(
        cls,
        library: Library,
        model: HSTUConfig,
        catalogue: Catalogue,
        seed: int,
        *,
        precision: str,
        target: str,
        profiles: list[Sizes],
        calibration: str = "",
        refit: bool = False,
        plugin: bool = False,
    ) -> Facts:
        most = profiles[-1]
        return cls(
            model_hash=model_hash(model, catalogue, seed),
            precision=precision,
            library=library.name,
            version=library.version,
            target=target,
            profiles=profiles,
            tile_rows=min(gpu_tile_rows(most.batch, model.heads, most.history), most.longest),
            calibration=calibration if BASE[precision] != precision else "",
            refit=refit,
            plugin=plugin and not library.rtx,
        )

    def folder(self, structure: str) -> Path:
        """Return the plan's folder in the cache.

        structure: hash of the model without its weights, for plans whose weights can be replaced.
        """
        facts = asdict(self)
        if self.refit:
            facts["model_hash"] = structure
        return (
            cache_folder() / "plans" / f"{facts['model_hash']}-{self.precision}-sm{self.target}-{digest_of(facts)[:8]}"
        )

    def shapes(self, profile: Sizes) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Return the smallest, best and largest shape of each input. A profile is tuned for its largest batch."""
        targets = min(profile.candidates, profile.longest)
        rows, candidates = (min(self.tile_rows, n) for n in (profile.longest, targets))
        most = {
            "L": profile.tokens,
            "B": profile.batch,
            "B + 1": profile.batch + 1,
            "M": profile.candidates,
            "T": -(-profile.longest // rows),
            "R": rows,
            "TC": -(-targets // candidates),
            "RC": candidates,
            "N": profile.history,
        }
        shapes: dict[str, tuple[tuple[int, ...], ...]] = {}
        for name, (_, dims) in INPUTS.items():
            largest = tuple(most[d] for d in dims)
            smallest = tuple(2 if d == "B + 1" else 1 for d in dims)
            shapes[name] = smallest, largest, largest
        return shapes


@dataclass(frozen=True)
class Plan:
    """A plan that was built or loaded. manifest: facts, tensors, sizes and build times."""

    folder: Path
    facts: Facts
    manifest: dict[str, Any]

    def read(self) -> bytes:
        return (self.folder / PLAN_FILE).read_bytes()


def build(
    library: Library,
    facts: Facts,
    model: HSTUConfig,
    catalogue: Catalogue,
    seed: int,
    folder: Path,
    feeds: Sequence[Any] = (),
    progress: Progress | None = None,
    keep: bool = False,
) -> Plan:
    """Build a plan into `folder`, and replace a plan that is there. Its export comes from the cache, or is made.

    feeds: the calibration set of int8 and fp8, inputs of the exported model. keep: if another process was faster, keep
    and return its plan. Takes seconds (TensorRT for RTX) to minutes. Raises ValueError for a missing calibration set or
    a target that TensorRT can't build for here, UnavailableError, with the library's message, for what it refuses.
    """
    atomic_io.check(folder, MANIFEST_FILE, "plan")
    require_target(library, facts.target)
    begun = time.perf_counter()
    found = exporter.cached(model, catalogue, seed, BASE[facts.precision])
    with atomic_io.scratch(folder) as scratch:
        onnx, made = found.onnx, scratch / "onnx"
        made.mkdir()
        if BASE[facts.precision] != facts.precision:
            from grengines.tensorrt.quantise import quantise

            onnx = quantise(onnx, made / "quantised.onnx", facts.precision, feeds)
        if facts.plugin:
            from grengines.tensorrt import plugin

            onnx = plugin.substitute(onnx, made / "plugin.onnx")
            plugin.register(model, facts.profiles[-1], facts.target)
        exported = time.perf_counter()
        serialized, tensors = _compile(library, facts, onnx, progress)
        built = time.perf_counter()
        shutil.rmtree(made)
        (scratch / PLAN_FILE).write_bytes(serialized)
        manifest = {
            "facts": asdict(facts),
            "tensors": tensors,
            "bytes": len(serialized),
            "sha256": sha256(scratch / PLAN_FILE),
            "export_s": exported - begun,
            "build_s": built - exported,
        }
        (scratch / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n")
        while not atomic_io.publish(scratch, folder):
            if keep:
                return load(folder, facts, _again(folder))
            atomic_io.discard(folder)
    return Plan(folder, facts, manifest)


def cached(
    library: Library, facts: Facts, model: HSTUConfig, catalogue: Catalogue, seed: int, feeds: Sequence[Any] = ()
) -> Plan:
    """Return the plan from the cache folder, which is built if it is missing. Raises as `build` and `load`."""
    folder = facts.folder(structure_of(model, catalogue))
    if folder.exists():
        return load(folder, facts, _again(folder))
    return build(library, facts, model, catalogue, seed, folder, feeds, keep=True)


def _again(folder: Path) -> str:
    return f"rm -r {folder}, and it is built again"


def load(folder: Path, wanted: Facts, hint: str) -> Plan:
    """Open a plan. hint: the fix that error messages name.

    Raises ValueError, one line, for a folder without a complete plan, or with one of another model, precision, library,
    version or GPU.
    """
    manifest_file = folder / MANIFEST_FILE
    if not manifest_file.is_file():
        raise ValueError(f"{folder}: no plan; {hint}")
    try:
        manifest = json.loads(manifest_file.read_text())
        values = manifest["facts"]
        facts = Facts(**{**values, "profiles": [Sizes(**sizes) for sizes in values["profiles"]]})
        if facts.format != FORMAT:
            raise ValueError(f"format {facts.format}, expected {FORMAT}")
        expected = manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{manifest_file}: not the manifest of a plan of this version ({e}); {hint}") from None
    plan = folder / PLAN_FILE
    if not plan.is_file() or sha256(plan) != expected:
        raise ValueError(f"{plan}: missing, or not as it was written (sha256 differs from {MANIFEST_FILE}); {hint}")
    ours = ("precision", "library", "version", "target", "plugin")
    for name in (*ours, *(() if facts.refit else ("model_hash",))):
        got, want = getattr(facts, name), getattr(wanted, name)
        if got != want:
            raise ValueError(f"{folder}: built for {name} {got}, this run has {want}; {hint}")
    return Plan(folder, facts, manifest)


def structure_of(model: HSTUConfig, catalogue: Catalogue) -> str:
    """Return the hash of a model without its weights."""
    return model_hash(replace(model, weights=None), catalogue, -1)


def _compile(library: Library, facts: Facts, onnx: Path, progress: Progress | None) -> tuple[bytes, dict[str, Any]]:
    trt, log = library.module, logger(library)
    log.take()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):
        reason = parser.get_error(0).desc() if parser.num_errors else log.take()
        raise UnavailableError(
            f"{facts.library} {facts.version} can't parse the {facts.precision} model: {' '.join(reason.split())}"
        )
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # no TF32 for the network's fp32 parts
    if facts.refit:
        # One by one: TensorRT for RTX can't compile the graph's scalar constants as weights that may change.
        config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
        for name in _weight_names(onnx):
            if not network.mark_weights_refittable(name):
                raise UnavailableError(f"{facts.library} {facts.version} can't make {name} replaceable: {log.take()}")
    if library.rtx:
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # else it may allocate within a CUDA graph
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(_capability(trt, facts.target), 0):
            raise UnavailableError(f"{facts.library} refuses compute capability {facts.target}: {log.take()}")
    for sizes in facts.profiles:
        profile = builder.create_optimization_profile()
        for name, shapes in facts.shapes(sizes).items():
            profile.set_shape(name, *shapes)
        if config.add_optimization_profile(profile) < 0:
            raise UnavailableError(f"{facts.library} refuses the profile {sizes}: {log.take()}")
    if progress is not None:
        monitor = _monitor(trt, progress)  # keeps it alive during the build
        config.progress_monitor = monitor
    # Timings of earlier builds on this GPU. TensorRT for RTX measures nothing when it builds.
    timings = None if library.rtx else _timings(config, _timings_file(facts))
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        what = f"{facts.precision}{' with refit' if facts.refit else ''} for compute capability {facts.target}"
        raise UnavailableError(f"{facts.library} {facts.version} can't build {what}: {log.take()}")
    if timings is not None:
        atomic_io.write(_timings_file(facts), bytes(timings.serialize()))
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    tensors += [network.get_output(i) for i in range(network.num_outputs)]
    described = {t.name: {"dtype": str(t.dtype).split(".")[-1], "shape": list(t.shape)} for t in tensors}
    return bytes(serialized), described


def _weight_names(onnx: Path) -> list[str]:
    """Return the weights of an ONNX file: floating-point tensors of more than one number."""
    from onnx import TensorProto, load

    kinds = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    weights = load(str(onnx), load_external_data=False).graph.initializer
    return [w.name for w in weights if w.data_type in kinds and max(w.dims, default=1) > 1]


def require_target(library: Library, target: str) -> None:
    """Raise ValueError or UnavailableError for a compute capability that no plan can be built for here."""
    if reason := library.elsewhere(target):
        raise ValueError(f"--target {target}: {reason}")
    if library.rtx:
        _capability(library.module, target)


def _capability(trt: Any, target: str) -> Any:
    name = f"SM{target.replace('.', '')}"
    known = [n for n in dir(trt.ComputeCapability) if n.startswith("SM")]
    if name not in known:
        allowed = ", ".join(f"{n[2:-1]}.{n[-1]}" for n in known)
        raise UnavailableError(f"TensorRT for RTX has no target {target}; it has {allowed}")
    return getattr(trt.ComputeCapability, name)


def _timings_file(facts: Facts) -> Path:
    return cache_folder() / "plans" / f"timings-{facts.version}-sm{facts.target}"


def _timings(config: Any, file: Path) -> Any:
    """Set the build's timing cache and return it: the file's, or a new one if that is damaged or another GPU's."""
    cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = steps
            progress(phase, 0.0)

        def step_complete(self, phase: str, step: int) -> bool:
            progress(phase, (step + 1) / max(self.steps[phase], 1))
            return True  # go on

        def phase_finish(self, phase: str) -> None:
            progress(phase, 1.0)

    return Monitor()
