"""The header of a safetensors file: what it holds, and what is wrong with it, before a tensor is read. No torch import.

A file of weights can so be refused before a cell is recorded.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from grengines.models.hstu.config import HSTUConfig

MAKE_WEIGHTS = (
    "`grbench train` writes one, and `grbench import-weights` makes one of a checkpoint of another project "
    "(docs/WEIGHTS.md)"
)
MAKE_IDS = (
    "`grbench train task=generate` writes one, and `grbench import-weights --from semantic_ids` makes one of .npy, "
    ".csv or JSON (docs/WEIGHTS.md)"
)
RANKER, GENERATOR, DECODER, IDS = "a ranker's weights", "a generator's weights", "a decoder's weights", "semantic IDs"
NAMED = {"head_hidden.weight": RANKER, "model.embed_tokens.weight": DECODER, "codes": IDS, "token_table": GENERATOR}
FLOATS = ("F16", "F32", "F64", "BF16")  # safetensors' names of dtypes that need no scales
_BEGINS = {  # the first bytes of files that are given by mistake
    b"PK\x03\x04": "it is an archive, as torch.save writes",
    b"\x80": "it is a pickle, as torch.save writes",
    b"\x1f\x8b": "it is compressed by gzip",
    b"\x93NUMPY": "it is an array of NumPy",
    b"PAR1": "it is a Parquet table",
}
_NOT_SHAPE = ("name", "weights", "variant")  # every other option of HSTUConfig changes the meaning of the weights


@dataclass(frozen=True)
class Header:
    """The names of a file's tensors, and what it says of itself."""

    path: str
    names: frozenset[str]
    metadata: Mapping[str, str]

    def holds(self) -> str:
        """Return what the tensors are, in words."""
        return next((kind for name, kind in NAMED.items() if name in self.names), "tensors of another layout")

    def check_options(self, config: HSTUConfig, not_used: Collection[str]) -> None:
        """Raise ValueError if the weights were written for another model. not_used: options that it does not read.

        A narrower window than that of the training is a choice of serving: the weights are the same, and what it costs
        in quality can be measured.
        """
        try:
            saved = dict(json.loads(self.metadata.get("model", "{}")))
        except (ValueError, TypeError):
            wrong = "its metadata 'model' is not a JSON object; save the weights again"
            raise ValueError(f"{self.path}: {wrong}") from None
        if _narrower(config.max_attn_len, saved.get("max_attn_len")):
            del saved["max_attn_len"]
        for key, value in shape_of(config).items():
            if key in saved and saved[key] != value and key not in not_used:
                raise ValueError(
                    f"{self.path}: written for {key}={_text(saved[key])}, the model has {_text(value)}; "
                    f"set {shlex.quote(f'model.{key}={_text(saved[key])}')} or give other weights"
                )


def read(path: str | Path, make: str = MAKE_WEIGHTS) -> Header:
    """Read a file's header. make: how such a file is made. Raises ValueError as `unreadable`."""
    from safetensors import SafetensorError, safe_open  # imports NumPy, which takes a tenth of a second

    try:
        with safe_open(str(path), framework="np") as f:
            return Header(str(path), frozenset(f.keys()), f.metadata() or {})
    except (SafetensorError, OSError) as e:
        raise unreadable(path, e, make) from None


def unreadable(
    path: str | Path, error: Exception, make: str = MAKE_WEIGHTS, again: str = "save it again"
) -> ValueError:
    """Return the error for a file that should be safetensors: what it is instead, and how the right one is made.

    again: what to do about a damaged one.
    """
    what = _instead(Path(path))
    if what is None:
        return ValueError(f"{path}: not a readable safetensors file ({' '.join(str(error).split())}); {again}")
    return ValueError(f"{path}: not a readable safetensors file: {what}; {make}")


def shape_of(config: HSTUConfig) -> dict[str, object]:
    """Return the options that change the meaning of the weights."""
    options = dataclasses.asdict(config) | dataclasses.asdict(config.choices)
    return {key: value for key, value in options.items() if key not in _NOT_SHAPE}


def _narrower(window: int, trained: object) -> bool:
    """Return True if a token sees only a part of what it saw in the training. 0: a window without end."""
    return isinstance(trained, int) and window > 0 and (trained == 0 or window < trained)


def _instead(path: Path) -> str | None:
    """Return what a file is that is no safetensors file, or None for a damaged one."""
    if path.is_dir():
        return "it is a folder"
    try:
        with path.open("rb") as f:
            first = f.read(64)
    except OSError:
        return None
    if not first:
        return "it is empty"
    if first[8:9] == b"{":  # the length of the header, then the header
        return None
    if found := next((what for begin, what in _BEGINS.items() if first.startswith(begin)), None):
        return found
    try:
        line = first.splitlines()[0].decode()
    except UnicodeDecodeError:
        return "it is other data"
    return f"it is text that begins with {line[:40]!r}" if line.isprintable() else "it is other data"


def _text(value: object) -> str:
    return json.dumps(value, separators=(",", ":")).replace('"', "")
