"""Packing of requests into the arrays that HSTU runs on: one staging buffer, one copy to the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from operator import add, le
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from grengines.api import Catalogue, Request
from grengines.models.hstu.config import HSTUConfig
from grengines.runtime import staging
from grengines.runtime.native import native
from grengines.runtime.slots import Slot
from grengines.runtime.staging import Buffer

Int64Array = npt.NDArray[np.int64]
COLUMNS = ("history_items", "history_actions", "history_weights", "history_timestamps")
TIMES = ("times", "until")  # arrays that some encodings have
OFFSETS = ("q_offsets", "candidate_offsets", "kv_offsets", "kept_offsets")  # the last two in append batches only


@dataclass(frozen=True)
class Encoding:
    """Numbering of tokens: the sizes of the model's tables.

    By default the encoding of a token does not change when events are appended after it, so keys and values computed at
    one visit stay valid at the next:

    token row      item % item_rows; contextual token c of a user: item_rows + (user * C + c) % user_rows
    position       index of the event in the history, at most max_positions - 1; candidates share the one
                   after the history; contextual token c has a row of its own, max_positions + c
    time bucket    floor(log2(1 + gap)), gap in seconds to the event before; 0 for the first event and
                   contextual tokens; of a candidate, the gap between the last event and the request
    actions        the event's bit mask; 0 for candidates and contextual tokens. Weight likewise.

    Of other HSTU models (grengines.models.hstu.variant):

    from_end       position: tokens to the end of the history, 1 for the last event, 0 for candidates; time bucket:
                   floor(sqrt(minutes to the request)), with contextual tokens at time 0
    combinations   action bit: 2^mask, which stands for this combination of an event's actions
    target_action  action bit of candidates: the one after those of events
    contextual_from, blank_rows  a user with fewer events has no contextual tokens, or those of token rows
                   item_rows + user_rows + c
    arrays         of a batch: the time of a token and of what follows it, and the contextual tokens of each sequence
    """

    item_rows: int
    user_rows: int
    num_actions: int
    contextual_seq_len: int
    max_positions: int
    time_buckets: int
    from_end: bool = False
    combinations: bool = False
    target_action: bool = False
    contextual_from: int = 0
    blank_rows: int = 0
    arrays: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: HSTUConfig, catalogue: Catalogue) -> Encoding:
        """Return the encoding of a model for a catalogue. Raises ValueError for more actions than the model takes."""
        choices, C = config.choices, config.contextual_seq_len
        if choices.actions == "combinations" and catalogue.num_actions > 5:
            raise ValueError(
                f"model.actions=combinations: the workload has {catalogue.num_actions} actions; allowed are at most 5, "
                "because each combination has a row; set model.actions=bits"
            )
        timed = choices.clock or choices.time_bias > 0
        return cls(
            item_rows=max(min(catalogue.num_items, config.embedding_rows), 1),
            user_rows=min(max(catalogue.num_users, 1) * config.contextual_seq_len, config.embedding_rows),
            num_actions=catalogue.num_actions,
            contextual_seq_len=config.contextual_seq_len,
            max_positions=config.max_positions,
            time_buckets=config.time_buckets,
            from_end=choices.encoder == "end",
            combinations=choices.actions == "combinations",
            target_action=choices.target_action,
            contextual_from=choices.contextual_from if C else 0,
            blank_rows=C if choices.contextual_from and choices.contextual_missing == "blank" else 0,
            arrays=(*(TIMES if timed else ()), *(("num_contextuals",) if config.sparse_contextual else ())),
        )

    @property
    def action_rows(self) -> int:
        """Rows of the action table."""
        return (1 << self.num_actions if self.combinations else self.num_actions) + self.target_action

    @property
    def action_mask(self) -> int:
        """Bits of an event's actions that are used; -1: all."""
        return (1 << self.num_actions) - 1 if self.target_action or self.combinations else -1

    @property
    def candidate_action(self) -> int:
        """Action bits of a candidate."""
        return 1 << (self.action_rows - 1) if self.target_action else 0

    def contextual(self, events: int) -> int:
        """Return the contextual tokens of a user with this many events."""
        return self.contextual_seq_len if events >= self.contextual_from or self.blank_rows else 0


