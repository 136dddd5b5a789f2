"""One job: every chosen shape of every chosen family, with all variants of a shape side by side.

A shape takes four steps: first calls, gate, interleaved timing, and the gate again, with the outputs that were timed. A
failure of one variant becomes the status of its row and stops no other variant. Only a lost GPU ends the job.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from grbench.execution.records import Status, one_line
from grbench.execution.stats import percentile
from grbench.execution.worker import out_of_memory
from grbench.gate.kernel import KernelGate, KernelGateResult, TimedOutputs
from grbench.kernelbench.config import Family, KernelBenchConfig, changes_of, composed, select
from grbench.kernelbench.timing import Call, Ceilings, ceilings, fp8_ceilings, interleaved, median_ms
from grengines.numerics import IncorrectError
from grengines.runtime.device import DTYPES
from grkernels import registry, tuning
from grkernels.variant import Cost, KernelVariant

# The most work of a call on a CPU, about a second, unless a shape is named in full.
CPU_LIMIT = Cost(flops=5 * 10**9, bytes=2 * 10**8)
INPUT_SETS = 2  # used in turns, so that no variant finds its inputs in a cache
ALL_SHAPES = "*"  # the shape of a row for a variant that can't run at all


@dataclass
class Row:
    """One variant at one shape. `metrics` has rates and shares, `times_ms` the milliseconds of every repetition."""

    family: str
    variant: str
    shape: str
    dtype: str
    peer: bool = False
    status: Status = Status.OK
    reason: str | None = None
    flops: int | None = None  # mask-exact
    bytes: int | None = None  # each input read once, each output written once
    metrics: dict[str, float] = field(default_factory=dict)
    times_ms: list[float] = field(default_factory=list)
    tuning: list[dict[str, Any]] = field(default_factory=list)  # launch configurations and their sources
    started_at: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat())
    duration_s: float = 0.0

    @property
    def ok(self) -> bool:
        return self.status is Status.OK

    def fail(self, status: Status, reason: str) -> None:
        """Set the status of a failure, and drop the times."""
        self.status, self.reason, self.times_ms = status, reason, []


@dataclass(frozen=True)
class Contender:
    """A variant or a peer.

    `bind(**inputs)` returns the call that is timed. It raises NotImplementedError, with the reason, for inputs that the
    contender can't run.
    """

    name: str
    bind: Callable[..., Call]
    reference: Callable[..., Any]
    supports: Callable[..., str | None]
    max_error_ratio: float
    peer: bool = False
    same_operator: bool = True
    candidates: tuple[Mapping[str, int], ...] = ()  # launch configurations to tune over
    yardstick: Callable[..., Any] | None = None  # the reference with the rounding of operands in fp8
    cost: Callable[..., Cost] | None = None  # with the bytes of its own operands; None: the family's


class DeviceLostError(Exception):
    """The GPU takes no more work from this process."""


class Bench:
    """Runner of one job. `say` takes one line of progress at a time."""

    def __init__(self, config: KernelBenchConfig, device: str, say: Callable[[str], None]) -> None:
        self._config, self._device, self._say = config, device, say
        self._dtype = DTYPES[config.dtype]
        self._tuned: set[tuple[str, str, str]] = set()
        torch.backends.cuda.matmul.allow_tf32 = False  # the fp32 reference must be exact
        self.ceilings: Ceilings = ceilings(device, config.dtype, self._dtype)

    def run(self) -> Iterator[list[Row]]:
        """Yield the rows of each finished shape, and first the rows of variants that can't run at all.

        Raises DeviceLostError after it has yielded the rows of the shape at which the GPU was lost.
        """
        for family in select(self._config):
            contenders, unusable = self._contenders(family)
            if unusable:
                yield unusable
            for name in family.shapes if contenders else ():
                rows = [Row(family.name, c.name, name, self._config.dtype, c.peer) for c in contenders]
                begin = time.perf_counter()
                lost = None
                try:
                    self._shape(family, name, contenders, rows)
                except DeviceLostError as e:
                    lost = e
                except Exception as e:  # of what all variants share: inputs, timing
                    lost = self._lost(e)
                    _fail_all(rows, *status_of(e))
                if lost:
                    _fail_all(rows, Status.ERROR, f"not finished: {lost}")
                for row in rows:
                    row.duration_s = time.perf_counter() - begin
                gc.collect()
                yield rows
                if lost:
                    raise lost

    def _contenders(self, family: Family) -> tuple[list[Contender], list[Row]]:
        """Return the contenders that can be imported, and a row for each other one."""
        contenders: list[Contender] = []
        unusable: list[Row] = []
        if family.name in composed():
            return [_together(family.bench, name) for name in family.variants], unusable

        def attempt(name: str, load: Callable[[], Contender], peer: bool = False) -> None:
            try:
                contenders.append(load())
            except Exception as e:
                row = Row(family.name, name, ALL_SHAPES, self._config.dtype, peer)
                row.fail(*(Status.UNAVAILABLE, one_line(e)) if isinstance(e, ImportError) else status_of(e))
                unusable.append(row)

        for name in family.variants:
            attempt(name, partial(_variant, family.name, name))
            for change in changes_of(self._config):
                attempt(_changed_name(name, change), partial(_changed, family.name, name, change))
        peers = f"{registry.family(family.name).folder()}.peers"
        if self._config.peers and find_spec(peers):
            for peer in import_module(peers).PEERS:
                attempt(peer.name, partial(_peer, peer), peer=True)
        return contenders, unusable

    def _shape(self, family: Family, name: str, contenders: list[Contender], rows: list[Row]) -> None:
        if "torch._dynamo" in sys.modules:  # something may be compiled; the import alone takes two seconds
            torch.compiler.reset()  # otherwise it compiles later shapes for any size, and gives up after some of them
        bench, shape = family.bench, family.bench.SHAPES[name]
        cost: Cost = bench.cost(shape, self._config.dtype)
        costs = {c.name: c.cost(shape, self._config.dtype) if c.cost else cost for c in contenders}
        for row in rows:
            row.flops, row.bytes = costs[row.variant]
        too_much = any(c > limit for c, limit in zip(cost, CPU_LIMIT, strict=True))
        if self._device == "cpu" and too_much and name not in self._config.shapes:
            much = f"over {CPU_LIMIT.flops / 1e9:g} GFLOP or {CPU_LIMIT.bytes / 1e9:g} GB"
            _fail_all(rows, Status.UNAVAILABLE, f"{much} a call: run on a CPU only if named in full, shapes=[NAME]")
            return
        able = []
        for contender, row in zip(contenders, rows, strict=True):
            with self._guard(row):
                why = contender.supports(device=self._device, dtype=self._config.dtype, **bench.supports_args(shape))
                if why:
                    row.fail(Status.UNAVAILABLE, why)
                else:
                    able.append((contender, row))
        if not able:
            return
        self._say(f"{family.name} {name} {self._config.dtype}")
        seed = self._config.seed
        make = partial(bench.inputs, dtype=self._dtype, device=self._device)
        sets = [make(shape, seed=seed + i) for i in range(INPUT_SETS)]
        timed = TimedOutputs(sets, family.writes)
        small = bench.check_shape(shape) if hasattr(bench, "check_shape") else shape
        fresh, others = (make(small, seed=seed + INPUT_SETS + i) for i in range(2))
        gates: dict[tuple[Callable[..., Any], Callable[..., Any] | None], KernelGate] = {}
        calls: dict[str, list[Call]] = {}
        checks: dict[str, Callable[[], KernelGateResult]] = {}
        for contender, row in able:
            with self._guard(row):
                bound = [contender.bind(**inputs) for inputs in sets]
                self._first_calls(bound[0], row)
                kind = contender.reference, contender.yardstick
                if kind not in gates:
                    layers = getattr(shape, "layers", 1)
                    gates[kind] = KernelGate(
                        contender.reference, fresh, others, self._dtype, family.writes, layers, contender.yardstick
                    )
                check = partial(gates[kind].check, contender.bind(**fresh), contender.max_error_ratio)
                if self._config.tune and contender.candidates:
                    self._tune(contender, row, bound[0], check)
                row.metrics |= check().metrics()
                calls[contender.name], checks[contender.name] = bound, check
        if not calls:
            return
        times = interleaved(
            calls, self._device, repeats=self._config.repeats, min_time_s=self._config.min_time_s, seed=seed
        )
        for contender, row in able:
            if contender.name in calls:
                with self._guard(row):
                    if failure := times.failed.get(contender.name):
                        raise failure
                    checks[contender.name]()  # again: a result that is wrong under load must not count
                    turn, result = times.last[contender.name]
                    gate = gates[contender.reference, contender.yardstick]
                    again = calls[contender.name][turn]
                    compared = timed.check(gate, turn, result, again, contender.max_error_ratio)
                    row.metrics["error_timed"] = compared.error
                    row.times_ms = times.ms[contender.name]
                    roofs = fp8_ceilings(self.ceilings, self._device) if contender.yardstick else self.ceilings
                    row.metrics |= rates(row.times_ms, costs[contender.name], roofs)
        _compare(able)

    def _first_calls(self, call: Call, row: Row) -> None:
        """Run twice, and record launch configurations. The first call, which compiles, is the cold start."""
        begin = time.perf_counter()
        row.tuning = _configurations(call)
        self._wait()
        row.metrics["cold_start_s"] = time.perf_counter() - begin
        call()
        self._wait()

    def _tune(self, contender: Contender, row: Row, call: Call, check: Callable[[], KernelGateResult]) -> None:
        """Find the fastest correct configuration for each key of this call that earlier shapes did not have."""

        def measure() -> float:
            try:
                call()
                check()
                return median_ms(call, self._device)
            except Exception as e:
                if lost := self._lost(e):
                    raise lost from e
                return float("inf")

        for entry in row.tuning:
            key = (entry["family"], entry["variant"], entry["key"])
            if key[:2] == (row.family, row.variant) and key not in self._tuned:
                best, ms = tuning.tune(*key, contender.candidates, measure)
                self._tuned.add(key)
                of = f"of {len(contender.candidates)} ({ms:.4g} ms) at {key[2]}"
                self._say(f"  {row.variant}: {tuning.words(best)} is the fastest {of}")
        row.tuning = _configurations(call)

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()

    @contextlib.contextmanager
    def _guard(self, row: Row) -> Iterator[None]:
        """Turn an exception inside the context into the status of the row. Raises DeviceLostError only."""
        try:
            yield
        except DeviceLostError as e:
            row.fail(Status.ERROR, str(e))
            raise
        except Exception as e:
            row.fail(*status_of(e))
            if isinstance(e, IncorrectError) and isinstance(e.result, KernelGateResult):
                row.metrics |= e.result.metrics()
            if lost := self._lost(e):
                raise lost from e

    def _lost(self, error: Exception) -> DeviceLostError | None:
        """Return an error if the GPU is lost: after an illegal access CUDA fails every call of this process."""
        try:
            self._wait()
        except Exception:
            return DeviceLostError(f"the GPU was lost ({one_line(error)})")
        return None


def _fail_all(rows: list[Row], status: Status, reason: str) -> None:
    for row in rows:
        if row.ok:
            row.fail(status, reason)


def status_of(error: Exception) -> tuple[Status, str]:
    """Return the status for an exception, and its message in one line."""
    text = one_line(error)
    if isinstance(error, IncorrectError):
        return Status.INCORRECT, text
    if isinstance(error, NotImplementedError):
        return Status.UNAVAILABLE, text
    if out_of_memory(error):
        return Status.OOM, text
    return Status.ERROR, f"{type(error).__name__}: {text}"


def rates(times_ms: list[float], cost: Cost, roofs: Ceilings) -> dict[str, float]:
    """Return percentiles, rates at the median, and shares of the device's ceilings."""
    p10, p50, p90 = (percentile(times_ms, p) for p in (10, 50, 90))
    tflops, tbps = cost.flops / p50 / 1e9, cost.bytes / p50 / 1e9
    return {
        "latency_ms/p10": p10,
        "latency_ms/p50": p50,
        "latency_ms/p90": p90,
        "repetitions": len(times_ms),
        "tflops": tflops,
        "tbps": tbps,
        "matmul_share": tflops / roofs.tflops,
        "copy_share": tbps / roofs.tbps,
        "roofline_share": 1e3 * roofs.floor_s(*cost) / p50,
        "ceiling_tflops": roofs.tflops,
    }


