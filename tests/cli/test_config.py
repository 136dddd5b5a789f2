"""Configurations: every group composes, wrong ones are refused in one line, from anywhere."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.checkout import ROOT
from helpers.command import Grbench
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import grbench
from grbench import workloads
from grbench.cli import main
from grbench.config import composition, malformed
from grbench.config.compose import CONFIG_DIR, compose_jobs, compose_spec, explain, plan_jobs, prepare_hydra
from grbench.config.reference import ROOTS, reference
from grbench.config.schema import (
    ConfigError,
    RunConfig,
    RunSpec,
    batching,
    schemas,
    spec_from_json,
    spec_to_json,
    to_spec,
)
from grbench.config.unread import unread
from grbench.execution.files import require_files
from grbench.workloads import load_events
from grbench.workloads.config import DrawnConfig
from grengines import registry

GROUPS = ["model", "engine", "kernel", "cache", "workload", "scenario", "tracking"]
OPTIONS = [
    (group, path.stem) for group in GROUPS for path in sorted((ROOT / "conf" / group).glob("*.yaml"))
]  # fmt: skip


@pytest.fixture
def events(tmp_path: Path) -> str:
    """The path of a file that csv and recbole read."""
    (tmp_path / "events.tsv").write_text("user_id\titem_id\ttimestamp\n1\t2\t3\n")
    return str(tmp_path / "events.tsv")


@pytest.mark.parametrize("group, name", OPTIONS)
def test_every_option_of_every_group_composes(group: str, name: str, events: str) -> None:
    needs = [f"workload.path={events}"] if name in ("csv", "recbole") else []
    needs += ["engine=hf"] if name.startswith("decoder_") else ["engine=hstu"] if name in ("dlrm_v3_stu", "fp8") else []
    spec, run = compose_spec([f"{group}={name}", *needs])
    chosen = getattr(run, group)
    assert chosen.name == name
    assert spec_from_json(spec_to_json(spec)) == spec


@pytest.mark.parametrize("group, name", OPTIONS)
def test_a_file_holds_only_values_that_differ_from_its_schema(group: str, name: str) -> None:
    path = ROOT / "conf" / group / f"{name}.yaml"
    assert path.read_text().startswith("# ")  # docs/CONFIG.md shows the comment
    stated = OmegaConf.load(path)
    assert isinstance(stated, DictConfig)
    base, *_ = stated.pop("defaults")
    schema = OmegaConf.structured(schemas()[group][base.removeprefix(f"/schema/{group}/").removesuffix("@_here_")])
    restated = [key for key in stated if OmegaConf.merge(schema, {key: stated[key]})[key] == schema._get_node(key)]
    assert not restated, f"{path}: {restated} are the schema's own defaults: remove them"


@pytest.mark.parametrize("name", ["config", "cachesim", "kernelbench", "train", "tune"])
def test_a_root_file_holds_the_groups_and_hydras_settings_alone(name: str) -> None:
    stated = OmegaConf.load(ROOT / "conf" / f"{name}.yaml")
    assert set(stated) == {"defaults", "hydra"}


def test_the_reference_page_is_current() -> None:
    page = (ROOT / "docs" / "CONFIG.md").read_text()
    assert page == reference(), "write it again: python -m grbench config > docs/CONFIG.md"


DOCUMENTED = [*(s for group in schemas().values() for s in group.values()), *(s for _, s in ROOTS.values())]


@pytest.mark.parametrize("schema", DOCUMENTED, ids=lambda schema: schema.__name__)
def test_every_key_has_a_meaning(schema: type) -> None:
    for field in dataclasses.fields(schema):
        if field.default_factory is dict or dataclasses.is_dataclass(field.default_factory):
            continue  # a group
        meaning = field.metadata["help"]
        assert meaning and not meaning.endswith(".") and "|" not in meaning, field.name


def test_a_part_of_the_reference_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "gate", "runner"]) == 0
    printed = capsys.readouterr().out
    assert "| `max_error_ratio` | float > 0 | `2.0` |" in printed and "| `timeout_s` |" in printed
    assert printed in reference() and "| `latency_limit_ms` |" not in printed
    assert main(["config", "gates"]) == 2
    assert capsys.readouterr().err == (
        "grbench config: gates: no such group; nearest: gate; groups: run, model, engine, kernel, cache, workload, "
        "scenario, tracking, retrieval, gate, runner, slurm, tune, kernels, cachesim, fleet, train, training, serve\n"
    )


@pytest.mark.parametrize(
    "overrides, key, allowed",
    [
        (["scenario.max_bach=3"], "max_bach", "max_batch"),  # a typo lists the known keys
        (["engine=hstu", "+engine.turbo=true"], "turbo", "precision"),
        (
            ["engine=hstu", "cache.memory_gb=1"],
            "cache.memory_gb: cache=none has no memory_gb",
            "set cache=gdsf, lfu, lru or predictive, or leave it out",
        ),
        (["scenario.clients=2"], "scenario=server has no clients", "set scenario=closed_loop, or leave it out"),
        (["scenario.max_batch=many"], "scenario.max_batch", "int"),
        (["scenario.max_batch=0"], "scenario.max_batch", ">= 1"),
        (["runner.timeout_s=1e10"], "runner.timeout_s", "<= 31536000"),
        (["runner.memory_limit_gb=1e12"], "runner.memory_limit_gb", "<= 1000000"),
        (["model.tasks=[]"], "model.tasks=[]", "at least one output"),
        (["model.tasks=liked"], "model.tasks=liked", "list of str; write 'model.tasks=[liked]'"),
        (["engine=hstu", "engine.precision=fp4"], "engine.precision", "bf16"),
        (["latency_limit_ms=-1"], "latency_limit_ms", "> 0"),
        (["latency_limit_ms=.inf"], "latency_limit_ms", "> 0"),
        (["latency_limit_ms=.nan"], "latency_limit_ms", "> 0"),
        (["gate.requests=1"], "gate.requests", ">= 2"),
        (["engine=hf", "task=generate", "scenario.in_flight=2"], "scenario.in_flight=2", "hstu, aoti"),
        (["engine=pipeline", "scenario.in_flight=2"], "scenario.in_flight=2", "vllm batches by itself"),
        (
            ["engine=hstu", "scenario=single_stream", "scenario.in_flight=4"],
            "scenario.in_flight=4",
            "scenario.in_flight=1",
        ),
        (["scenario.order=lifo"], "scenario.order", "fifo, length, hit"),
        (["engine=hstu", "scenario.order=hit"], "scenario.order=hit: cache=none", "cache=lru"),
        (["engine=warp"], "engine", "hstu"),
        *(
            (["engine=remote", f"engine.url={url}"], f"engine.url={url}: allowed is", "such as http://127.0.0.1:8000")
            for url in ("foo", "127.0.0.1:8000", "ftp://a:1", "http://a:b", "http://:80", "http://a:1/v2", "http://a:0")
        ),
        (["engine=hstuu"], "engine=hstuu", "nearest: hstu;"),
        (["engine=onnx"], "engine=onnx", "nearest: onnxruntime;"),
        (["model=hstu_tny"], "model=hstu_tny", "nearest: hstu_tiny;"),
        (["kernel=tritn"], "kernel=tritn", "nearest: triton;"),
        (["kernel.layer_norm=TRITN"], "kernel.layer_norm=TRITN", "nearest: triton;"),
        (["cache=lruu"], "cache=lruu", "nearest: lru;"),
        (["workload=ml_100"], "workload=ml_100", "nearest: ml_100k;"),
        (["scenario=ofline"], "scenario=ofline", "nearest: offline;"),
        (["task=generat"], "task=generat", "nearest: generate;"),
        (["engine@engine.retrieve=vlm"], "vlm", "nearest: vllm;"),
        (["nonsense=1"], "nonsense", "latency_limit_ms"),
        (["workload=csv"], "workload.path", "workload.path"),
        (["model.layers=null"], "model.layers", "int"),
        (["seed=[1,"], "seed=[1,", "[ is not closed; write 'seed=[1]'"),
        (["seed"], "seed", "key=value"),
        (["workload.path=müll/a.csv"], "'ü' needs quotes around the text", """write 'workload.path="müll/a.csv"'"""),
        *(
            (["workload=csv", f"workload.path={path}"], f"workload.path={path}: ${{ refers to another option: ", typed)
            for path, typed in (
                ("/d${x}/r.csv", """there is no x; for the text itself type 'workload.path="/d\\${x}/r.csv"'"""),
                ("/d${", """no } closes it; for the text itself type 'workload.path="/d\\${"'"""),
                ("/d${x:1}", """Unsupported interpolation type x; for the text itself"""),
            )
        ),
        (["workload=csv", 'workload.path="/d${"'], "no } closes it", """type 'workload.path="/d\\${"'"""),
        (
            ["runner.output_root=/o ${z}"],
            "runner.output_root=/o ${z}: ${ refers",
            """'runner.output_root="/o \\${z}"'""",
        ),
        (["hydra.run.dir=/o${z}"], "hydra.run.dir: ", "'z' not found"),
        (["engin=hstu"], "engin", "nearest: engine;"),
        (["engine=null"], "engine=null", "one option"),
        (["gate=none"], "gate=none", "gate.KEY="),
        (["scenario=server,offline"], "scenario=server,offline", "-m sweeps"),
    ],
)
def test_a_wrong_value_is_one_line_with_key_and_what_is_allowed(overrides: list[str], key: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_spec(overrides)
    message = str(caught.value)
    assert key in message
    assert allowed in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("overrides", "batch", "flight"),
    [
        (["engine=hstu"], "16, the default", "2, the default: engine hstu takes a batch while another is under way"),
        (
            ["engine=aoti", "scenario.in_flight=1", "scenario.max_batch=8"],
            "8, set instead of 16",
            "1, set instead of 2",
        ),
        (["engine=hf", "task=generate"], "16, the default", "1, the default: engine hf ends a batch before"),
        (["engine=pipeline"], "16, the default", "1, the default: engine vllm batches by itself"),
        (["engine=hstu", "scenario=single_stream"], "1, the default: single_stream", "1, the default: single_stream"),
        (["engine=hstu", "scenario=single_stream", "scenario.max_batch=4"], "4, set instead of 1", "1, the default"),
        (["engine=hstu", "scenario=multi_stream", "scenario.max_batch=1"], "1, set instead of 16", "2, the default"),
    ],
)
def test_the_defaults_of_batches_follow_the_engine(overrides: list[str], batch: str, flight: str) -> None:
    spec, _ = compose_spec(overrides)
    why = batching(spec)
    assert why["max_batch"].startswith(batch) and why["in_flight"].startswith(flight)
    assert f"{spec.scenario.max_batch}, {spec.scenario.in_flight}" == f"{batch.split(',')[0]}, {flight.split(',')[0]}"


def test_every_cell_of_a_sweep_is_checked_before_the_first_runs(grbench_here: Grbench) -> None:
    done = grbench_here("-m", "workload=synthetic", "scenario.max_batch=1,2,0")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "grbench: scenario.max_batch=0: allowed is int >= 1 and <= 65536; 1 of 3 combinations can't be, and "
        "skip_invalid=true leaves them out"
    ], done.stderr
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize(
    "arguments, line",
    [
        ("--nope", "--nope: no such flag; python -m {} --hydra-help lists them"),
        ("--run -m", "--run --multirun: only one of them at a time; leave the others out"),
        ("--cfg everything", "argument --cfg/-c: invalid choice"),
        ("--config-dir nowhere", "--config-dir nowhere: no such folder"),
        ("--config-name other", "Cannot find primary config 'other'"),
        ("--resolve", "--resolve: it needs --cfg job; give both"),
        ("--config-path conf", "--config-path: not taken here; --config-dir FOLDER adds"),
    ],
)
@pytest.mark.parametrize("program", ["grbench", "grbench cachesim"])
def test_a_wrong_flag_is_one_line(grbench_here: Grbench, program: str, arguments: str, line: str) -> None:
    done = grbench_here(*program.split()[1:], *arguments.split())
    assert done.returncode == 2
    [error] = done.stderr.splitlines()
    assert error.startswith(f"{program}: {line.format(program)}")


@pytest.mark.parametrize(
    "words, option",
    [
        (["engine=hstu", "workload=synthetic"], "runner.output_root"),
        (["tune", "engine=hstu", "workload=synthetic"], "runner.output_root"),
        (["cachesim"], "output_root"),
    ],
)
@pytest.mark.usefixtures("forked_workers")
def test_a_folder_that_cannot_be_made_is_one_line(
    grbench_here: Grbench, tmp_path: Path, words: list[str], option: str
) -> None:
    (tmp_path / "taken").touch()
    done = grbench_here(*words, f"{option}=taken")
    assert done.returncode == 2
    [error] = done.stderr.splitlines()
    assert f": {option}=taken: Not a directory; set {option} to a folder" in error


def cells_of(overrides: Sequence[str], sweep: bool = True) -> list[tuple[RunSpec, RunConfig]]:
    """Compose the cells of a command line as a user typed it."""
    prepare_hydra()
    return compose_jobs("config", to_spec, overrides, sweep, unread=unread)


def test_a_sweep_is_expanded_as_hydra_does() -> None:
    cells = cells_of(["scenario=offline,server", "seed=range(0,3)"])
    assert [(spec.scenario.name, spec.seed) for spec, _ in cells] == [
        (name, seed) for name in ("offline", "server") for seed in range(3)
    ]


def plan(*overrides: str) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """Return what each job of a sweep was made from, and what was left out."""
    prepare_hydra()
    invocation, jobs = plan_jobs("config", to_spec, overrides, multirun=True)
    assert invocation.total == len(jobs)
    return [job.overrides for job in jobs], invocation.skipped


@pytest.mark.parametrize(
    "swept, fixed",
    [
        ("cache=lru,lfu", ["cache.memory_gb=0.02", "engine=hstu"]),
        ("engine=hstu,onnxruntime", ["engine.precision=fp32"]),
        ("workload=csv,recbole", ["workload.path=events.tsv"]),
    ],
)
def test_a_sweep_over_a_group_takes_a_key_that_the_groups_default_lacks(
    swept: str, fixed: list[str], events: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(events).parent)
    group, _, names = swept.partition("=")
    cells = cells_of([swept, *fixed])
    assert [getattr(spec, group).name for spec, _ in cells] == names.split(",")
    key, _, value = fixed[0].partition("=")
    assert [str(getattr(getattr(spec, group), key.split(".")[1])) for spec, _ in cells] == [value] * 2


def test_a_plan_knows_the_folder_of_ones_own_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    prepare_hydra()
    for words, sweep in ((["engine=hstu"], False), (["engine=hstu", "seed=1"], True)):
        invocation, _ = plan_jobs("config", to_spec, words, sweep, "mine")
        assert invocation.config_dir == tmp_path / "mine"  # a printed command runs from anywhere


def test_a_sweep_takes_a_glob() -> None:
    jobs, _ = plan("model=glob(hstu*)", "engine=hstu")
    assert [words[0] for words in jobs] == ["model=hstu_0p2b", "model=hstu_tiny"]


@pytest.mark.parametrize(
    "word",
    [
        *("runner.repeats=1,5", "runner.output_root=a,b", "runner.keep_engine=true,false", "runner.parallel=2,4"),
        *("runner.cluster=none,slurm", "slurm.gpus=1,2", "tracking=none,mlflow"),
    ],
)
def test_an_option_of_the_whole_sweep_is_not_swept_over(word: str) -> None:
    key = word.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"^{key}=\w+: {key} is an option of the whole sweep"):
        cells_of(["engine=hstu", "seed=0,1", word])
    assert len(cells_of(["engine=hstu", "seed=0,1", word.partition(",")[0]])) == 2


def test_combinations_that_cannot_be_are_refused_by_name_or_left_out() -> None:
    sweep = ["engine=hstu,onnxruntime", "engine.precision=fp32,int8", "workload=synthetic"]
    line = "engine=hstu engine.precision=int8: engine.precision=int8: allowed is one of auto, fp32, fp16, bf16, fp8"
    with pytest.raises(ConfigError) as caught:
        plan(*sweep)
    assert str(caught.value) == f"{line}; 1 of 4 combinations can't be, and skip_invalid=true leaves them out"
    jobs, skipped = plan(*sweep, "skip_invalid=true")
    assert [words[:2] for words in jobs] == [
        ("engine=hstu", "engine.precision=fp32"),
        ("engine=onnxruntime", "engine.precision=fp32"),
        ("engine=onnxruntime", "engine.precision=int8"),
    ]
    assert skipped == (line,)
    with pytest.raises(ConfigError, match=r"^scenario\.max_bach: no such key; nearest"):  # wrong in all of them
        plan("scenario.max_bach=1", "seed=0,1", "skip_invalid=true")


@pytest.mark.parametrize(
    "sweep, cells, line",
    [
        (
            ["engine=hstu", "cache=none,lru", "cache.memory_gb=0.02"],
            [["cache=none"], ["cache=lru", "cache.memory_gb=0.02"]],
            "cache.memory_gb: cache=none does not read it and runs without it; the other combinations use it",
        ),
        (  # a swept option makes no second cell where it is lacking
            ["engine=hstu", "cache=none,lru", "cache.memory_gb=0.02,0.1"],
            [["cache=none"], ["cache=lru", "cache.memory_gb=0.02"], ["cache=lru", "cache.memory_gb=0.1"]],
            "cache.memory_gb: cache=none does not read it and runs without it; the other combinations use it",
        ),
        (
            ["engine=hstu", "scenario=offline,server,closed_loop", "scenario.target_qps=9"],
            [["scenario=offline"], ["scenario=server", "scenario.target_qps=9"], ["scenario=closed_loop"]],
            "scenario.target_qps: scenario=offline, scenario=closed_loop does not read it and runs without it; the "
            "other combinations use it",
        ),
        (  # an option that a task does not read, and one that another option makes idle
            ["engine=hstu,hf", "retrieval.beam_width=16,32"],
            [["engine=hstu"], ["engine=hf", "retrieval.beam_width=16"], ["engine=hf", "retrieval.beam_width=32"]],
            "retrieval.beam_width: engine=hstu does not read it and runs without it; the other combinations use it",
        ),
        (
            ["engine=hstu", "cache=lru", "cache.host_gb=0,1", "cache.prefetch_s=2"],
            [["cache=lru", "cache.host_gb=0"], ["cache=lru", "cache.host_gb=1", "cache.prefetch_s=2"]],
            "cache.prefetch_s: cache.host_gb=0 does not read it and runs without it; the other combinations use it",
        ),
        (
            ["engine=hstu,pipeline", "engine@engine.retrieve=hstu", "engine.retrieve.precision=fp32"],
            [["engine=hstu"], ["engine=pipeline", "engine@engine.retrieve=hstu", "engine.retrieve.precision=fp32"]],
            "engine@engine.retrieve: engine=hstu does not read it and runs without it; the other combinations use it",
        ),
    ],
)
def test_a_combination_that_lacks_an_option_runs_without_it(
    sweep: list[str], cells: list[list[str]], line: str
) -> None:
    said: list[str] = []
    prepare_hydra()
    invocation, jobs = plan_jobs("config", to_spec, sweep, multirun=True, report=said.append, unread=unread)
    assert [[w for w in job.overrides if w != "engine=hstu" or w in cells[0]] for job in jobs] == cells
    assert invocation.total == len(jobs) and said[0] == line


@pytest.mark.parametrize("more", [[], ["skip_invalid=true"]])
def test_an_option_that_no_combination_has_is_refused_with_the_nearest(more: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^cache=none: cache\.memory_g: no such key|^cache\.memory_g: no such key"):
        plan("engine=hstu", "cache=none,lru", "cache.memory_g=0.02", *more)
    with pytest.raises(ConfigError, match=r"nearest: cache\.memory_gb"):
        plan("engine=hstu", "cache=lru,lfu", "cache.memory_g=0.02", *more)
    with pytest.raises(ConfigError, match=r"engine\.precison: no such key; nearest: engine\.precision"):
        plan("engine=hstu", "seed=1,word", "engine.precison=fp32", *more)  # a wrong seed is no proof that it is a key


@pytest.mark.parametrize(
    "word, line",
    [
        ("engine=hstu,", "the list ends with a comma; write engine=hstu, or -m engine=hstu,VALUE for a sweep"),
        ("engine=,hstu", "the list begins with a comma; write engine=hstu, or -m engine=hstu,VALUE for a sweep"),
        ("engine=hstu,,aoti", "the list has an empty item; write -m engine=hstu,aoti"),
        ("engine=,", "the list has an empty item; write engine=VALUE, or -m engine=VALUE,VALUE for a sweep"),
        ("model.tasks=[a,]", "the list has an empty item; write 'model.tasks=[a]'"),
        ("seed=[1,", "[ is not closed; write 'seed=[1]'"),
        ("seed=range(0,3", "( is not closed; write -m 'seed=range(0,3)'"),
        ("model.tasks=a]", "] closes no bracket; write model.tasks=a, or -m model.tasks=a,VALUE for a sweep"),
        ("seed=choice()", "choice() has no values; write seed=VALUE, or -m seed=VALUE,VALUE for a sweep"),
        ("workload.path=~/a.csv", """'~' needs quotes around the text; write 'workload.path="~/a.csv"'"""),
        ("workload.path=a(1).csv", """'(' needs quotes around the text; write 'workload.path="a(1).csv"'"""),
        ("seed", "not an override, which is key=value"),
        ("=hstu", "'' is no key; an override is key=value, with a key such as seed or engine.precision"),
        ("my engine=hstu", "'my engine' is no key; an override is key=value, with a key such as seed"),
    ],
)
def test_a_malformed_word_is_explained_with_what_works(word: str, line: str) -> None:
    for words, sweep in (([word], False), (["engine=hstu", word], True)):
        with pytest.raises(ConfigError) as caught:
            cells_of(words, sweep)
        assert str(caught.value).startswith(f"{word}: {line}")


def test_what_is_written_instead_is_accepted() -> None:
    for word in ("seed=range(0,3", "seed=1,,2", "seed=1,", "workload.path=a(1).csv", "model.tasks=[a,]"):
        prepare_hydra()
        written = shlex.split(malformed.problem(word, "").partition("; write ")[2].partition(", or")[0])
        with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
            OverridesParser.create().parse_overrides([w for w in written if w != "-m"])


@pytest.mark.parametrize("word", ["seed=range(3,1)", "model=glob(nothing*)"])
def test_a_sweep_over_nothing_names_the_option(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cells_of(["engine=hstu", word])
    assert str(caught.value).startswith(f"{word}: it has no value; give at least one, {word.partition('=')[0]}=")


def test_a_sweep_over_an_interval_says_what_is_allowed() -> None:
    with pytest.raises(ConfigError) as caught:
        cells_of(["engine=hstu", "seed=interval(1,4)"])
    allowed = "seed=VALUE,VALUE, 'seed=range(FIRST,END,STEP)' and 'seed=choice(VALUE,VALUE)'"
    assert str(caught.value) == f"seed=interval(1,4): an interval has no list of values; allowed are {allowed}"


REFUSED = [  # what the worker refused before: overrides, and the refusal
    ("engine=onnxruntime cache=lru", "cache=lru: engine=onnxruntime computes whole histories; set cache=none"),
    ("engine=onnxruntime cache.item_memory_gb=1", "cache.item_memory_gb=1: engine=onnxruntime has the whole table"),
    ("engine=onnxruntime kernel=triton", "kernel=triton: engine=onnxruntime runs its own kernels; set kernel=auto"),
    ("engine=onnxruntime engine.device=cpu engine.precision=bf16", "engine.precision=bf16 and engine.device=cpu: "),
    ("engine=tensorrt cache=lru", "cache=lru: engine=tensorrt computes whole histories; set cache=none"),
    ("engine=tensorrt engine.refit=true engine.precision=int8", "engine.refit=true and engine.precision=int8: "),
    ("engine=tensorrt engine.fallback=[hstuu]", "engine.fallback=hstuu: nearest: hstu; allowed are hstu, aoti"),
    ("engine=aoti engine.fallback=[onnxruntime] cache=lru", "engine.fallback=onnxruntime: cache=lru: engine=onnx"),
    ("engine=aoti cache.item_memory_gb=1", "cache.item_memory_gb=1: a package has the whole table on the device"),
    ("engine=aoti kernel.hstu_attention=cutlass", "kernel.hstu_attention=cutlass can't be part of a package; those"),
    ("engine=aoti engine.device=cpu engine.cuda_graphs=true", "engine.cuda_graphs=true and engine.device=cpu: a CPU"),
    ("engine=hstu engine.device=cpu engine.cuda_graphs=true", "engine.cuda_graphs=true and engine.device=cpu: a CPU"),
    ("engine=hstu engine.cuda_graphs=true engine.candidate_microbatch=8", "engine.cuda_graphs=true and engine.cand"),
    ("engine=hstu task=generate engine.candidate_microbatch=8", "engine.candidate_microbatch=8 is for ranking"),
    ("engine=hstu task=generate cache=lru", "cache=lru: the cache group serves ranking only; set cache=none"),
    ("engine=hf cache.item_memory_gb=1", "cache=none: the cache group serves ranking only"),
    ("engine=hf kernel=triton", "kernel."),
    ("engine=vllm engine.device=cpu engine.cuda_graphs=true", "engine.cuda_graphs=true and engine.device=cpu: a CPU"),
    ("engine=vllm engine.block_size=48", "engine.block_size=48: must be a power of two"),
    (
        "engine=vllm model=decoder_tiny engine.kv_cache_precision=fp8",
        "engine.kv_cache_precision=fp8 and model=decoder_tiny: the attention of decoders reads no scales of pages; set "
        "engine.kv_cache_precision=engine, or a model of HSTU",
    ),
    (
        "engine=vllm cache=lru cache.precision=fp8",
        "cache=lru: the cache group serves ranking only; set cache=none; engine=vllm has engine.kv_cache_precision",
    ),
    (
        "engine=vllm engine.max_num_batched_tokens=1 engine.chunked_prefill=false",
        "engine.max_num_batched_tokens=1 and engine.chunked_prefill=false: a step holds a whole search, so "
        "the least value is 2, and more for longer prompts; set it to 0, or engine.chunked_prefill=true",
    ),
    (
        "engine=vllm model=decoder_tiny engine.max_num_batched_tokens=65 engine.chunked_prefill=false",
        "engine.max_num_batched_tokens=65 and engine.chunked_prefill=false: a step holds a whole search, so "
        "the least value is 66, and more for longer prompts; set it to 0, or engine.chunked_prefill=true",
    ),
    (
        "engine=pipeline engine.retrieve.max_num_batched_tokens=1 engine.retrieve.chunked_prefill=false",
        "engine.retrieve.max_num_batched_tokens=1 and engine.retrieve.chunked_prefill=false: a step",
    ),
    ("engine=vllm model.qk_dim=8 model.v_dim=12", "model.qk_dim=8, model.v_dim=12: engine vllm needs them equal"),
    ("engine=remote cache=lru", "cache=lru: engine remote has none; give the cache to the server"),
    ("engine=pipeline engine@engine.rank=onnxruntime cache=lru", "cache=lru: engine=onnxruntime computes whole"),
    ("engine=pipeline engine.retrieve.block_size=48", "engine.retrieve.block_size=48: must be a power of two"),
    ("engine=hstu task=generate model.variant=research", "model.time_bias=129: a search over 3 levels"),
    (
        "engine=hstu task=generate workload=synthetic retrieval.codes=2",
        "retrieval.levels=3 retrieval.codes=2: 3 levels",
    ),
    ("engine=hstu workload.min_history=9 workload.max_history=8", "workload.min_history=9 is above workload.max_hist"),
    ("engine=hstu workload=synthetic workload.items=9", "workload.num_candidates=32: workload.items=9; ask for fewer"),
    ("engine=hstu workload=synthetic workload.revisit_rate=0", "workload.revisit_rate=0.0 needs 2000 users for 2000"),
    ("engine=hstu workload.max_requests=1", "workload.max_requests=1: the workload has one request, the gate needs"),
    ("engine=hstu workload=synthetic workload.visits=1", "workload.visits=1: the workload has one request, the gate"),
]


@pytest.mark.parametrize("words, line", REFUSED)
def test_what_no_machine_can_run_is_refused_before_it_is_recorded(words: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_spec(words.split())
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    "words",
    [
        "engine.max_num_batched_tokens=1",  # a prompt is read token by token
        "engine.max_num_batched_tokens=2 engine.chunked_prefill=false",
        "model=decoder_tiny engine.max_num_batched_tokens=66 engine.chunked_prefill=false",
        "model=decoder_tiny engine.max_num_batched_tokens=2 engine.chunked_prefill=false retrieval.levels=1",
    ],
)
def test_a_step_that_may_hold_a_search_is_accepted(words: str) -> None:
    compose_spec(["engine=vllm", *words.split()])


UNREAD = [  # overrides of which the cell does not read the last, and why
    ("engine=hstu retrieval.beam_width=8", "task=rank searches for no items; set task=generate, or leave it out"),
    ("engine=hstu retrieval={k:3}", "task=rank searches for no items; set task=generate, or leave it out"),
    ("engine=hstu model.item_norm=true", "task=rank does not read it; set task=generate, or leave it out"),
    ("engine=hstu task=generate model.head_dim=3", "task=generate does not read it; set task=rank, or leave it out"),
    ("engine=hstu task=generate model.weights=f", "task=generate has the weights of retrieval.weights; set that"),
    ("engine=hf retrieval.levels=1 retrieval.codes=9", "with retrieval.levels=1 each item is a code; leave it out, or"),
    ("engine=hstu cache=lru cache.onload_share=1", "it is not read with cache.host_gb=0.0; set cache.host_gb too, or"),
    ("engine=hstu scenario=offline scenario.expected_qps=9", "it is not read with scenario.min_duration_s=0.0; set"),
    ("engine=hstu engine.cuda_graphs=false engine.graph_lengths=[64]", "it is not read with engine.cuda_graphs=false"),
    (
        "engine=pipeline engine.retrieve.cuda_graphs=false engine.retrieve.graph_tokens=[64]",
        "it is not read with engine.retrieve.cuda_graphs=false; set it to auto or true",
    ),
    ("engine=tensorrt engine.calibration=2", "it is not read with engine.precision=auto; set it to int8 or fp8, or"),
    ("engine=hstu gate.quality_requests=9", "random weights have no quality; set model.weights=FILE, or leave it"),
    ("task=recommend workload=synthetic gate.allow_loss=[int8]", "workload=synthetic has random events; set"),
]


@pytest.mark.parametrize("words, why", UNREAD)
def test_an_option_that_a_cell_does_not_read_is_refused_where_it_is_typed(
    words: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("f").touch()
    typed = words.split()
    line = f"{typed[-1]}: {why}"
    with pytest.raises(ConfigError) as caught:
        compose_spec(typed, refuse_unread=True)
    assert str(caught.value).startswith(line)
    with pytest.raises(ConfigError) as caught:  # no cell of a sweep reads it either
        cells_of([*typed, "seed=1,2"])
    assert str(caught.value).replace("True", "true").startswith(line)
    assert compose_spec(typed[:-1], refuse_unread=True)


def test_accuracy_issues_the_requests_that_have_a_truth() -> None:
    words = ["engine=hstu", "scenario=offline", "scenario.mode=accuracy", "model.tasks=[rated,liked]"]
    words.append(f"model.weights={RANKER}")
    with pytest.raises(ConfigError, match=r"^scenario\.queries=9: .* issues gate\.quality_requests; set that$"):
        compose_spec([*words, "scenario.queries=9"], refuse_unread=True)
    assert compose_spec([*words, "gate.quality_requests=9"], refuse_unread=True)


def test_files_may_set_what_a_cell_does_not_read(tmp_path: Path) -> None:
    """One study serves several tasks; what it sets was not typed."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "study").mkdir()
    study = tmp_path / "mine" / "study" / "both.yaml"
    study.write_text("# @package _global_\nretrieval: {k: 3, beam_width: 3}\n")
    assert compose_spec(["engine=hstu", "study=both"], str(tmp_path / "mine"), refuse_unread=True)


