"""Inputs of the small operator families, and the check that every variant must pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from grkernels import registry
from grkernels.norm_gate.reference import moments_of
from grkernels.rounding import rounded

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FLOOR = 4 * 2.0**-23  # a few roundings of fp32: where eager PyTorch happens to be exact
Arguments = dict[str, Any]


def offsets(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])


def jagged_lengths(first: tuple[int, ...], second: tuple[int, ...]) -> Arguments:
    return {"first_offsets": offsets(first), "second_offsets": offsets(second)}


def norm_gate(rows: int, heads: int, d: int, *, scale: float = 1e-3, mean: float = 0.0) -> Arguments:
    """u is a strided view of a projection, and so is a where it has several heads."""
    W = heads * d
    a = scale * (mean + torch.randn(rows, W + 8 * (heads > 1)))[:, :W]
    return {
        "u": 2 * torch.randn(rows, 2 * W + 16)[:, 16 : 16 + W],
        "a": a.unflatten(1, (heads, d)) if heads > 1 else a,
        "weight": 1 + 0.1 * torch.randn(W),
        "bias": 0.1 * torch.randn(W),
        "eps": 1e-6 if mean == 0.0 else scale**2 / 100,
    }


def part_of_rows(rows: int, parts: int, width: int, *, scale: float = 1e-3, mean: float = 0.0) -> Arguments:
    """The second of several parts of rows, with the moments of all of them."""
    whole = norm_gate(rows, parts, width, scale=scale, mean=mean)
    a = whole["a"].flatten(1) if parts > 1 else whole["a"]
    whole["u"], whole["weight"], whole["bias"] = (whole[n][..., width : 2 * width] for n in ("u", "weight", "bias"))
    moments = torch.stack([moments_of(part) for part in a.chunk(parts, dim=1)])
    return whole | {"a": a[:, width : 2 * width], "moments": moments}


def layer_norm(rows: int, width: int, *, scale: float = 1.0, mean: float = 0.0) -> Arguments:
    x = scale * (mean + torch.randn(rows, width + 8))[:, 8:]
    return {"x": x, "weight": 1 + 0.1 * torch.randn(width), "bias": 0.1 * torch.randn(width), "eps": scale**2 / 100}


def interaction(batch: int, features: int, dim: int) -> Arguments:
    """Strided: some features of each sample, some values of each feature."""
    return {"x": torch.randn(batch, features + 2, dim + 4)[:, 1 : 1 + features, 4:]}


def jagged_concat(first: tuple[int, ...], second: tuple[int, ...], heads: int, d: int, padding: int = 0) -> Arguments:
    """Padding beyond the last sequence is NaN: nothing may come of it."""
    streams = []
    for lengths in first, second:
        x = torch.randn(sum(lengths) + padding, heads, 2 * d)[:, :, d:]
        x[sum(lengths) :] = torch.nan
        streams.append(x if heads > 1 else x[:, 0])
    rows = sum(first) + sum(second) + padding
    return {"first": streams[0], "second": streams[1], "rows": rows, **jagged_lengths(first, second)}


def jagged_split(first: tuple[int, ...], second: tuple[int, ...], heads: int, d: int, padding: int = 0) -> Arguments:
    x = torch.randn(sum(first) + sum(second) + padding, heads, d + 8)[:, :, 8:]
    x[sum(first) + sum(second) :] = torch.nan
    sizes = {"first_rows": sum(first) + padding, "second_rows": sum(second) + 2 * padding}
    return {"x": x if heads > 1 else x[:, 0], **sizes, **jagged_lengths(first, second)}


def token_embedding(rows: int, width: int, num_actions: int) -> Arguments:
    return {
        "token_rows": torch.randint(30, (rows,)),
        "actions": torch.randint(2 ** (num_actions + 1), (rows,)),  # one bit more than the table has rows
        "weights": torch.rand(rows, dtype=torch.float64),
        "positions": torch.randint(9, (rows,)),
        "time_buckets": torch.randint(5, (rows,)),
        "token_table": torch.randn(30, width),
        "action_table": torch.randn(num_actions, width),
        "weight_vector": torch.randn(width),
        "position_table": torch.randn(9, width),
        "time_table": torch.randn(5, width),
    }


def thirds(out: Tensor, x: Arguments) -> tuple[Tensor, ...]:
    return out.chunk(3, dim=1)


def dense_and_pairs(out: Tensor, x: Arguments) -> tuple[Tensor, ...]:
    return out.tensor_split([x["x"].shape[2]], dim=1)


PARTS: dict[str, Callable[[Any, Arguments], tuple[Tensor, ...]]] = {
    "norm_gate": thirds,
    "layer_norm": lambda out, x: (out,),
    "interaction": dense_and_pairs,
    "jagged_concat": lambda out, x: (out,),
    "jagged_split": lambda out, x: out,
    "token_embedding": lambda out, x: (out,),
}
RAGGED = (3, 0, 1, 0, 5), (0, 0, 4, 1, 2)
# What to run each family at; on a CPU, torch.compile runs the first only: compiling takes seconds.
CASES: dict[str, list[Callable[[], Arguments]]] = {
    "norm_gate": [
        lambda: norm_gate(5, 2, 20),
        lambda: norm_gate(3, 1, 48, scale=1e-5, mean=10.0),
        lambda: norm_gate(1, 1, 1100),
        lambda: norm_gate(2, 4, 1024, scale=1e-5),
        lambda: norm_gate(0, 1, 16),
        lambda: part_of_rows(5, 2, 20),
        lambda: part_of_rows(3, 3, 48, scale=1e-5, mean=10.0),
    ],
    "layer_norm": [
        lambda: layer_norm(5, 40),
        lambda: layer_norm(3, 100, scale=1e-2, mean=20.0),
        lambda: layer_norm(1, 1),
        lambda: layer_norm(2, 4097),
        lambda: layer_norm(0, 16),
    ],
    "interaction": [
        lambda: interaction(5, 4, 16),
        lambda: interaction(3, 27, 40),
        lambda: interaction(9, 1, 100),
        lambda: interaction(3, 2, 100),
        lambda: interaction(2, 33, 300),
        lambda: interaction(1, 128, 16),
        lambda: interaction(2, 130, 40),
        lambda: interaction(0, 4, 16),
    ],
    "jagged_concat": [
        lambda: jagged_concat(*RAGGED, 2, 20),
        lambda: jagged_concat(*RAGGED, 1, 1100, padding=3),
        lambda: jagged_concat((1,), (0,), 1, 16),
        lambda: jagged_concat((0, 0, 2), (0, 0, 0), 1, 16),
        lambda: jagged_concat((0,), (0,), 1, 16, padding=2),
        lambda: jagged_concat((), (), 1, 16, padding=2),
    ],
    "jagged_split": [
        lambda: jagged_split(*RAGGED, 2, 20),
        lambda: jagged_split(*RAGGED, 1, 1100, padding=3),
        lambda: jagged_split((1,), (0,), 1, 16),
        lambda: jagged_split((0, 0, 2), (0, 0, 0), 1, 16),
        lambda: jagged_split((0,), (0,), 1, 16, padding=2),
        lambda: jagged_split((), (), 1, 16, padding=2),
    ],
    "token_embedding": [
        lambda: token_embedding(7, 24, 3),
        lambda: token_embedding(3, 1100, 1),
        lambda: token_embedding(0, 16, 2),
    ],
}
EACH_CASE = [pytest.param(family, case, id=f"{family}{i}") for family in CASES for i, case in enumerate(CASES[family])]


def converted(arguments: Arguments, dtype: torch.dtype, device: str | None = None) -> Arguments:
    """The same problem, its fp32, fp16 and bf16 tensors as `dtype`; strides stay. device None: where they are.

    Moments are fp32 in every dtype.
    """

    def convert(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        whole = x if x._base is None else x._base  # converting a view would make it contiguous
        moved = whole.to(device, dtype if x.dtype in DTYPES.values() and name != "moments" else x.dtype)
        return moved.as_strided(x.shape, x.stride(), x.storage_offset())

    return {name: convert(name, x) for name, x in arguments.items()}


def exact_result(family: str, arguments: Arguments) -> Any:
    """The reference's result in fp32 on the same (rounded) values."""
    return registry.get(family, "torch").reference(**converted(arguments, torch.float32))


