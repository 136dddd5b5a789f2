"""Launching Triton kernels: at little host time, and without compiling them anew as lengths change."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from grkernels import tuning

# Triton reads this when a kernel is defined, so it must be set before Triton variants are imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Launcher:
    """A kernel, and what to launch it by.

    Triton's own call works out each time what every argument's type, alignment and divisibility mean, and compiles
    again, for seconds, where they differ from all calls before: a batch of another length in the middle of a
    measurement. Here a call finds its kernel by what it was compiled for, and lengths are not part of that.
    """

    def __init__(self, kernel: Any, aligned: int) -> None:
        self.kernel = kernel
        self._aligned = aligned
        self._found: dict[Any, Any] = {}

    def __call__(
        self,
        grid: tuple[Any, Any, Any],
        tensors: Sequence[Tensor],
        fixed: tuple[int, ...],
        numbers: Sequence[float],
        constants: tuple[Any, ...],
        num_warps: int,
        num_stages: int | None = None,
    ) -> None:
        """Launch on the current stream. The arguments are the kernel's parameters in their order: tensors, numbers
        that it is compiled for (strides, sizes of the model), further ones, constants."""
        arguments = (*tensors, *fixed, *numbers, *constants)
        if INTERPRETED or torch.compiler.is_exporting():
            self._launch(grid, arguments, num_warps, num_stages)
            return
        addresses = 0
        for tensor in tensors[: self._aligned]:
            addresses |= tensor.data_ptr()
        if addresses % 16:  # rare: Triton's own call compiles for that
            self._launch(grid, arguments, num_warps, num_stages)
            return
        key = (tensors[0].get_device(), fixed, constants, num_warps, num_stages, *[t.dtype for t in tensors])
        found = self._found.get(key)
        if found is None:
            self._found[key] = self._launch(grid, arguments, num_warps, num_stages)
            tuning.note_compiled(self.kernel.fn.__module__)
        else:
            found[grid](*arguments)

    def _launch(self, grid: Any, arguments: Any, num_warps: int, num_stages: int | None) -> Any:
        """Triton's own call; while torch.export traces, what puts the launch into the graph."""
        kernel = torch.library.wrap_triton(self.kernel) if torch.compiler.is_exporting() else self.kernel
        options = {} if num_stages is None else {"num_stages": num_stages}
        return kernel[grid](*arguments, num_warps=num_warps, **options)


def launched(
    *, tensors: Sequence[str], indices: Sequence[str] = (), numbers: Sequence[str] = ()
) -> Callable[[Any], Launcher]:
    """In the place of triton.jit, for a kernel that the host launches.

    Its parameters come in this order: tensors, which it is compiled for as beginning at multiples of 16 bytes; indices,
    tensors that may begin anywhere in a packed buffer; fixed numbers; numbers that it isn't compiled for (lengths);
    constants.
    """

    def decorate(function: Any) -> Launcher:
        kernel = triton.jit(
            function, do_not_specialize=list(numbers), do_not_specialize_on_alignment=[*indices, *numbers]
        )
        names = list(function.__annotations__)
        assert names[: len(tensors) + len(indices)] == [*tensors, *indices], names
        return Launcher(kernel, len(tensors))

    return decorate
