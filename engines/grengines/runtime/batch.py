"""From requests to the arrays that HSTU is run on: one staging buffer, one copy to the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from grengines.api import Catalogue, Request
from grengines.models.hstu.config import HSTUConfig
from grengines.runtime import staging


@dataclass(frozen=True)
class Encoding:
    """How tokens are numbered: the sizes of the model's tables.

    Nothing that a token is encoded by changes when events are appended after it, so keys and values
    computed at one visit stay valid at the next:

    token row      item % item_rows; contextual token c of a user: item_rows + (user * C + c) % user_rows
    position       index of the event in the history, at most max_positions - 1; candidates share the one
                   after the history; contextual token c has a row of its own, max_positions + c
    time bucket    floor(log2(1 + gap)), gap in seconds to the event before; 0 for the first event and
                   contextual tokens; of a candidate, the gap between the last event and the request
    actions        the event's bit mask; 0 for candidates and contextual tokens. Weight likewise.
    """

    item_rows: int
    user_rows: int
    num_actions: int
    contextual_seq_len: int
    max_positions: int
    time_buckets: int

    @classmethod
    def of(cls, config: HSTUConfig, catalogue: Catalogue) -> Encoding:
        return cls(
            item_rows=max(min(catalogue.num_items, config.embedding_rows), 1),
            user_rows=min(max(catalogue.num_users, 1) * config.contextual_seq_len, config.embedding_rows),
            num_actions=catalogue.num_actions,
            contextual_seq_len=config.contextual_seq_len,
            max_positions=config.max_positions,
            time_buckets=config.time_buckets,
        )


class Bucket(NamedTuple):
    """Padded sizes of a batch: sequences, tokens to encode a sequence, candidates a sequence."""

    batch: int
    length: int
    candidates: int
    cached: int = 0  # tokens a sequence whose keys and values are in pages


@dataclass
class JaggedBatch:
    """Tokens of all sequences one after another, as tensors on one device.

    L tokens to encode, B sequences, M candidates. Padding: token rows past q_offsets[B] are encoded and
    seen by nobody, sequences past the real ones are empty, candidate rows past the real ones repeat row 0.
    """

    token_rows: Tensor  # int64 [L]
    actions: Tensor  # int64 [L] bit masks
    weights: Tensor  # float64 [L]
    positions: Tensor  # int64 [L]
    time_buckets: Tensor  # int64 [L]
    q_offsets: Tensor  # int64 [B + 1]
    kv_offsets: Tensor  # int64 [B + 1]; the same object where nothing is cached
    num_targets: Tensor  # int64 [B]
    candidate_rows: Tensor  # int64 [M], rows of the L tokens
    # Delta form only, else empty. The keys' stream holds each sequence's cached tokens, then its new ones.
    kept_offsets: Tensor  # int64 [B + 1]: of the keys' stream without candidates
    max_q_len: int
    max_kv_len: int


@dataclass
class HostBatch:
    """A packed batch on the host: every array of a JaggedBatch in one int64 buffer."""

    buffer: Tensor  # int64 [total], pinned where it is to be copied to a GPU
    sizes: dict[str, int]  # of each array, by its name in JaggedBatch, in the buffer's order
    max_q_len: int
    max_kv_len: int
    candidate_counts: list[int]  # of each request
    tokens: int  # real tokens to encode
    first_rows: list[int]  # of each request, its first row among the packed tokens

    @property
    def padded_tokens(self) -> int:
        return self.sizes["token_rows"]

    @property
    def token_rows(self) -> npt.NDArray[np.int64]:
        """The packed token rows [padded_tokens]: what is written to them is what is copied to the device."""
        rows: npt.NDArray[np.int64] = self.buffer[: self.padded_tokens].numpy()  # the buffer's first array
        return rows

    def to(self, device: torch.device, out: Tensor | None = None) -> JaggedBatch:
        """Copy to the device in one go, without waiting; into `out` (int64 [total]) where it is given."""
        buffer = self.buffer.to(device, non_blocking=True) if out is None else out.copy_(self.buffer, non_blocking=True)
        parts = dict(zip(self.sizes, buffer.split(list(self.sizes.values())), strict=True))
        parts["weights"] = parts["weights"].view(torch.float64)
        if not len(parts["kept_offsets"]):
            parts["kv_offsets"] = parts["q_offsets"]  # the same object: attention knows the full form by it
        return JaggedBatch(**parts, max_q_len=self.max_q_len, max_kv_len=self.max_kv_len)


def pack(
    requests: Sequence[Request],
    encoding: Encoding,
    *,
    cached: Sequence[int] | None = None,
    candidates: slice = slice(None),
    bucket: Bucket | None = None,
    pin: bool = False,
) -> HostBatch:
    """Number the tokens of `requests` and lay them out.

    cached: how many tokens of each request (contextual ones and events) have cached keys and values; only
    the rest is packed. candidates: which of each request's candidates; slice(0) for a prefill. bucket: pad
    to these sizes. pin: page-locked memory, for GPUs.

    Raises ValueError for requests that don't fit the bucket, for more cached tokens than there are, and
    for new events after cached ones in a model with contextual tokens: those see the whole history, so
    each new event changes them and nothing of them can be kept.
    """
    C, B = encoding.contextual_seq_len, len(requests)
    done = [0] * B if cached is None else list(cached)
    events = [len(r.history_items) for r in requests]
    chosen = [r.candidates[candidates] for r in requests]
    targets = [len(c) for c in chosen]
    whole = [C + e for e in events]
    new = [n - d + t for n, d, t in zip(whole, done, targets, strict=True)]
    for r, n, d in zip(requests, whole, done, strict=True):
        if not 0 <= d <= n or (C and d not in (0, n)):
            allowed = f"0 or {n}, since contextual tokens see the whole history" if C else f"0 to {n}"
            raise ValueError(f"request {r.request_id}: {d} tokens are cached; allowed is {allowed}")
    with_targets = [n + t for n, t in zip(whole, targets, strict=True)]
    longest, longest_kv = max(new, default=0), max(with_targets, default=0)
    q_offsets = [0, *accumulate(new)]
    L, B_padded, M = q_offsets[-1], B, sum(targets)
    if bucket is not None:
        sizes_needed = (B, longest, max(targets, default=0), max(done, default=0))
        if any(needed > there for needed, there in zip(sizes_needed, bucket, strict=True)):
            raise ValueError(f"{B} requests of at most {longest} tokens don't fit {bucket}; pack them without it")
        B_padded, longest, longest_kv = bucket.batch, bucket.length, bucket.length + bucket.cached
        L, M = bucket.batch * bucket.length, bucket.batch * bucket.candidates
    delta = cached is not None
    sizes = {
        **dict.fromkeys(("token_rows", "actions", "weights", "positions", "time_buckets"), L),
        "q_offsets": B_padded + 1,
        "kv_offsets": B_padded + 1,
        "num_targets": B_padded,
        "candidate_rows": M,
        "kept_offsets": delta * (B_padded + 1),
    }
    buffer = staging.zeros(sum(sizes.values()), pin)
    packed, ends = buffer.numpy(), accumulate(sizes.values())
    arrays = {name: packed[end - n : end] for (name, n), end in zip(sizes.items(), ends, strict=True)}

    rows, actions, positions, gaps = (arrays[n] for n in ("token_rows", "actions", "positions", "time_buckets"))
    weights = arrays["weights"].view(np.float64)
    candidate_rows = arrays["candidate_rows"]
    count = np.arange(max(L, *events, 0))
    position = np.minimum(count, encoding.max_positions - 1)
    placed = 0
    # As little as can be for each request, and the rest for all of them at once: NumPy's calls are what takes time.
    for b, r in enumerate(requests):
        h, times = events[b], r.history_timestamps
        first, last = max(done[b] - C, 0), q_offsets[b + 1]
        end = last - targets[b]
        if first < h:
            at, after_first = end - (h - first), max(first, 1)
            rows[at:end] = r.history_items[first:]
            actions[at:end] = r.history_actions[first:]
            weights[at:end] = r.history_weights[first:]
            positions[at:end] = position[first:h]
            gaps[end - (h - after_first) : end] = times[after_first:] - times[after_first - 1 : -1]
        rows[end:last] = chosen[b]
        positions[end:last] = min(h, encoding.max_positions - 1)
        gaps[end:last] = r.timestamp - times[-1] if h else 0
        candidate_rows[placed : placed + targets[b]] = count[end:last]
        placed += targets[b]
    if rows.view(np.uint64).max(initial=0) >= encoding.item_rows:  # dividing takes ten times as long as looking
        np.remainder(rows, encoding.item_rows, out=rows)
    for at, d, r in zip(q_offsets[:-1], done, requests, strict=True) if C else ():
        if not d:
            rows[at : at + C] = encoding.item_rows + (r.user_id * C + count[:C]) % encoding.user_rows
            positions[at : at + C] = encoding.max_positions + count[:C]
    # The exponent bits of 1 + gap as a double: floor(log2), exactly. A clock that ran backwards counts as no gap.
    np.maximum(gaps, 0, out=gaps)
    exponents = (gaps + 1.0).view(np.int64)
    exponents >>= 52
    exponents -= 1023
    np.minimum(exponents, encoding.time_buckets - 1, out=gaps)

    arrays["num_targets"][:B] = targets
    offsets = {"q_offsets": q_offsets, "kv_offsets": q_offsets}
    if delta:
        offsets |= {"kv_offsets": [0, *accumulate(with_targets)], "kept_offsets": [0, *accumulate(whole)]}
    for name, values in offsets.items():
        arrays[name][: B + 1] = values
        arrays[name][B + 1 :] = values[-1]
    return HostBatch(buffer, sizes, longest, longest_kv, targets, q_offsets[-1], q_offsets[:-1])


def pack_slices(
    requests: Sequence[Request],
    encoding: Encoding,
    microbatch: int,
    *,
    cached: Sequence[int] | None = None,
    bucket: Bucket | None = None,
    pin: bool = False,
) -> list[HostBatch]:
    """One batch of all that isn't cached; or, with microbatches, what isn't cached of the histories, and then slices of
    so many candidates each, of whose requests the whole history is cached by then."""
    most = max(len(r.candidates) for r in requests)
    if not microbatch or not most:
        return [pack(requests, encoding, cached=cached, bucket=bucket, pin=pin)]
    whole = [encoding.contextual_seq_len + len(r.history_items) for r in requests]
    slices = [slice(begin, begin + microbatch) for begin in range(0, most, microbatch)]
    return [
        pack(requests, encoding, cached=cached, candidates=slice(0), pin=pin),
        *(pack(requests, encoding, cached=whole, candidates=s, pin=pin) for s in slices),
    ]