@pytest.mark.parametrize("missing", [None, "package vllm is not installed; pip install vllm"])
def test_a_pipeline_is_judged_by_the_stages_that_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, missing: str | None
) -> None:
    """Refuse alike on every machine, whatever it has installed."""
    monkeypatch.setattr(registry, "availability", lambda name: missing)
    words = ["engine=pipeline", "model=dlrm_v3_stu"]
    with pytest.raises(ConfigError, match=r"engine vllm lacks it, .*; set engine@engine\.retrieve=hstu for this model"):
        compose_spec(words)
    compose_spec([*words, "engine@engine.retrieve=hstu"])


@pytest.mark.parametrize(
    "head, more, line",
    [
        ("userId,movieId,timestamp", ["workload.user_column=user"], "row 1 has no column 'user'; nearest: userId;"),
        ("userId,movieId,timestamp", ["workload.rating_column=stars"], "row 1 has no column 'stars'; it has userId"),
        ("who,what,when", [], "no column is known to be the user (user_id, userId,"),
        ("userId,movieId", [], "no column is known to be the time"),
        ("", [], "the file is empty"),
    ],
)
def test_wrong_columns_are_refused_before_anything_is_recorded(
    grbench_here: Grbench, tmp_path: Path, head: str, more: list[str], line: str
) -> None:
    for name in ("e.csv", "e.csv.gz"):
        with gzip.open(tmp_path / name, "wt") if name.endswith("gz") else (tmp_path / name).open("w") as f:
            f.write(f"{head}\n1,2,3\n" if head else "")
        words = ["engine=hstu", "workload=csv", f"workload.path={name}", *more, "tracking=none"]
        done = grbench_here(*words)
        assert done.returncode == 2 and not list(tmp_path.rglob("record.json"))
        assert done.stderr.startswith(f"grbench: {name}: {line}"), done.stderr
    jobs, skipped = plan("engine=hstu,onnxruntime", "cache=none,lru", "skip_invalid=true")
    assert len(jobs) == 3 and skipped[0].startswith("engine=onnxruntime cache=lru: cache=lru: engine=onnxruntime")


