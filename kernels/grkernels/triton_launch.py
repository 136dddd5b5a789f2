"""Launches of Triton kernels that take little host time and never compile for a new length."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from grkernels import tuning

# Triton reads this when a kernel is defined, so it must be set before Triton variants are imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Launcher:
    """A kernel and its compiled forms.

    Triton's own call inspects the type, alignment and divisibility of every argument. It compiles again, for seconds,
    if they differ from all earlier calls, such as for a batch of another length in the middle of a measurement. This
    call finds the compiled kernel by types, strides and constants. Lengths are no part of the key.
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
        descriptors: Sequence[TensorDescriptor] = (),
    ) -> None:
        """Launch on the current stream.

        The arguments are the kernel's parameters in order: descriptors, tensors, numbers that it is compiled for
        (strides, sizes of the model), other numbers, constants.
        """
        arguments = (*descriptors, *tensors, *fixed, *numbers, *constants)
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
        key += tuple((d.base.dtype, *d.block_shape) for d in descriptors)
        found = self._found.get(key)
        if found is None:
            self._found[key] = self._launch(grid, arguments, num_warps, num_stages)
            tuning.note_compiled(self.kernel.fn.__module__)
        else:
            found[grid](*arguments)

    def _launch(self, grid: Any, arguments: Any, num_warps: int, num_stages: int | None) -> Any:
        """Call Triton, or put the launch into the graph while torch.export traces."""
        kernel = torch.library.wrap_triton(self.kernel) if torch.compiler.is_exporting() else self.kernel
        options = {} if num_stages is None else {"num_stages": num_stages}
        return kernel[grid](*arguments, num_warps=num_warps, **options)


def launched(
    *,
    tensors: Sequence[str],
    indices: Sequence[str] = (),
    numbers: Sequence[str] = (),
    descriptors: Sequence[str] = (),
) -> Callable[[Any], Launcher]:
    """Decorate a kernel that the host launches, instead of triton.jit.

    Its parameters come in this order: descriptors, of what TMA loads; tensors, compiled for addresses of whole
    16 bytes; indices, tensors that may begin anywhere in a packed buffer; fixed numbers; numbers that it isn't
    compiled for (lengths); constants.
    """

    def decorate(function: Any) -> Launcher:
        kernel = triton.jit(
            function, do_not_specialize=list(numbers), do_not_specialize_on_alignment=[*indices, *numbers]
        )
        names = list(function.__annotations__)
        first = [*descriptors, *tensors, *indices]
        assert names[: len(first)] == first, names
        return Launcher(kernel, len(tensors))

    return decorate
