"""HSTU attention as an ONNX function: a node of grbench's domain with a body of standard operators.

Every runtime can run the body. A runtime with a plugin of the node's name and domain replaces it. The body computes
less than the square mask. No row sees a candidate other than itself, so the keys are the tokens before the candidates,
and each row's own part is one product:

    a_i = (sum over visible j != i of SiLU(alpha q_i k_j) v_j  +  SiLU(alpha q_i k_i) v_i) / N

A loop processes tiles of query rows, so memory grows with the longest history, not with its square. It is a loop and
not a scan because TensorRT's parser accepts only loops. grkernels/hstu_attention/spec.py defines what is visible.
"""

from __future__ import annotations

from typing import Any

import onnx
import onnx.parser
import onnxscript
from onnx.defs import OpSchema

DOMAIN = "grbench"
NAME = "hstu_attention"
VERSION = 2  # of the domain; it changes with the operator's meaning
INDICES = ("q_offsets", "offsets", "num_targets", "tiles", "columns")
OPTIONS = ("scaling_seqlen", "contextual_seq_len", "max_attn_len")
OPSET = 18  # the oldest with every operator of the exported model


def register_schema() -> None:
    """Register the operator's schema with the onnx package, for its exporter and checker. Safe to call twice."""
    if onnx.defs.has(NAME, DOMAIN):
        return
    kinds = OpSchema.AttrType
    onnx.defs.register_schema(
        OpSchema(
            NAME,
            DOMAIN,
            VERSION,
            "HSTU attention of the last tokens of each sequence, or of all, to the whole sequence.",
            inputs=[
                *(OpSchema.FormalParameter(name, "T") for name in "qkv"),
                *(OpSchema.FormalParameter(name, "tensor(int64)") for name in INDICES),
            ],
            outputs=[OpSchema.FormalParameter("out", "T")],
            type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "fp32, fp16 or bf16")],
            attributes=[
                OpSchema.Attribute("alpha", kinds.FLOAT, ""),
                *(OpSchema.Attribute(name, kinds.INT, "") for name in OPTIONS),
            ],
        )
    )


def onnx_node(
    q: Any,
    k: Any,
    v: Any,
    q_offsets: Any,
    offsets: Any,
    num_targets: Any,
    tiles: Any,
    columns: Any,
    longest: Any,
    alpha: float,
    *options: int,
) -> Any:
    """Translate a call of the torch operator to a node of grbench's domain, for torch.onnx. Nothing needs `longest`."""
    op = onnxscript.values.Opset(DOMAIN, VERSION)
    attributes = dict(zip(OPTIONS, options, strict=True))
    return op.hstu_attention(q, k, v, q_offsets, offsets, num_targets, tiles, columns, alpha=alpha, **attributes)


