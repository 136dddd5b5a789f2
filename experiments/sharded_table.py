"""Lookups a second of an item table over two GPUs, beside one GPU, its hot rows, page-locked memory, and FBGEMM.

    python experiments/sharded_table.py --rows 100000 --tokens 1000       # a CPU only checks the answers
    python experiments/sharded_table.py                                   # 8 GB of rows, two GPUs
    python experiments/sharded_table.py --rows 100000000 --cases "two GPUs, loads" "host, loads"    # 102 GB of rows
    python experiments/sharded_table.py --predict                         # what is expected, without a table

A lookup takes rows of the host's batch to vectors [tokens, width] on the first GPU. All cases are in memory at the same
time, each lookup has ids of its own, and every case and size is warmed up. The cases that do nothing on the host but
send ids are timed by the device, one lookup a round, in a new order each round (grbench.kernelbench.timing). The others
are timed by the host's clock: a round is `--burst` lookups one after another, without a wait between. Figures are
medians of the rounds with 95% intervals.

Each row of the table has its number in all of its words. What a case returns is compared with that, bit by bit, before
it is timed and in the last round. Ids are drawn from Zipf's law, 0: uniform, and hot rows are anywhere in the table.
`--budget` is the memory for hot rows of each GPU, in % of the table's rows.

Beside each time is the prediction from the drawn ids and the rates below. `hidden_%` is the share of the shorter one
that is hidden where a matrix product of about the same time follows each lookup, but for the first lookup of a burst.
It is of the cases that the host times, and is left out where its interval is wider than 20 points.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import common
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from grbench.kernelbench.timing import interleaved, median_ms
from grengines.api import UnavailableError
from grengines.cache.item_shards import ItemShards
from grengines.cache.items import HotRows
from grengines.numerics import IncorrectError
from grkernels.parts import Parts, let_read

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Lookup = Callable[[Rows], Tensor]
DTYPE = torch.float16
ROWS = 1 << 28  # at most: `words_of` has 28 bits
RESAMPLES = 1000
WIDEST = 20.0  # points of an interval of `hidden_%`
SIDE = 4096  # of the matrices that are multiplied beside lookups: some 0.2 ms
# What the predictions take, for an H200 and 16 cores: bytes/s of the device's memory, of NVLink one way, of PCIe, and
# of the host's gather into page-locked memory; seconds of the host for a launch, for an id that it sorts and finds, and
# for one that it splits off for its GPU.
HBM, NVLINK, PCIE, HOST = 4.3e12, 375e9, 54e9, 20e9
LAUNCH_S, ID_S, SPLIT_S = 15e-6, 40e-9, 10e-9


@dataclass(frozen=True)
class Work:
    """The work of a lookup, from the ids that were drawn."""

    tokens: int
    bytes: int  # of a row
    distinct: float  # rows of a lookup
    missing: float  # distinct rows of a lookup that the most frequent rows, in one GPU's budget, are not
    missing_of_two: float  # the same for the budget of two


@dataclass(frozen=True)
class Case:
    """A way to look rows up."""

    name: str
    make: Callable[[Setup], Lookup]
    seconds: Callable[[Work], float]  # predicted
    hot: bool = False  # it has rows that were looked up before on the GPUs
    lookups: int = 1  # of a call
    host: bool = False  # the host does more than to send ids, so that its clock counts


class Setup:
    """The table on the host and on the devices. Cases share its parts."""

    def __init__(self, args: argparse.Namespace, devices: list[torch.device]) -> None:
        self.args, self.devices = args, devices
        self.host = numbered(torch.empty(args.rows, args.width, dtype=DTYPE))
        self.length = -(-args.rows // 2)  # of a half
        self.slots = slots_of(args)
        self.budget = self.slots * args.width * DTYPE.itemsize

    @cached_property
    def halves(self) -> list[Tensor]:
        return [self._part(i * self.length, device) for i, device in enumerate(self.devices)]

    @cached_property
    def whole(self) -> Tensor:
        return self._part(0, self.devices[0], self.args.rows)

    def _part(self, begin: int, device: torch.device, length: int | None = None) -> Tensor:
        rows = min(length or self.length, self.args.rows - begin)
        part = numbered(torch.empty(rows, self.args.width, dtype=DTYPE, device=device), begin)
        wait_for_gpus()
        return part

    def sender(self, device: torch.device, dtype: torch.dtype = torch.int64) -> Sender:
        return Sender(device, max(self.args.tokens), dtype)


class Sender:
    """Send ids to a device, in turn through two buffers. Page-locked memory that is made in a lookup takes longer."""

    def __init__(self, device: torch.device, most: int, dtype: torch.dtype) -> None:
        self._device, cuda = device, device.type == "cuda"
        self._buffers = [torch.empty(most, dtype=dtype, pin_memory=cuda) for _ in range(2)]
        self._sent = [torch.cuda.Event() for _ in range(2)] if cuda else []
        self._turn = 0

    def __call__(self, rows: Rows) -> Tensor:
        self._turn ^= 1
        if self._sent:
            self._sent[self._turn].synchronize()  # the copy before from this buffer
        ids = self._buffers[self._turn][: len(rows)].copy_(torch.from_numpy(rows)).to(self._device, non_blocking=True)
        if self._sent:
            self._sent[self._turn].record(torch.cuda.current_stream(self._device))
        return ids


def words_of(rows: Tensor) -> Tensor:
    """Return what the words of rows int32 [n] hold: int32 [n], their number as two fp16 numbers of 14 bits each.

    All are positive normal numbers. FBGEMM takes fp16 through fp32, which changes the bits of NaN.
    """
    return ((rows & 0x3FFF) | (rows >> 14 << 16)) + 0x0400_0400


def numbered(rows: Tensor, first: int = 0) -> Tensor:
    """Write the number of each row into it."""
    for begin in range(0, len(rows), 1 << 20):
        part = rows[begin : begin + (1 << 20)].view(torch.int32)
        numbers = torch.arange(first + begin, first + begin + len(part), device=rows.device, dtype=torch.int32)
        part.copy_(words_of(numbers)[:, None])
    return rows


def of_one(setup: Setup) -> Lookup:
    table, send = setup.whole, setup.sender(setup.devices[0])
    return lambda rows: table.index_select(0, send(rows))


def loads(setup: Setup, readers: int = 1) -> Lookup:
    first, *more = setup.devices[:readers]
    for reader in (first, *more):
        for other in setup.devices:
            if why := let_read(reader, other):
                raise UnavailableError(why)
    tables = [(Parts(setup.halves, setup.length, device), setup.sender(device)) for device in (first, *more)]
    others = [device for device in more if device.type == "cuda"]

    def lookup(rows: Rows) -> Tensor:
        for device in others:  # a call begins on all GPUs when it does on the first one
            torch.cuda.current_stream(device).wait_stream(torch.cuda.current_stream(first))
        found = []
        for table, send in tables:
            with torch.cuda.device(table.device if table.device.type == "cuda" else -1):
                found.append(table.gather(send(rows)))
        for device in others:  # and ends when all have ended
            torch.cuda.current_stream(first).wait_stream(torch.cuda.current_stream(device))
        return found[0]

    return lookup


def both_load(setup: Setup) -> Lookup:
    return loads(setup, readers=2)


def ids_out(setup: Setup) -> Lookup:
    """Each GPU gets its ids, gathers and sends the rows back: the all-to-all of one process."""
    first, length = setup.devices[0], setup.length
    held = [(part, setup.sender(part.device)) for part in setup.halves]
    send_places = setup.sender(first)

    def lookup(rows: Rows) -> Tensor:
        owner = rows // length
        mine = [np.flatnonzero(owner == i) for i in range(len(held))]
        back = [
            part.index_select(0, send(rows[its] - i * length)).to(first, non_blocking=True)
            for i, ((part, send), its) in enumerate(zip(held, mine, strict=True))
        ]
        places = np.empty_like(rows)
        places[np.concatenate(mine)] = np.arange(len(rows))
        return torch.cat(back).index_select(0, send_places(places))

    return lookup


def hot_of_one(setup: Setup) -> Lookup:
    hot = HotRows.within(setup.budget, setup.host, device=setup.devices[0], dtype=DTYPE)
    send = setup.sender(setup.devices[0])
    return lambda rows: hot.table.index_select(0, send(hot.lookup(rows)))


def hot_of_two(setup: Setup) -> Lookup:
    shards = ItemShards(setup.host, setup.devices, DTYPE, setup.budget)
    send = setup.sender(setup.devices[0])

    def lookup(rows: Rows) -> Tensor:
        placed = rows.copy()
        shards.place([placed])
        return shards.table.gather(send(placed))

    return lookup


def of_host(setup: Setup) -> Lookup:
    lock_pages(setup.host)
    table, send = Parts([setup.host], len(setup.host), setup.devices[0]), setup.sender(setup.devices[0])
    return lambda rows: table.gather(send(rows))


def lock_pages(host: Tensor) -> None:
    """Let GPUs read a host tensor, until the process ends."""
    if torch.cuda.is_available() and not host.is_pinned():
        begun = time.perf_counter()
        if code := int(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, 1)):  # for every device
            raise UnavailableError(f"cudaHostRegister of {host.nbytes / 1e9:.1f} GB: CUDA error {code}")
        print(f"locked {host.nbytes / 1e9:.1f} GB in {time.perf_counter() - begun:.1f} s", flush=True)


def fbgemm(setup: Setup, place: str) -> Lookup:
    """FBGEMM's table batched embedding for inference, its table in memory that host and GPU share."""
    try:
        from fbgemm_gpu.split_embedding_configs import SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
            BoundsCheckMode,
            EmbeddingLocation,
            PoolingMode,
        )
        from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
    except ImportError as e:
        raise UnavailableError(f"{e}; install the release of fbgemm-gpu for PyTorch {torch.__version__}") from None
    args, device = setup.args, setup.devices[0]
    location = EmbeddingLocation[place if device.type == "cuda" else "HOST"]
    made = IntNBitTableBatchedEmbeddingBagsCodegen(
        [("items", args.rows, args.width, SparseType.FP16, location)],
        pooling_mode=PoolingMode.NONE,
        bounds_check_mode=BoundsCheckMode.NONE,
        device=device,
        output_dtype=SparseType.FP16,
        cache_load_factor=setup.slots / args.rows,
        uvm_host_mapped=True,
    )
    made.initialize_weights()
    table = made.split_embedding_weights()[0][0].view(DTYPE)
    numbered(table[:, : args.width])  # rows on a CPU may have padding behind
    wait_for_gpus()
    offsets = torch.arange(max(args.tokens) + 1, dtype=torch.int32, device=device)
    send = setup.sender(device, torch.int32)
    return lambda rows: made(send(rows), offsets[: len(rows) + 1])


