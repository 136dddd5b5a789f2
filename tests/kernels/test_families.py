"""The rows of the operator families: what they drive, and that a family or a variant is one row and one module."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import json
import re
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import run_fresh

from grbench.config.compose import CONFIG_DIR
from grengines.models.decoder.config import DecoderConfig
from grengines.models.hstu.config import HSTUConfig
from grengines.runtime import kernels
from grkernels import choice, families, registry, timing, tuning
from grkernels.choice import RefusedError, choose, requested
from grkernels.config import KernelConfig
from grkernels.families import Sizes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = {"dtype": "bf16", "sizes": Sizes()}


def test_every_row_has_its_modules() -> None:
    for name, spec in registry.FAMILIES.items():
        folder = Path(*(importlib.import_module(spec.folder()).__path__))
        modules = {path.stem for path in folder.glob("*.py")}
        assert {*spec.variants, "reference", "bench"} <= modules
        assert spec.summary and set(spec.fastest) == {"cpu", "cuda", "sm90"}
        for kind, order in spec.fastest.items():
            assert all(kind in spec.variants[variant].devices for variant in order if variant in spec.variants)
            assert order[-1] == "torch"
        shape = next(iter(registry.bench(name).SHAPES.values()))
        assert registry.bench(name).supports_args(shape).keys() <= spec.dims(Sizes()).keys()
        assert callable(registry.bench(name).of_model)


def test_each_variant_is_one_line_of_yaml() -> None:
    folder = Path(CONFIG_DIR) / "kernel"
    assert {path.stem for path in folder.glob("*.yaml")} == {"auto", *registry.variant_names()}
    for path in folder.glob("*.yaml"):
        comment, schema, *own = path.read_text().splitlines()
        assert comment.startswith("# ") and schema.startswith("defaults:")
        assert own == ([] if path.stem == "auto" else [f"name: {path.stem}"])


def test_the_group_names_every_family_that_does_not_name_itself() -> None:
    asked = KernelConfig(name="triton", hstu_attention="cutlass", norm_gate="auto").requested()  # type: ignore[call-arg]
    assert asked["hstu_attention"] == "cutlass" and asked["norm_gate"] == "auto"
    others = {f: asked[f] for f in asked if f not in ("hstu_attention", "norm_gate")}
    assert others == {f: "triton" if registry.family(f).of_model else "auto" for f in others}
    assert KernelConfig(paged_write="torch").requested()["paged_write"] == "torch"  # type: ignore[call-arg]
    assert set(KernelConfig().requested().values()) == {"auto"}
    with pytest.raises(ValueError, match=r"unknown variant 'best'; known: auto, torch, compile, triton, cutlass"):
        requested("best")


# The choice


def test_a_cpu_gets_torch_even_where_triton_is_interpreted() -> None:
    made = choose(requested("auto"), device="cpu", **BF16)
    assert made.variants == dict.fromkeys(registry.FAMILIES, "torch") and made.reasons.keys() == made.variants.keys()
    first, *others = made.reasons["norm_gate"].split("; ", 3)
    assert first == "torch: the only one left"
    assert others[0] == "cutlass: needs an NVIDIA GPU of compute capability 9.0"
    assert others[1] == "triton: needs an NVIDIA GPU"
    assert others[2].startswith("compile: an engine with it starts slowly (docs/design/kernels.md")


SMALL = Sizes(32, 2, 16, 16, page=16, products="fp8", users=2, events=24, candidates=4)


def never(*asked: object, **options: object) -> None:
    raise AssertionError("variants are timed")


ALONE = ("paged_write", "beam_attention")  # those with a variant that a captured graph can't hold


def test_a_device_without_a_measured_order_times_the_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time kernels on inputs of a model: in Triton's interpreter, where no GPU is."""
    monkeypatch.setattr(registry, "device_kind", lambda device: "cuda")
    before = tuning.provenance()
    made = choose(requested("auto"), device=DEVICE, dtype="bf16", sizes=SMALL)
    assert tuning.provenance() == before  # a record's launch configurations are those of the model
    for family, why in made.reasons.items():
        found = re.match(
            r"\w+: by a timing of 2 variants: triton (\S+) ms, torch (\S+) ms, because no order .* cuda", why
        )
        assert found, (family, why)
        triton, torch_ms = map(float, found.groups())
        taken, other = (triton, torch_ms) if made.variants[family] == "triton" else (torch_ms, triton)
        assert taken <= other * choice.NEAR * 1.01, (family, why)  # the figures are rounded
    assert made.reasons["norm_gate"].endswith("; cutlass: needs an NVIDIA GPU of compute capability 9.0")
    assert choose(requested("auto"), device=DEVICE, dtype="bf16", sizes=SMALL) == made  # a process times once


