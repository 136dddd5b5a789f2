"""Launches of CuTe DSL kernels that take little host time."""

from __future__ import annotations

import struct
import threading
from typing import Any


class Launcher:
    """A compiled kernel that takes Python numbers.

    The package's own call wraps each argument in an object, which takes 5 us each. This one writes all of them into
    one buffer, whose addresses are marshalled once.

    compiled: what `cute.compile` returned for a function of a named tuple and a stream.
    letters: types of the named tuple's values and of the stream, in the code of the module struct. P stands for
    pointers and the stream, i and q for Int32 and Int64, f for Float32.
    """

    def __init__(self, compiled: Any, letters: str) -> None:
        self._compiled, self._format = compiled, struct.Struct(letters)
        self._offsets = [struct.calcsize(letters[:i] + "0" + letter) for i, letter in enumerate(letters)]
        self._local = threading.local()  # a buffer a thread: the launch itself runs without the interpreter's lock

    def __call__(self, *values: float) -> None:
        """Launch. `values`: addresses and numbers, then the stream's address."""
        local = self._local
        if not hasattr(local, "buffer"):
            import ctypes

            local.buffer = ctypes.create_string_buffer(self._format.size)
            base = ctypes.addressof(local.buffer)
            local.executor = self._compiled.to(None)  # for the current device
            *slots, stream = (ctypes.c_void_p(base + offset) for offset in self._offsets)
            local.slots = _Slots(slots), _Slots([stream])
            local.addresses = local.executor.generate_execution_args(*local.slots)[0]
        self._format.pack_into(local.buffer, 0, *values)
        local.executor.run_compiled_program(local.addresses)


class _Slots:
    """An argument whose values are at fixed addresses."""

    def __init__(self, addresses: list[Any]) -> None:
        self._addresses = addresses

    def __c_pointers__(self) -> list[Any]:
        return self._addresses
