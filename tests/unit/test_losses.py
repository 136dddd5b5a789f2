"""Losses of a deployment's steps, from the records of reports/quality. The page there has the same figures."""

from __future__ import annotations

import copy
import dataclasses
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from grbench import deployment as deployments
from grbench.config.arguments import CommandError
from grbench.config.compose import compose_spec
from grbench.config.schema import ConfigError
from grbench.deployment import Deployment, Step, Strategy
from grbench.report import losses
from grbench.report.frame import read_cells
from grbench.report.losses import options_of_spec, with_losses
from grbench.report.losses_command import main
from grengines import base, registry
from grengines.onnxruntime import session

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "reports/quality"
FEWER = ROOT / "reports/rank_candidates"
WEIGHTS = ROOT / "experiments/weights/ml_100k"
COMMON = ["engine=hstu", "engine.precision=fp32", "workload=ml_100k", "workload.max_history=50"]
RETRIEVE = [
    *COMMON,
    f"retrieval.weights={WEIGHTS}/retriever/weights.safetensors",
    f"retrieval.semantic_ids={WEIGHTS}/retriever/semantic_ids.safetensors",
]
FP32 = "engine.precision=fp32"
RANK = [*COMMON, "model.tasks=[rated,liked]", f"model.weights={WEIGHTS}/ranker/weights.safetensors"]


def retrieve(*steps: Step) -> Deployment:
    strategies = [
        Strategy("wide", [*RETRIEVE, "retrieval.beam_width=64"]),
        Strategy("narrow", [*RETRIEVE, "retrieval.beam_width=4", "retrieval.k=4"]),
    ]
    return Deployment(version=1, task="generate", strategies=strategies, degrade=list(steps))


def rank(
    *steps: Step, half: Sequence[str] = ("engine.precision=bf16",), **changes: str
) -> tuple[Deployment, dict[str, dict[str, Any]]]:
    """A deployment that ranks, and its options. half: what the second strategy adds."""
    changed = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    strategies = [
        Strategy("ranker", [*RANK, *changed]),
        Strategy("half", [*RANK, *changed, *half]),
    ]
    deployment = Deployment(version=1, task="rank", strategies=strategies, degrade=list(steps))
    return deployment, {name: options_of_spec(spec) for name, spec in deployment.specs().items()}


def on_the_page(section: str, row: str, kept: Path = KEPT) -> list[float]:
    """The change of the headline figure in a table of a page: [value, low, high]."""
    text = (kept / "README.md").read_text().partition(f"## {section}")[2].partition("\n## ")[0]
    cells = next(line for line in text.splitlines() if re.match(rf"\| [\d, ]+ \| {row} \|", line)).split(" | ")
    return [float(number) for number in re.findall(r"[-+]\d\.\d+", cells[3])]


def assert_is(step: Step, figure: str, section: str, row: str, kept: Path = KEPT) -> None:
    value, low, high = on_the_page(section, row, kept)
    assert step.loss == {figure: pytest.approx(-value, abs=5.1e-5)}
    assert step.intervals == {figure: pytest.approx([-high, -low], abs=5.1e-5)}


def test_the_command_fills_in_what_the_page_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "best.yaml"
    steps = (Step("short", max_history=8), Step("old", stale_state=True), Step("beams", strategy="narrow"))
    deployments.save(retrieve(*steps), file)
    assert main([str(file), str(KEPT)]) == 0
    short, old, beams = deployments.load(file).degrade
    assert_is(short, "hr10_loss", "Retrieve: history window against speed", "8")
    assert_is(old, "hr10_loss", "Retrieve: age of the state against speed", "16")  # 4 events lose less
    assert_is(beams, "hr10_loss", "Retrieve: beam width against speed", "4")
    assert beams.record == str(KEPT / "records/retrieve_beams_4_offline_quality_requests=1000")
    assert f"beams: hr10_loss 0.0498 [0.0354, 0.0653], {beams.record}" in capsys.readouterr().out


def test_the_comments_at_the_top_of_the_file_stay(tmp_path: Path) -> None:
    """`grbench tune` says there why its strategy is not certified."""
    file, remark = tmp_path / "best.yaml", "The strategy is not certified, because ..."
    deployments.save(retrieve(Step("short", max_history=8)), file, remark)
    comments = f"{deployments.HEADER}# {remark}\n"
    assert main([str(file), str(KEPT)]) == 0
    assert file.read_text().startswith(f"{comments}version: 1\n") and deployments.load(file).degrade[0].loss