def uvm(setup: Setup) -> Lookup:
    return fbgemm(setup, "MANAGED")


def uvm_cached(setup: Setup) -> Lookup:
    return fbgemm(setup, "MANAGED_CACHING")


def host_s(ids: int, missing: float, work: Work) -> float:
    """The host's part of a lookup of hot rows."""
    return ids * ID_S + missing * work.bytes / HOST


def moved(work: Work, rate: float, rows: float | None = None, launches: int = 0) -> float:
    """The ids' way to the device and the rows' way to their place, or the host's launches if it is the last."""
    rows = work.tokens if rows is None else rows
    return max(launches * LAUNCH_S, work.tokens * 8 / PCIE + rows * work.bytes / rate)


CASES = [
    Case("one GPU has all rows", of_one, lambda w: moved(w, HBM / 2)),
    Case("two GPUs, loads", loads, lambda w: moved(w, NVLINK, w.tokens / 2)),
    Case("two GPUs, loads, both read", both_load, lambda w: moved(w, NVLINK, w.tokens / 2), lookups=2),
    Case(
        "two GPUs, ids out and rows back",
        ids_out,
        lambda w: w.tokens * SPLIT_S + moved(w, NVLINK, w.tokens / 2, launches=10),
        host=True,
    ),
    Case(
        "two GPUs, hot rows",
        hot_of_two,
        lambda w: max(
            host_s(w.tokens, w.missing_of_two, w),  # the sort of each half, and the split before it
            w.missing_of_two / 2 * w.bytes / PCIE + moved(w, NVLINK, w.tokens / 2, launches=2),
        ),
        hot=True,
        host=True,
    ),
    Case(
        "one GPU, hot rows",
        hot_of_one,
        lambda w: max(host_s(w.tokens, w.missing, w), w.missing * w.bytes / PCIE + moved(w, HBM / 2, launches=2)),
        hot=True,
        host=True,
    ),
    Case("host, loads", of_host, lambda w: moved(w, PCIE)),
    Case("FBGEMM, host", uvm, lambda w: moved(w, PCIE)),
    Case("FBGEMM, hot rows", uvm_cached, lambda w: w.missing * w.bytes / PCIE + moved(w, HBM / 2), hot=True),
]


