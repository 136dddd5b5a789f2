"""Inference calls of the Open Inference Protocol as JSON with binary tensors, and their answers."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import json
import math
from collections.abc import Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from grbench.serve.errors import RefusedError, invalid
from grkernels.nearest import nearest

Tensor = npt.NDArray[Any]
HEADER_LENGTH = "inference-header-content-length"  # of the JSON before the binary tensors
INLINE = 100_000  # bytes of a call that the event loop reads itself; more would hold other calls up
DTYPES: dict[str, type[np.generic]] = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}
MOST_DIMENSIONS = 8
MOST_NAME = 1024  # characters
MOST_NUMBERS = 1 << 40  # of a tensor
MOST_TIME = 1e12  # of a deadline, in its unit
UNSUPPORTED = ("shared_memory_region", "classification")  # Triton's, of inputs and outputs
# Keys of dictionaries are sets in this order. KServe's clients send the last two fields.
CALL_FIELDS = dict.fromkeys(("id", "parameters", "inputs", "outputs", "model_name", "model_version")).keys()
INPUT_FIELDS = dict.fromkeys(("name", "shape", "datatype", "parameters", "data")).keys()
OUTPUT_FIELDS = dict.fromkeys(("name", "parameters", "shape", "datatype")).keys()
CALL_PARAMETERS = ("deadline_ms", "timeout", "binary_data_output")  # the parameters that a call has here
TENSOR_PARAMETERS = ("binary_data", "binary_data_size")
APPEND_PARAMETERS = ("user_id", "version")
SIMILAR = 0.75  # likeness from which a parameter is a misspelling of one of ours
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
SIZES = {dtype: np.dtype(dtype).itemsize for dtype in DTYPES.values()}  # bytes of a number


@dataclass
class Call:
    """An inference call: tensors by name, and the outputs that are asked for, each with its form."""

    tensors: dict[str, Tensor]
    id: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    outputs: dict[str, bool] = field(default_factory=dict)  # name: whether it is binary; empty: all
    binary: bool = False  # the form of outputs that name none
    limit_s: float = math.inf  # the client's own deadline, from when the call has come
    client: str = ""  # name of the API key, for several clients
    came: float | None = None  # when all of it was there, time.perf_counter; None: when it is queued


def parse_call(body: bytes, header_length: str | None) -> Call:
    """Read the body of an HTTP request. header_length: the value of the header `HEADER_LENGTH`. Raises RefusedError."""
    if not body:
        raise invalid("body: empty; allowed is an object with the key inputs")
    end = len(body) if header_length is None else json_length(header_length)
    if not 0 < end <= len(body):
        raise invalid(f"{HEADER_LENGTH}={end}: the body has {len(body)} bytes; allowed is 1 to that")
    try:
        return _parsed(body, end)
    except MemoryError:
        raise RefusedError(413, "body: it takes more memory than there is; send less, or binary tensors") from None


def _parsed(body: bytes, end: int) -> Call:
    try:
        content = orjson.loads(memoryview(body)[:end])
    except ValueError as e:
        raise invalid(_not_json(body[:end], e)) from None
    if not isinstance(content, dict):
        raise invalid("body: allowed is an object with the key inputs")
    _check_fields(content, CALL_FIELDS, "body")
    parameters = _object(content.get("parameters", {}), "parameters")
    binary = _flag(parameters, "binary_data_output", False, "parameters")
    outputs = {}
    for number, output in enumerate(_list(content.get("outputs", []), "outputs")):
        key = f"outputs[{number}]"
        _check_fields(_object(output, key), OUTPUT_FIELDS, key)
        wanted = _object(output.get("parameters", {}), f"{key}.parameters")
        check_output(wanted, key)
        form = _flag(wanted, "binary_data", binary, f"{key}.parameters")
        outputs[text_of(output.get("name"), f"{key}.name")] = form
    tensors = _tensors(_list(content.get("inputs"), "inputs"), body, end)
    return Call(tensors, text_of(content.get("id", ""), "id"), parameters, outputs, binary)


class _Constant(str):
    """NaN, Infinity or -Infinity: Python's json and others write them, and JSON has none of them."""