class Bucket(NamedTuple):
    """Sizes that a batch is padded to. It holds the batches of which no size is larger."""

    batch: int  # sequences
    tokens: int  # to encode, of all sequences
    candidates: int  # of all sequences
    length: int  # most tokens to encode of a sequence
    targets: int  # most candidates of a sequence
    keys: int  # most tokens of a sequence, cached ones included

    @classmethod
    def even(cls, batch: int, length: int, candidates: int = 0, keys: int = 0) -> Bucket:
        """Return the bucket with room for `length` tokens and `candidates` candidates of each sequence."""
        return cls(batch, batch * length, batch * candidates, length, candidates, max(keys, length))

    @classmethod
    def of(cls, new: Sequence[int], candidates: Sequence[int] = (), keys: Sequence[int] = ()) -> Bucket:
        """Return the sizes of a batch. Each sequence has tokens to encode, candidates and, if some are cached, keys."""
        longest, most = max(new, default=0), max(candidates, default=0)
        return cls(len(new), sum(new), sum(candidates), longest, most, max(keys, default=longest))

    def fits(self, other: Bucket) -> bool:
        """Return whether no size exceeds the other's."""
        return all(map(le, self, other))


@dataclass
class JaggedBatch:
    """Tokens of all sequences one after another, as tensors on one device.

    L tokens to encode, B sequences, M candidates. Padding: token rows past q_offsets[B] are encoded and seen by nobody,
    sequences past the real ones are empty, candidate rows past the real ones repeat row 0.

    In a full batch every key belongs to a token of the batch: the three offsets are one tensor. In an append batch
    cached keys come first in each sequence.
    """

    token_rows: Tensor  # int64 [L]
    actions: Tensor  # int64 [L] bit masks
    weights: Tensor  # float64 [L]
    positions: Tensor  # int64 [L]
    time_buckets: Tensor  # int64 [L]
    q_offsets: Tensor  # int64 [B + 1]
    kv_offsets: Tensor  # int64 [B + 1]: of the keys, cached ones included
    num_targets: Tensor  # int64 [B]
    candidate_rows: Tensor  # int64 [M], rows of the L tokens
    candidate_offsets: Tensor  # int64 [B + 1]: of candidate_rows
    kept_offsets: Tensor  # int64 [B + 1]: of the keys without candidates'
    max_q_len: int
    max_kv_len: int
    max_candidates: int  # of a sequence
    times: Tensor | None = None  # int64 [L], seconds: if the encoding has it, as the next two
    until: Tensor | None = None  # int64 [L]
    num_contextuals: Tensor | None = None  # int64 [B]


@dataclass
class HostBatch:
    """A packed batch on the host: every array of a JaggedBatch in one int64 buffer."""

    buffer: Tensor  # int64 [total], pinned if it is to be copied to a GPU
    sizes: dict[str, int]  # of each array, by its name in JaggedBatch, in the buffer's order
    appends: bool  # keys of cached tokens precede the batch's own; otherwise only q_offsets is in the buffer
    max_q_len: int
    max_kv_len: int
    max_candidates: int
    candidate_counts: list[int]  # of each request
    tokens: int  # real tokens to encode
    first_rows: list[int]  # of each request, its first row among the packed tokens

    @property
    def padded_tokens(self) -> int:
        return self.sizes["token_rows"]

    @property
    def token_rows(self) -> Int64Array:
        """The packed token rows [padded_tokens], a view: changes are copied to the device."""
        rows: Int64Array = self.buffer[: self.padded_tokens].numpy()  # the buffer's first array
        return rows

    def to(self, device: torch.device, out: Tensor | None = None) -> JaggedBatch:
        """Copy to the device in one go, without waiting; into `out` (int64 [total]) if it is given."""
        buffer = self.buffer.to(device, non_blocking=True) if out is None else out.copy_(self.buffer, non_blocking=True)
        parts = dict(zip(self.sizes, buffer.split(list(self.sizes.values())), strict=True))
        parts["weights"] = parts["weights"].view(torch.float64)
        if not self.appends:
            parts["kv_offsets"] = parts["kept_offsets"] = parts["q_offsets"]
        most = {name: getattr(self, name) for name in ("max_q_len", "max_kv_len", "max_candidates")}
        return JaggedBatch(**parts, **most)