@pytest.mark.parametrize(
    ("option", "why"),
    [("captured", "launches cost nothing in CUDA graphs"), ("compiled", "Inductor compiles torch together with what")],
)
def test_engines_without_single_calls_take_the_order(option: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "device_kind", lambda device: "cuda")
    monkeypatch.setattr(timing, "times", never)
    sizes = dataclasses.replace(SMALL, **{option: True})
    made = choose(requested("auto"), device=DEVICE, dtype="bf16", sizes=sizes)
    assert set(made.variants.values()) == {"triton"}
    for family, found in made.reasons.items():
        if option == "captured" and family in ALONE:
            assert found.startswith("triton: the only one left; torch: waits for the device")
        else:
            start = "triton: the first that can run in the order; no order is measured for cuda, and none is timed, "
            assert found.startswith(f"{start}because {why}"), found


def test_a_family_without_inputs_of_a_model_takes_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "device_kind", lambda device: "cuda")
    monkeypatch.setattr(timing, "times", never)
    monkeypatch.delattr("grkernels.layer_norm.bench.of_model")
    made = choose({"layer_norm": "auto"}, device=DEVICE, dtype="bf16", sizes=SMALL)
    why = "none is timed, because grkernels.layer_norm.bench has no of_model, the inputs of a model; cutlass: "
    assert made.variants == {"layer_norm": "triton"} and why in made.reasons["layer_norm"]


