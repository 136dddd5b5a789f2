"""Losses of products in e4m3 in a trained model: outliers of weights and operands, and the rounding of either.

Weights have a scale for each output channel, and operands one for each row, as in `grkernels.fp8`. Beside it stands
what one scale would cost: for the weight, or for all rows that the model saw (a static scale).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from grengines.api import Request
from grengines.last_layer import LastLayer
from grengines.models.hstu.model import HSTURanker
from grengines.models.hstu.weights import SCALES, is_product
from grengines.numerics import relative_error
from grengines.runtime import atomic_io
from grengines.runtime.batch import pack
from grkernels.fp8 import DTYPE, Scaled

LARGEST = torch.finfo(DTYPE).max


@dataclass
class Loss:
    """Rounding of one matrix, or of one product's operands."""

    spread: float  # its largest scale over the median one
    outlier: float  # the largest number of a row over the row's root mean square, of the worst row
    error: float  # relative, with a scale for each row
    error_of_one_scale: float  # relative, with one scale for all


def write(source: str | Path, path: str | Path) -> dict[str, Loss]:
    """Write the weights of a file with the products' in e4m3, and return what each of them lost.

    The numbers and scales are those that engine.precision=fp8 makes of `source`; other tensors and metadata are copied.
    Raises ValueError for a file that is in e4m3 already, OSError.
    """
    with safe_open(str(source), framework="pt") as f:
        metadata = f.metadata()
        names = list(f.keys())
        tensors = {name: f.get_tensor(name) for name in names}
    losses = {}
    for name in filter(is_product, names):
        weight = tensors[name]
        if weight.dtype is DTYPE:
            raise ValueError(f"{source}: tensor {name} is in e4m3 already; give the weights that it was made of")
        made = Scaled.of(weight.to(torch.bfloat16))
        tensors[name] = made.values[:, : weight.shape[1]].contiguous()
        tensors[name + SCALES] = made.scales
        wide = weight.float()
        largest = wide.abs().amax(1)
        losses[name] = Loss(
            _spread(largest), _outlier(wide, largest), _error_by_row(wide), _error_of(wide, float(largest.max()))
        )
    with atomic_io.replacing(Path(path)) as temporary:
        save_file(tensors, str(temporary), metadata=metadata)
    return losses


@torch.inference_mode()
def operands(model: HSTURanker, requests: Sequence[Request]) -> dict[str, Loss]:
    """Return what the operands of each product lose for these requests.

    model: in fp32, with the kernels' references.
    """
    largest: dict[str, list[Tensor]] = {}
    outliers: dict[str, float] = {}

    def look(name: str, x: Tensor) -> None:
        largest.setdefault(name, []).append(x.abs().amax(1))
        outliers[name] = max(outliers.get(name, 0.0), _outlier(x, largest[name][-1]))

    _see(model, requests, look)
    maxima = {name: torch.cat(rows) for name, rows in largest.items()}
    squares = {name: torch.zeros(3, dtype=torch.float64) for name in maxima}

    def measure(name: str, x: Tensor) -> None:
        size = float(x.double().norm())
        errors = (_error_by_row(x), _error_of(x, float(maxima[name].max())))
        squares[name] += torch.tensor([size**2, *((size * e) ** 2 for e in errors)], dtype=torch.float64)

    _see(model, requests, measure)
    return {
        name: Loss(_spread(rows), outliers[name], *(squares[name][1:] / squares[name][0]).sqrt().tolist())
        for name, rows in maxima.items()
    }


def _see(model: HSTURanker, requests: Sequence[Request], see: Callable[[str, Tensor], None]) -> None:
    with _watched(model, see):
        for request in requests:
            model(pack([request], model.encoding).to(model.device))


@contextmanager
def _watched(model: HSTURanker, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Show the operand of each product, by the name of its weight."""
    kernels, computed = model.kernels, model.computed
    gated = itertools.cycle(f"layers.{i}.out.weight" for i in range(len(model.layers)))

    def norm_gate(*args: Any, **options: Any) -> Tensor:
        out: Tensor = kernels.norm_gate(*args, **options)
        see(next(gated), out)
        return out

    def hook(name: str) -> Callable[..., None]:
        return lambda _, args: see(name, args[0])

    linears: dict[str, Any] = {f"layers.{i}.uvqk.weight": layer.uvqk for i, layer in enumerate(model.layers)}
    linears["head_hidden.weight"] = model.head_hidden
    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    model.kernels, model.computed = kernels.replace(norm_gate=norm_gate), LastLayer.EVERY
    try:
        yield
    finally:
        model.kernels, model.computed = kernels, computed
        for handle in handles:
            handle.remove()


def _spread(largest: Tensor) -> float:
    """Return the largest of the rows' largest numbers over the median one; rows of zeros do not count."""
    largest = largest[largest > 0]
    return float(largest.max() / largest.median()) if len(largest) else 1.0


def _outlier(x: Tensor, largest: Tensor) -> float:
    return float((largest / x.square().mean(1).sqrt().clamp(min=1e-30)).max())


def _error_by_row(x: Tensor) -> float:
    return relative_error(Scaled.of(x).numbers(torch.float32)[:, : x.shape[1]], x)


def _error_of(x: Tensor, largest: float) -> float:
    scale = max(largest, 1e-30) / LARGEST
    return relative_error((x / scale).to(DTYPE).float() * scale, x)
