"""Configuration of a kernel benchmark, and the families, variants and shapes that it selects.

Nothing here imports torch before the names of shapes are looked up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from grbench.config.schema import ConfigError, checked, register_studies, schemas
from grengines.options import option
from grkernels import registry
from grkernels.nearest import nearest


@dataclass
class KernelBenchConfig:
    """Root of the configuration. `python -m grbench kernels --cfg job` prints it."""

    families: list[str] = option([], "operator families; empty: all")
    variants: list[str] = option([], "variants of each family; empty: all")
    shapes: list[str] = option(
        [], "names of shapes or patterns such as 4x128_*; empty: all, on a CPU without those that need a full name"
    )
    dtype: str = option("bf16", "type of the operands", choices=["bf16", "fp16", "fp32"])
    device: str = option("auto", "auto: a GPU if there is one", choices=["auto", "cuda", "cpu"])
    seed: int = option(0, "seed of the operands", ge=0, le=2**31 - 1)
    repeats: int = option(30, "fewest repetitions of a variant and shape", ge=3, le=1000)
    min_time_s: float = option(1.0, "time that the repetitions of a shape take, about", gt=0)
    tune: bool = option(False, "first measure every launch configuration and write the table of this GPU")
    launches: list[str] = option(
        [],
        "changes to a launch configuration, such as 'n=64 stages=3'; each is measured beside the variant itself",
    )
    peers: bool = option(True, "also measure kernels of other projects that are installed")
    tracking: Any = field(default_factory=dict)
    output_root: str = option("outputs", "folder for results, plots and the MLflow database")


@dataclass(frozen=True)
class Family:
    """An operator family with its chosen variants and shapes."""

    name: str
    bench: Any  # module grkernels.<family>.bench, or one of `composed`
    variants: tuple[str, ...]
    shapes: tuple[str, ...]
    writes: tuple[str, ...] = ()  # as in grkernels.families.FamilySpec


def register_schemas() -> None:
    """Register the dataclasses with Hydra. A second call does no harm."""
    store = ConfigStore.instance()
    register_studies()
    store.store(name="kernelbench_schema", node=KernelBenchConfig)
    for name, schema in schemas()["tracking"].items():
        store.store(group="schema/tracking", name=name, node=schema)


def to_config(cfg: DictConfig) -> KernelBenchConfig:
    """Return a composed configuration, its names checked. Raises as `checked` and `select`."""
    config = checked(cfg, KernelBenchConfig)
    changes_of(config)
    select(config)
    return config


def changes_of(config: KernelBenchConfig) -> list[dict[str, int]]:
    """Return the changes to launch configurations. Raises ConfigError for words that are not like n=64."""
    changes = []
    for launch in config.launches:
        pairs = [word.partition("=") for word in launch.split()]
        if not pairs or not all(name.isidentifier() and number.isdecimal() for name, _, number in pairs):
            raise ConfigError(f"launches: {launch!r} is no list of numbers; write \"launches=['n=64 stages=3']\"")
        changes.append({name: int(number) for name, _, number in pairs})
    return changes


def select(config: KernelBenchConfig) -> list[Family]:
    """Return the families with their chosen variants and shapes. Raises ConfigError for an unknown name."""
    together = composed()
    every = [*registry.FAMILIES, *together]
    _check("families", config.families, every)
    families = []
    for name in config.families or every:
        if config.launches and name in together:
            allowed = ", ".join(registry.FAMILIES)
            raise ConfigError(f"launches: {name} has no launch configuration; choose families among {allowed}")
        bench = together.get(name) or registry.bench(name)
        variants, shapes = variants_of(name), tuple(bench.SHAPES)
        families.append(
            Family(
                name,
                bench,
                tuple(v for v in variants if not config.variants or v in config.variants),
                tuple(s for s in shapes if not config.shapes or any(fnmatchcase(s, p) for p in config.shapes)),
                () if name in together else registry.family(name).writes,
            )
        )
    _check("variants", config.variants, [v for f in families for v in variants_of(f.name)])
    _check("shapes", config.shapes, [s for f in families for s in f.bench.SHAPES])
    return [f for f in families if f.variants and f.shapes]


def variants_of(family: str) -> tuple[str, ...]:
    """Return all variants of a family, or of operators that are measured together."""
    together = composed().get(family)
    return together.VARIANTS if together else registry.variants(family)


def composed() -> dict[str, Any]:
    """Return the modules of this folder that measure several operators together, by the name of their family.

    Each has VARIANTS, SHAPES, inputs, cost, supports_args, reference, refusal and bind; `cost` also takes a variant,
    and `yardstick` gives its rounded reference, or None for that of the dtype.
    """
    from grbench.kernelbench import products, projected, stack

    return {module.FAMILY: module for module in (products, projected, stack)}


def _check(key: str, asked: Iterable[str], known: Iterable[str]) -> None:
    known = list(dict.fromkeys(known))
    for name in asked:
        if not any(name == k or (key == "shapes" and fnmatchcase(k, name)) for k in known):
            raise ConfigError(f"{key}: unknown {name!r}; {nearest(name, known)}known: {', '.join(known)}")


def device_of(config: KernelBenchConfig) -> str:
    """Return cuda or cpu. Raises ConfigError for a missing GPU, and for tuning without a GPU."""
    import torch

    there = torch.cuda.is_available()
    if config.device == "cuda" and not there:
        raise ConfigError("device=cuda: PyTorch finds no GPU; `python -m grbench doctor` says why; allowed here: cpu")
    device = "cuda" if there and config.device != "cpu" else "cpu"
    if config.tune and device == "cpu":
        raise ConfigError("tune=true: launch configurations are tuned on a GPU; allowed here: tune=false")
    return device
