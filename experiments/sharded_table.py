"""Lookups a second of an item table over two GPUs, beside one GPU, its hot rows, page-locked memory, and FBGEMM.

    python experiments/sharded_table.py --rows 100000 --tokens 1000       # a CPU only checks the answers
    python experiments/sharded_table.py                                   # 8 GB of rows, two GPUs
    python experiments/sharded_table.py --rows 100000000                  # 102 GB of rows, twice with FBGEMM
    python experiments/sharded_table.py --predict                         # what is expected, without a table

A lookup takes rows of the host's batch to vectors [tokens, width] on the first GPU. Its time is the wall clock of
lookups one after another, without a wait between. Each row of the table has its number in all of its words, and what a
case returns is compared with that, bit by bit, before it is timed. Ids are drawn from Zipf's law, 0: uniform, and hot
rows are anywhere in the table. `--budget` is the memory for hot rows of each GPU, in % of the table's rows.

Beside each time is the prediction from the drawn ids and the rates below. `hidden_%` is the share of the shorter one
that is hidden where a matrix product of about the same time follows each lookup.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import common
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from grengines.api import UnavailableError
from grengines.cache.item_shards import ItemShards
from grengines.cache.items import HotRows
from grengines.numerics import IncorrectError
from grkernels.parts import Parts, let_read

Rows = npt.NDArray[np.int64]
Lookup = Callable[[Rows], Tensor]
DTYPE = torch.float16
# What the predictions take, for an H200 and 16 cores: bytes/s of the device's memory, of NVLink one way, of PCIe, and
# of the host's gather into page-locked memory; seconds of a launch, of an id that the host sorts and finds, and of one
# that it sends to its GPU.
HBM, NVLINK, PCIE, HOST = 4.3e12, 375e9, 54e9, 20e9
LAUNCH_S, ID_S, SPLIT_S = 15e-6, 40e-9, 10e-9


@dataclass(frozen=True)
class Work:
    """The work of a lookup, from the ids that were drawn."""

    tokens: int
    bytes: int  # of a row
    missing: float  # distinct rows of a lookup that the most frequent rows, in one GPU's budget, are not
    missing_of_two: float  # the same for the budget of two


@dataclass(frozen=True)
class Case:
    """A way to look rows up. make: the lookup, given the arguments, the host table and the devices."""

    name: str
    make: Callable[[argparse.Namespace, Tensor, list[torch.device]], Lookup]
    seconds: Callable[[Work], float]  # predicted
    hot: bool = False  # it has rows that were looked up before on the GPUs
    lookups: int = 1  # of a call


def numbered(rows: Tensor, first: int = 0) -> Tensor:
    """Fill each row with its number."""
    for begin in range(0, len(rows), 1 << 20):
        part = rows[begin : begin + (1 << 20)].view(torch.int32)
        part.copy_(
            torch.arange(first + begin, first + begin + len(part), device=rows.device, dtype=torch.int32)[:, None]
        )
    return rows


def sent(rows: Rows, device: torch.device) -> Tensor:
    ids = torch.from_numpy(rows)
    return ids if device.type == "cpu" else ids.pin_memory().to(device, non_blocking=True)


def parts_over(args: argparse.Namespace, devices: Sequence[torch.device]) -> tuple[list[Tensor], int]:
    """The table in equal parts on the devices, and the rows of a part."""
    length = -(-args.rows // len(devices))
    begins = range(0, args.rows, length)
    empty = [
        torch.empty(min(length, args.rows - begin), args.width, dtype=DTYPE, device=device)
        for begin, device in zip(begins, devices, strict=True)
    ]
    held = [numbered(part, begin) for part, begin in zip(empty, begins, strict=True)]
    wait_for_gpus()
    return held, length


def of_one(args: argparse.Namespace, host: Tensor, devices: list[torch.device]) -> Lookup:
    [table], _ = parts_over(args, devices[:1])
    return lambda rows: table.index_select(0, sent(rows, devices[0]))


def loads(args: argparse.Namespace, host: Tensor, devices: list[torch.device], readers: int = 1) -> Lookup:
    held, length = parts_over(args, devices)
    for reader in devices[:readers]:
        for other in devices:
            if why := let_read(reader, other):
                raise UnavailableError(why)
    tables = [Parts(held, length, device) for device in devices[:readers]]

    def lookup(rows: Rows) -> Tensor:
        found = []
        for table in tables:
            with torch.cuda.device(table.device if table.device.type == "cuda" else -1):
                found.append(table.gather(sent(rows, table.device)))
        for device in devices[1:readers]:  # a call ends when both have ended
            if device.type == "cuda":
                torch.cuda.current_stream(devices[0]).wait_stream(torch.cuda.current_stream(device))
        return found[0]

    return lookup


def both_load(args: argparse.Namespace, host: Tensor, devices: list[torch.device]) -> Lookup:
    return loads(args, host, devices, readers=2)


def ids_out(args: argparse.Namespace, host: Tensor, devices: list[torch.device]) -> Lookup:
    """Each GPU gets its ids, gathers and sends the rows back: the all-to-all of one process."""
    held, length = parts_over(args, devices)

    def lookup(rows: Rows) -> Tensor:
        owner = rows // length
        mine = [np.flatnonzero(owner == i) for i in range(len(held))]
        back = [
            part.index_select(0, sent(rows[its] - i * length, part.device)).to(devices[0], non_blocking=True)
            for i, (part, its) in enumerate(zip(held, mine, strict=True))
        ]
        places = np.empty_like(rows)
        places[np.concatenate(mine)] = np.arange(len(rows))
        return torch.cat(back).index_select(0, sent(places, devices[0]))

    return lookup


def hot_of_one(args: argparse.Namespace, host: Tensor, devices: list[torch.device]) -> Lookup:
    hot = HotRows.within(budget(args), host, device=devices[0], dtype=DTYPE)
    return lambda rows: hot.table.index_select(0, sent(hot.lookup(rows), devices[0]))


def hot_of_two(args: argparse.Namespace, host: Tensor, devices: list[torch.device]) -> Lookup:
    shards = ItemShards(host, devices, DTYPE, budget(args))

    def lookup(rows: Rows) -> Tensor:
        placed = rows.copy()
        shards.place([placed])
        return shards.table.gather(sent(placed, devices[0]))

    return lookup


def of_host(args: argparse.Namespace, host: Tensor, devices: list[torch.device]) -> Lookup:
    lock_pages(host)
    table = Parts([host], len(host), devices[0])
    return lambda rows: table.gather(sent(rows, devices[0]))


def lock_pages(host: Tensor) -> None:
    """Let GPUs read a host tensor, until the process ends."""
    if torch.cuda.is_available() and not host.is_pinned():
        begun = time.perf_counter()
        if code := int(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, 1)):  # for every device
            raise UnavailableError(f"cudaHostRegister of {host.nbytes / 1e9:.1f} GB: CUDA error {code}")
        print(f"locked {host.nbytes / 1e9:.1f} GB in {time.perf_counter() - begun:.1f} s", flush=True)


def fbgemm(args: argparse.Namespace, devices: list[torch.device], place: str) -> Lookup:
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
    device = devices[0]
    location = EmbeddingLocation[place if device.type == "cuda" else "HOST"]
    made = IntNBitTableBatchedEmbeddingBagsCodegen(
        [("items", args.rows, args.width, SparseType.FP16, location)],
        pooling_mode=PoolingMode.NONE,
        bounds_check_mode=BoundsCheckMode.NONE,
        device=device,
        output_dtype=SparseType.FP16,
        cache_load_factor=slots_of(args) / args.rows,
        uvm_host_mapped=True,
    )
    made.initialize_weights()
    table = made.split_embedding_weights()[0][0].view(DTYPE)
    numbered(table[:, : args.width])  # rows on a CPU may have padding behind
    wait_for_gpus()
    offsets = torch.arange(max(args.tokens) + 1, dtype=torch.int32, device=device)
    return lambda rows: made(sent(rows.astype(np.int32), device), offsets[: len(rows) + 1])  # type: ignore[arg-type]


def uvm(args: argparse.Namespace, host: Tensor, devices: list[torch.device]) -> Lookup:
    return fbgemm(args, devices, "MANAGED")


def uvm_cached(args: argparse.Namespace, host: Tensor, devices: list[torch.device]) -> Lookup:
    return fbgemm(args, devices, "MANAGED_CACHING")


def slots_of(args: argparse.Namespace) -> int:
    """Hot rows of a GPU: at least those of a lookup."""
    return max(round(args.rows * args.budget / 100), max(args.tokens))


def budget(args: argparse.Namespace) -> int:
    """Bytes of a GPU for hot rows."""
    return slots_of(args) * args.width * DTYPE.itemsize


def host_s(ids: int, missing: float, work: Work) -> float:
    """The host's part of a lookup of hot rows."""
    return ids * ID_S + missing * work.bytes / HOST