def test_a_wrong_row_is_refused_before_anything_is_recorded(grbench_here: Grbench, tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("userId,movieId,timestamp\n1,2,3\n1,x,soon\n")
    words = ["engine=hstu", "workload=csv", "workload.path=e.csv", "tracking=none"]
    line = "e.csv: row 3, column timestamp: 'soon' is not a number; correct or remove the row"
    done = grbench_here("-m", *words, "seed=0,1")
    assert done.returncode == 2 and done.stderr.endswith(f"grbench: {line}\n")
    with pytest.raises(ConfigError, match=re.escape(line)):
        grbench.run(words, output_root=tmp_path / "o")
    assert list(tmp_path.iterdir()) == [tmp_path / "e.csv"]


def test_a_file_is_read_through_once_and_again_when_it_or_its_options_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRBENCH_CACHE", str(tmp_path / "cache"))
    read: list[str] = []
    build = workloads.build
    monkeypatch.setattr(workloads, "build", lambda config, *more: read.append(config.path) or build(config, *more))

    def reads(path: str, *more: str) -> int:
        words = ["engine=hstu", "workload=csv", f"workload.path={path}", "workload.num_candidates=1", *more]
        read.clear()
        require_files([compose_spec(words)[0]] * 2)
        return len(read)

    good = "userId,movieId,timestamp\n1,2,3\n1,3,4\n1,4,9005\n1,2,9009\n2,4,3\n2,3,9000\n"
    (tmp_path / "a.csv").write_text(good)
    (tmp_path / "b.csv").write_text(good)
    assert [reads(f"{tmp_path}/{name}.csv") for name in "aab"] == [1, 0, 0]
    assert reads(f"{tmp_path}/a.csv", "workload.visit_events=1") == 1
    (tmp_path / "a.csv").write_text(good.replace("1,3,4", "1,3,x"))
    for _ in range(2):  # what is wrong is never remembered
        with pytest.raises(ConfigError, match=r"a\.csv: row 3, column timestamp"):
            reads(f"{tmp_path}/a.csv")
    (tmp_path / "cache").rename(tmp_path / "gone")
    (tmp_path / "cache").touch()  # a cache that can't be written: the file is read each time
    assert [reads(f"{tmp_path}/b.csv") for _ in range(2)] == [1, 1]


WEIGHTS = ROOT / "experiments" / "weights" / "ml_100k"
RANKER, RETRIEVER = (f"{WEIGHTS}/{name}/weights.safetensors" for name in ("ranker", "retriever"))
IDS = f"{WEIGHTS}/retriever/semantic_ids.safetensors"
ALIEN = "not a readable safetensors file: it is "


@pytest.mark.parametrize(
    "words, line",
    [
        ("model.weights=good.csv", f"model.weights=good.csv: {ALIEN}text that begins with 'user_id,item_id'; "),
        ("model.weights=w.pt", f"model.weights=w.pt: {ALIEN}an archive, as torch.save writes; `grbench train` writes"),
        ("model.weights=cut.st", "model.weights=cut.st: not a readable safetensors file (Error while deserializing"),
        ("model.weights=empty", f"model.weights=empty: {ALIEN}empty; "),
        ("model.weights=folder", f"model.weights=folder: {ALIEN}a folder; "),
        ("task=generate retrieval.weights=good.csv", f"retrieval.weights=good.csv: {ALIEN}text"),
        ("task=generate retrieval.semantic_ids=good.csv", f"retrieval.semantic_ids=good.csv: {ALIEN}text that begins"),
        (f"model.weights={RETRIEVER}", f"model.weights={RETRIEVER}: it holds a generator's weights, and a ranker's"),
        (f"task=generate retrieval.weights={RANKER}", f"retrieval.weights={RANKER}: it holds a ranker's weights, and"),
        (f"task=generate retrieval.weights={IDS}", f"retrieval.weights={IDS}: it holds semantic IDs, and a gen"),
        (f"task=generate retrieval.semantic_ids={RETRIEVER}", f"retrieval.semantic_ids={RETRIEVER}: it holds a gener"),
        (f"model=decoder_tiny engine=hf retrieval.weights={RETRIEVER}", f"retrieval.weights={RETRIEVER}: it holds a g"),
        (f"model.weights={RANKER}", f"model.weights={RANKER}: written for tasks=[rated,liked], the model has [engag"),
        (f"task=generate retrieval.weights={RETRIEVER} model.eps=0.1", f"retrieval.weights={RETRIEVER}: written for e"),
        (
            f"engine=pipeline engine@engine.retrieve=hstu model.tasks=[rated,liked] model.weights={RANKER} "
            "retrieval.weights=good.csv",
            f"retrieval.weights=good.csv: {ALIEN}text",
        ),
    ],
)  # fmt: skip
def test_other_files_than_weights_are_refused_before_anything_is_recorded(
    words: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.csv").write_text("user_id,item_id\n1,2\n")
    Path("w.pt").write_bytes(b"PK\x03\x04" + bytes(60))
    Path("cut.st").write_bytes(Path(RANKER).read_bytes()[:-9])
    Path("empty").touch()
    Path("folder").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError) as caught:
        grbench.run(["engine=hstu", "tracking=none", *words.split()], output_root=tmp_path / "o")
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_weights_that_fit_are_taken_by_their_headers() -> None:
    words = ["engine=pipeline", "engine@engine.retrieve=hstu", "model.tasks=[rated,liked]", f"model.weights={RANKER}"]
    require_files([compose_spec([*words, f"retrieval.weights={RETRIEVER}", f"retrieval.semantic_ids={IDS}"])[0]])


def test_the_columns_of_a_table_without_its_rows_are_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"user": [1], "item": [2]}), tmp_path / "e.parquet")
    words = ["engine=hstu", "workload=csv", f"workload.path={tmp_path}/e.parquet"]
    with pytest.raises(ConfigError, match=r"e\.parquet: no column is known to be the time"):
        compose_spec(words)
    compose_spec([*words, "workload.time_column=none"])