def pack(
    requests: Sequence[Request],
    encoding: Encoding,
    *,
    cached: Sequence[int] | None = None,
    candidates: slice | None = None,
    bucket: Bucket | None = None,
    pin: bool = False,
) -> HostBatch:
    """Number the tokens of `requests` and lay them out. Arguments and errors: of Layout."""
    return Layout.of(requests, encoding, cached, candidates).pack(bucket, pin=pin)


@dataclass(slots=True)
class Layout:
    """Tokens of each request of a batch that is to be packed. A history is the contextual tokens and the events."""

    requests: list[Request]
    encoding: Encoding
    appends: bool  # cached tokens precede those of the batch
    candidates: list[Int64Array]
    targets: list[int]  # candidates of each
    events: list[int]
    contextual: list[int]
    histories: list[int]  # tokens of each
    cached: list[int]  # first tokens of each history that are not packed
    new: list[int]  # tokens of each that are packed
    q_offsets: list[int]  # of these
    needed: Bucket  # the sizes of the batch

    @classmethod
    def of(
        cls,
        requests: Sequence[Request],
        encoding: Encoding,
        cached: Sequence[int] | None = None,
        candidates: slice | None = None,
    ) -> Layout:
        """Count the tokens of `requests`.

        cached: makes an append batch; the number of each request's first tokens (contextual ones and events) whose keys
        and values are cached, so that only the rest is packed. candidates: the slice of each request's candidates;
        None: all; slice(0) for a prefill.

        Raises ValueError for more cached tokens than there are, and for new events after cached ones in a model with
        contextual tokens: those see the whole history, so each new event changes them and nothing of them can be kept.
        """
        requests, appends, C = list(requests), cached is not None, encoding.contextual_seq_len
        chosen = [r.candidates if candidates is None else r.candidates[candidates] for r in requests]
        done = list(cached) if cached is not None else [0] * len(requests)
        if (functions := native().functions) is not None:
            least = 0 if encoding.blank_rows else encoding.contextual_from
            if (found := functions.layout(requests, chosen, done, C, least)) is not None:
                fields = [requests, encoding, appends, chosen, *found[:-1], Bucket._make(found[-1])]
                return cls(*fields)
        _check(requests, chosen)
        targets = [len(c) for c in chosen]
        events = [len(r.history_items) for r in requests]
        contextual = [encoding.contextual(n) for n in events]
        histories = [c + n for c, n in zip(contextual, events, strict=True)]
        for r, n, d in zip(requests, histories, done, strict=True):
            if not 0 <= d <= n or (C and d not in (0, n)):
                allowed = f"0 or {n}, since contextual tokens see the whole history" if C else f"0 to {n}"
                raise ValueError(f"request {r.request_id}: {d} tokens are cached; allowed is {allowed}")
        new = [n - d + t for n, d, t in zip(histories, done, targets, strict=True)]
        needed = Bucket.of(new, targets, list(map(add, histories, targets)))
        counts = targets, events, contextual, histories, done, new, [0, *accumulate(new)]
        return cls(requests, encoding, appends, chosen, *counts, needed=needed)

    def length(self, bucket: Bucket | None = None) -> int:
        """Return the length of the buffer for the batch in a bucket."""
        return self._places(bucket or self.needed)[0]

    def pack(self, bucket: Bucket | None = None, *, slot: Slot | None = None, pin: bool = False) -> HostBatch:
        """Number the tokens and lay them out.

        bucket: pad to these sizes. slot: to take the buffer from; without it, `pin` asks for page-locked memory. Raises
        ValueError for a batch that doesn't fit the bucket.
        """
        encoding, padded = self.encoding, bucket or self.needed
        if not self.needed.fits(padded):
            raise ValueError(f"a batch of {self.needed} doesn't fit {bucket}; pack it without it")
        total, sizes, places = self._places(padded)
        buffer, packed = slot.take(total) if slot else Buffer.of(staging.empty(total, pin))
        functions = native().functions
        more = encoding.contextual_seq_len or encoding.from_end or encoding.arrays
        arrays = {name: packed[place] for name, place in places.items()} if more or functions is None else {}
        if functions is not None:
            _write_tokens_in_c(functions, packed, padded, self, places["q_offsets"].start)
        else:
            _write_tokens(arrays, self)
            offsets = self.offsets(padded.batch)
            packed[total - len(offsets) :] = offsets
        if encoding.contextual_seq_len:
            _write_contextual(arrays, self)
        if encoding.from_end:
            _encode_from_end(arrays, self)
        if encoding.arrays:
            _write_more(arrays, self)
        return HostBatch(
            buffer,
            sizes,
            appends=self.appends,
            max_q_len=padded.length,
            max_kv_len=padded.keys,
            max_candidates=padded.targets,
            candidate_counts=self.targets,
            tokens=self.needed.tokens,
            first_rows=self.q_offsets[:-1],
        )

    def offsets(self, sequences: int) -> list[int]:
        """Return the offsets that a batch has, in the order of OFFSETS, and num_targets. More sequences are empty."""
        made = [self.q_offsets, [0, *accumulate(self.targets)]]
        if self.appends:
            made.append([0, *accumulate(map(add, self.histories, self.targets))])
            made.append([0, *accumulate(self.histories)])
        more = sequences - len(self.targets)
        return [n for offsets in made for n in (*offsets, *[offsets[-1]] * more)] + self.targets + [0] * more

    def _places(self, padded: Bucket) -> tuple[int, dict[str, int], dict[str, slice]]:
        return _places(padded.tokens, padded.batch, padded.candidates, self.appends, self.encoding.arrays)


