"""Signals that end a command, and a worker whose launcher is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from grbench import signals
from grbench.config import command
from grbench.config.compose import prepare_hydra
from grbench.config.jobs import Job, Session
from grbench.config.schema import to_spec


@pytest.fixture(autouse=True)
def handlers() -> Iterator[list[object]]:
    before = [signal.getsignal(number) for number in signals.ENDING]
    yield list(before)
    for number, handler in zip(signals.ENDING, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", signals.ENDING)
def test_the_first_signal_is_raised_and_later_ones_are_ignored(number: signal.Signals) -> None:
    with pytest.raises(signals.Stopped) as stopped, signals.raised():
        signal.raise_signal(number)
    for each in signals.ENDING:
        signal.raise_signal(each)
    assert signals.exit_code(stopped.value) == 128 + number


def test_handlers_are_as_before_where_no_signal_came(handlers: list[object]) -> None:
    with signals.raised():
        assert signal.getsignal(signal.SIGTERM) is not handlers[1]
    assert [signal.getsignal(each) for each in signals.ENDING] == handlers


def test_an_interrupt_without_a_signal_has_the_exit_code_of_ctrl_c() -> None:
    assert signals.exit_code(KeyboardInterrupt()) == 130


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with signals.raised():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_waits_for_the_end_of_what_is_kept() -> None:
    done = False
    with signals.raised(), pytest.raises(signals.Stopped, match="SIGTERM"), signals.deferred():
        signal.raise_signal(signal.SIGTERM)
        done = True
    assert done


def test_a_worker_ends_with_its_launcher() -> None:
    """The test is the launcher: it goes away as one does that SIGKILL ends, without a word."""
    code = "import sys, time, threading; from grbench.execution.worker import _end_with_launcher as end\n"
    code += "threading.Thread(target=end, args=[int(sys.argv[1])], daemon=True).start(); print(); time.sleep(600)"
    read_end, write_end = os.pipe()
    command = [sys.executable, "-c", code, str(write_end)]
    worker = subprocess.Popen(command, pass_fds=[write_end], start_new_session=True, stdout=subprocess.PIPE)
    os.close(write_end)
    assert worker.stdout is not None and worker.stdout.readline() == b"\n"
    assert worker.poll() is None
    os.close(read_end)
    assert worker.wait(timeout=60) == -signal.SIGKILL


def test_a_signal_while_the_results_are_drawn_does_not_cost_the_table(tmp_path: Path) -> None:
    closed: list[str] = []

    class Drawing(Session):
        def run(self, job: Job) -> None: ...

        def finish(self) -> None: ...

        def close(self, cut_short: str = "") -> int:
            closed.append(cut_short)
            if len(closed) == 1:
                raise signals.Stopped(signal.SIGTERM)
            return 0

    words = ["engine=hstu", "tracking=none", f"hydra.run.dir={tmp_path}"]
    with pytest.raises(signals.Stopped):
        command.run("grbench", words, "config", prepare_hydra, to_spec, lambda first, invocation: Drawing())
    assert closed == ["", "interrupted"]


def test_a_signal_that_python_drops_comes_again() -> None:
    """An exception in a callback of weakref is dropped."""
    thing = {0}
    called: list[object] = []

    def callback(reference: object) -> None:
        called.append(reference)
        signal.raise_signal(signal.SIGTERM)
        called.append("not reached")

    kept = weakref.ref(thing, callback)
    with pytest.raises(signals.Stopped, match="SIGTERM"), signals.raised():
        del thing
        assert called == [kept], "the first signal was raised in the callback, and dropped"
        time.sleep(60)
        pytest.fail("the signal did not come again")
