"""One search from the command line: its cells, its progress, its answer and its files."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from grbench.config.compose import compose_spec
from grbench.config.jobs import Invocation
from grbench.config.schema import ConfigError
from grbench.execution.clock import pace
from grbench.execution.files import require_files
from grbench.execution.folders import new_folder, require_writable
from grbench.execution.ranks import require_gpus
from grbench.execution.session import CellSession
from grbench.report.cells import number_of
from grbench.tools import sizing
from grbench.tune import answer, deploy
from grbench.tune.answer import Answer
from grbench.tune.certification import SEED, Certificate, certifiable, plan
from grbench.tune.config import Declared
from grbench.tune.knowledge import Knowledge
from grbench.tune.limits import Verdict
from grbench.tune.live import LiveEvaluator
from grbench.tune.outcome import BudgetSpentError, Configuration, Outcome, Probe, Wanted
from grbench.tune.probes import FEWEST
from grbench.tune.quality import Qualities
from grbench.tune.search import Search
from grbench.tune.space import Space
from grbench.tune.surrogate import Surrogate
from grbench.tune.trial import HELD, Batching, Trial


class TuneSession:
    """Runs a search and says what it found. Every cell is kept, however the search ends.

    The caller holds the command line (`only_command`).
    """

    def __init__(self, declared: Declared, space: Space, words: Sequence[str]) -> None:
        self._declared, self._space, self._words = declared, space, words
        self._screen, self._begun = Console(stderr=True), time.monotonic()
        kept = [] if declared.fixed_value("runner.keep_engine") else ["runner.keep_engine=true"]
        _, run = compose_spec([*declared.fixed, *space.configurations[0].words, *kept], declared.config_dir)
        if run.runner.cluster != "none":
            raise ConfigError(
                f"runner.cluster={run.runner.cluster}: a search measures on its own machine; allowed is none"
            )
        require_files(space.specs.values())
        gpus = require_gpus(space.specs.values(), run.runner.cluster)
        root = Path(run.runner.output_root).absolute()
        self.folder = root / "tune" / datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
        common = frozenset(declared.fixed)
        invocation = Invocation(("tune", *words), 0, self.folder, (), _path(declared.config_dir), common)
        with new_folder(self.folder):
            require_writable(self.folder, f"runner.output_root={run.runner.output_root}", "set runner.output_root to")
            self._cells = CellSession(run, invocation, rare=True, gpus=gpus, alone=True)
        earlier = None if run.rerun else root
        self._qualities = Qualities(declared, space.specs)
        self._evaluator = LiveEvaluator(
            self._cells, declared, space.specs, self._qualities, earlier, self.folder, self._say
        )
        batching = {
            configuration: Batching(spec.scenario.max_batch, spec.scenario.max_wait_ms / 1e3, spec.scenario.in_flight)
            for configuration, spec in space.specs.items()
        }
        proposer = Surrogate(space.configurations, space.axes, declared.seed)
        self._proposer = proposer
        operations = {configuration: sizing.operations(spec) for configuration, spec in space.specs.items()}
        self._knowledge = Knowledge(declared.goal, batching, operations)
        self._search = Search(
            self._knowledge, space.configurations, self._evaluator, proposer, self._show, say=self._say
        )
        self._root = root
        self._unevaluated = ""  # why the weights of what is certified could not be evaluated

    def run(self) -> int:
        """Search, certify and say what was found. Returns the exit code.

        It is 0, 1 if nothing keeps the limits, or 2 if a file of the answer can't be written.

        Raises KeyboardInterrupt after saying what was found until then, and ConfigError.
        """
        cut_short = ""
        certificate: Certificate | None = None
        interrupt: KeyboardInterrupt | None = None
        try:
            self._announce()
            self._search.run()
            certificate = self._certify()
            self._evaluate(certificate)
            found = answer.answer(self._knowledge, certificate)
            if found is not None:
                self._measure_steps(found)
                best = self._knowledge.incumbent
                if certificate is None and best is not None and best is not found.trial:  # a step found a better one
                    certificate = self._certify()
                    self._evaluate(certificate)
                    found = answer.answer(self._knowledge, certificate)
        except KeyboardInterrupt as e:
            cut_short, interrupt = "interrupted", e
            self._knowledge.uncertified = "the search was interrupted"
            found = answer.answer(self._knowledge, certificate)
        except ConfigError:
            self._cells.end(cut_short=True)
            raise
        code = self._conclude(found and self._with_quality(found), cut_short)
        if interrupt is not None:
            raise interrupt
        return code

    def _certify(self) -> Certificate | None:
        """Certify the best, or say why nothing is certified."""
        if not self._declared.goal.runs:
            self._knowledge.uncertified = "certify_runs=0 asks for no others"
            return None
        return self._search.certify()

    def _evaluate(self, certificate: Certificate | None) -> None:
        """Evaluate the weights of what is certified, unless a probe of the same answers has: its budget is no limit."""
        if certificate is not None and self._qualities.due(certificate.trial.configuration):
            self._unevaluated = "its evaluation was interrupted"  # until it has ended
            outcome = self._evaluator.evaluate_quality(certificate.trial.configuration)
            failed = "" if outcome is None or outcome.ok else f"{outcome.status}: {outcome.error}"
            self._unevaluated = "the budget asks for no cell" if outcome is None else failed

    def _with_quality(self, found: Answer) -> Answer:
        """Return an answer with the quality of trained weights, among its figures and in words."""
        known, configuration = self._qualities, found.trial.configuration
        if not known.trained(configuration):
            return found
        if not (metrics := known.metrics(configuration)):
            why = self._unevaluated or known.why_none(configuration)
            return dataclasses.replace(found, quality=f"Its quality is unknown: {why}")
        intervals = {
            **found.outcome.intervals,
            **known.intervals(configuration),
            **known.against_default(configuration),
        }
        outcome = dataclasses.replace(found.outcome, metrics={**found.outcome.metrics, **metrics}, intervals=intervals)
        against = "the default configuration" if known.another_model(configuration) else "the same model in fp32"
        return dataclasses.replace(found, outcome=outcome, quality=answer.quality(outcome, against))

    def _measure_steps(self, found: Answer) -> None:
        """Measure configurations one step from the winner while the budget lasts, so that each step has a cost."""
        closed = {trial.configuration for trial in self._knowledge.trials}.union(*self._knowledge.left_out.values())
        left = [configuration for configuration in self._space.configurations if configuration not in closed]

        def steps() -> Iterator[Configuration]:
            for configuration in answer.unmeasured_steps(found, self._space.axes, left):
                self._proposer.take(configuration)
                yield configuration

        with contextlib.suppress(BudgetSpentError):
            self._search.try_each(steps())

    def _conclude(self, found: Answer | None, cut_short: str) -> int:
        from grbench.tune import page

        written: list[Path] = []
        places: dict[str, Path] = {}
        lost: list[str] = []
        with self._unless_unwritable("deployment", lost):  # before the page, which needs far more space
            if found is not None:
                places["deployment"] = deploy.write(found, self._declared, self.folder)
        with self._unless_unwritable("page", lost):
            if self._knowledge.trials:
                written = page.write(self._knowledge, found, self._declared, self._space, self.folder)
                places["page"] = written[0]
        pictures = [path for path in [self.folder / f"{page.NAME}_files"] if path.is_dir()]
        self._cells.end(bool(cut_short), page.summary(self._knowledge, found), [*written, *pictures])
        where = os.path.relpath(self.folder)
        if cut_short:
            self._say(f"{cut_short}; the same command goes on from here, with its whole budget again")
        if found is None:
            self._say(f"records: {where}   report: python -m grbench report {shlex.quote(where)}")
            if not cut_short:
                for line in answer.remarks(self._knowledge):
                    self._say(line)
                print(f"grbench tune: {self._why_none()}", file=sys.stderr)
        else:
            print(answer.sentence(found))
            print(answer.binding(found))
            for key, values, rate, change in answer.neighbours(found):
                print(f"  {key} {values}: requests/s: {rate}; against the winner: {change}")
            for line in answer.remarks(self._knowledge):
                print(line)
            places["records"] = self.folder
            self._say("   ".join(f"{name}: {shlex.quote(os.path.relpath(path))}" for name, path in places.items()))
            if best := places.get("deployment"):
                self._say(f"serve it: grbench serve {shlex.quote(f'deployment={os.path.relpath(best)}')}")
        for line in lost:
            print(f"grbench tune: {line}", file=sys.stderr)
        return 1 if found is None else 2 if lost else 0

    @contextlib.contextmanager
    def _unless_unwritable(self, what: str, lost: list[str]) -> Iterator[None]:
        """Add a line to `lost` if a file of the answer can't be written: the answer itself is to be shown still."""
        try:
            yield
        except OSError as e:
            why = f"the {what} could not be written: {e.strerror or e}"
            lost.append(f"{os.path.relpath(self.folder)}: {why}; free space there, then give the same command again")

    def _why_none(self) -> str:
        """Return why there is no answer, in one line."""
        if any(trial.probes or trial.offline or trial.failed for trial in self._knowledge.trials):
            return answer.nobody(self._knowledge)
        budget = self._declared.budget
        if budget.cells is not None:
            few = f"no record answers, and a first answer takes about {answer.FIRST_ANSWER} cells"
            return f"budget={budget.cells}cells: {few}; nearest: budget=20cells"
        goal = self._declared.goal
        cell_s = self._evaluator.cell_s + max(goal.probe_s, FEWEST / goal.rate if goal.rate else 0.0)
        minutes = max(math.ceil(answer.FIRST_ANSWER * cell_s / 60), 5)
        return (
            f"budget={budget.seconds:g}s: too small for one cell of about {cell_s:.0f} s; nearest: budget={minutes}min"
        )

    def _announce(self) -> None:
        space, goal = self._space, self._declared.goal
        limits = ", ".join(map(str, goal.limits)) or "no limit"
        self._say(
            f"{goal.objective} within {limits}; {number_of(len(space.configurations), 'configuration')}; "
            f"budget of this call: {self._declared.budget}"
        )
        if space.axes:
            self._say("searched: " + " ".join(f"{key}={','.join(values)}" for key, values in space.axes.items()))
        for reason, count in list(space.left_out.items())[:6]:
            self._say(f"left out {count}: {reason}")
        if len(space.left_out) > 6:
            self._say(f"left out {sum(list(space.left_out.values())[6:])} for {len(space.left_out) - 6} other reasons")

    def _show(self, trial: Trial, probe: Probe, outcome: Outcome, verdict: Verdict | None) -> None:
        """Print one line for a probe: what was measured, the incumbent and what is left."""
        name = trial.configuration.name
        kept = " (kept)" if outcome.kept else f" ({outcome.seconds:.0f} s)"
        if not outcome.ok:
            what = f"{outcome.status}: {outcome.error}"
        elif probe.rate is None:
            what = f"offline {outcome.metrics['throughput_rps']:.4g} requests/s{trial.failed and f', {trial.failed}'}"
        else:
            figure = answer.decisive(self._declared.goal, outcome)
            what = f"{'certifying at ' if probe.seed else ''}{probe.rate:g} requests/s: {figure}"
        took_s, rest_s = time.monotonic() - self._begun, self._evaluator.rest_s(self._to_certify(trial, probe, verdict))
        rest = f"{max(self._evaluator.left(), 0.0):.0%} of the budget left, {pace(took_s, took_s, took_s + rest_s)}"
        self._say(f"{time.strftime('%H:%M:%S')} {name}: {what}{kept}; best: {answer.leader(self._knowledge)}; {rest}")

    def _to_certify(self, trial: Trial, probe: Probe, verdict: Verdict | None) -> list[Wanted]:
        """Return the runs that are still to certify after a probe, as far as is known."""
        goal, best = self._declared.goal, next(iter(certifiable(self._knowledge)), None)
        if not goal.runs or self._knowledge.concluded:
            return []
        if probe.seed:
            seeds = range(probe.seed + 1, SEED + goal.runs) if verdict in HELD else ()
            return [(trial.configuration, dataclasses.replace(probe, seed=seed)) for seed in seeds]
        return [] if best is None else plan(self._knowledge, self._evaluator, best)

    def _say(self, line: str) -> None:
        self._screen.print(line, soft_wrap=True, markup=False, highlight=False)


def _path(folder: str | None) -> Path | None:
    return Path(folder).absolute() if folder else None