def test_the_record_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deployment is served elsewhere than where its losses were filled in."""
    file = tmp_path / "best.yaml"
    deployments.save(retrieve(Step("short", max_history=8)), file)
    monkeypatch.chdir(KEPT.parent)
    assert main([str(file), KEPT.name]) == 0
    monkeypatch.chdir(tmp_path)
    [short] = deployments.load(file).degrade
    assert short.record is not None and (Path(short.record) / "record.json").is_file()


@pytest.mark.parametrize("changes", [{}, {"cache": "lru", "kernel": "torch", "engine__device": "cpu"}])
def test_a_ranker_loses_auc(changes: dict[str, str]) -> None:
    """A cache, kernels and the device do not decide quality; the precision of the second strategy does."""
    steps = (Step("short", max_history=8), Step("old", stale_state=True), Step("bf16", strategy="half"))
    short, old, half = with_losses(*rank(*steps, **changes), read_cells([KEPT]), KEPT)
    assert_is(short, "auc_loss", "Rank: history window against speed", "8")
    assert_is(old, "auc_loss", "Rank: age of the state against speed", "16")
    assert_is(half, "auc_loss", "Rank: engine and precision against speed", "hstu bf16")


@pytest.mark.parametrize(
    "step, changes, words",
    [
        (Step("s", max_history=9), {}, "no record has strategy ranker with workload.max_history=9; the nearest"),
        (Step("s", max_candidates=9), {}, "no record has strategy ranker with workload.num_candidates=9; the nearest"),
        (
            Step("s", max_candidates=32),
            {},
            "it leaves out none of the candidates of strategy ranker, which has workload.num_candidates=32; set that",
        ),
        (
            Step("s", max_history=8),
            {"workload__visit_events": "8"},
            "no record has the options of strategy ranker; the nearest of them has workload.visit_events=16 instead of",
        ),
        (
            Step("s", stale_state=True),
            {"cache": "lru", "cache__precision": "int8"},
            "no record has strategy ranker with workload.stale_events > 0",
        ),
        *[
            (
                Step("s", strategy="half"),
                {"half": [FP32, kernel]},
                "no record has strategy half; the nearest of them has kernel.hstu_attention=null instead of fp8",
            )
            for kernel in ("kernel.hstu_attention=fp8", "kernel=fp8")
        ],
        (
            Step("s", strategy="half"),
            {"half": ["engine=tensorrt", "engine.precision=int8", "engine.calibration=32"]},
            "no record has strategy half; the nearest of them has engine=onnxruntime instead of tensorrt, "
            "engine.calibration=null instead of 32",
        ),
        (
            Step("s", strategy="half"),
            {"half": [FP32, "kernel=torch"]},
            "it changes no option of strategy ranker that decides answers, so no record measures a loss",
        ),
        *[
            (
                Step("s", max_history=window),
                {},
                "it changes no option of strategy ranker that decides answers, so no record measures a loss",
            )
            for window in (50, 128)  # the strategy has 50, and there are records of both
        ],
    ],
)
def test_a_step_without_a_record_is_refused(step: Step, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        with_losses(*rank(step, **changes), read_cells([KEPT, FEWER]), KEPT)
    message = str(refused.value)
    assert message.startswith(f"degrade[0] (s): {words}")
    assert "type the loss into the file" in message and "\n" not in message


def test_pages_of_vllm_in_8_bits_decide_quality() -> None:
    """Records from before the option have pages as the engine computes."""
    new, eight = (
        losses._decisive(options_of_spec(compose_spec(["engine=vllm", f"engine.kv_cache_precision={stored}"])[0]))
        for stored in ("engine", "fp8")
    )
    assert eight == {**new, "engine.kv_cache_precision": "fp8"} and "engine.kv_cache_precision" not in new


def test_a_precision_auto_is_what_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The records asked for fp32, or for auto, and fp32 ran: it is auto on a CPU, and bf16 is auto on a GPU."""
    step, auto = Step("short", max_history=8), {"engine__precision": "auto"}
    cells = read_cells([KEPT])
    monkeypatch.setattr(losses, "visible_gpus", list)
    assert_is(with_losses(*rank(step, **auto), cells, KEPT)[0], "auc_loss", "Rank: history window against speed", "8")
    monkeypatch.setattr(losses, "visible_gpus", lambda: ["0"])
    here = {**auto, "engine__device": "cpu"}
    assert_is(with_losses(*rank(step, **here), cells, KEPT)[0], "auc_loss", "Rank: history window against speed", "8")
    half = rank(Step("half", strategy="half"), half=["engine.precision=auto"])
    row = "hstu bf16"
    assert_is(with_losses(*half, cells, KEPT)[0], "auc_loss", "Rank: engine and precision against speed", row)
    with pytest.raises(ConfigError, match=r"no record has strategy ranker with workload\.max_history=8"):
        with_losses(*rank(step, **auto), cells, KEPT)


