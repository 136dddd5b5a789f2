"""Attention of other projects, which the kernel benchmark measures if they are installed.

None of their code is here. Their interfaces differ between releases, so a call passes only the arguments that the
installed release has. Inputs are converted to a peer's layout before the timed call. `sdpa_softmax` is another
operator and only a yardstick: PyTorch's softmax attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grkernels.hstu_attention.reference import hstu_attention as hstu_reference

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Peer:
    """An implementation of another project.

    `load` imports it and returns `bind`. Its ImportError says what is missing and which command installs it.
    `bind` takes the family's arguments and returns the call to time. It raises NotImplementedError, with the reason,
    for arguments that the peer does not support.
    """

    name: str
    load: Callable[[], Callable[..., Call]]
    reference: Callable[..., Tensor] = hstu_reference
    same_operator: bool = True


def _meta(tma: bool) -> Callable[..., Call]:
    """Meta's Triton kernels."""
    module = _module(
        ["generative_recommenders.ops.triton.triton_hstu_attention"],
        "git clone https://github.com/meta-recsys/generative-recommenders and put the folder on PYTHONPATH",
    )

    def bind(**inputs: Any) -> Call:
        _needs_gpu(inputs)
        _whole_scale(inputs)
        _no_pages(inputs)
        delta = inputs["q_offsets"] is not inputs["kv_offsets"]
        function = getattr(module, "triton_cached_hstu_mha" if delta else "triton_hstu_mha", None)
        if function is None:
            raise NotImplementedError("this release has no attention with a cache")
        if tma and "enable_tma" not in inspect.signature(function).parameters:
            raise NotImplementedError("this release has no option enable_tma")
        q, n = inputs["q"].contiguous(), inputs["scaling_seqlen"]
        return _known(
            function,
            N=n,
            max_seq_len=n,
            alpha=inputs["alpha"],
            q=q,
            delta_q=q,
            k=inputs["k"].contiguous(),
            v=inputs["v"].contiguous(),
            seq_offsets=inputs["kv_offsets"],
            causal=True,
            attn_scale=torch.tensor(1.0 / n, device=q.device),
            num_targets=inputs["num_targets"],
            max_attn_len=inputs.get("max_attn_len", 0),
            contextual_seq_len=inputs.get("contextual_seq_len", 0),
            enable_tma=tma,
        )

    return bind


def _fbgemm() -> Callable[..., Call]:
    """FBGEMM's CUTLASS kernels, by NVIDIA."""
    module = _module(
        ["fbgemm_gpu.experimental.hstu", "hstu.cuda_hstu_attention", "hstu_attn"],
        "build FBGEMM's fbgemm_gpu from source with: python setup.py install --build-target=hstu",
    )
    function = getattr(module, "hstu_attn_varlen_func", None)
    if function is None:
        raise ImportError(f"{module.__name__} has no hstu_attn_varlen_func")
    knows = inspect.signature(function).parameters

    def bind(**inputs: Any) -> Call:
        _needs_gpu(inputs)
        _no_pages(inputs)
        if "scaling_seqlen" not in knows:
            _whole_scale(inputs)
        q, v, targets = inputs["q"], inputs["v"], inputs["num_targets"]
        if inputs.get("max_attn_len", 0) or inputs.get("contextual_seq_len", 0):
            raise NotImplementedError("windows and contextual tokens are not measured with this peer")
        if q.dtype not in (torch.float16, torch.bfloat16):
            raise NotImplementedError("fp16 and bf16 only")
        if q.shape[2] != v.shape[2] or q.shape[2] not in (32, 64, 128, 256):
            raise NotImplementedError("head sizes must be equal and 32, 64, 128 or 256")
        q_offsets, kv_offsets = inputs["q_offsets"].int(), inputs["kv_offsets"].int()
        return _known(
            function,
            q=q,
            k=inputs["k"],
            v=v,
            cu_seqlens_q=q_offsets,
            seq_offsets_q=q_offsets,
            cu_seqlens_k=kv_offsets,
            seq_offsets_k=kv_offsets,
            seqused_q=None,
            seqused_k=None,
            max_seqlen_q=inputs["max_q_len"],
            max_seqlen_k=inputs["max_kv_len"],
            scaling_seqlen=inputs["scaling_seqlen"],
            num_contexts=None,
            num_targets=None if targets is None else targets.int(),
            target_group_size=1,
            window_size=(-1, 0),
            alpha=inputs["alpha"],
            is_delta_q=inputs["q_offsets"] is not inputs["kv_offsets"],
        )

    return bind