def moved(work: Work, rate: float, rows: float | None = None, launches: int = 2) -> float:
    return max(launches * LAUNCH_S, (work.tokens if rows is None else rows) * work.bytes / rate)


CASES = [
    Case("one GPU has all rows", of_one, lambda w: moved(w, HBM / 2)),
    Case("two GPUs, loads", loads, lambda w: moved(w, NVLINK, w.tokens / 2)),
    Case("two GPUs, loads, both read", both_load, lambda w: moved(w, NVLINK, w.tokens / 2, 4), lookups=2),
    Case("two GPUs, ids out and rows back", ids_out, lambda w: w.tokens * SPLIT_S + moved(w, NVLINK, w.tokens / 2, 10)),
    Case(
        "two GPUs, hot rows",
        hot_of_two,
        lambda w: max(
            host_s(w.tokens, w.missing_of_two, w),  # the sort of each half, and the split before it
            w.missing_of_two / 2 * w.bytes / PCIE + moved(w, NVLINK, w.tokens / 2),
        ),
        hot=True,
    ),
    Case(
        "one GPU, hot rows",
        hot_of_one,
        lambda w: max(host_s(w.tokens, w.missing, w), w.missing * w.bytes / PCIE + moved(w, HBM / 2)),
        hot=True,
    ),
    Case("host, loads", of_host, lambda w: moved(w, PCIE)),
    Case("FBGEMM, host", uvm, lambda w: moved(w, PCIE)),
    Case("FBGEMM, hot rows", uvm_cached, lambda w: w.missing * w.bytes / PCIE + moved(w, HBM / 2, None, 8), hot=True),
]