@pytest.mark.parametrize("engine", ["hstu", "aoti", "onnxruntime", "tensorrt", "vllm", "hf"])
@pytest.mark.parametrize("gpus", [[], ["0"]])
def test_a_precision_auto_is_as_the_option_of_the_engine_says(
    monkeypatch: pytest.MonkeyPatch, engine: str, gpus: list[str]
) -> None:
    monkeypatch.setattr(losses, "visible_gpus", lambda: gpus)
    spec, _ = compose_spec([f"engine={engine}"])
    [its] = [field for field in dataclasses.fields(spec.engine) if field.name == "precision"]  # type: ignore[arg-type]
    said = re.search(r"auto: (\w+)(?: on cuda, (\w+) on cpu)?", its.metadata["help"])
    assert said is not None
    expected = said[1] if gpus or said[2] is None else said[2]
    assert losses.automatic(spec) == {"engine.precision": expected}


@pytest.mark.parametrize(
    "device, gpu, precision", [("cuda", False, "bf16"), ("cpu", True, "fp32"), ("auto", True, "bf16")]
)
def test_the_device_of_the_options_decides_what_auto_is(device: str, gpu: bool, precision: str) -> None:
    spec, _ = compose_spec(["engine=hstu", f"engine.device={device}"])
    assert registry.precisions_of(spec.engine, gpu) == {"engine.precision": precision}
    assert registry.precisions_of(compose_spec(["engine=remote"])[0].engine, gpu) == {}


