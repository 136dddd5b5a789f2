"""An ONNX model that is the attention function alone."""

from __future__ import annotations

import onnxruntime
from onnx import TensorProto, helper

from grengines.export.onnx_attention import DOMAIN, INDICES, NAME, OPSET, VERSION, onnx_function, register_schema


def attention_session(
    H: int, dqk: int, dv: int, N: int, C: int, W: int, alpha: float, skip_hidden: bool
) -> onnxruntime.InferenceSession:
    """A model that is the attention function alone."""
    kinds = {"q": ["Q", H, dqk], "k": ["L", H, dqk], "v": ["L", H, dv]}
    shapes = {"q_offsets": ["P"], "offsets": ["P"], "num_targets": ["B"], "tiles": ["T", "R"], "columns": ["N"]}
    register_schema()
    graph = helper.make_graph(
        [
            helper.make_node(
                NAME, [*kinds, *INDICES], ["out"], domain=DOMAIN, alpha=alpha, scaling_seqlen=N,
                contextual_seq_len=C, max_attn_len=W,
            )
        ],
        "attention",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in kinds.items()]
        + [helper.make_tensor_value_info(n, TensorProto.INT64, s) for n, s in shapes.items()],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["Q", H, dv])],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[onnx_function(N, C, W, skip_hidden)])
    model.ir_version = 10
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
