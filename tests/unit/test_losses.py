"""Losses of a deployment's steps, from the records of reports/quality. The page there has the same figures."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from grbench import deployment as deployments
from grbench.config.arguments import CommandError
from grbench.config.schema import ConfigError
from grbench.deployment import Deployment, Step, Strategy
from grbench.report.frame import read_cells
from grbench.report.losses import options_of_spec, with_losses
from grbench.report.losses_command import main

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "reports/quality"
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


def on_the_page(section: str, row: str) -> list[float]:
    """The change of the headline figure in a table of the page: [value, low, high]."""
    text = (KEPT / "README.md").read_text().partition(f"## {section}")[2].partition("\n## ")[0]
    cells = next(line for line in text.splitlines() if re.match(rf"\| [\d, ]+ \| {row} \|", line)).split(" | ")
    return [float(number) for number in re.findall(r"[-+]\d\.\d+", cells[3])]


def assert_is(step: Step, figure: str, section: str, row: str) -> None:
    value, low, high = on_the_page(section, row)
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


@pytest.mark.parametrize("changes", [{}, {"cache": "lru", "kernel": "torch", "engine__device": "cpu"}])
def test_a_ranker_loses_auc(changes: dict[str, str]) -> None:
    """A cache, kernels and the device do not decide quality; the precision of the second strategy does."""
    steps = (Step("short", max_history=8), Step("old", stale_state=True), Step("bf16", strategy="half"))
    short, old, half = with_losses(*rank(*steps, **changes), read_cells([KEPT]))
    assert_is(short, "auc_loss", "Rank: history window against speed", "8")
    assert_is(old, "auc_loss", "Rank: age of the state against speed", "16")
    assert_is(half, "auc_loss", "Rank: engine and precision against speed", "hstu bf16")


@pytest.mark.parametrize(
    "step, changes, words",
    [
        (Step("s", max_history=9), {}, "no record has strategy ranker with workload.max_history=9; the nearest"),
        (Step("s", max_candidates=9), {}, "no study measures answers without the last candidates; type the loss"),
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
        (
            Step("s", max_history=8),
            {"engine__precision": "auto"},
            "no record has the options of strategy ranker; the nearest of them has engine.precision=",
        ),
    ],
)
def test_a_step_without_a_record_is_refused(step: Step, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        with_losses(*rank(step, **changes), read_cells([KEPT]))
    message = str(refused.value)
    assert message.startswith(f"degrade[0] (s): {words}")
    assert "type the loss into the file" in message and "\n" not in message


@pytest.mark.parametrize("auto", ["ranker", "half"])
def test_the_precision_of_a_strategy_is_to_be_named(auto: str) -> None:
    """The advice is not to measure: a record with `auto` has the precision that ran."""
    precision = {"ranker": "auto", "half": "fp32"}[auto]
    step = Step("s", strategy="half") if auto == "half" else Step("s", max_history=8)
    advice = r"; set engine\.precision=fp32 in the strategy: a record has the precision that ran; or type the loss"
    with pytest.raises(ConfigError, match=rf"strategy {auto}; the nearest of them has [^;]*{advice}"):
        with_losses(*rank(step, half=["engine.precision=auto"], engine__precision=precision), read_cells([KEPT]))


def test_an_onnx_file_is_another_model() -> None:
    """The file of a strategy may be of 8 bits, and then runs as fp16. The record of bf16 is made one of fp16."""
    cells = read_cells([KEPT])
    for _, record in cells:
        if record.spec["engine"].get("precision") == "bf16":
            record.spec["engine"] |= {"name": "onnxruntime", "precision": "fp16", "onnx": None}
    half, step = ["engine=onnxruntime", "engine.precision=fp16"], Step("s", strategy="half")
    assert_is(
        with_losses(*rank(step, half=half), cells)[0],
        "auc_loss",
        "Rank: engine and precision against speed",
        "hstu bf16",
    )
    with pytest.raises(ConfigError, match=r"half; the nearest of them has engine\.onnx=null instead of sha256:"):
        with_losses(*rank(step, half=[*half, f"engine.onnx={__file__}"]), cells)


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
        with_losses(*rank(Step("short", max_history=8)), cells)


def test_the_precision_of_a_record_is_that_which_ran() -> None:
    """The records' engine with `auto` ran fp32 on a CPU: the strategy says fp32, and has the same loss."""
    cells = read_cells([KEPT])
    for _, record in cells:
        if record.spec["engine"].get("precision") == "fp32":
            record.spec["engine"]["precision"] = "auto"
    [short] = with_losses(*rank(Step("short", max_history=8)), cells)
    assert_is(short, "auc_loss", "Rank: history window against speed", "8")


def test_fewer_candidates_keep_the_loss_that_was_typed() -> None:
    typed = Step("half", max_candidates=16, loss={"auc_loss": 0.003})
    kept, short = with_losses(*rank(typed, Step("short", max_history=8)), read_cells([KEPT]))
    assert kept == typed
    assert_is(short, "auc_loss", "Rank: history window against speed", "8")


def test_a_loss_of_nothing_has_no_sign() -> None:
    """A record is there twice, the second time as if its window were shorter."""
    [base] = [(f, record) for f, record in read_cells([KEPT]) if f.name == "rank_offline_quality_requests=1000"]
    copied = copy.deepcopy(base[1])
    copied.spec["workload"]["max_history"] = 49
    [short] = with_losses(*rank(Step("short", max_history=49)), [base, (base[0], copied)])
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
