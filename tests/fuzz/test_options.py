"""Random options: each command line gives a cell or one line that says what is wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from helpers.command import Grbench
from helpers.fuzz import drawn, for_seconds, require_one_line
from hypothesis import given
from hypothesis import strategies as st

from grbench.cachesim.config import CacheSimConfig
from grbench.config.compose import compose_spec
from grbench.config.schema import ConfigError, GateConfig, RetrievalConfig, RunConfig, RunnerConfig, schemas
from grbench.execution import records
from grbench.kernelbench.config import KernelBenchConfig

# What hydra's grammar, numbers and texts have at their edges.
VALUES = [
    *("0", "1", "-1", "2", "7", "64", "1e9", "-0.5", "0.5", "1e-300", "1e308", "inf", "nan", "9" * 20, "true", "null"),
    *(
        "",
        "''",
        "x",
        "[]",
        "[1]",
        "[1,2]",
        "[x,null]",
        "{}",
        "{a:1}",
        "'a b'",
        '"it\'s"',
        "???",
        "${seed}",
        "${nope}",
        "1,2",
    ),
    *("range(3)", "auto", "fp32", "int8", "torch", "hstu", "lru", "ml_100k", "server", "../x", "/dev/null", "~", "%20"),
]
FAST = [  # so that a cell that runs takes seconds
    "engine=hstu",
    "model=hstu_tiny",
    "workload=synthetic",
    "workload.items=300",
    "workload.users=30",
    "workload.visits=60",
    "workload.history_median=16",
    "workload.max_history=64",
    "scenario=closed_loop",
    "scenario.queries=32",
    "gate.requests=2",
    "warmup_batches=1",
    "tracking=none",
    "runner.timeout_s=60",
]
CHEAP = [  # options whose every allowed value keeps such a cell short
    *("model.alpha", "model.contextual_seq_len", "model.max_attn_len", "model.scaling_seqlen"),
    *("model.max_positions", "model.time_buckets", "model.tasks", "engine.precision", "engine.device"),
    *("kernel", "kernel.layer_norm", "cache", "cache.block", "workload.num_candidates", "workload.min_history"),
    *("workload.max_requests", "workload.revisit_rate", "workload.item_zipf", "workload.user_zipf"),
    *("workload.delta_mean", "workload.burstiness", "scenario.clients", "scenario.max_batch"),
    *("scenario.max_wait_ms", "scenario.in_flight", "gate.measured", "gate.allow_loss", "latency_limit_ms"),
    *("warmup_batches", "seed", "task"),
]


def keys() -> list[str]:
    """Return every key of a run: groups, and the options of every schema of each."""
    found = {f.name for f in dataclasses.fields(RunConfig)}
    grouped = {group: list(options.values()) for group, options in schemas().items()}
    grouped |= {"gate": [GateConfig], "retrieval": [RetrievalConfig], "runner": [RunnerConfig]}
    for group, options in grouped.items():
        found |= {f"{group}.{f.name}" for schema in options for f in dataclasses.fields(schema)}
    return sorted(found)


def choices() -> st.SearchStrategy[str]:
    groups = {group: sorted(options) for group, options in schemas().items()}
    return st.sampled_from(sorted(groups)).flatmap(lambda g: st.sampled_from(groups[g]).map(lambda name: f"{g}={name}"))


def words(known: list[str]) -> st.SearchStrategy[str]:
    """Return overrides of known keys with values that may be nonsense, and now and then of other keys."""
    key = st.one_of(st.sampled_from(known), st.sampled_from(known), st.text("abc._@=+~ ", min_size=1, max_size=6))
    value = st.one_of(st.sampled_from(VALUES), st.integers(-5, 5000).map(str), st.text(max_size=6))
    return st.tuples(st.sampled_from(["", "", "", "+", "++", "~"]), key, value).map(lambda p: f"{p[0]}{p[1]}={p[2]}")


def test_random_overrides_give_a_spec_or_one_line(seconds: float) -> None:
    overrides = st.lists(choices(), max_size=3), st.lists(words(keys()), min_size=1, max_size=4)

    @drawn(seconds, 12)
    @given(*overrides)
    def check(chosen: list[str], typed: list[str]) -> None:
        try:
            spec, _ = compose_spec([*chosen, *typed])
            assert len(spec.hash) == 12
        except ConfigError as e:
            require_one_line(e)

    for_seconds(seconds, check)


@pytest.mark.parametrize(("command", "schema"), [("kernels", KernelBenchConfig), ("cachesim", CacheSimConfig)])
def test_random_options_of_other_commands_end_without_a_traceback(
    command: str, schema: type[Any], grbench_here: Grbench, seconds: float
) -> None:
    known = [f.name for f in dataclasses.fields(schema)]

    @drawn(seconds, 10)
    @given(st.lists(words(known), min_size=1, max_size=3))
    def check(typed: list[str]) -> None:
        done = grbench_here(command, *(word for word in typed if not word.startswith("-")), "--cfg", "job")
        assert done.returncode in (0, 2), done.stderr
        assert done.returncode == 0 or len(done.stderr.strip().splitlines()) == 1, done.stderr

    for_seconds(seconds, check)


def test_a_cell_of_random_options_ends_as_a_record_or_one_line(
    grbench_here: Grbench, seconds: float, tmp_path: Any
) -> None:
    """Run cells of cheap options. An error that the code does not expect begins with the name of its type."""

    @drawn(seconds, 1 if seconds == 0 else 5)
    @given(st.lists(st.sampled_from(CHEAP).flatmap(lambda key: words([key])), min_size=1, max_size=3))
    def check(typed: list[str]) -> None:
        before = set(tmp_path.rglob(records.RECORD_FILE))
        done = grbench_here(*FAST, *typed)
        assert done.returncode in (0, 1, 2) and "Traceback" not in done.stderr, done.stderr
        made = [records.load(path) for path in set(tmp_path.rglob(records.RECORD_FILE)) - before]
        assert len(made) == (done.returncode != 2), done.stderr
        for record in made:
            kind = (record.error or "").partition(":")[0]
            assert not kind.endswith(("Error", "Exception")), f"{' '.join(typed)}: {record.error}"

    for_seconds(seconds, check)
