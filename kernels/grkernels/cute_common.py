"""Common parts of the CuTe DSL variants: signatures, compiling, rows in 16-byte vectors."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Annotated, Any, Protocol, get_origin, get_type_hints

import cuda.bindings.driver as cuda
import cutlass
import torch
from cutlass import Float32, Float64, Int32, Int64, cute
from cutlass.cute.runtime import make_ptr
from torch import Tensor

from grkernels import cute_cache, tuning
from grkernels.cute_launch import Launcher

ELEMENTS = {torch.bfloat16: cutlass.BFloat16, torch.float16: cutlass.Float16, torch.float32: Float32}
VECTOR_BYTES = 16  # what a thread loads or stores at once
WARP = 32
_LETTERS = {Int32: "i", Int64: "q", Float32: "f"}  # of the module struct


# Pointers of a kernel's signature, by the type of the values.
ElementPointer = Annotated[cute.Pointer, None]  # the kernel's own element type, at a multiple of 16 bytes
Float32Pointer = Annotated[cute.Pointer, Float32]  # at a multiple of 16 bytes
Float64Pointer = Annotated[cute.Pointer, Float64]
Int32Pointer = Annotated[cute.Pointer, Int32]
Int64Pointer = Annotated[cute.Pointer, Int64]


class Kernel(Protocol):
    """A kernel and the sizes that it is compiled for."""

    @property
    def dtype(self) -> Any:
        """Element type."""

    @property
    def signature(self) -> type[tuple[Any, ...]]:
        """Named tuple of the arguments: pointers as above, Int32, Int64 and Float32, and named tuples of these."""

    @property
    def launch(self) -> Any:
        """Function of the arguments, as one named tuple, and of the stream."""


def compile_kernel(kernel: Kernel, options: str = "") -> Any:
    """Compile for this machine's GPU, or without a GPU for that of the environment variable CUTE_DSL_ARCH (sm_90a)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's advice to its caller, such as which loops to unroll
        return cute.compile(kernel.launch, _example(kernel.signature, kernel.dtype), cuda.CUstream(0), options=options)


def launcher(kernel: Kernel) -> Launcher:
    """Compile for this machine's GPU, or load what an earlier process compiled.

    The result takes the values of the arguments, nested ones flattened, then the stream's address. A pointer's value
    is its address.
    """
    architecture = "sm_{}{}a".format(*torch.cuda.get_device_capability())
    compiled, new = cute_cache.compiled(kernel, architecture, lambda: compile_kernel(kernel))
    if new:
        tuning.note_compiled(type(kernel).__module__)
    return Launcher(compiled, _letters(kernel.signature) + "P")


def _fields(signature: Any) -> list[Any]:
    return list(get_type_hints(signature, include_extras=True).values())


def _example(kind: Any, element: Any) -> Any:
    """Return an argument to compile with."""
    if hasattr(kind, "_fields"):
        return kind(*(_example(field, element) for field in _fields(kind)))
    if get_origin(kind) is Annotated:
        values = kind.__metadata__[0] or element
        align = VECTOR_BYTES if values in ELEMENTS.values() else values.width // 8
        return make_ptr(values, 0, cute.AddressSpace.gmem, assumed_align=align)
    return kind(1)


def _letters(kind: Any) -> str:
    """Return the types of the values of an argument, as the module struct writes them."""
    return "".join(map(_letters, _fields(kind))) if hasattr(kind, "_fields") else _LETTERS.get(kind, "P")


def stream(device: torch.device) -> int:
    """Return the address of the current stream."""
    address: int = torch.cuda.current_stream(device.index).cuda_stream
    return address


@cache
def processors(device: int) -> int:
    """Return the number of streaming multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def vector_rows(x: Tensor) -> Tensor:
    """Return [rows, ...] as [rows, W], with contiguous rows at multiples of 16 bytes. Copies only if necessary."""
    x = x.flatten(1)
    aligned = x.data_ptr() % VECTOR_BYTES == 0 and x.stride(0) * x.element_size() % VECTOR_BYTES == 0
    return x if aligned and x.stride(1) == 1 else x.clone(memory_format=torch.contiguous_format)


def supports(*, device: str, dtype: str, width: int, **dims: int) -> str | None:
    """Return None if rows are whole 16-byte vectors and the GPU is a Hopper, else the reason."""
    if dtype not in ("fp32", "fp16", "bf16"):
        return f"dtype {dtype} is none of fp32, fp16, bf16"
    if width % 8:
        return f"width {width} is not a multiple of 8 (torch, compile and triton take any)"
    if not device.startswith("cuda") or not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return "CuTe DSL kernels need an NVIDIA GPU of compute capability 9.0 (torch, compile and triton run elsewhere)"
    return None


def ahead(pointer: cute.Pointer, offset: Any, step: int) -> cute.Pointer:
    """Return pointer + offset. The compiler learns that the offset is a multiple of `step` values.

    Pointer.align would do that too, but it rounds the address up at run time.
    """
    return pointer + cute.assume(offset, divby=step)


# On the device. Vector i of a row belongs to thread i % threads. A thread holds its vectors of a row as a Python list.


def rounds(dtype: Any, width: int, threads: int) -> int:
    """Return the number of vectors of a row that a thread holds."""
    return -(-width // (threads * vector(dtype)))


def vector(dtype: Any) -> int:
    """Return the number of values in a vector."""
    return VECTOR_BYTES * 8 // int(dtype.width)


@cute.jit
def load_row(
    row: cute.Pointer,
    width: cutlass.Constexpr[int],
    thread: Int32,
    threads: cutlass.Constexpr[int],
    wanted: Any = True,
) -> Any:
    """Return this thread's vectors of a row as register tensors: zeros past its end, or if it isn't wanted."""
    dtype = row.dtype
    size = vector(dtype)
    parts = []
    for i in cutlass.range_constexpr(rounds(dtype, width, threads)):
        column = (thread + i * threads) * size
        part = cute.make_rmem_tensor(cute.make_layout(size), dtype)
        if cutlass.const_expr(wanted is True and (i + 1) * threads * size <= width):
            cute.autovec_copy(_vector_at(row, column), part)
        else:
            part.fill(dtype(0))
            if wanted and column < width:
                cute.autovec_copy(_vector_at(row, column), part)
        parts.append(part)
    return parts


@cute.jit
def store_row(
    parts: Any, row: cute.Pointer, width: cutlass.Constexpr[int], thread: Int32, threads: cutlass.Constexpr[int]
) -> None:
    """Store what load_row returned."""
    size = vector(row.dtype)
    for i in cutlass.range_constexpr(rounds(row.dtype, width, threads)):
        column = (thread + i * threads) * size
        if cutlass.const_expr((i + 1) * threads * size <= width):
            cute.autovec_copy(parts[i], _vector_at(row, column))
        else:
            if column < width:
                cute.autovec_copy(parts[i], _vector_at(row, column))


def _vector_at(row: cute.Pointer, column: Int32) -> cute.Tensor:
    return cute.make_tensor(ahead(row, column, vector(row.dtype)), cute.make_layout(vector(row.dtype)))


def wide(parts: Any) -> list[Any]:
    """Convert register tensors to fp32 values."""
    return [part.load().to(Float32) for part in parts]


def rounded(values: list[Any], dtype: Any) -> list[Any]:
    """Convert fp32 values to register tensors, rounded to nearest, ties to even."""
    parts = []
    for value in values:
        part = cute.make_rmem_tensor(value.shape, dtype)
        part.store(value.to(dtype))
        parts.append(part)
    return parts