def test_nothing_is_timed_beside_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threads know it too. Times of before are used, so that an engine that is built again has the same kernels."""
    monkeypatch.setattr(registry, "device_kind", lambda device: "cuda")
    sizes = dataclasses.replace(SMALL, embedding_dim=80)

    def made() -> choice.KernelChoice:
        return choose({"layer_norm": "auto"}, device=DEVICE, dtype="bf16", sizes=sizes)

    async def on_a_thread() -> choice.KernelChoice:
        return await asyncio.to_thread(made)

    with choice.beside("calls"):
        first = asyncio.run(on_a_thread())
    assert first.variants == {"layer_norm": "triton"}
    order = (
        "the first that can run in the order; no order is measured for cuda, and none is timed beside calls; cutlass"
    )
    assert first.reasons["layer_norm"].startswith(f"triton: {order}")
    timed = made()
    assert "by a timing of 2 variants" in timed.reasons["layer_norm"]
    with choice.beside("calls"):
        assert asyncio.run(on_a_thread()) == timed


BIASES = ("model.position_bias=true", "model.time_bias=8", "model.target_group_size=2")


@pytest.mark.parametrize(
    ("family", "options", "arguments"),
    [
        ("hstu_attention", {"stored": "int8"}, ("k_pages", "k_scales", "page_table")),
        ("hstu_attention", {"attention": BIASES, "page": 0}, ("extras",)),
        ("hstu_attention", {"attention": BIASES}, ("extras", "page_table")),
        ("paged_write", {"stored": "int8"}, ("k_scales", "v_scales")),
        ("norm_gate", {"gate": ("model.output=gate", "model.group_norm=true")}, ("concat", "groups", "to")),
        ("norm_gate", {"gate": ("engine.tensor_parallel=2",), "products": ""}, ("moments",)),
    ],
)
def test_the_timed_inputs_have_the_options_of_the_model(family: str, options: dict, arguments: tuple[str, ...]) -> None:
    sizes = dataclasses.replace(SMALL, **options)
    inputs = registry.bench(family).of_model(sizes, dtype=torch.float32, device=DEVICE)
    assert set(arguments) <= inputs.keys()
    found = timing.times(family, ("triton", "torch"), DEVICE, "fp32", sizes)
    assert all(isinstance(ms, float) for ms in found.values()), found


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Sizes]:
    """Return the sizes that are timed, on a GPU without a measured order, where Triton is the faster."""
    monkeypatch.setattr(registry, "device_kind", lambda device: "cuda")
    seen: list[Sizes] = []

    def times(*asked: Any, known: bool) -> timing.Times:
        seen.append(asked[-1])
        return {"triton": 1.0, "torch": 2.0}

    monkeypatch.setattr(timing, "times", times)
    return seen


def test_an_engine_times_histories_that_its_model_takes(timed: list[Sizes]) -> None:
    for most in (40, 16385):
        made = kernels.choose({"layer_norm": "auto"}, HSTUConfig(max_positions=most), DEVICE, "fp32")
        assert made.variants == {"layer_norm": "triton"}
    assert [sizes.events for sizes in timed] == [40, 2048]


def test_a_decoder_is_timed_at_its_own_heads_and_beams(timed: list[Sizes]) -> None:
    model = DecoderConfig(heads=8, kv_heads=4, head_dim=16, max_positions=32)
    kernels.choose({"beam_attention": "auto"}, model, DEVICE, "fp32", page=16, ranks=2, beams=5)
    [sizes] = timed
    inputs = {f: registry.bench(f).of_model(sizes, dtype=torch.float32, device=DEVICE) for f in ALONE}
    assert inputs["beam_attention"]["q"].shape == (8 * 5, 4, 16)
    assert inputs["beam_attention"]["k_pages"].shape[1:] == (16, 2, 16)
    assert inputs["paged_write"]["k_pages"].shape[1:] == (16, 2, 16)


def test_a_wrong_variant_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros are the fastest answer of a returned result, and nothing that of a written one."""
    monkeypatch.setattr(registry, "device_kind", lambda device: "cuda")
    for family, fn in (("layer_norm", lambda x, *a, **o: torch.zeros_like(x)), ("paged_write", lambda *a, **o: None)):
        broken = dataclasses.replace(registry.get(family, "torch"), fn=fn)
        monkeypatch.setattr(f"grkernels.{family}.torch.VARIANT", broken)
        sizes = dataclasses.replace(SMALL, embedding_dim=112, qk_dim=32, products="")
        made = choose({family: "auto"}, device=DEVICE, dtype="bf16", sizes=sizes)
        assert made.variants == {family: "triton"}
        assert re.search(
            r"torch failed \(differs from the fp32 reference by [\d.]+ \(relative\), allow", made.reasons[family]
        )


def test_a_variant_that_fails_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("no memory\nat all")

    monkeypatch.setattr(registry, "device_kind", lambda device: "cuda")
    auto, sizes = {"layer_norm": "auto"}, dataclasses.replace(SMALL, embedding_dim=48)
    with monkeypatch.context() as patched:
        broken = dataclasses.replace(registry.get("layer_norm", "torch"), fn=fails)
        patched.setattr("grkernels.layer_norm.torch.VARIANT", broken)
        made = choose(auto, device=DEVICE, dtype="fp32", sizes=sizes)
    assert made.variants == {"layer_norm": "triton"}
    assert "torch failed (OutOfMemoryError: no memory), because" in made.reasons["layer_norm"]
    with monkeypatch.context() as patched:
        for variant in ("torch", "triton"):
            broken = dataclasses.replace(registry.get("layer_norm", variant), fn=fails)
            patched.setattr(f"grkernels.layer_norm.{variant}.VARIANT", broken)
        with pytest.raises(RefusedError, match=r"kernel\.layer_norm=auto: by a timing of 2 .* triton failed \(OutOf"):
            choose(auto, device=DEVICE, dtype="fp32", sizes=dataclasses.replace(sizes, events=25))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cutlass")
    monkeypatch.setattr(registry, "device_kind", lambda device: "sm90")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