def _check(requests: Sequence[Request], candidates: Sequence[Int64Array]) -> None:
    """Raise TypeError or ValueError for arrays that native.c refuses, which NumPy would cast or repeat."""
    for b, (r, chosen) in enumerate(zip(requests, candidates, strict=True)):
        columns = {name: getattr(r, name) for name in COLUMNS}
        for name, array in (*columns.items(), ("candidates", chosen)):
            dtype = np.dtype(np.float32 if name == "history_weights" else np.int64)
            if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != 1:
                raise TypeError(
                    f"{name} must be {dtype} with one dimension, as grengines.api.Request says; got {array!r}"
                )
        if len({len(array) for array in columns.values()}) > 1:
            raise ValueError(f"request {b} of the batch: its arrays have other lengths")


@lru_cache(maxsize=256)
def _places(
    tokens: int, sequences: int, candidates: int, appends: bool, more: tuple[str, ...] = ()
) -> tuple[int, dict[str, int], dict[str, slice]]:
    """Return the length of a batch's buffer, and the sizes and places of its arrays by name, in their order."""
    sizes = {
        **dict.fromkeys(("token_rows", "actions", "weights", "positions", "time_buckets"), tokens),
        "candidate_rows": candidates,
        **{name: tokens if name in TIMES else sequences for name in more},
        **dict.fromkeys(OFFSETS[: 4 if appends else 2], sequences + 1),
        "num_targets": sequences,
    }
    ends = accumulate(sizes.values())
    places = {name: slice(end - n, end) for (name, n), end in zip(sizes.items(), ends, strict=True)}
    return sum(sizes.values()), sizes, places


