"""Tensors of a checkpoint: read without running code, checked one by one, and listed by what became of each."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from grengines.models.header import unreadable

NESTED = ("dense_dict", "model_state_dict", "state_dict", "model")  # where checkpoints keep the model's own tensors


@dataclass(frozen=True)
class Fate:
    """One tensor of the checkpoint: mapped to a tensor of ours, folded into some, or left out."""

    tensor: str
    shape: list[int]
    fate: str  # mapped, folded or left out
    to: str  # our tensors, or the reason


@dataclass
class Source:
    """The tensors of a checkpoint, by name. Each must be taken or left out before `finish`."""

    path: Path
    tensors: dict[str, Tensor]
    fates: list[Fate] = field(default_factory=list)

    def has(self, name: str) -> bool:
        """Return True if there is a tensor of this name."""
        return name in self.tensors

    def look(self, name: str, *shape: int) -> Tensor:
        """Return a tensor as it is, which is to be taken as well.

        shape: its dimensions, -1 for any. Raises ValueError for one that is missing or of another shape.
        """
        if name not in self.tensors:
            near = f"; it has {', '.join(sorted(self.tensors)[:3])} ..." if self.tensors else ""
            raise ValueError(f"{self.path}: tensor {name} is missing{near}")
        tensor = self.tensors[name]
        found = list(tensor.shape)
        if shape and (len(found) != len(shape) or any(n not in (-1, m) for n, m in zip(shape, found, strict=True))):
            wanted = ", ".join("any" if n == -1 else str(n) for n in shape)
            raise ValueError(f"{self.path}: tensor {name} is {found}, expected [{wanted}]")
        return tensor

    def take(self, name: str, *shape: int, to: str, folded: bool = False) -> Tensor:
        """Return a tensor as fp32, which becomes `to`. Raises ValueError as `look`, and for one that is not finite."""
        tensor = self.look(name, *shape).detach().float()
        if not tensor.isfinite().all():
            raise ValueError(f"{self.path}: tensor {name} has NaN or infinity")
        self.fates.append(Fate(name, list(tensor.shape), "folded" if folded else "mapped", to))
        return tensor

    def leave(self, prefix: str, why: str) -> None:
        """Leave out the tensors whose names begin so."""
        taken = {fate.tensor for fate in self.fates}
        for name, tensor in self.tensors.items():
            if name.startswith(prefix) and name not in taken:
                self.fates.append(Fate(name, list(tensor.shape), "left out", why))

    def finish(self) -> None:
        """Raise ValueError for a tensor that was neither taken nor left out."""
        known = {fate.tensor for fate in self.fates}
        if surplus := sorted(self.tensors.keys() - known):
            raise ValueError(
                f"{self.path}: unexpected tensor {surplus[0]} {list(self.tensors[surplus[0]].shape)} "
                f"({len(surplus)} in all): this layout has no place for it"
            )


def read(path: Path) -> Source:
    """Read a .safetensors file, or a file of torch.save with tensors only.

    Raises ValueError, one line, for a file that cannot be read or holds other objects than tensors.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return Source(path, read_safetensors(path))
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        reason = str(e).partition("WeightsUnpickler error:")[2].strip().partition("\n")[0] or "pickled data"
        raise ValueError(
            f"{path}: holds other objects than tensors, which could run code ({reason}); save the tensors alone: "
            "torch.save(model.state_dict(), FILE)"
        ) from None
    except (OSError, RuntimeError, EOFError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        raise ValueError(f"{path}: no file of torch.save, or a damaged one; save the state dict again") from None
    nested = next((found[k] for k in NESTED if isinstance(found, Mapping) and isinstance(found.get(k), Mapping)), found)
    if not isinstance(nested, Mapping):
        raise ValueError(f"{path}: holds a {type(nested).__name__}, not a state dict of tensors")
    odd = next(
        (k for k, v in nested.items() if not isinstance(v, Tensor) and not str(k).endswith("_extra_state")), None
    )
    if odd is not None:
        raise ValueError(f"{path}: {odd} is a {type(nested[odd]).__name__}, not a tensor; save the state dict alone")
    return Source(path, {str(k): v for k, v in nested.items() if isinstance(v, Tensor)})


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises ValueError, one line, for a damaged one."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as e:
        raise unreadable(path, e, "give the checkpoint") from None


def drop_prefix(source: Source, known: str) -> None:
    """Drop what wrappers (DDP and the like) put before every name, so that a name begins with `known`.

    Raises ValueError if no name contains it, or for a name that is there with and without the prefix.
    """
    name = next((n for n in source.tensors if known in n), None)
    if name is None:
        raise ValueError(f"{source.path}: tensor {known}... is missing; is it another layout? (--from)")
    prefix = name[: name.index(known)]
    bare = (n.removeprefix(prefix) for n in source.tensors if prefix and n.startswith(prefix))
    if twice := next((n for n in bare if n in source.tensors), None):
        raise ValueError(f"{source.path}: tensors {twice} and {prefix}{twice}: save the state dict of one model alone")
    source.tensors = {n.removeprefix(prefix): t for n, t in source.tensors.items()}


def count(source: Source, pattern: str) -> int:
    """Return the number of layers: how many i there are with a tensor named pattern.format(i)."""
    layers = 0
    while source.has(pattern.format(layers)):
        layers += 1
    return layers
