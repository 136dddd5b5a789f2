"""Kernel variants of an engine, chosen for its model, device and precision."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from grengines.api import UnavailableError
from grengines.models.decoder.config import DecoderConfig
from grengines.models.hstu.config import INTERACTING, HSTUConfig
from grkernels import choice
from grkernels.choice import KernelChoice
from grkernels.families import Sizes

MOST_TIMED = 2048  # events of a user, where variants are timed


def choose(
    kernels: Mapping[str, str],
    model: HSTUConfig | DecoderConfig,
    device: str,
    precision: str,
    *,
    page: int = 0,
    stored: str = "",
    captured: bool = False,
    compiled: bool = False,
    products: str = "",
    ranks: int = 1,
    beams: int = Sizes.beams,
    allowed: Collection[str] | None = None,
) -> KernelChoice:
    """The variant of each family: the one that is named, or for auto the fastest that runs here.

    page: tokens of a page of the KV cache, 0 without one. stored: int8 or fp8 for its pages in 8 bits. captured: in a
    CUDA graph. compiled: by Inductor. products: fp8 for their operands in e4m3. ranks: processes that share the heads;
    where the norm is over all of them, it is given its moments. beams: of a search. allowed: the only variants that
    auto may take. Raises UnavailableError, naming the variants that would run, if a named one can't run.
    """
    qk_dim, v_dim = (model.qk_dim, model.v_dim) if isinstance(model, HSTUConfig) else (model.head_dim, model.head_dim)
    attention, gate = (model.attention_extras, model.gate_extras) if isinstance(model, HSTUConfig) else ((), ())
    if ranks > 1 and isinstance(model, HSTUConfig) and not model.choices.group_norm:
        gate = (*gate, f"engine.tensor_parallel={ranks}")
    kv_heads = model.kv_heads if isinstance(model, DecoderConfig) else model.heads
    sizes = Sizes(
        model.embedding_dim,
        model.heads // ranks,
        qk_dim,
        v_dim,
        INTERACTING,
        page,
        stored,
        captured,
        compiled,
        products,
        attention,
        gate,
        kv_heads=kv_heads // ranks,
        beams=beams,
        events=min(model.max_positions, MOST_TIMED),
    )
    try:
        return choice.choose(kernels, device=device, dtype=precision, sizes=sizes, allowed=allowed)
    except choice.RefusedError as e:
        raise UnavailableError(str(e)) from None
