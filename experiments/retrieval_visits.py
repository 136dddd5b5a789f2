"""Latency of a search for new users, and for users who return with a few new items.

    python experiments/retrieval_visits.py model=hstu_0p2b --history 1024 4096 --new 0 16 64 --batches 1
    python experiments/retrieval_visits.py model=decoder_1p7b kernel=torch retrieval.beam_width=256 --history 333
    python experiments/retrieval_visits.py model=decoder_1p7b model.vocabulary=null,151936 kernel=torch --history 333
    python experiments/retrieval_visits.py engine=hstu model=hstu_tiny --items 500 --codes 16 --history 16 --rounds 2

Random weights, random semantic IDs of three codes, histories of this very length, all different. A returning user is
one whose prefix the engine may have cached. Before an engine is timed it passes the harness's gate on these requests.
Times are wall clock around `generate`: from requests on the host to items there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import common
import numpy as np

from grbench.config.schema import RunSpec
from grbench.gate.generate import GenerateGate
from grbench.gate.rank import stored_precision
from grengines.api import Catalogue, Request, Retrieval
from grengines.models.decoder.config import DecoderConfig
from grengines.semantic.ids import SemanticIds

LEVELS = 3
DEFAULTS = ["workload=synthetic", "engine=vllm", "model=hstu_0p2b", "task=generate", "gate.requests=2"]


def random_ids(items: int, codes: int) -> SemanticIds:
    """Different random tuples, one an item."""
    keys = np.random.default_rng(0).choice(codes**LEVELS, items, replace=False)
    columns = np.unravel_index(keys, (codes,) * LEVELS)
    return SemanticIds(np.stack(columns, axis=1).astype(np.int32), (codes,) * LEVELS)


def measure(rows: common.Rows, spec: RunSpec, ids: SemanticIds, history: int, args: Any) -> None:
    """Check and time one engine at one history length."""
    assert spec.retrieval is not None  # the task is generate
    retrieval = Retrieval(ids, spec.retrieval.k, spec.retrieval.beam_width)
    catalogue = Catalogue(num_users=1, num_items=len(ids.codes), num_actions=1)
    count, most = max(args.batches), max(args.new)
    users = common.requests_of((args.rounds + 1) * count, history + most, 0, catalogue=catalogue)
    row = {"model": spec.model.name, "engine": spec.engine.name, "history_tokens": LEVELS * history}
    row |= {"beam": retrieval.beam_width}
    if isinstance(spec.model, DecoderConfig):
        row["softmax over"] = spec.model.vocabulary or "codes"
    sample = users[: max(count, 2)]
    try:
        engine = common.engine_of(spec, sample, count, catalogue, task="generate", retrieval=retrieval)
    except Exception as e:  # other engines are measured all the same
        rows.fail(e, **row)
        return
    try:
        actual = engine.actual()
        gate = GenerateGate(
            spec, catalogue, sample, retrieval, actual["device"], actual["precision"], stored_precision(actual)
        )
        found = gate.check(engine, count)
        facts = {"error": found.error, "allowed": found.tolerance, "overlap": found.overlap}
        for batch in args.batches:
            groups = [users[i * batch : (i + 1) * batch] for i in range(args.rounds + 1)]
            for visit, ms, tokens in visits(engine, groups, history, args.new):
                times = {"p50_ms": float(np.median(ms)), "p90_ms": float(np.percentile(ms, 90))}
                rows.add(**row, batch=batch, visit=visit, **times, hit_tokens=tokens, **facts, samples_ms=ms)
    except Exception as e:
        rows.fail(e, **row)
    finally:
        engine.close()


def visits(
    engine: Any, groups: Sequence[Sequence[Request]], history: int, new: Sequence[int]
) -> list[tuple[str, list[float], float]]:
    """Each kind of visit with its milliseconds and, of the last one, the tokens that were cached.

    groups: users who visit together; the first group warms up.
    """
    kinds = ["first", *(f"returns with {items} new items" for items in new)]
    ms: dict[str, list[float]] = {kind: [] for kind in kinds}
    tokens = dict.fromkeys(kinds, 0.0)
    for turn, group in enumerate(groups):
        before = [common.first_events(user, history) for user in group]
        for kind, items in zip(kinds, [0, *new], strict=True):
            engine.reset_cache()
            if kind != "first":
                engine.generate(before)
            now = [common.first_events(user, history + items) for user in group]
            call = common.timed(lambda now=now: engine.generate(now))
            if turn:
                ms[kind].append(call.ms)
                tokens[kind] = call.result.details.get("prefix_hit_tokens", 0.0)
    return [(kind, ms[kind], tokens[kind]) for kind in kinds]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__ or "", rounds=8)
    parser.add_argument("--items", type=int, default=1_000_000, help="of the catalogue (default: %(default)s)")
    parser.add_argument("--codes", type=int, default=256, help="of a level (default: %(default)s)")
    parser.add_argument("--history", type=int, nargs="+", default=[1024], help="items, three tokens each")
    parser.add_argument("--new", type=int, nargs="+", default=[0], help="items that are new at a return")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args(arguments)
    specs = {}
    for history in args.history:
        positions = f"model.max_positions={LEVELS * (history + max(args.new))}"
        specs[history] = common.specs_of(parser, DEFAULTS, [*args.overrides, positions])
    rows, ids = common.Rows(args, __file__, arguments), random_ids(args.items, args.codes)
    for history, each in specs.items():
        for spec in each:
            measure(rows, spec, ids, history, args)
    rows.close()


if __name__ == "__main__":
    common.run(main)