@pytest.mark.parametrize("engine", ["hstu", "onnxruntime"])
def test_an_engine_and_the_losses_read_auto_from_the_row_of_the_engine(
    monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """A row with other precisions changes both."""
    spec, _ = compose_spec([f"engine={engine}", "engine.device=cpu"])
    place: Any = {"hstu": base.placement_of, "onnxruntime": session.placement_of}[engine]
    for expected in ("fp32", "fp16"):
        row = dataclasses.replace(registry.get(engine), auto_precision=("bf16", expected))
        monkeypatch.setitem(registry.ENGINES, engine, row)
        assert place(spec.engine).precision == expected
        assert losses.automatic(spec) == {"engine.precision": expected}


@pytest.mark.parametrize("gpus, retrieve, rank", [([], "fp32", "fp32"), (["0"], "bf16", "fp16")])
def test_each_stage_of_a_pipeline_has_a_precision_auto(
    monkeypatch: pytest.MonkeyPatch, gpus: list[str], retrieve: str, rank: str
) -> None:
    monkeypatch.setattr(losses, "visible_gpus", lambda: gpus)
    spec, _ = compose_spec(["task=recommend", "engine=pipeline", "engine@engine.rank=onnxruntime"])
    expected = {"engine.retrieve.precision": retrieve, "engine.rank.precision": rank}
    assert losses.automatic(spec) == expected
    assert expected.items() <= options_of_spec(spec).items()


def test_the_command_says_what_a_precision_auto_is_for_each_strategy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a GPU two engines have two precisions under one key."""
    monkeypatch.setattr(losses, "visible_gpus", lambda: ["0"])
    deployment, _ = rank(Step("short", max_history=8), half=["engine=onnxruntime"], engine__precision="auto")
    deployments.save(deployment, tmp_path / "best.yaml")
    with pytest.raises(CommandError, match="no record has "):
        main([str(tmp_path / "best.yaml"), str(KEPT)])
    advice = "on this machine; name the precision where another one serves"
    assert capsys.readouterr().err.splitlines() == [
        f"grbench losses: strategy ranker: engine.precision=auto is bf16 {advice}",
        f"grbench losses: strategy half: engine.precision=auto is fp16 {advice}",
    ]


@pytest.mark.parametrize("lacking", ["base", "window", "age", "strategy"])
def test_the_command_of_a_lacking_record_makes_it(lacking: str) -> None:
    """The options of the command, given to a copy of a record that is there, are the record that lacked."""
    step = {"age": Step("s", stale_state=True), "strategy": Step("s", strategy="half")}.get(lacking)
    deployment, options = rank(step or Step("s", max_history=9), half=["engine.precision=auto", "engine=aoti"])
    cells = [cell for cell in read_cells([KEPT]) if not cell[1].spec["workload"]["stale_events"]]
    if lacking == "base":
        cells = [cell for cell in cells if cell[1].spec["workload"]["max_history"] == 8]
    with pytest.raises(ConfigError, match="no record has ") as refused:
        with_losses(deployment, options, cells, "outputs/${seed}")
    command = re.search(r"; make it: python -m grbench (.*); or type the loss into the file$", str(refused.value))
    assert command is not None
    spec, run = compose_spec(shlex.split(command[1]))
    assert run.runner.output_root == "outputs/${seed}" and len(spec.gate.allow_loss) == 4
    folder, made = next(cell for cell in cells if cell[1].spec["task"] == "rank")
    made = copy.deepcopy(made)
    made.spec, made.files, made.actual = spec.to_dict(), spec.file_contents(), {**made.actual, "precision": "fp32"}
    if lacking == "base":
        with pytest.raises(ConfigError, match=r"no record has strategy ranker with workload\.max_history=9"):
            with_losses(deployment, options, [*cells, (folder, made)], KEPT)
    else:
        [found] = with_losses(deployment, options, [*cells, (folder, made)], KEPT)
        assert found.record == str(folder)


def test_the_command_of_a_lacking_record_has_the_folder_of_ones_own_groups() -> None:
    deployment, options = rank(Step("s", max_history=9))
    deployment.config_dir = "/my own"
    with pytest.raises(ConfigError, match="; make it: python -m grbench --config-dir '/my own' "):
        with_losses(deployment, options, [], KEPT)


def test_random_weights_have_no_losses() -> None:
    strategies = [Strategy("ranker", COMMON)]
    deployment = Deployment(version=1, task="rank", strategies=strategies, degrade=[Step("short", max_history=8)])
    options = {name: options_of_spec(spec) for name, spec in deployment.specs().items()}
    with pytest.raises(ConfigError, match=r"strategy ranker has random weights, which have no quality; add model\.w"):
        with_losses(deployment, options, read_cells([KEPT]), KEPT)


def test_an_onnx_file_is_another_model() -> None:
    """The file of a strategy may be of 8 bits, and then runs as fp16. The record of bf16 is made one of fp16."""
    cells = read_cells([KEPT])
    for _, record in cells:
        if record.spec["engine"].get("precision") == "bf16":
            record.spec["engine"] |= {"name": "onnxruntime", "precision": "fp16", "onnx": None}
    half, step = ["engine=onnxruntime", "engine.precision=fp16"], Step("s", strategy="half")
    assert_is(
        with_losses(*rank(step, half=half), cells, KEPT)[0],
        "auc_loss",
        "Rank: engine and precision against speed",
        "hstu bf16",
    )
    with pytest.raises(ConfigError, match=r"half; the nearest of them has engine\.onnx=null instead of sha256:"):
        with_losses(*rank(step, half=[*half, f"engine.onnx={__file__}"]), cells, KEPT)


def test_other_weights_are_another_model(tmp_path: Path) -> None:
    """One bit of the weights is another. The file stays as it was."""
    data = bytearray((WEIGHTS / "retriever/weights.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "weights.safetensors").write_bytes(data)
    deployment, file = retrieve(Step("short", max_history=8)), tmp_path / "best.yaml"
    deployment.strategies[0].overrides.append(f"retrieval.weights={tmp_path}/weights.safetensors")
    deployments.save(deployment, file)
    before = file.read_text()
    with pytest.raises(
        CommandError, match=r"the nearest of them has retrieval\.weights=sha256:0a1a1b4957f2 instead of"
    ):
        main([str(file), str(KEPT)])
    assert file.read_text() == before


def test_records_of_other_users_are_not_compared() -> None:
    cells = read_cells([KEPT])
    for _, record in cells:
        if record.spec["workload"]["max_history"] == 8:
            record.spec["gate"]["quality_requests"] = 500
    with pytest.raises(ConfigError, match="max_history=8"):
        with_losses(*rank(Step("short", max_history=8)), cells, KEPT)


def test_the_precision_of_a_record_is_that_which_ran() -> None:
    """The records' engine with `auto` ran fp32 on a CPU: the strategy says fp32, and has the same loss."""
    cells = read_cells([KEPT])
    for _, record in cells:
        if record.spec["engine"].get("precision") == "fp32":
            record.spec["engine"]["precision"] = "auto"
    [short] = with_losses(*rank(Step("short", max_history=8)), cells, KEPT)
    assert_is(short, "auc_loss", "Rank: history window against speed", "8")


def test_fewer_candidates_lose_the_hit_rate_of_candidates_by_popularity() -> None:
    """The loss of a step is from records of two numbers of candidates, and AUC is of others."""
    steps = Step("half", max_candidates=16, loss={"auc_loss": 0.003}), Step("few", max_candidates=8)
    half, few = with_losses(*rank(*steps), read_cells([KEPT, FEWER]), "reports")
    for step, row in ((half, "16"), (few, "8")):
        assert_is(step, "hr10_popular_loss", "Rank: candidates scored against speed", row, FEWER)
        assert step.record is not None and f"rank_candidates_{row}_offline" in step.record


@pytest.mark.parametrize("change", [{"max_candidates": 9}, {"max_history": 9}])
def test_a_loss_that_was_typed_stays_where_no_record_has_it(
    change: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed, file = Step("typed", loss={"auc_loss": 0.003}, **change), tmp_path / "best.yaml"  # type: ignore[arg-type]
    deployments.save(rank(typed, Step("short", max_history=8))[0], file)
    assert main([str(file), str(KEPT)]) == 0
    kept, short = deployments.load(file).degrade
    assert kept == typed
    assert_is(short, "auc_loss", "Rank: history window against speed", "8")
    assert "typed: auc_loss 0.0030, as typed\n" in capsys.readouterr().out


def test_a_loss_of_nothing_has_no_sign() -> None:
    """A record is there twice, the second time as if its window were shorter."""
    [base] = [(f, record) for f, record in read_cells([KEPT]) if f.name == "rank_offline_quality_requests=1000"]
    copied = copy.deepcopy(base[1])
    copied.spec["workload"]["max_history"] = 49
    [short] = with_losses(*rank(Step("short", max_history=49)), [base, (base[0], copied)], KEPT)
    assert str([short.loss, short.intervals]) == "[{'auc_loss': 0.0}, {'auc_loss': [0.0, 0.0]}]"


def test_names_of_losses_say_what_they_are() -> None:
    step = Step("beams", strategy="narrow", loss={"hr10": 0.05})
    with pytest.raises(ConfigError, match=r"degrade\[0\]\.loss\.hr10: no name of a loss; allowed are such as auc_loss"):
        retrieve(step).specs()
    step = dataclasses.replace(step, loss={"hr10_loss": 0.05}, intervals={"hr10_loss": [0.04]})
    with pytest.raises(ConfigError, match=r"degrade\[0\]\.intervals\.hr10_loss: 1 numbers; allowed is \[low, high\]"):
        retrieve(step).specs()
    step = dataclasses.replace(step, intervals={"hr10": [0.04, 0.06]})
    with pytest.raises(ConfigError, match=r"\[0\]\.intervals\.hr10: no loss of the step has .*; allowed are hr10_loss"):
        retrieve(step).specs()
    step = Step("beams", strategy="narrow", intervals={"hr10_loss": [0.04, 0.06]})
    with pytest.raises(
        ConfigError, match=r"\[0\]\.intervals\.hr10_loss: no loss of the step .* is empty; give the loss"
    ):
        retrieve(step).specs()
    with pytest.raises(ConfigError, match="a call to generate sends no candidates"):
        retrieve(Step("few", max_candidates=4)).specs()