@pytest.mark.parametrize(
    "name, text, more",
    [
        ("bom.csv", "\ufeffuserId,movieId,timestamp\n1,2,3\n2,2,4\n", []),
        ("bom.csv", "\ufeffuserId,movieId,timestamp\n1,2,3\n2,2,4\n", ["workload.user_column=userId"]),
        ("mac.csv", "userId,movieId,timestamp\r1,2,3\r2,2,4\r", []),
        ("mac.csv.gz", '\ufeff"userId","movieId","timestamp"\r1,2,3\r2,2,4\r', []),
        ("tabs.tsv", "\ufeffuserId\tmovieId\ttimestamp\r\n1\t2\t3\r\n2\t2\t4\r\n", []),
        ("quotes.csv", '"userId","item, id",timestamp\n1,2,3\n2,2,4\n', ['workload.item_column="item, id"']),
        ("mac.txt", "\ufeff1 2 3 4\r2 2 3\r", []),
        ("mac.dat", "1::2::5::3\r2::2::4::4\r", []),
        ("bom.inter", "\ufeffuser_id:token\titem_id:token\ttimestamp:float\r1\t2\t3\r2\t2\t4\r", []),
    ],
)  # fmt: skip
def test_a_file_that_loads_is_not_refused_before(tmp_path: Path, name: str, text: str, more: list[str]) -> None:
    path, data = tmp_path / name, text.encode()
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    workload = "recbole" if name.endswith("inter") else "csv"
    spec = compose_spec(["engine=hstu", f"workload={workload}", f"workload.path={path}", *more])[0]
    assert not isinstance(spec.workload, DrawnConfig)
    assert load_events(spec.workload).num_users == 2


