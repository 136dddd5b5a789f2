"""Key of the table of launch configurations."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from grkernels import tuning


def tuning_key(
    *,
    q: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    num_targets: Tensor | None,
    max_q_len: int,
    max_kv_len: int,
    contextual_seq_len: int = 0,
    max_attn_len: int = 0,
    k_pages: Tensor | None = None,
    **_: Any,
) -> str:
    """Return all that the best launch configuration depends on. Takes the arguments of the family's functions.

    These are the element and head sizes, the number of sequences times heads and the lengths (to the next power of
    two), the kind of mask, the page size, and the type of 8-bit pages.
    """
    mask = [
        *(["contextual"] if contextual_seq_len else []),
        *(["window"] if max_attn_len else []),
        *(["targets"] if num_targets is not None else []),
    ]
    return tuning.key(
        bits=8 * q.element_size(),
        qk=q.shape[2],
        v=v.shape[2],
        spread=tuning.bucket((q_offsets.shape[0] - 1) * q.shape[1]),
        q=tuning.bucket(max_q_len),
        kv=tuning.bucket(max_kv_len),
        mask="+".join(mask) or "causal",
        page=0 if k_pages is None else k_pages.shape[1],
        **_stored(k_pages),
    )


def _stored(pages: Tensor | None) -> dict[str, str]:
    if pages is None or pages.element_size() > 1:
        return {}
    return {"stored": str(pages.dtype).removeprefix("torch.")}
