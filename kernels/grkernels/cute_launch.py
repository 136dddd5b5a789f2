"""Compiling CuTe DSL kernels and calling them with little host time."""

from __future__ import annotations

import struct
import threading
from typing import Any


class Launcher:
    """A compiled kernel that takes plain Python numbers.

    The package's own call wraps each argument in an object, 5 us apiece; this one writes all of them into one
    buffer, whose addresses were marshalled once.

    compiled: what `cute.compile` returned. arguments: their types in struct's letters, in order: P for pointers and
    the stream, i and q for Int32 and Int64, f for Float32.
    """

    def __init__(self, compiled: Any, arguments: str) -> None:
        self._compiled, self._format = compiled, struct.Struct(arguments)
        self._offsets = [struct.calcsize(arguments[:i] + "0" + letter) for i, letter in enumerate(arguments)]
        self._local = threading.local()  # a buffer a thread: the launch itself runs without the interpreter's lock

    def __call__(self, *values: float) -> None:
        """Launch on the stream that is among the values."""
        local = self._local
        if not hasattr(local, "buffer"):
            import ctypes

            local.buffer = ctypes.create_string_buffer(self._format.size)
            base = ctypes.addressof(local.buffer)
            local.executor = self._compiled.to(None)  # for the current device
            slots = [_Slot(ctypes.c_void_p(base + offset)) for offset in self._offsets]
            local.addresses, local.slots = local.executor.generate_execution_args(*slots)[0], slots
        self._format.pack_into(local.buffer, 0, *values)
        local.executor.run_compiled_program(local.addresses)


class _Slot:
    """An argument that lies at a fixed address."""

    def __init__(self, address: Any) -> None:
        self._address = address

    def __c_pointers__(self) -> list[Any]:
        return [self._address]