class Ids:
    """Draws of Zipf's law over `rows` rows, by the inverse of its continuous form."""

    def __init__(self, rows: int, power: float, seed: int) -> None:
        self.rows, self._power, self._rng = rows, power, np.random.default_rng(seed)
        self._step = next(n for n in range(2_654_435_761, 2_654_435_861) if math.gcd(n, rows) == 1)

    def ranks(self, count: int) -> Rows:
        u, rest = self._rng.random(count), 1 - self._power
        x = self.rows**u if rest == 0 else (1 + u * (float(self.rows) ** rest - 1)) ** (1 / rest)
        return np.clip(x.astype(np.int64) - 1, 0, self.rows - 1)

    def rows_of(self, ranks: Rows) -> Rows:
        """Rows of ranks: the hottest lie anywhere."""
        return ranks * self._step % self.rows


def seconds_of(calls: Sequence[Callable[[], object]]) -> float:
    """Wall clock of a call, if they follow each other."""
    wait_for_gpus()
    begun = time.perf_counter()
    for call in calls:
        call()
    wait_for_gpus()
    return (time.perf_counter() - begun) / len(calls)


def wait_for_gpus() -> None:
    for i in range(torch.cuda.device_count()):
        torch.cuda.synchronize(i)


def hidden(calls: Sequence[Callable[[], object]], took: float, device: torch.device) -> dict[str, float]:
    """The share of the shorter one that is hidden where a product of about the same time follows each lookup."""
    x = torch.ones(2048, 2048, dtype=torch.bfloat16, device=device)
    out = torch.empty_like(x)
    one = [seconds_of([partial(torch.mm, x, x, out=out)] * 50) for _ in range(2)][1]

    def compute() -> None:
        for _ in range(max(round(took / one), 1)):
            torch.mm(x, x, out=out)

    alone = seconds_of([compute] * len(calls))
    both = 2 * seconds_of([call for pair in zip(calls, [compute] * len(calls), strict=True) for call in pair])
    return {"hidden_%": 100 * (took + alone - both) / min(took, alone)}


def check(case: Case, lookup: Lookup, rows: Rows, width: int) -> None:
    found = lookup(rows)[:, :width].contiguous().view(torch.int32).cpu()
    if found.shape[0] != len(rows) or not bool((found == torch.from_numpy(rows).int()[:, None]).all()):
        raise IncorrectError(f"{case.name}: rows of the lookup differ from the table")


