"""Fixtures of the tests of engines."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator

import pytest

LIBRARY = "torch.onnx._internal.exporter._registration"


@pytest.fixture(scope="session")
def parsed_once() -> Iterator[None]:
    """Let PyTorch's exporter parse its library of functions once: each export does it, and it takes a second."""
    library = importlib.import_module(LIBRARY).onnxscript_apis
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "get_torchlib_ops", functools.cache(library.get_torchlib_ops))
        yield


@pytest.fixture
def exporter_for_forks(parsed_once: None) -> None:
    """Import the exporter and its library here: each fork would, for three seconds."""
    importlib.import_module("torch.export._trace")
    importlib.import_module(LIBRARY).onnxscript_apis.get_torchlib_ops()