class Ids:
    """Draws of Zipf's law over `rows` rows, by the inverse of its continuous form."""

    def __init__(self, rows: int, power: float, seed: int) -> None:
        self.rows, self.power, self._rng = rows, power, np.random.default_rng(seed)
        self._step = next(n for n in range(2_654_435_761, 2_654_435_861) if math.gcd(n, rows) == 1)
        self._back = pow(self._step, -1, rows)

    def draw(self, lookups: int, tokens: int) -> list[Rows]:
        """Rows of lookups."""
        return [self.rows_of(self.ranks(tokens)) for _ in range(lookups)]

    def ranks(self, count: int) -> Rows:
        u, rest = self._rng.random(count), 1 - self.power
        x = self.rows**u if rest == 0 else (1 + u * (float(self.rows) ** rest - 1)) ** (1 / rest)
        return np.clip(x.astype(np.int64) - 1, 0, self.rows - 1)

    def rows_of(self, ranks: Rows) -> Rows:
        """Rows of ranks: the hottest lie anywhere."""
        return ranks * self._step % self.rows

    def ranks_of(self, rows: Rows) -> Rows:
        return rows * self._back % self.rows


def wait_for_gpus() -> None:
    for i in range(torch.cuda.device_count()):
        torch.cuda.synchronize(i)


