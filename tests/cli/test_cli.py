"""The `grbench` command: its subcommands, their help, unknown words, shell completion."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.checkout import ROOT
from helpers.command import Grbench

import grbench
from grbench.cli import main
from grbench.completion import HYDRA
from grbench.subcommands import SUBCOMMANDS

Capture = pytest.CaptureFixture[str]
COMPLETED = {  # typed: some of what it becomes, and what it must not become
    "grbench ": ("doctor build-plan engine= seed=", "--help"),
    "grbench si": ("sizing", "doctor seed="),
    "grbench engine=": ("engine=hstu engine=vllm", "doctor"),
    "grbench scenario=offline model=hstu_t": ("model=hstu_tiny", "model=dlrm_v3"),
    "grbench run cache=l": ("cache=lru cache=lfu", "cache=none"),
    "grbench kernels dty": ("dtype=", "kernels latency_limit_ms="),
    "grbench cachesim polic": ("policies.", "kernels"),
    "grbench sizing --": ("--items --precision", "--repeats"),
    "grbench sizing --items 5 model=d": ("model=dlrm_v3", "model=hstu_tiny --items"),
    "grbench export --precision int8 model.lay": ("model.layers=", "--precision"),
    "grbench ui --p": ("--port", "--uri"),
    "grbench import --": ("--uri --experiment", "--port"),
}


@pytest.fixture(autouse=True)
def as_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in this process leave it as it was."""
    monkeypatch.setattr(sys, "argv", ["grbench"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")


def output(capsys: Capture, *words: str) -> str:
    """Return the output of a command line that succeeds."""
    try:
        code = main(words)
    except SystemExit as ended:  # of --help
        code = int(ended.code or 0)
    printed = capsys.readouterr()
    assert (code, printed.err) == (0, "")
    return printed.out


def test_a_checkout_without_its_packages_says_how_to_set_up() -> None:
    words = [sys.executable, "-S", "-m", "grbench", "engine=hstu"]  # -S: without the installed packages
    done = subprocess.run(words, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{sys.executable} has no package grkernels; run `make setup" in done.stderr


def test_help_lists_every_subcommand_on_one_screen(capsys: Capture) -> None:
    lines = output(capsys, "--help").splitlines()
    assert len(lines) < 56 and max(map(len, lines)) < 120
    for name, command in SUBCOMMANDS.items():
        assert f"  grbench {name:<14} {command.summary}" in lines


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_subcommand_has_help_with_an_example(capsys: Capture, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """It is as wide as the terminal but for the examples, and explains each flag, or says what explains each key."""
    monkeypatch.setenv("COLUMNS", "80")
    text = output(capsys, name, "--help")
    assert f"python -m grbench {'' if name == 'run' else name}".rstrip() in text
    if not text.startswith("usage: "):
        assert name == "run" or f"grbench config {name}" in text
        return
    before = text.partition("\nexamples:")[0].splitlines()
    assert max(map(len, before)) <= 80 and "..." not in text.partition("\nexamples:")[2]
    flags = [i for i, line in enumerate(before) if line.startswith("  -") and "  " not in line.strip()]
    bare = [before[i] for i in flags if not "".join(before[i + 1 : i + 2]).startswith("        ")]
    assert not bare


def test_help_lists_the_options_in_a_folder_of_ones_own(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "workload").mkdir()
    (tmp_path / "workload" / "mine.yaml").write_text("defaults: [/schema/workload/synthetic@_here_]\nname: mine\n")
    text = output(capsys, "--config-dir", str(tmp_path), "workload=mine", "--help")
    assert "\nworkload: csv, mine, ml_100k, " in text


@pytest.mark.parametrize(
    "word, line",
    [
        ("sizng", "sizng: no such command; nearest: sizing; commands: run, tune, doctor, "),
        ("kernelbench", "kernelbench: no such command; nearest: kernels; commands: run, "),
        ("seed", "seed: no such command; nearest: serve; commands: run, tune, doctor, "),
    ],
)
def test_an_unknown_word_is_one_line_with_the_nearest_commands(capsys: Capture, word: str, line: str) -> None:
    assert main([word, "model=hstu_tiny"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"grbench: {line}") and printed.err.count("\n") == 1


@pytest.mark.parametrize(
    "line, near",
    [
        ("compare --tolerence 1 a b", "--tolerance"),
        ("export --precision fp33", "fp32"),
        ("tune engine=hstu scenario=servr", "server"),
        ("tune engine=hstu --config-dir . scenario=servr", "server"),
        ("cachesim policies=[lruu]", "lru"),
        ("kernels families=[layer_nrm]", "layer_norm"),
        ("config engin", "engine"),
        ("reports refrence", "reference"),
    ],
)
def test_a_misspelt_choice_of_a_subcommand_is_one_line_with_the_nearest(capsys: Capture, line: str, near: str) -> None:
    assert main(line.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and f"; nearest: {near}; " in printed.err and printed.err.count("\n") == 1


def test_the_version_is_the_packages(capsys: Capture) -> None:
    assert output(capsys, "--version") == f"grbench {grbench.__version__}\n"


def test_run_is_the_name_of_the_default(capsys: Capture) -> None:
    named, default = (output(capsys, *words, "--cfg", "job", "seed=3") for words in ([], ["run"]))
    assert named == default and "seed: 3" in named


@pytest.mark.parametrize("typed", COMPLETED)
def test_a_typed_line_is_completed(capsys: Capture, monkeypatch: pytest.MonkeyPatch, typed: str) -> None:
    monkeypatch.setenv("COMP_LINE", typed)
    found = set(output(capsys, "-sc", "query=bash").split())
    some, none = (set(words.split()) for words in COMPLETED[typed])
    assert some <= found and not none & found


@pytest.mark.parametrize("name", [name for name in SUBCOMMANDS if name not in HYDRA])
def test_the_flags_of_a_subcommand_are_those_of_its_help(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("COMP_LINE", f"grbench {name} --")
    completed = set(output(capsys, "-sc", "query=bash").split())
    assert completed == set(re.findall(r"^ +(?:-\w, )?(--[\w-]+)", output(capsys, name, "--help"), re.M)) - {"--help"}


def test_bash_completes_subcommands(tmp_path: Path) -> None:
    program = tmp_path / "grbench"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.argv[0] = \'grbench\'\n'
                       'from grbench.cli import main; sys.exit(main())" "$@"\n')  # fmt: skip
    program.chmod(0o755)
    script = f"""
PATH={tmp_path}:$PATH
eval "$(grbench -sc install=bash)"
COMP_LINE="grbench over" COMP_POINT=12 COMP_CWORD=1
hydra_bash_completion
echo "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "overhead\n", done.stderr


def test_a_reader_that_leaves_is_no_error(grbench: Grbench, tmp_path: Path) -> None:
    command = f"{sys.executable} -m grbench kernels --help | true"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_working_folder_that_is_gone_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert main(["sizing", "engine=hstu"]) == 2
    assert capsys.readouterr().err == "grbench sizing: the working folder was removed; change to one that exists\n"