def facts(args: argparse.Namespace, case: Case, power: float, tokens: int, ranks: Sequence[Rows]) -> dict[str, Any]:
    """The columns of a row that are known before it is measured. ranks: of each lookup."""
    slots = slots_of(args)
    distinct = [np.unique(one) for one in ranks]
    missing = [float(np.mean([(one >= n).sum() for one in distinct])) for n in (slots, 2 * slots)]
    seconds = case.seconds(Work(tokens, args.width * DTYPE.itemsize, *missing))
    return {
        "case": case.name,
        "zipf": power,
        "tokens": tokens,
        "distinct": round(float(np.mean([len(one) for one in distinct]))),
        "predicted_us": seconds * 1e6,
        "predicted_mlookups_s": case.lookups * tokens / seconds / 1e6,
    }


@torch.inference_mode()
def measure(args: argparse.Namespace, case: Case, host: Tensor, devices: list[torch.device], out: common.Rows) -> None:
    """Check and time a case with every law of ids and every size."""
    for power in args.zipf:
        try:
            lookup, ids = case.make(args, host, devices), Ids(args.rows, power, args.seed)
            if case.hot:  # the hottest rows last, so that the state is near that of many lookups
                most, chunk = min(2 * slots_of(args), args.rows), max(args.tokens)
                for end in range(most, 0, -chunk):
                    lookup(ids.rows_of(np.arange(max(end - chunk, 0), end)))
            for tokens in args.tokens:
                for _ in range(args.warmup):
                    lookup(ids.rows_of(ids.ranks(tokens)))
                check(case, lookup, ids.rows_of(ids.ranks(tokens)), args.width)
                ranks = [ids.ranks(tokens) for _ in range(args.lookups)]
                calls, more = (
                    [partial(lookup, ids.rows_of(one)) for one in several]
                    for several in (ranks, [ids.ranks(tokens) for _ in ranks])  # hot rows keep those of the first
                )
                took = seconds_of(calls)
                row = facts(args, case, power, tokens, ranks)
                row |= {"us": took * 1e6, "mlookups_s": case.lookups * tokens / took / 1e6}
                out.add(**row, **(hidden(more, took, devices[0]) if devices[0].type == "cuda" else {}))
        except Exception as e:
            out.fail(e, case=case.name, zipf=power)
        lookup = calls = more = None  # type: ignore[assignment]  # the memory of the case
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__ or "", overrides=False)
    parser.add_argument("--rows", type=int, default=8_000_000, help="of the table (default: %(default)s)")
    parser.add_argument("--width", type=int, default=512, help="numbers of a row, fp16 (default: %(default)s)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[10_000, 100_000], help="ids of a lookup")
    parser.add_argument("--zipf", type=float, nargs="+", default=[0.0, 0.8, 1.0], help="exponents; 0: uniform")
    parser.add_argument("--budget", type=float, default=10.0, help="hot rows of a GPU, %% of the rows (%(default)s)")
    parser.add_argument("--warmup", type=int, default=20, help="lookups that are not timed (default: %(default)s)")
    parser.add_argument("--lookups", type=int, default=100, help="lookups that are timed (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="+", default=[c.name for c in CASES], choices=[c.name for c in CASES])
    parser.add_argument("--predict", action="store_true", help="print what is expected, without a table")
    args = parser.parse_args(arguments)
    out = common.Rows(args, __file__, arguments)
    cases = [case for case in CASES if case.name in args.cases]
    if args.predict:
        for case, power, tokens in itertools.product(cases, args.zipf, args.tokens):
            ids = Ids(args.rows, power, args.seed)
            out.add(**facts(args, case, power, tokens, [ids.ranks(tokens) for _ in range(args.lookups)]))
        out.close()
        return
    gpus = torch.cuda.device_count()
    devices = [torch.device("cuda", i) for i in range(2)] if gpus > 1 else [torch.device("cpu")] * 2
    out.note(
        f"{args.rows} rows of {args.width} fp16, {args.rows * args.width * 2 / 1e9:.3g} GB; {devices[0].type}, "
        f"{torch.get_num_threads()} threads. Rates: millions of rows a second."
    )
    host = numbered(torch.empty(args.rows, args.width, dtype=DTYPE))
    for case in cases:
        measure(args, case, host, devices, out)
    out.close()


if __name__ == "__main__":
    common.run(main)