Arrays = dict[str, Int64Array]  # of a HostBatch, by name


@lru_cache(maxsize=16)
def _count(n: int, most: int) -> Int64Array:
    """Return 0, 1, ... as int64 [n], at most `most`. It is shared: never write it."""
    counted: Int64Array = np.minimum(np.arange(n), most)
    return counted


def _write_tokens_in_c(functions: Any, packed: Int64Array, padded: Bucket, layout: Layout, offsets_at: int) -> None:
    """Write what `_write_tokens` writes, and the offsets."""
    encoding = layout.encoding
    functions.write_tokens(
        packed,
        layout.requests,
        layout.candidates,
        layout.cached,
        layout.contextual,
        padded.tokens,
        padded.candidates,
        padded.batch,
        offsets_at,
        layout.appends,
        encoding.item_rows,
        encoding.action_mask,
        encoding.combinations,
        encoding.candidate_action,
        encoding.max_positions - 1,
        encoding.time_buckets,
    )


def _write_tokens(arrays: Arrays, layout: Layout) -> None:
    """Write each token's row, actions, weight, position and time bucket, and candidate_rows.

    NumPy's calls are what takes time, so each request makes few, and the rest is done for all of them at once.
    """
    requests, encoding = layout.requests, layout.encoding
    last_position, candidate_action = encoding.max_positions - 1, encoding.candidate_action
    rows, actions, positions, gaps = (arrays[n] for n in ("token_rows", "actions", "positions", "time_buckets"))
    weights, candidate_rows = arrays["weights"].view(np.float64), arrays["candidate_rows"]
    for array in (rows, actions, weights, positions, gaps, candidate_rows):
        array.fill(0)
    most = 1 << max(len(rows), *layout.events, 0).bit_length()  # a power of two: few counts are made
    count, position = _count(most, most), _count(most, last_position)
    placed, new = 0, False
    for r, candidates, events, c, cached, last in zip(
        requests,
        layout.candidates,
        layout.events,
        layout.contextual,
        layout.cached,
        layout.q_offsets[1:],
        strict=True,
    ):
        targets, times = len(candidates), r.history_timestamps
        first, end = max(cached - c, 0), last - targets
        if first < events:
            new = True
            at, after_first = end - (events - first), max(first, 1)
            rows[at:end] = r.history_items[first:]
            actions[at:end] = r.history_actions[first:]
            if encoding.action_mask != -1:
                actions[at:end] &= encoding.action_mask
            if encoding.combinations:
                np.left_shift(1, actions[at:end], out=actions[at:end])
            weights[at:end] = r.history_weights[first:]
            positions[at:end] = position[first:events]
            np.subtract(times[after_first:], times[after_first - 1 : -1], out=gaps[end - (events - after_first) : end])
        rows[end:last] = candidates
        positions[end:last] = min(events, last_position)
        if candidate_action:
            actions[end:last] = candidate_action
        candidate_rows[placed : placed + targets] = count[end:last]
        placed += targets
    if new:
        _to_time_buckets(gaps, encoding.time_buckets)
    for r, events, targets, last in zip(requests, layout.events, layout.targets, layout.q_offsets[1:], strict=True):
        gap = max(r.timestamp - int(r.history_timestamps[-1]), 0) if events else 0
        gaps[last - targets : last] = min((1 + gap).bit_length(), encoding.time_buckets) - 1
    if rows.view(np.uint64).max(initial=0) >= encoding.item_rows:  # dividing takes ten times as long as looking
        np.remainder(rows, encoding.item_rows, out=rows)