def _compare(able: list[tuple[Contender, Row]]) -> None:
    """Add each row's speed-up over eager PyTorch and over the fastest peer of the same operator."""
    done = [(c, row, row.metrics["latency_ms/p50"]) for c, row in able if row.ok]
    eager = min((ms for c, _, ms in done if c.name == "torch" and not c.peer), default=None)
    peer = min((ms for c, _, ms in done if c.peer and c.same_operator), default=None)
    for _, row, ms in done:
        row.metrics |= {name: other / ms for name, other in (("speedup_torch", eager), ("speedup_peer", peer)) if other}


def _variant(family: str, name: str) -> Contender:
    if why := registry.availability(family, name):
        raise ImportError(why)
    variant = registry.get(family, name)
    module = sys.modules.get(variant.fn.__module__)
    return Contender(
        name,
        lambda **inputs: partial(variant.fn, **inputs),
        variant.reference,
        variant.supports,
        variant.max_error_ratio,
        candidates=tuple(getattr(module, "CANDIDATES", ())),
        yardstick=variant.yardstick,
    )


def _changed_name(name: str, change: Mapping[str, int]) -> str:
    return "+".join([name, *tuning.words(change).split()])


def _changed(family: str, name: str, change: Mapping[str, int]) -> Contender:
    """Return a variant with a change to its launch configuration."""
    variant = _variant(family, name)
    known = {number: None for config in variant.candidates for number in config}
    unknown = [number for number in change if number not in known]
    why = f"launches: {name} has no {', '.join(unknown)}; it has {', '.join(known) or 'no launch configuration'}"

    def bind(**inputs: Any) -> Call:
        call = variant.bind(**inputs)

        def changed() -> Any:
            with tuning.changed(family, name, change):
                return call()

        return changed

    def supports(**dims: Any) -> str | None:
        return why if unknown else variant.supports(**dims)

    return replace(variant, name=_changed_name(name, change), bind=bind, supports=supports, candidates=())


def _together(module: Any, name: str) -> Contender:
    return Contender(
        name,
        partial(module.bind, name),
        module.reference,
        partial(module.refusal, name),
        KernelVariant.max_error_ratio,
        yardstick=module.yardstick(name),
        cost=partial(module.cost, variant=name),
    )


def _peer(peer: Any) -> Contender:
    return Contender(
        peer.name,
        peer.load(),
        peer.reference,
        lambda **_: None,
        KernelVariant.max_error_ratio,
        peer=True,
        same_operator=peer.same_operator,
    )


def _configurations(call: Call) -> list[dict[str, Any]]:
    """Call, and return the launch configurations that were used."""
    tuning.reset()  # so that only those of this call are listed
    call()
    return tuning.provenance()