def _not_json(text: bytes, error: ValueError) -> str:
    """Return what is wrong with text that is not JSON, with the field if that is a number which JSON cannot hold.

    Python reads a long text for seconds, and holds up all other calls: it keeps orjson's line and column.
    """
    if len(text) <= INLINE and (b"NaN" in text or b"Infinity" in text):
        with contextlib.suppress(ValueError, RecursionError):
            for where, value in _leaves(json.loads(text, parse_constant=_Constant)):
                if isinstance(value, _Constant):
                    return f"{where or 'body'}={value}: not JSON; allowed are finite numbers"
    return f"body: not JSON: {error}"


def _leaves(content: Any) -> Iterator[tuple[str, Any]]:
    """Yield what is in nested objects and lists, in order, with its place. A tensor's place is its name."""
    left = [("", content)]
    while left:
        where, value = left.pop()
        if isinstance(value, dict):
            name = value.get("name")
            where = shown(name) if type(name) is str else where
            inside = [
                (where if key == "data" else f"{where}.{shown(key)}".lstrip("."), one) for key, one in value.items()
            ]
        elif isinstance(value, list):
            inside = [(f"{where}[{i}]", one) for i, one in enumerate(value)]
        else:
            yield where, value
            continue
        left += reversed(inside)


def _tensors(inputs: list[Any], body: bytes, at: int) -> dict[str, Tensor]:
    """Read the inputs. at: where the binary tensors begin, in the order of the inputs that have one."""
    tensors: dict[str, Tensor] = {}
    for number, one in enumerate(inputs):
        left = len(body) - at
        if (nbytes := _usual_size(one, left)) and one["name"] not in tensors:
            dtype = DTYPES[one["datatype"]]
            tensors[one["name"]] = np.frombuffer(body, dtype, nbytes // SIZES[dtype], at)
            at += nbytes
            continue
        name = text_of(_object(one, f"inputs[{number}]").get("name"), f"inputs[{number}].name")
        if name in tensors:
            raise invalid(f"inputs[{number}].name={name}: it is there twice")
        _check_fields(one, INPUT_FIELDS, name)
        shape = shape_of(one.get("shape"), name)
        dtype = dtype_of(one.get("datatype"), name)
        parameters = _object(one.get("parameters", {}), f"{name}.parameters")
        check_output(parameters, name)
        if (size := parameters.get("binary_data_size")) is None:
            tensors[name] = tensor_of_list(one.get("data"), dtype, shape, name)
            continue
        if type(size) is not int:
            raise invalid(f"{name}.parameters.binary_data_size={typed(size)}: allowed is an integer")
        if not 0 <= size <= left:
            raise invalid(f"{name}.parameters.binary_data_size={shown(size)}: {left} bytes are left in the body")
        tensors[name] = tensor_of_bytes(memoryview(body)[at : at + size], dtype, shape, name)
        at += size
    if left := len(body) - at:
        raise invalid(f"body: {left} bytes are left behind the last input; check the sizes of the binary tensors")
    return tensors


def _usual_size(one: Any, left: int) -> int:
    """Return the bytes of a right input in its most common form: binary, in one dimension. 0: look at each part of it.

    left: bytes behind the JSON that are not read yet. To look at each part takes three times as long.
    """
    try:
        name, dtype, (length,), parameters = one["name"], one["datatype"], one["shape"], one["parameters"]
        size: int = parameters["binary_data_size"]
        needed = length * SIZES[DTYPES[dtype]]
    except (KeyError, TypeError, ValueError):
        return 0
    is_usual = len(one) == 4 and len(parameters) == 1 and type(name) is str and len(name) <= MOST_NAME
    return size if is_usual and type(length) is type(size) is int and 0 < size == needed <= left else 0


def tensor_of_bytes(data: bytes | memoryview, dtype: type[np.generic], shape: Sequence[int], name: str) -> Tensor:
    """Return a tensor of little-endian bytes. Raises RefusedError."""
    needed = math.prod(shape) * SIZES[dtype]
    if len(data) != needed:
        raise invalid(f"{name}: {len(data)} bytes; shape {list(shape)} of {NAMES[np.dtype(dtype)]} needs {needed}")
    return np.frombuffer(data, dtype).reshape(shape)


def tensor_of_list(data: Any, dtype: type[np.generic], shape: Sequence[int], name: str) -> Tensor:
    """Return a tensor of numbers in a list, nested or flat. Raises RefusedError."""
    values, kinds = _flat(_list(data, f"{name}.data"), name)
    kind = NAMES[np.dtype(dtype)]
    if not kinds <= ({bool} if kind == "BOOL" else {int} if "INT" in kind else {int, float}):
        raise invalid(f"{name}.data: allowed are numbers of {kind}")
    if len(values) != math.prod(shape):
        raise invalid(f"{name}.data: {len(values)} numbers; shape {list(shape)} needs {math.prod(shape)}")
    try:
        if "FP" in kind:
            with np.errstate(over="ignore"):
                tensor = np.array(values, dtype)
        else:
            tensor = np.array(values, dtype)
    except OverflowError:
        raise invalid(f"{name}.data: a number is outside {kind}") from None
    if "FP" in kind and (infinite := int(np.isinf(tensor).sum())) and infinite > sum(map(math.isinf, values)):
        raise invalid(f"{name}.data: a number is outside {kind}")
    return tensor.reshape(shape)


def _flat(data: list[Any], name: str) -> tuple[list[Any], set[type]]:
    """Return the values of nested lists, and their types: NumPy would make room for the longest string among them."""
    for _ in range(MOST_DIMENSIONS):
        kinds = set(map(type, data))
        if list not in kinds:
            return data, kinds
        if len(kinds) > 1 or len(set(map(len, data))) > 1:
            raise invalid(f"{name}.data: the rows have different lengths")
        data = list(itertools.chain.from_iterable(data))
    raise invalid(f"{name}.data: allowed are lists in at most {MOST_DIMENSIONS} levels")


def _check_fields(content: Mapping[str, Any], known: KeysView[str], key: str) -> None:
    """Raise RefusedError for a field that the protocol does not have: what is a client's own goes into parameters."""
    if content.keys() <= known:
        return
    name = next(name for name in content if name not in known)
    raise invalid(f"{key}.{shown(name)}: no such field; {nearest(name, known)}allowed are {', '.join(known)}")


def check_parameters(parameters: Mapping[str, Any], known: Sequence[str], key: str = "") -> None:
    """Raise RefusedError for a parameter whose name is like one of `known`, and is none. key: of its tensor.

    The protocol lets clients send parameters of their own, so any other is ignored.
    """
    for name in parameters:
        if name not in known and (like := difflib.get_close_matches(name.lower(), known, n=1, cutoff=SIMILAR)):
            where = f"{key}.parameters" if key else "parameters"
            raise invalid(f"{where}.{shown(name)}: no such parameter; nearest: {like[0]}; there are {', '.join(known)}")


def check_output(parameters: Mapping[str, Any], key: str) -> None:
    """Raise RefusedError for a parameter of a tensor that would change where or what it is, or is misspelled."""
    if not parameters:
        return
    if found := next((name for name in UNSUPPORTED if name in parameters), None):
        raise invalid(f"{key}.parameters.{found}: not supported here; leave it out")
    check_parameters(parameters, TENSOR_PARAMETERS, key)


def dtype_of(name: Any, tensor: str) -> type[np.generic]:
    """Return the type of a tensor. Raises RefusedError."""
    if not isinstance(name, str) or name not in DTYPES:
        raise invalid(f"{tensor}.datatype={shown(name)}: allowed are {', '.join(DTYPES)}")
    return DTYPES[name]


def shape_of(shape: Any, tensor: str) -> list[int]:
    """Return the shape of a tensor. Raises RefusedError."""
    if type(shape) is list and len(shape) == 1 and type(shape[0]) is int and 0 <= shape[0] <= MOST_NUMBERS:
        return shape  # as nearly all are: checks of any shape take ten times as long
    sizes = _list(shape, f"{tensor}.shape")
    if len(sizes) > MOST_DIMENSIONS:
        raise invalid(f"{tensor}.shape: {len(sizes)} dimensions; allowed are at most {MOST_DIMENSIONS}")
    if not all(type(n) is int and 0 <= n <= MOST_NUMBERS for n in sizes):
        raise invalid(f"{tensor}.shape=[{', '.join(map(shown, sizes))}]: allowed are integers from 0 to {MOST_NUMBERS}")
    if math.prod(max(n, 1) for n in sizes) > MOST_NUMBERS:
        raise invalid(f"{tensor}.shape={sizes}: allowed are at most {MOST_NUMBERS} numbers")
    return sizes


def wanted(call: Call, outputs: Sequence[str]) -> Sequence[str]:
    """Return the outputs that a call asks for, of those of its task. Raises RefusedError for one that there is not."""
    if unknown := [name for name in call.outputs if name not in outputs]:
        near = nearest(shown(unknown[0]), outputs)
        raise invalid(f"outputs: {shown(unknown[0])}: no such output; {near}allowed are {', '.join(outputs)}")
    return list(call.outputs) or outputs


def render(
    call: Call, model: str, version: str, tensors: Mapping[str, Tensor], parameters: Mapping[str, Any]
) -> tuple[bytes, dict[str, str]]:
    """Return the body of an answer and its headers."""
    outputs, blobs = [], []
    for name, tensor in tensors.items():
        output: dict[str, Any] = {"name": name, "datatype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
        if call.outputs.get(name, call.binary):
            blobs.append(np.ascontiguousarray(tensor).tobytes())
            output["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            output["data"] = np.ascontiguousarray(tensor).ravel()
        outputs.append(output)
    content = {"model_name": model, "model_version": version, "parameters": dict(parameters), "outputs": outputs}
    if call.id:
        content["id"] = call.id
    text = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    if not blobs:
        return text, {"content-type": "application/json"}
    headers = {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(text))}
    return b"".join([text, *blobs]), headers


def number_of(parameters: Mapping[str, Any], name: str) -> float | None:
    """Return a parameter that is a number above 0 and in bounds; None: it is absent. Raises RefusedError."""
    value = parameters.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MOST_TIME:
        raise invalid(f"parameters.{name}={typed(value)}: allowed is a number > 0 and <= {MOST_TIME:g}")
    return float(value)


def _object(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise invalid(f"{key}: allowed is an object")
    return value


def _list(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise invalid(f"{key}: {'missing' if value is None else 'wrong'}; allowed is a list")
    return value


def text_of(value: Any, key: str) -> str:
    """Return a name or an id of a client. Raises RefusedError for what is none, or a long one."""
    if not isinstance(value, str) or len(value) > MOST_NAME:
        allowed = f"a string of at most {MOST_NAME} characters"
        raise invalid(f"{key}: {'missing' if value is None else 'wrong'}; allowed is {allowed}")
    return value


def json_length(value: str) -> int:
    """Return the value of the header `HEADER_LENGTH`. Raises RefusedError."""
    if not (value.isascii() and value.isdigit() and len(value) < 16):
        raise invalid(f"{HEADER_LENGTH}={shown(value)}: allowed is an integer")
    return int(value)


def _flag(parameters: Mapping[str, Any], name: str, default: bool, key: str) -> bool:
    value = parameters.get(name, default)
    if type(value) is not bool:
        raise invalid(f"{key}.{name}={typed(value)}: allowed are true and false")
    return value


def shown(value: Any) -> str:
    """Return a value of a client for an error: short and in one line."""
    if not isinstance(value, str | int | float):
        return type(value).__name__
    return " ".join(str(value)[:60].split())


def typed(value: Any) -> str:
    """Return a value of a parameter for an error, as `shown`: a string has its quotes, which make it one."""
    return f'"{shown(value)}"' if isinstance(value, str) else shown(value)


def unknown_model(name: str, known: str) -> RefusedError:
    """Return the error for a model that is not served."""
    return RefusedError(404, f"model {shown(name)}: not served here; the model is {known}")