def errors(family: str, out: Any, arguments: Arguments, exact: Any = None) -> list[float]:
    """||out - exact|| / ||exact|| of each part; exact: `exact_result`, if it is there."""
    exact = exact_result(family, arguments) if exact is None else exact
    pairs = zip(PARTS[family](out, arguments), PARTS[family](exact, arguments), strict=True)
    return [((a.float() - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in pairs]


def agrees(family: str, out: Any, arguments: Arguments) -> bool:
    """The check that every variant must pass. Shape and dtype are those of eager PyTorch."""
    eager = registry.get(family, "torch")
    expected = eager.fn(**arguments)
    for a, b in zip(PARTS[family](out, arguments), PARTS[family](expected, arguments), strict=True):
        assert a.shape == b.shape and a.dtype is b.dtype
    dtype = next(x.dtype for x in arguments.values() if isinstance(x, Tensor) and x.dtype in DTYPES.values())
    # In half precision eager PyTorch is itself under test; in fp32 the reference has no rounding to compare with.
    yardstick = expected if dtype == torch.float32 else rounded(eager.reference, dtype)(**arguments)
    exact = exact_result(family, arguments)
    allowed = [eager.max_error_ratio * e + FLOOR for e in errors(family, yardstick, arguments, exact)]
    return all(e <= most for e, most in zip(errors(family, out, arguments, exact), allowed, strict=True))  # NaN fails
