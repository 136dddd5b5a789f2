"""Tensors of a call as requests of an engine, and an engine's answers as tensors.

Names are those of NVIDIA's HSTU model for Triton where they mean the same. A call may hold several users: tensors of
each are one behind another, and their lengths are in TOKEN_LENGTHS and NUM_CANDIDATES.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from grbench.serve.errors import invalid
from grbench.serve.protocol import Tensor
from grbench.serve.state import Histories, History
from grengines.api import Catalogue, Float32Array, Int64Array, Request
from grkernels.nearest import nearest

# Keys of dictionaries are sets in this order.
REQUIRED = dict.fromkeys(("USER_IDS", "TOKEN_LENGTHS", "TOKENS")).keys()
RANKED = dict.fromkeys((*REQUIRED, "NUM_CANDIDATES")).keys()
INPUTS = {  # name: datatype and meaning
    "USER_IDS": ("INT64", "users"),
    "TOKEN_LENGTHS": ("INT64", "tokens of each user: events of the history, then candidates"),
    "TOKENS": ("INT64", "item of each token, oldest event first, candidates last"),
    "NUM_CANDIDATES": ("INT64", "candidates of each user; only to rank"),
    "ACTIONS": ("INT64", "bit mask of each event's actions; absent: 0"),
    "WEIGHTS": ("FP32", "weight of each event; absent: 0"),
    "TIMESTAMPS": ("INT64", "time of each event in seconds; absent: 0"),
    "REQUEST_TIMES": ("INT64", "time of each user's visit in seconds; absent: that of the last event"),
    "STATE_VERSIONS": ("INT64", "version of each user's state on the server; the events come behind it; -1: none"),
}
_ids = itertools.count(1)
MOST_NUMBER = 1 << 62
MOST_WEIGHT = 1e4  # beyond it 16-bit arithmetic overflows


@dataclass(frozen=True)
class Bounds:
    """The sizes and ids that a request may have."""

    task: str
    catalogue: Catalogue
    max_users: int
    max_history: int
    max_candidates: int


@dataclass(slots=True)
class Reply:
    """The answer to one request."""

    scores: Float32Array
    items: Int64Array | None = None


def decode(
    tensors: Mapping[str, Tensor], bounds: Bounds, states: Histories, deadline_ms: float = math.inf, client: str = ""
) -> list[Request]:
    """Return a request for each user of a call. Raises RefusedError, which names the tensor and what is allowed."""
    if not tensors.keys() <= INPUTS.keys():
        unknown = next(name for name in tensors if name not in INPUTS)
        raise invalid(f"inputs: {unknown}: no such tensor; {nearest(unknown, INPUTS)}allowed are {', '.join(INPUTS)}")
    required = RANKED if bounds.task == "rank" else REQUIRED
    if not tensors.keys() >= required:
        missing = next(name for name in required if name not in tensors)
        raise invalid(f"inputs: {missing} is missing; needed are {', '.join(required)}")
    users = _numbers(tensors, "USER_IDS", None, 0, None)
    count = len(users)
    if not 1 <= count <= bounds.max_users:
        raise invalid(f"USER_IDS: {count} users; allowed are 1 to {bounds.max_users} (serve.max_users)")
    lengths = _numbers(tensors, "TOKEN_LENGTHS", count, 0, bounds.max_history + bounds.max_candidates)
    candidates = _candidates(tensors, count, bounds)
    events = [length - wanted for length, wanted in zip(lengths, candidates, strict=True)]
    if (least := min(events)) < 0:
        i = events.index(least)
        raise invalid(f"TOKEN_LENGTHS[{i}]={lengths[i]}: fewer than NUM_CANDIDATES[{i}]={candidates[i]}")
    items = _column(tensors, "TOKENS", sum(lengths), 0, bounds.catalogue.num_items - 1)
    total = sum(events)
    actions = _column(tensors, "ACTIONS", total, 0, (1 << bounds.catalogue.num_actions) - 1)
    weights = _weights(tensors, total)
    times = _column(tensors, "TIMESTAMPS", total, 0, None)
    visits = _numbers(tensors, "REQUEST_TIMES", count, 0, None) if "REQUEST_TIMES" in tensors else None
    versions = _numbers(tensors, "STATE_VERSIONS", count, -1, None) if "STATE_VERSIONS" in tensors else None
    requests = []
    token = event = 0
    for i in range(count):
        history = History(
            items[token : token + events[i]],
            actions[event : event + events[i]],
            weights[event : event + events[i]],
            times[event : event + events[i]],
        )
        wanted = items[token + events[i] : token + lengths[i]]
        token, event = token + lengths[i], event + events[i]
        if versions is not None and versions[i] >= 0:
            history = states.at(users[i], versions[i], client).joined(history).newest(bounds.max_history)
        if not 1 <= len(history) <= bounds.max_history:
            raise invalid(
                f"TOKEN_LENGTHS[{i}]={lengths[i]}: {len(history)} events of a history; allowed are 1 to "
                f"{bounds.max_history} (serve.max_history)"
            )
        time = None if visits is None else visits[i]
        requests.append(_request(users[i], history, wanted, time, deadline_ms))
    return requests


def events_of(tensors: Mapping[str, Tensor], bounds: Bounds) -> History:
    """Return the events that a call appends: TOKENS, ACTIONS, WEIGHTS and TIMESTAMPS. Raises RefusedError."""
    allowed = ("TOKENS", "ACTIONS", "WEIGHTS", "TIMESTAMPS")
    if unknown := [name for name in tensors if name not in allowed]:
        raise invalid(f"inputs: {unknown[0]}: not taken here; allowed are {', '.join(allowed)}")
    if "TOKENS" not in tensors:
        raise invalid("inputs: TOKENS is missing: the items of the new events")
    items = _column(tensors, "TOKENS", None, 0, bounds.catalogue.num_items - 1)
    total = len(items)
    if total > bounds.max_history:
        raise invalid(f"TOKENS: {total} events; allowed are at most {bounds.max_history} in a call (serve.max_history)")
    actions = _column(tensors, "ACTIONS", total, 0, (1 << bounds.catalogue.num_actions) - 1)
    return History(items, actions, _weights(tensors, total), _column(tensors, "TIMESTAMPS", total, 0, None))


def _request(user: int, history: History, candidates: Int64Array, time: int | None, deadline_ms: float) -> Request:
    return Request(
        request_id=next(_ids),
        user_id=user,
        history_items=history.items,
        history_actions=history.actions,
        history_weights=history.weights,
        history_timestamps=history.timestamps,
        num_seen=0,
        candidates=candidates,
        timestamp=int(history.timestamps[-1]) if time is None else time,
        arrival_s=0.0,
        deadline_ms=deadline_ms,
    )


def _candidates(tensors: Mapping[str, Tensor], count: int, bounds: Bounds) -> list[int]:
    if bounds.task != "rank":
        if "NUM_CANDIDATES" in tensors and any(_numbers(tensors, "NUM_CANDIDATES", count, 0, None)):
            raise invalid(f"NUM_CANDIDATES: task {bounds.task} takes no candidates; leave it out")
        return [0] * count
    return _numbers(tensors, "NUM_CANDIDATES", count, 1, bounds.max_candidates)


def _numbers(tensors: Mapping[str, Tensor], name: str, length: int | None, low: int, high: int | None) -> list[int]:
    """Return a tensor with a number for each user. Few numbers are checked sooner in Python than in NumPy."""
    values = _vector(tensors[name], name, length)
    if values.dtype == np.int64 and len(values):
        numbers: list[int] = values.tolist()
        if low <= min(numbers) and max(numbers) <= (MOST_NUMBER if high is None else high):
            return numbers
    found: list[int] = _column(tensors, name, length, low, high).tolist()
    return found


def _column(tensors: Mapping[str, Tensor], name: str, length: int | None, low: int, high: int | None) -> Int64Array:
    """Return a tensor of integers from `low` to `high`; zeros if it is absent."""
    if name not in tensors:
        return np.zeros(length or 0, np.int64)
    values = _vector(tensors[name], name, length)
    if values.dtype.kind not in "iu":
        raise invalid(f"{name}.datatype: allowed is INT64")
    most = high if high is not None else MOST_NUMBER
    if low == 0 and len(values) and values.dtype == np.int64:
        sizes = values.view(np.uint64)  # as numbers without a sign, negative ones are the largest
        if sizes[sizes.argmax()] <= most:  # half the time of `max`
            return values
    if len(values) and (int(values.min()) < low or int(values.max()) > most):
        i = int(values.argmin() if int(values.min()) < low else values.argmax())
        allowed = f">= {low}" if high is None else f"{low} to {high}"
        raise invalid(f"{name}[{i}]={values[i]}: allowed is {allowed}")
    return values.astype(np.int64, copy=False)


def _weights(tensors: Mapping[str, Tensor], length: int) -> Float32Array:
    if "WEIGHTS" not in tensors:
        return np.zeros(length, np.float32)
    values = _vector(tensors["WEIGHTS"], "WEIGHTS", length)
    if values.dtype == np.float32:
        weights: Float32Array = values
    else:
        with np.errstate(over="ignore"):
            weights = values.astype(np.float32)
    if len(weights) and weights[weights.argmin()] >= -MOST_WEIGHT and weights[weights.argmax()] <= MOST_WEIGHT:
        return weights  # NaN is no larger or smaller, and both find it
    if not (allowed := np.abs(weights) <= MOST_WEIGHT).all():  # False for NaN too
        i = int(allowed.argmin())
        raise invalid(f"WEIGHTS[{i}]={values[i]}: allowed is -{MOST_WEIGHT:g} to {MOST_WEIGHT:g}")
    return weights


def _vector(values: Tensor, name: str, length: int | None) -> Tensor:
    if values.ndim != 1 or (length is not None and len(values) != length):
        allowed = "one dimension" if length is None else f"[{length}]"
        raise invalid(f"{name}.shape={list(values.shape)}: allowed is {allowed}")
    return values


def encode(replies: Sequence[Reply]) -> dict[str, Tensor]:
    """Return the answers of a call as tensors."""
    lengths = np.array([len(reply.scores) for reply in replies], np.int64)
    tensors: dict[str, Tensor] = {"OUTPUT": _joined([reply.scores for reply in replies])}
    items = [reply.items for reply in replies if reply.items is not None]
    if items:
        tensors["ITEMS"] = _joined(items)
    return tensors | {"OUTPUT_LENGTHS": lengths}


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def outputs_of(task: str) -> tuple[str, ...]:
    """Return the names of a task's outputs."""
    return ("OUTPUT", "OUTPUT_LENGTHS") if task == "rank" else ("OUTPUT", "ITEMS", "OUTPUT_LENGTHS")


def metadata(task: str, tasks: Sequence[str]) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Return the inputs and outputs of a task. tasks: names of the scores of an item; empty: it has one number."""
    names = [name for name in INPUTS if task == "rank" or name != "NUM_CANDIDATES"]
    inputs: list[dict[str, object]] = [{"name": n, "datatype": INPUTS[n][0], "shape": [-1]} for n in names]
    output: dict[str, object] = {"name": "OUTPUT", "datatype": "FP32", "shape": [-1]}
    if tasks:
        output |= {"shape": [-1, len(tasks)], "parameters": {"tasks": ",".join(tasks)}}
    numbers: list[dict[str, object]] = [
        {"name": name, "datatype": "INT64", "shape": [-1]} for name in outputs_of(task) if name != "OUTPUT"
    ]
    return inputs, [output, *numbers]