def test_a_head_with_an_open_quote_is_refused_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_bytes(b'"userId,movieId\r1,2\r')
    with pytest.raises(ConfigError, match=r'e\.csv: row 1 has a quote \("\) that is opened and not closed'):
        compose_spec(["engine=hstu", "workload=csv", f"workload.path={tmp_path}/e.csv"])


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["seed=3", "engine=hstu", "engine.precision=bf16", "scenario.max_batch=8", "seed=4"],
        ["engine@engine.retrieve=hstu", "engine.retrieve.precision=fp16", "retrieval={k: 3}", "retrieval.k=4"],
        ["study=batching", "hydra.mode=RUN", "latency_limit_ms=5", "hydra.run.dir=x"],
        ["model.tasks=[a,b]", "+model.other=1", "++engine.other=2", "~workload.users", "+more=1"],
        ["model={layers: 3}", "model=hstu_tiny", "model.layers=4"],
        ["scenario.target_qps=1,2"],
        ["engine=none"],
        ["engine.nothing=1"],
        ["seed=word"],
        ["+seed=1"],
        ["kernel@nowhere=auto"],
        ["~tracking", "tracking.uri=x"],
        ["=1"],
    ],
)
def test_a_kept_choice_of_groups_gives_what_hydra_gives(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is composed twice: the second time its groups are kept, from another folder."""
    prepare_hydra()

    def result(compose: Callable[[], DictConfig]) -> object:
        try:
            return OmegaConf.to_container(compose(), enum_to_str=True)
        except (HydraException, OmegaConfBaseException, ValueError) as e:
            return type(e), explain(e)

    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        result(lambda: composition.compose("config", words))
        monkeypatch.chdir(tmp_path)
        expected = result(lambda: hydra_compose("config", words, return_hydra_config=True))
        assert result(lambda: composition.compose("config", words)) == expected


def test_a_default_that_refers_to_a_choice_follows_it(tmp_path: Path) -> None:
    (tmp_path / "refers.yaml").write_text("defaults: [engine: a, kernel: '${engine}_fast', _self_]\n")
    for name in ("engine/a", "engine/b", "kernel/a_fast", "kernel/b_fast"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text(f"name: {name}\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        for choice in "ab":
            cfg = composition.compose("refers", [f"engine={choice}"])
            assert (cfg.engine.name, cfg.kernel.name) == (f"engine/{choice}", f"kernel/{choice}_fast")


def test_a_kept_choice_of_groups_follows_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kept configuration is used once more, and not when a file has changed or when it was found elsewhere."""
    composed: list[list[str]] = []
    by_hydra = composition.hydra_compose
    monkeypatch.setattr(composition, "hydra_compose", lambda name, words, **options: (
        composed.append(words) or by_hydra(name, words, **options)
    ))  # fmt: skip
    monkeypatch.setattr(composition, "_kept", {})
    monkeypatch.setattr(composition, "FOLDERS", [tmp_path])
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        spec, _ = compose_spec(["engine=hstu", f"seed={seed}", f"engine.candidate_microbatch={seed}"])
        assert (spec.seed, spec.engine.candidate_microbatch) == (seed, seed)
        monkeypatch.chdir(tmp_path.parent)
    assert composed == [["engine=hstu"]]
    (tmp_path / "new.yaml").write_text("a: 1")
    compose_spec(["engine=hstu"])
    own = tmp_path / "own" / "engine" / "mine.yaml"
    own.parent.mkdir(parents=True)
    for precision in ("fp16", "bf16"):
        own.write_text(f"defaults: [/schema/engine/hstu@_here_, _self_]\nprecision: {precision}\n")
        assert compose_spec(["engine=mine"], str(tmp_path / "own"))[0].engine.precision == precision
    assert [words[0] for words in composed] == ["engine=hstu", "engine=hstu", "engine=mine", "engine=mine"]


def test_the_hash_distinguishes_measurements_and_nothing_else() -> None:
    base = compose_spec([])[0].hash
    assert compose_spec(["runner.timeout_s=5", "tracking=none", "rerun=true"])[0].hash == base
    assert compose_spec(["seed=1"])[0].hash != base
    assert compose_spec(["scenario.max_batch=3"])[0].hash != base
    code = "from grbench.config.compose import compose_spec; print(compose_spec([])[0].hash)"
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert again.stdout.strip() == base  # another process, another hash seed


def test_cfg_job_prints_the_whole_configuration_from_any_directory(grbench_here: Grbench) -> None:
    done = grbench_here("--cfg", "job", "model=dlrm_v3", "seed=5")
    assert done.returncode == 0, done.stderr
    assert "seed: 5" in done.stdout
    assert "name: dlrm_v3" in done.stdout
    refused = grbench_here("--cfg", "job", "seed=-5")
    assert refused.returncode == 2
    assert "seed=-5: allowed is int >= 0" in refused.stderr


@pytest.mark.parametrize("line", ["-m {} {}", "{} -m {}", "{} {} -m"])
def test_overrides_stand_before_and_after_flags(grbench_here: Grbench, line: str) -> None:
    words = line.format("workload=synthetic", "seed=0,-5").split()
    done = grbench_here(*words)
    assert done.returncode == 2 and "seed=-5: allowed is int >= 0" in done.stderr and "1 of 2 combin" in done.stderr


def test_overrides_stand_on_both_sides_of_a_question(grbench_here: Grbench) -> None:
    done = grbench_here("model=dlrm_v3", "--cfg", "job", "seed=5")
    assert done.returncode == 0, done.stderr
    assert done.stdout == grbench_here("--cfg", "job", "model=dlrm_v3", "seed=5").stdout


@pytest.mark.parametrize("form", ["json", "csv"])
def test_a_flag_chooses_the_form_of_the_cells(grbench_here: Grbench, form: str) -> None:
    asked = grbench_here(f"--{form}", "--cfg", "job").stdout
    assert f"  print: {form}\n" in asked
    assert asked == grbench_here("--cfg", "job", f"runner.print={form}").stdout


def test_a_folder_of_ones_own_configs_works_beside_ours(grbench_here: Grbench, tmp_path: Path) -> None:
    own = tmp_path / "own" / "workload" / "mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("defaults: [/schema/workload/synthetic@_here_, _self_]\nname: mine\nusers: 77\n")
    done = grbench_here("--config-dir", str(tmp_path / "own"), "workload=mine", "study=batching", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "users: 77" in done.stdout


def test_help_lists_the_groups_and_imports_nothing_heavy(grbench_here: Grbench) -> None:
    done = grbench_here("--help")
    assert done.returncode == 0
    for group in GROUPS:
        assert f"\n{group}: " in done.stdout
    code = (
        "import sys, json; import grbench.cli, grbench.config.compose as c; c.compose_spec([]);"
        "print(json.dumps([m for m in ('torch', 'mlflow', 'vllm', 'tensorrt', 'pandas') if m in sys.modules]))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(loaded.stdout) == []


def test_shell_completion_knows_the_groups(grbench_here: Grbench) -> None:
    done = grbench_here("-sc", "install=bash")
    assert done.returncode == 0
    assert "complete" in done.stdout