def estimate(figure: Callable[..., Any], *samples: Sequence[float]) -> tuple[float, float, float]:
    """Return a figure of the medians of samples [rounds], and its 95% interval: all samples draw the same rounds."""
    taken = np.asarray(samples)
    drawn = np.random.default_rng(0).integers(taken.shape[1], size=(RESAMPLES, taken.shape[1]))
    low, high = np.quantile(figure(*np.median(taken[:, drawn], axis=2)), [0.025, 0.975])
    return float(figure(*np.median(taken, axis=1))), float(low), float(high)


def hidden(ms: Sequence[Sequence[float]], many: int) -> dict[str, Any]:
    """The columns of the share that is hidden. ms: [3, rounds], bursts of `many` lookups, of products, and of both."""

    def share(lookups: Floats, products: Floats, both: Floats) -> Floats:
        return 100 * (lookups + products - both) / (np.minimum(lookups, products) * (1 - 1 / many))

    value, low, high = estimate(share, *ms)
    return {"hidden_%": value if high - low <= WIDEST else None, "hidden_low": low, "hidden_high": high}


def check(name: str, found: Tensor, rows: Rows, width: int) -> None:
    words = words_of(torch.from_numpy(rows).int()).to(found.device)
    if found.shape[0] != len(rows) or not bool(
        (found[:, :width].contiguous().view(torch.int32) == words[:, None]).all()
    ):
        raise IncorrectError(f"{name}: rows of the lookup differ from the table")


def slots_of(args: argparse.Namespace) -> int:
    """Hot rows of a GPU: at least those of a lookup."""
    return int(max(round(args.rows * args.budget / 100), *args.tokens))