def onnx_function(
    scaling_seqlen: int, contextual_seq_len: int, max_attn_len: int, skip_hidden: bool = False
) -> onnx.FunctionProto:
    """Return the function of one model. Its body has only the parts of the mask that the model uses.

    Inputs, but for `longest`, and output are those of the torch operator. Attributes are alpha and OPTIONS.
    skip_hidden: a tile's products end at the last key that its last row sees. This saves half of a long history's work,
    but shapes then differ between tiles, which not every runtime allows.

    In half precision scores, SiLU and the row's own part are in fp32. The division by N is split as in
    grkernels/hstu_attention/torch.py: half of N's bits go into the weights, so that sums can't overflow fp16.
    """
    C, W = contextual_seq_len, max_attn_len
    pre_scale = 2.0 ** -(scaling_seqlen.bit_length() // 2)
    shift = max(C - 1, 0)
    # With a history, a contextual token sees every token before the candidates, itself included.
    context = """
        at_start = Equal(row_position, zero)
        in_history = Less(seen_position, history)
        from_context = And(at_start, in_history)
        visible = Or(before, from_context)"""
    window = f"""
        distance = Sub(row_position, seen_position)
        width = Constant<value_int = {W}>()
        near = LessOrEqual(distance, width)
        before = And(earlier, near)"""
    mask = (window if W else "\n        before = Identity(earlier)") + (
        context if C else "\n        visible = Identity(before)"
    )
    own = """
        stream_m = Gather(m, sequence)
        stream_position = Sub(own_row, shift)
        not_in_context = Greater(stream_position, zero)
        no_history = LessOrEqual(stream_m, zero)
        counts = Or(not_in_context, no_history)
        counts_3 = Unsqueeze(counts, ends)
        own_share = Where(counts_3, own_product, nothing)"""
    if not C:
        own = "\n        own_share = Identity(own_product)"
    seen = """
            seen_keys = Identity(keys)
            seen_values = Identity(values)
            seen_position = Identity(column_position)"""
    bounds = ""
    if skip_hidden:
        bounds = """
        latest_first = ReduceMax<keepdims = 1>(first_rows)
        earliest_first = ReduceMin<keepdims = 0>(first_rows)"""
        seen = f"""
            last_of_tile = Slice(tile, last, end, first)
            last_row = Add(last_of_tile, latest_first)
            beyond_row = Add(last_row, one)
            contextual = Constant<value_int = {C}>()
            whole = Size(columns)
            first_of_tile = Gather(tile, zero)
            first_row = Add(first_of_tile, earliest_first)
            is_contextual = Less(first_row, contextual)
            stop = Where(is_contextual, whole, beyond_row)
            seen_keys = Slice(keys, first, stop, last)
            seen_values = Slice(values, first, stop, third)
            seen_position = Slice(column_position, first, stop, third)"""
    text = f"""
    <domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>
    {NAME} <alpha, scaling_seqlen, contextual_seq_len, max_attn_len>
        (q, k, v, q_offsets, offsets, num_targets, tiles, columns) => (out)
    {{
        zero = Constant<value_int = 0>()
        one = Constant<value_int = 1>()
        nothing = Constant<value_float = 0.0>()
        alpha = Constant<value_float: float = @alpha>()
        pre_scale = Constant<value_float = {pre_scale!r}>()
        post_scale = Constant<value_float = {1.0 / (scaling_seqlen * pre_scale)!r}>()
        own_scale = Constant<value_float = {1.0 / scaling_seqlen!r}>()
        shift = Constant<value_int = {shift}>()
        first = Constant<value_ints = [0]>()
        second = Constant<value_ints = [1]>()
        third = Constant<value_ints = [2]>()
        last = Constant<value_ints = [-1]>()
        end = Constant<value_ints = [{2**62}]>()
        ends = Constant<value_ints = [1, 2]>()

        begins = Slice(offsets, first, last, first)
        stops = Slice(offsets, second, end, first)
        lengths = Sub(stops, begins)
        q_begins = Slice(q_offsets, first, last, first)
        q_stops = Slice(q_offsets, second, end, first)
        q_lengths = Sub(q_stops, q_begins)
        first_rows = Sub(lengths, q_lengths){bounds}
        tokens_1 = Shape<start = 0, end = 1>(k)
        tokens = Squeeze(tokens_1)
        last_token = Sub(tokens, one)
        queries_1 = Shape<start = 0, end = 1>(q)
        queries = Squeeze(queries_1)
        last_query = Sub(queries, one)
        begins_2 = Unsqueeze(begins, last)
        q_begins_2 = Unsqueeze(q_begins, last)
        first_rows_2 = Unsqueeze(first_rows, last)
        stop_minus = Sub(lengths, shift)
        m = Sub(stop_minus, num_targets)
        m_2 = Unsqueeze(m, last)

        any_column = Add(begins_2, columns)
        column = Min(any_column, last_token)
        k_rows = Gather(k, column)
        v_rows = Gather(v, column)
        keys = Transpose<perm = [0, 2, 3, 1]>(k_rows)
        values = Transpose<perm = [0, 2, 1, 3]>(v_rows)
        column_shifted = Sub(columns, shift)
        column_positive = Max(column_shifted, zero)
        column_capped = Min(column_positive, m_2)
        column_position = Unsqueeze(column_capped, second)
        history = Unsqueeze(m_2, last)

        count_1 = Shape<start = 0, end = 1>(tiles)
        count = Squeeze(count_1)
        yes = Cast<to = 9>(one)
        tiled = Loop<body = attend_tile (int64 i, bool go_on) => (bool goes_on, attended) {{
            goes_on = Identity(go_on)
            tile = Gather(tiles, i){seen}
            any_row = Add(q_begins_2, tile)
            row_of_stream = Min(any_row, last_query)
            q_rows = Gather(q, row_of_stream)
            q_heads = Transpose<perm = [0, 2, 1, 3]>(q_rows)
            row = Add(first_rows_2, tile)
            row_shifted = Sub(row, shift)
            row_positive = Max(row_shifted, zero)
            row_capped = Min(row_positive, m_2)
            row_position = Unsqueeze(row_capped, last)
            earlier = Greater(row_position, seen_position){mask}
            visible_4 = Unsqueeze(visible, second)
            products = MatMul(q_heads, seen_keys)
            products_32 = Cast<to = 1>(products)
            scores = Mul(products_32, alpha)
            gates = Sigmoid(scores)
            activated = Mul(scores, gates)
            scaled = Mul(activated, pre_scale)
            weights_32 = Where(visible_4, scaled, nothing)
            weights = CastLike(weights_32, values)
            summed = MatMul(weights, seen_values)
            attended = Transpose<perm = [0, 2, 1, 3]>(summed)
        }}>(count, yes)

        by_sequence = Transpose<perm = [1, 0, 2, 3, 4]>(tiled)
        flat_shape = Shape<start = 1>(v)
        all_rows = Concat<axis = 0>(last, flat_shape)
        padded = Reshape(by_sequence, all_rows)
        stream = Range(zero, queries, one)
        stream_2 = Unsqueeze(stream, last)
        over = LessOrEqual(q_stops, stream_2)
        over_int = Cast<to = 7>(over)
        past = ReduceSum<keepdims = 0>(over_int, second)
        batch_1 = Shape<start = 0, end = 1>(num_targets)
        batch = Squeeze(batch_1)
        last_sequence = Sub(batch, one)
        sequence = Min(past, last_sequence)
        q_begin = Gather(q_begins, sequence)
        place_of_query = Sub(stream, q_begin)
        most_1 = Size(tiles)
        last_place = Sub(most_1, one)
        place_inside = Min(place_of_query, last_place)
        sequence_start = Mul(sequence, most_1)
        place = Add(sequence_start, place_inside)
        of_others = Gather(padded, place)
        of_others_32 = Cast<to = 1>(of_others)
        of_others_scaled = Mul(of_others_32, post_scale)

        first_of_own = Gather(first_rows, sequence)
        own_row = Add(first_of_own, place_of_query)
        begin = Gather(begins, sequence)
        any_own = Add(begin, own_row)
        own_token = Min(any_own, last_token)
        own_k = Gather(k, own_token)
        own_v = Gather(v, own_token)
        q_32 = Cast<to = 1>(q)
        k_32 = Cast<to = 1>(own_k)
        v_32 = Cast<to = 1>(own_v)
        elementwise = Mul(q_32, k_32)
        own_dot = ReduceSum<keepdims = 1>(elementwise, last)
        own_score = Mul(own_dot, alpha)
        own_gate = Sigmoid(own_score)
        own_activated = Mul(own_score, own_gate)
        own_product = Mul(own_activated, own_scale){own}
        of_itself = Mul(own_share, v_32)
        both = Add(of_others_scaled, of_itself)
        out = CastLike(both, v)
    }}
    """
    return onnx.parser.parse_function(text)
