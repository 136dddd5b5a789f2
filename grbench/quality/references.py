"""Answers of the fp32 reference, kept in a folder that the cells of one search or sweep share.

Configurations that differ in engine, kernel or precision have the same reference, which takes longest to answer on a
CPU. Answers are kept by all that decides them, so those of other weights, requests or code are computed anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grbench.config.schema import RunSpec, weights_of
from grbench.execution.environment import cpu_name
from grengines.api import Catalogue, Request, Retrieval
from grengines.runtime import atomic_io
from grengines.runtime.cache_dir import content

FOLDER = ".references"  # beside the folders of the cells


@dataclasses.dataclass(frozen=True)
class References:
    """The folder of the answers.

    code: the digest of the code that runs, which may be older than the files that are here now. None: it is not known,
    and nothing is kept.
    """

    folder: Path
    code: str | None

    @classmethod
    def of_process(cls, folder: Path) -> References:
        """Return those that configurations of this process share, whose code is one."""
        return cls(folder, "of this process")

    def of(
        self,
        spec: RunSpec,
        catalogue: Catalogue,
        retrieval: Retrieval | None,
        device: str,
        requests: Sequence[Request],
        compute: Callable[[], list[Any]],
    ) -> list[Any]:
        """Return the reference's answer to each request, an array: the kept one, else what `compute` returns.

        spec: of the cell; its engine, kernel and load play no part. Answers that can't be written are not kept.
        """
        if self.code is None:
            return compute()
        parts = {
            "code": self.code,
            "device": _name_of(device),
            "task": spec.task,
            "seed": spec.seed,
            "model": dataclasses.asdict(spec.model),
            "retrieval": dataclasses.asdict(spec.retrieval) if spec.retrieval else None,
            "ids": retrieval.ids.digest if retrieval else None,
            "weights": {part: content(Path(path)) for part, path in weights_of(spec).items() if path},
            "catalogue": dataclasses.asdict(catalogue),
            "requests": _digest(requests),
        }
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        path = self.folder / f"{key}.npz"
        if (known := _read(path)) is not None:
            return known
        answers = compute()
        with contextlib.suppress(OSError), io.BytesIO() as file:
            np.savez(file, values=np.concatenate(answers), lengths=[len(answer) for answer in answers])
            atomic_io.write(path, file.getvalue())
        return answers


def _read(path: Path) -> list[Any] | None:
    """Return the answers in a file; None if it is missing or damaged, which its checksums show."""
    try:
        with np.load(path) as kept:
            return np.split(kept["values"], kept["lengths"].cumsum()[:-1])
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def _digest(requests: Sequence[Request]) -> str:
    digest = hashlib.sha256()
    for request in requests:
        for field in dataclasses.fields(request):
            value = np.asarray(getattr(request, field.name))
            digest.update(f"{field.name} {value.dtype} {value.shape}".encode() + value.tobytes())
    return digest.hexdigest()


def _name_of(device: str) -> list[str]:
    """Return the device's model and the version of PyTorch, by which results may differ in rounding."""
    import torch

    return [torch.cuda.get_device_name() if device == "cuda" else cpu_name(), torch.__version__]