def work_of(args: argparse.Namespace, tokens: int, ranks: Sequence[Rows]) -> Work:
    """The work of lookups, from the ranks of each."""
    slots, distinct = slots_of(args), [np.unique(one) for one in ranks]
    missing = [float(np.mean([(one >= n).sum() for one in distinct])) for n in (slots, 2 * slots)]
    return Work(tokens, args.width * DTYPE.itemsize, float(np.mean([len(one) for one in distinct])), *missing)


def facts(case: Case, power: float, work: Work) -> dict[str, Any]:
    """The columns of a row that are known before it is measured."""
    seconds = case.seconds(work)
    return {
        "case": case.name,
        "zipf": power,
        "tokens": work.tokens,
        "distinct": round(work.distinct),
        "predicted_us": seconds * 1e6,
        "predicted_mlookups_s": case.lookups * work.tokens / seconds / 1e6,
    }


def ready(setup: Setup, case: Case, ids: Ids) -> Lookup:
    """Make a case. Its hot rows are near those after many lookups: the hottest come last."""
    lookup, most, chunk = case.make(setup), min(2 * setup.slots, ids.rows), max(setup.args.tokens)
    for end in range(most if case.hot else 0, 0, -chunk):
        lookup(ids.rows_of(np.arange(max(end - chunk, 0), end)))
    return lookup


def burst(rows: Sequence[Rows], lookup: Lookup | None, compute: Callable[[], object] | None, wait: bool) -> Any:
    """Do the lookups and the computation behind each. Return what the last one found."""
    found = None
    for one in rows:
        if lookup:
            found = lookup(one)
        if compute:
            compute()
    if wait:
        wait_for_gpus()
    return found


def product(x: Tensor, out: Tensor, times: int) -> None:
    for _ in range(times):
        torch.mm(x, x, out=out)


def products_of(device: torch.device, ms: Mapping[str, float]) -> dict[str, Callable[[], object]]:
    """Return matrix products that take about as long as each of `ms`."""
    x = torch.ones(SIDE, SIDE, dtype=torch.bfloat16, device=device)
    out = torch.empty_like(x)
    product(x, out, 1)
    one = median_ms(partial(product, x, out, 1), device.type)
    return {name: partial(product, x, out, max(round(took / one), 1)) for name, took in ms.items()}


def time_together(
    setup: Setup, cases: Sequence[Case], lookups: dict[str, Lookup], ids: Ids, tokens: int, out: common.Rows
) -> None:
    """Check and time cases of one clock. Those that fail leave `lookups`."""
    args, device, host = setup.args, setup.devices[0], cases[0].host
    clock, many = ("cpu", args.burst) if host else (device.type, 1)
    wait, rounds, warmup = clock == "cpu", args.rounds * args.burst // many, args.warmup * args.burst // many

    def drawn(count: int) -> list[list[Rows]]:
        return [ids.draw(many, tokens) for _ in range(count)]

    def fail(case: Case, error: Exception) -> None:
        out.fail(error, case=case.name, zipf=ids.power, tokens=tokens)
        lookups.pop(case.name, None)

    [first] = ids.draw(1, tokens)
    for case in cases:
        try:
            check(case.name, lookups[case.name](first), first, args.width)
        except Exception as e:
            fail(case, e)
    cases = [case for case in cases if case.name in lookups]
    if not cases:
        return
    rows, among, warm = drawn(rounds), drawn(rounds if host else 0), drawn(warmup)
    warmed = interleaved(
        {case.name: [partial(burst, one, lookups[case.name], None, wait) for one in warm] for case in cases},
        clock,
        repeats=warmup,
        min_time_s=0,
    )
    calls = {
        case.name: [partial(burst, one, lookups[case.name], None, wait) for one in rows]
        for case in cases
        if case.name not in warmed.failed
    }
    products = {}
    if host and device.type == "cuda":
        products = products_of(device, {name: float(np.median(warmed.ms[name])) / many for name in calls})
    for name, compute in products.items():
        calls[f"{name}: product"] = [partial(burst, rows[0], None, compute, wait)]
        calls[f"{name}: both"] = [partial(burst, one, lookups[name], compute, wait) for one in among]
    times = interleaved(calls, clock, repeats=rounds, min_time_s=0) if calls else warmed
    times.failed |= warmed.failed
    work = work_of(args, tokens, [ids.ranks_of(one) for several in rows for one in several])
    for case in cases:
        kinds = [case.name, *(f"{case.name}: {kind}" for kind in ("product", "both") if case.name in products)]
        try:
            for kind in kinds:
                if kind in times.failed:
                    raise times.failed[kind]
            for kind, each in zip([*kinds[:1], *kinds[2:]], (rows, among), strict=False):
                turn, found = times.last[kind]
                check(kind, found, each[turn][-1], args.width)
        except Exception as e:
            fail(case, e)
            continue
        ms = [times.ms[kind] for kind in kinds]
        us, low, high = (1e3 * value / many for value in estimate(lambda median: median, ms[0]))
        row = facts(case, ids.power, work)
        row |= {"clock": "wall" if wait else "device", "us": us, "us_low": low, "us_high": high}
        row |= {"mlookups_s": case.lookups * tokens / us} | (hidden(ms, many) if len(ms) > 1 else {})
        out.add(**row)