def test_hopper_gets_the_fastest_of_each_family(hopper: None) -> None:
    made = choose(requested("auto"), device="cuda", **BF16)
    triton = [family for family, variant in made.variants.items() if variant == "triton"]
    only_triton = [name for name, spec in registry.FAMILIES.items() if "cutlass" not in spec.variants]
    assert triton == ["layer_norm", "token_embedding", *only_triton]  # as measured
    assert {made.variants[f] for f in made.variants if f not in triton} == {"cutlass"}
    order = "the first that can run in the order measured for sm90 (grkernels/families.py)"
    assert made.reasons == {family: f"{variant}: {order}" for family, variant in made.variants.items()}


def test_the_others_are_timed_where_the_first_refuses_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "device_kind", lambda device: "sm90")
    made = choose({"interaction": "auto"}, device=DEVICE, dtype="bf16", sizes=dataclasses.replace(SMALL, features=65))
    assert made.variants["interaction"] in ("torch", "triton")
    timed, cutlass = made.reasons["interaction"].split("; ", 1)
    assert timed.partition(": ")[2].startswith("by a timing of 2 variants: triton ")
    assert timed.endswith(" ms, because no order is measured for what cutlass refuses")
    assert cutlass.startswith("cutlass: 65 features are over 64")


def test_an_engine_may_allow_fewer(hopper: None) -> None:
    made = choose(requested("auto"), device="cuda", allowed=("torch", "triton"), **BF16)
    assert set(made.variants.values()) == {"triton"}
    passed_over = {why.partition("; ")[2] for why in made.reasons.values()}
    assert passed_over == {"", "cutlass: this engine takes torch, triton only"}


def test_what_is_named_is_refused_and_not_replaced() -> None:
    with pytest.raises(RefusedError, match=r"kernel\.norm_gate=cutlass: .*supported here: torch, compile, triton"):
        choose(requested("auto", {"norm_gate": "cutlass"}), device="cpu", **BF16)


def test_a_missing_package_is_passed_over(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda name: None if name == "cutlass" else name)
    made = choose(requested("auto"), device="cuda", **BF16)
    assert set(made.variants.values()) == {"triton"}
    assert "cutlass: package cutlass is not installed; pip install" in made.reasons["norm_gate"]


# Adding one