def _write_contextual(arrays: Arrays, layout: Layout) -> None:
    """Write the rows and positions of contextual tokens."""
    requests, encoding = layout.requests, layout.encoding
    C, count = encoding.contextual_seq_len, np.arange(encoding.contextual_seq_len)
    rows, positions = arrays["token_rows"], arrays["positions"]
    for at, cached, c, events, r in zip(
        layout.q_offsets[:-1], layout.cached, layout.contextual, layout.events, requests, strict=True
    ):
        if c and not cached:
            rows[at : at + C] = encoding.item_rows + (r.user_id * C + count) % encoding.user_rows
            if events + len(r.candidates) < encoding.contextual_from:
                rows[at : at + C] = encoding.item_rows + encoding.user_rows + count
            positions[at : at + C] = encoding.max_positions + count


def _encode_from_end(arrays: Arrays, layout: Layout) -> None:
    """Write the positions and time buckets of `Encoding.from_end` over those from the start."""
    positions, buckets, encoding = arrays["positions"], arrays["time_buckets"], layout.encoding
    for i, r in enumerate(layout.requests):
        events, end = layout.events[i], layout.q_offsets[i + 1] - layout.targets[i]
        first = max(layout.cached[i] - layout.contextual[i], 0)
        at, begin = end - (events - first), layout.q_offsets[i]
        positions[at:end] = np.minimum(events - np.arange(first, events), encoding.max_positions - 1)
        positions[end : layout.q_offsets[i + 1]] = 0
        buckets[end : layout.q_offsets[i + 1]] = 0
        for places, times in (((at, end), r.history_timestamps[first:]), ((begin, at), np.zeros(at - begin))):
            minutes = np.maximum(r.timestamp - times, 0) / 60
            buckets[slice(*places)] = np.minimum(np.sqrt(minutes).astype(np.int64), encoding.time_buckets - 1)


def _write_more(arrays: Arrays, layout: Layout) -> None:
    """Write the arrays of `Encoding.arrays`. Contextual tokens have time 0, candidates the request's."""
    requests = layout.requests
    for name in layout.encoding.arrays:
        arrays[name].fill(0)
    if "num_contextuals" in arrays:
        arrays["num_contextuals"][: len(requests)] = layout.contextual
    for i, r in enumerate(requests) if "times" in arrays else ():
        last, end = layout.q_offsets[i + 1], layout.q_offsets[i + 1] - layout.targets[i]
        first = max(layout.cached[i] - layout.contextual[i], 0)
        at = end - (layout.events[i] - first)
        arrays["times"][at:end] = r.history_timestamps[first:]
        arrays["times"][end:last] = r.timestamp
        arrays["until"][at:end] = np.append(r.history_timestamps[first + 1 :], r.timestamp)[: end - at]
        arrays["until"][end:last] = r.timestamp


def _to_time_buckets(gaps: Int64Array, buckets: int) -> None:
    """Turn gaps in seconds into time buckets, in place. A clock that ran backwards counts as no gap."""
    np.maximum(gaps, 0, out=gaps)
    exponents = (gaps + 1.0).view(np.int64)  # the exponent bits of 1 + gap as a double: floor(log2), exactly
    exponents >>= 52
    exponents -= 1023
    np.minimum(exponents, buckets - 1, out=gaps)


def pack_slices(layout: Layout, microbatch: int, *, pin: bool = False) -> list[HostBatch]:
    """Pack all uncached tokens in one batch, or with `microbatch` > 0 in several.

    Then the first batch has the uncached tokens of the histories. Each further one has up to `microbatch` candidates of
    each request, over the whole history, which is cached by then.
    """
    most = layout.needed.targets if microbatch else 0
    if not most:
        return [layout.pack(pin=pin)]
    requests, encoding, cached = layout.requests, layout.encoding, layout.cached if layout.appends else None
    slices = [slice(begin, begin + microbatch) for begin in range(0, most, microbatch)]
    return [
        pack(requests, encoding, cached=cached, candidates=slice(0), pin=pin),
        *(pack(requests, encoding, cached=layout.histories, candidates=s, pin=pin) for s in slices),
    ]