@torch.inference_mode()
def measure(setup: Setup, cases: Sequence[Case], power: float, out: common.Rows) -> None:
    """Check and time all cases with a law of ids."""
    ids, lookups = Ids(setup.args.rows, power, setup.args.seed), dict[str, Lookup]()
    for case in cases:
        try:
            lookups[case.name] = ready(setup, case, ids)
        except Exception as e:
            out.fail(e, case=case.name, zipf=power)
    for tokens in setup.args.tokens:
        for host in (False, True):
            if group := [case for case in cases if case.host is host and case.name in lookups]:
                time_together(setup, group, lookups, ids, tokens, out)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__ or "", overrides=False)
    parser.add_argument("--rows", type=int, default=8_000_000, help="of the table (default: %(default)s)")
    parser.add_argument("--width", type=int, default=512, help="numbers of a row, fp16 (default: %(default)s)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[10_000, 100_000], help="ids of a lookup")
    parser.add_argument("--zipf", type=float, nargs="+", default=[0.0, 0.8, 1.0], help="exponents; 0: uniform")
    parser.add_argument("--budget", type=float, default=10.0, help="hot rows of a GPU, %% of the rows (%(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="of a burst, timed (default: %(default)s)")
    parser.add_argument("--burst", type=int, default=10, help="lookups one after another (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="rounds that are not timed (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="+", default=[c.name for c in CASES], choices=[c.name for c in CASES])
    parser.add_argument("--predict", action="store_true", help="print what is expected, without a table")
    args = parser.parse_args(arguments)
    if args.rows > ROWS:
        parser.error(f"--rows={args.rows}: allowed are at most {ROWS}")
    if min(args.rounds, args.warmup) < 1 or args.burst < 2:
        parser.error("--rounds and --warmup are at least 1, --burst at least 2")
    out = common.Rows(args, __file__, arguments)
    cases = [case for case in CASES if case.name in args.cases]
    if args.predict:
        for power, tokens in itertools.product(args.zipf, args.tokens):
            ids = Ids(args.rows, power, args.seed)
            work = work_of(args, tokens, [ids.ranks(tokens) for _ in range(args.rounds)])
            for case in cases:
                out.add(**facts(case, power, work))
        out.close()
        return
    gpus = torch.cuda.device_count()
    devices = [torch.device("cuda", i) for i in range(2)] if gpus > 1 else [torch.device("cpu")] * 2
    out.note(
        f"{args.rows} rows of {args.width} fp16, {args.rows * args.width * 2 / 1e9:.3g} GB; {devices[0].type}, "
        f"{torch.get_num_threads()} threads. Rates: millions of rows a second."
    )
    setup = Setup(args, devices)
    for power in args.zipf:
        measure(setup, cases, power, out)
    out.close()


if __name__ == "__main__":
    common.run(main)