def _sdpa() -> Callable[..., Call]:
    """PyTorch's scaled_dot_product_attention, with the kernel that it picks."""

    def bind(**inputs: Any) -> Call:
        q, k, v = (_padded(inputs, name) for name in "qkv")

        def call() -> Tensor:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=inputs["alpha"])
            return out.transpose(1, 2).flatten(0, 1)  # a view where the kernel keeps the layout of q

        return call

    return bind


def softmax_attention(**inputs: Any) -> Tensor:
    """Compute causal softmax attention of full sequences of one length: [L, H, dv].

    Products are in the inputs' dtype, the softmax in fp32.
    """
    q, k, v = (_padded(inputs, name) for name in "qkv")
    n = q.shape[2]
    hidden = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
    out = torch.empty_like(v)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            scores = (q[b, h] @ k[b, h].T).float().mul_(inputs["alpha"]).masked_fill_(hidden, -torch.inf)
            out[b, h] = scores.softmax(1).to(v.dtype) @ v[b, h]
    return out.transpose(1, 2).flatten(0, 1)


def _padded(inputs: dict[str, Any], name: str) -> Tensor:
    """Return [L, H, d] as a view [B, H, N, d].

    Raises NotImplementedError unless all sequences have the same length and no cache.
    """
    batch, n = inputs["q_offsets"].shape[0] - 1, inputs["max_q_len"]
    x: Tensor = inputs[name]
    if inputs["q_offsets"] is not inputs["kv_offsets"] or inputs.get("k_pages") is not None or x.shape[0] != batch * n:
        raise NotImplementedError("softmax yardstick: full sequences of one length only")
    if inputs["num_targets"] is not None or inputs.get("max_attn_len", 0) or inputs.get("contextual_seq_len", 0):
        raise NotImplementedError("softmax yardstick: causal masks only")
    sequences: Tensor = x.unflatten(0, (batch, n))
    return sequences.transpose(1, 2)


def _known(function: Callable[..., Tensor], **arguments: Any) -> Call:
    """Return a call with the arguments that this release of the function has."""
    names = inspect.signature(function).parameters
    return partial(function, **{name: value for name, value in arguments.items() if name in names})


def _module(names: list[str], install: str) -> Any:
    """Return the first of these modules that can be imported.

    Raises ImportError with the command that installs one.
    """
    why = f"package {names[0].partition('.')[0]} is not installed"
    for name in names:
        if not find_spec(name.partition(".")[0]):
            continue
        try:
            return import_module(name)
        except Exception as e:  # besides ImportError: a shared library for another GPU or PyTorch, an assertion
            why = f"{name} can't be imported ({type(e).__name__}: {e})"
    raise ImportError(f"{why}; {install}")


def _needs_gpu(inputs: dict[str, Any]) -> None:
    if not inputs["q"].is_cuda:
        raise NotImplementedError("needs an NVIDIA GPU")


def _whole_scale(inputs: dict[str, Any]) -> None:
    if inputs["scaling_seqlen"] != inputs["max_kv_len"]:
        raise NotImplementedError("divides by the longest length only")


def _no_pages(inputs: dict[str, Any]) -> None:
    if inputs.get("k_pages") is not None:
        raise NotImplementedError("paged keys are not measured with this peer")


PEERS = (
    Peer("meta_triton", partial(_meta, tma=False)),
    Peer("meta_triton_tma", partial(_meta, tma=True)),
    Peer("fbgemm", _fbgemm),
    Peer("sdpa_softmax", _sdpa, softmax_attention, same_operator=False),
)