TOY = '''
"""LayerNorm, a toy."""
import torch
from grkernels import capabilities
from grkernels.variant import KernelVariant
from grkernels.layer_norm.reference import layer_norm as reference

def layer_norm(x, weight, bias, *, eps):
    return torch.native_layer_norm(x, weight.shape, weight, bias, eps)[0]

VARIANT = KernelVariant("layer_norm", "toy", layer_norm, reference, capabilities.eager)
'''
FAMILY = {
    "__init__.py": """
from grkernels.families import TORCH, FamilySpec
SPEC = FamilySpec(
    "twice", "twice a tensor", {"torch": TORCH}, lambda s: {"width": s.embedding_dim}, package="toys.twice"
)
""",
    "reference.py": "def twice(x):\n    return (2 * x.float()).to(x.dtype)\n",
    "torch.py": """
from grkernels import capabilities
from grkernels.variant import KernelVariant
from toys.twice.reference import twice as reference
VARIANT = KernelVariant("twice", "torch", lambda x: x + x, reference, capabilities.eager)
""",
    "bench.py": """
import torch
from grkernels.variant import Cost
SHAPES = {"8": 8}
def inputs(shape, *, dtype, device, seed):
    generator = torch.Generator(device).manual_seed(seed)
    return {"x": torch.randn(shape, shape, generator=generator, device=device, dtype=dtype)}
def cost(shape, dtype):
    return Cost(shape**2, 4 * shape**2)
def supports_args(shape):
    return {"width": shape}
""",
}


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package outside the repository with a variant of layer_norm and a family, installed as pip would."""
    root = tmp_path / "site"
    files = {"__init__.py": "", "layer_norm.py": TOY, **{f"twice/{name}": text for name, text in FAMILY.items()}}
    for name, text in files.items():
        (root / "toys" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "toys" / name).write_text(text)
    metadata = root / "toys-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1\n")
    points = f"[{families.GROUP}]\nlayer_norm.toy = toys.layer_norm\ntwice = toys.twice:SPEC\n"
    (metadata / "entry_points.txt").write_text(points)
    monkeypatch.setenv("PYTHONPATH", str(root), prepend=":")
    return root


def test_a_package_brings_a_family_and_a_variant(toys: Path, tmp_path: Path) -> None:
    """They are in the doctor's list, in the benchmark behind its gate, and in a run by name."""
    options = ["variants=[torch,toy]", "shapes=[8,1280x512]", "dtype=fp32", "device=cpu", "repeats=3", "min_time_s=0.1"]
    bench = ["kernels", "families=[layer_norm,twice]", *options, "tracking=none"]
    cell = ["engine=hstu", "engine.device=cpu", "workload=synthetic", "workload.visits=60", "workload.max_history=32"]
    cell += ["scenario=offline", "scenario.queries=8", "kernel.layer_norm=toy", "tracking=none", "warmup_batches=1"]
    doctor, benched, ran = run_fresh(tmp_path, [["doctor", "--quick", "--json"], bench, cell])
    rows = {row["name"]: row["ok"] for row in json.loads(doctor.stdout) if row["kind"] == "kernel"}
    assert rows["layer_norm=toy"] and rows["twice=torch"]
    assert benched.returncode == 0, benched.stdout + benched.stderr
    [path] = tmp_path.glob("outputs/kernels/*/results.json")
    statuses = {(r["family"], r["variant"]): r["status"] for r in json.loads(path.read_text())["rows"]}
    assert statuses == {("layer_norm", "torch"): "OK", ("layer_norm", "toy"): "OK", ("twice", "torch"): "OK"}
    assert ran.returncode == 0, ran.stdout + ran.stderr
    [path] = tmp_path.glob("outputs/runs/*/record.json")
    record = json.loads(path.read_text())
    assert record["spec"]["kernel"]["name"] == "auto" and record["spec"]["kernel"]["layer_norm"] == "toy"
    assert record["requested"]["kernel.layer_norm"] == "toy" and record["requested"]["kernel.norm_gate"] == "auto"
    assert record["actual"]["kernels"]["layer_norm"] == "toy" and record["actual"]["kernels"]["twice"] == "torch"
    why = record["actual"]["kernel_choice"]
    assert why.keys() == record["actual"]["kernels"].keys() and why["layer_norm"] == "toy: named in the configuration"
    assert why["norm_gate"].startswith("torch: the only one left; ")


def point(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, families.GROUP)


@pytest.mark.parametrize(
    ("name", "why"),
    [("layer_norm.torch", "the name is taken"), ("nothing.toy", "there is no such family"), ("norm_gate", "taken")],
)
def test_entry_points_that_fit_nothing(name: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "entry_points", lambda group: [point(name, "toys.module")])
    with pytest.raises(ValueError, match=rf"entry point {name} of group grbench\.kernels \(toys\.module\): .*{why}"):
        families.load()


def test_nothing_is_measured_for_a_family_of_another_package() -> None:
    assert {spec.measured for spec in registry.FAMILIES.values()} == {("sm90",)}
    assert families.FamilySpec("twice", "twice a tensor").measured == ()
