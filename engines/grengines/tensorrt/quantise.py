"""Explicit Q/DQ: the layers' products of an exported model in int8 or fp8, with scales from real requests.

Both operands of every product x W (a layer's input and output projection) get a QuantizeLinear and a DequantizeLinear.
A runtime fuses these into a product of 8-bit numbers. Nothing else changes. Scales are symmetric and come from largest
magnitudes. x has one scale, over the calibration set. W has one for each output in int8, and one in fp8.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

OPSET = 21  # the oldest whose Q/DQ take fp16 scales and 8-bit floats
KINDS = {"int8": (TensorProto.INT8, 127.0), "fp8": (TensorProto.FLOAT8E4M3FN, 448.0)}
LEAST_SCALE = 2.0**-24  # the smallest fp16 number above 0, for tensors of zeros
Feed = dict[str, npt.NDArray[Any]]


def quantise(source: Path, target: Path, kind: str, feeds: Sequence[Feed]) -> Path:
    """Write the model of `source` with Q/DQ to `target`, in kind int8 or fp8. Returns `target`.

    feeds: inputs of the model, which give the scales. Raises ValueError for an empty calibration set or a model
    without such products.
    """
    if not feeds:
        raise ValueError(
            f"{kind} needs a calibration set; give requests: engine.calibration=16, or build for a workload's requests"
        )
    model = onnx.load(str(source))
    products = _products(model)
    if not products:
        raise ValueError(f"{source}: no layer's product in it to quantise; export the model again")
    largest = _largest(source, [node.input[0] for node in products], feeds, target.parent)
    dtype, top = KINDS[kind]
    weights = {w.name: w for w in model.graph.initializer}
    float_type = weights[products[0].input[1]].data_type
    nodes = []
    for node in model.graph.node:
        if node in products:
            x, w = node.input[:2]
            scale = max(largest[x] / top, LEAST_SCALE)
            name = f"{node.name}_x"
            model.graph.initializer.extend(
                [
                    helper.make_tensor(f"{name}_scale", float_type, [], [scale]),
                    helper.make_tensor(f"{name}_zero", dtype, [], [0]),
                ]
            )
            of_x = [f"{name}_scale", f"{name}_zero"]
            nodes.append(helper.make_node("QuantizeLinear", [x, *of_x], [f"{name}_q"], f"{name}_q"))
            nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", *of_x], [f"{name}_dq"], f"{name}_dq"))
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            nodes.append(_weight(model, weights[w], f"{node.name}_w", dtype, top, axis=0 if transposed else 1))
            node.input[0], node.input[1] = f"{name}_dq", f"{node.name}_w_dq"
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [w for w in model.graph.initializer if w.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for imports in (model.opset_import, *(f.opset_import for f in model.functions)):
        for entry in imports:
            entry.version = OPSET if entry.domain == "" else entry.version
    save(model, target)
    return target


def save(model: Any, path: Path) -> None:
    """Write a model, and its weights to a file beside it, since ONNX limits a file to 2 GiB."""
    onnx.save(model, str(path), save_as_external_data=True, location=f"{path.name}.data")


def _products(model: Any) -> list[Any]:
    """Return the Gemms of the layers' projections: constant weight, and a residual or bias of the same type."""
    constants = {w.name: w for w in model.graph.initializer}
    layers = [n for n in model.graph.node if n.op_type == "Gemm" and n.input[1] in constants]
    # The head is unchanged: it is small, and no later layer averages its rounding errors.
    return [n for n in layers if ".head_" not in n.input[1] and n.output[0] != "logits"]


def _largest(source: Path, names: Sequence[str], feeds: Sequence[Feed], folder: Path) -> dict[str, float]:
    """Return the largest magnitude of each tensor over the feeds, by ONNX Runtime on the CPU. folder: for its copy."""
    model = onnx.load(str(source))
    wanted = list(dict.fromkeys(names))
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in wanted)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    most = np.zeros(len(wanted))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / "model.onnx"
        save(model, path)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for feed in feeds:
            found = session.run(wanted, feed)
            most = np.maximum(most, [float(np.abs(x.astype(np.float32)).max()) for x in found])
    return dict(zip(wanted, most.tolist(), strict=True))


def _weight(model: Any, weight: Any, name: str, dtype: int, top: float, axis: int) -> Any:
    """Store the weight in 8 bits. Returns the node that dequantises it."""
    values = numpy_helper.to_array(weight).astype(np.float32)
    each = dtype == TensorProto.INT8
    magnitude = np.abs(values).max(axis=1 - axis) if each else np.abs(values).max()
    scale = np.maximum(magnitude / top, LEAST_SCALE)
    scale = scale.astype(helper.tensor_dtype_to_np_dtype(weight.data_type)).astype(np.float32)
    ratio = values / (np.expand_dims(scale, 1 - axis) if each else scale)
    if each:
        stored = np.clip(np.rint(ratio), -top, top).astype(np.int8)
    else:
        stored = np.clip(ratio, -top, top).astype(ml_dtypes.float8_e4m3fn)
    model.graph.initializer.extend(
        [
            helper.make_tensor(f"{name}_q", dtype, values.shape, stored.tobytes(), raw=True),
            helper.make_tensor(f"{name}_scale", weight.data_type, scale.shape, scale.flatten().tolist()),
            helper.make_tensor(f"{name}_zero", dtype, scale.shape, [0] * max(scale.size, 1)),
        ]
    )
    inputs = [f"{name}_q", f"{name}_scale", f"{name}_zero"]
    by_output: dict[str, Any] = {"axis": axis} if each else {}
    return helper.make_node("DequantizeLinear", inputs, [f"{name}_dq"], f"{name}_dq", **by_output)
