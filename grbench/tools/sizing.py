"""`grbench sizing`: the cost of a model before anything runs: parameters, FLOPs, KV bytes, users per card."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from grbench import workloads
from grbench.config.arguments import Arguments
from grbench.config.schema import ConfigError, RunSpec
from grbench.report.screen import unwrapped
from grbench.workloads.events import DataError
from grengines import registry
from grengines.api import Catalogue
from grengines.cache.config import EIGHT_BITS, stored
from grengines.hstu.config import FP8_STEP, without_fp8
from grengines.last_layer import LastLayer
from grengines.models.decoder.config import DecoderConfig, too_few_rows
from grengines.models.hstu.config import HSTUConfig
from grengines.vllm.config import VLLMEngineConfig
from grengines.vllm.config import stored as stored_by_vllm
from grkernels.hstu_attention.spec import BYTES, visible_pairs
from grkernels.hstu_attention.spec import flops as attention_flops

CODES = 256
COLUMNS = ("GFLOP", "attention\nshare", "all\nrows", "all\ncached", "KV MiB\nper user", "users\nper card")


def parameters(model: HSTUConfig, catalogue: Catalogue) -> dict[str, int]:
    """Count the parameters of a ranking model: embedding tables, layers, and the rest (output norm and head)."""
    import torch

    from grengines.models.hstu.model import HSTURanker
    from grkernels.operators import Operators

    with torch.device("meta"):  # shapes only, no memory
        ranker = HSTURanker(model, catalogue, Operators.reference())
    return _by_part({name: p.numel() for name, p in ranker.named_parameters()})


def generator_parameters(model: HSTUConfig | DecoderConfig, sizes: Sequence[int]) -> dict[str, int]:
    """Count the parameters of a model that generates semantic IDs. sizes: codes of each level."""
    import torch

    if isinstance(model, DecoderConfig):
        from grengines.models.decoder.weights import shapes

        return _by_part({name: math.prod(shape) for name, shape in shapes(model, sizes).items()})
    from grengines.models.hstu.generator import HSTUGenerator
    from grkernels.operators import Operators

    with torch.device("meta"):
        generator = HSTUGenerator(model, sizes, Operators.reference())
    return _by_part({name: p.numel() for name, p in generator.named_parameters()})


def _by_part(counts: Mapping[str, int]) -> dict[str, int]:
    parts = {"tables": 0, "layers": 0, "head": 0}
    for name, count in counts.items():
        is_table = name.endswith(("_table", "embed_tokens.weight", "weight_vector"))
        parts["layers" if "layers." in name else "tables" if is_table else "head"] += count
    return parts


def last_layer(spec: RunSpec, task: str) -> LastLayer | None:
    """Return the rows that the last layer of a cell's engine computes for rank or generate; None: not known here."""
    engine = _engine_of(spec, task)
    return registry.get(engine.name).last_layer(engine, task)


def _engine_of(spec: RunSpec, task: str) -> Any:
    """Return the options of the engine that does rank or generate."""
    stages = {stage_task: stage for stage, stage_task in registry.get(spec.engine.name).stages.items()}
    return getattr(spec.engine, stages[task]) if task in stages else spec.engine


def flops(model: HSTUConfig, history: int, candidates: int, cached: int = 0, rows: LastLayer = LastLayer.HALF) -> float:
    """Operations of one request, with the exact mask and no padding; a multiply-add is 2.

    Counts the layers' two projections, attention over the visible (row, column) pairs, and the head. Leaves out
    look-ups, norms and activations, which are under 1%. cached: first tokens whose keys and values are in the cache.
    rows: those that the last layer computes beside keys and values, by default as engine=hstu; EVERY: a full model.
    """
    tokens, choices = model.contextual_seq_len + history + candidates, model.choices
    new = tokens - cached
    whole = _layer_flops(model, tokens, candidates, new, new)
    last = _layer_flops(model, tokens, candidates, new, rows.rows(new, candidates))
    inputs = model.embedding_dim + model.interactions
    head = 2 * candidates * (model.head_dim * (inputs + len(model.tasks)) + model.interactions * model.embedding_dim)
    E = model.embedding_dim
    head += 2 * candidates * E * (2 * model.head_dim * (choices.item_tower == "mlp") + (E + 4) * choices.clock)
    return float((model.layers - 1) * whole + last + head)


def operations(spec: RunSpec) -> float:
    """Operations of the longest request of a cell in its precision: one in e4m3 counts as half of one.

    Of a search the codes of a level are unknown before semantic IDs are made, and count as CODES.
    """
    history, total = spec.workload.max_history, 0.0
    if spec.task in ("rank", "recommend"):
        model, candidates = spec.ranking_model, spec.workload.num_candidates
        engine = getattr(spec.engine, "rank", spec.engine)
        rows = last_layer(spec, "rank") or LastLayer.EVERY
        total = flops(model, history, candidates, rows=rows)
        if getattr(engine, "precision", None) == "fp8":
            total -= fp8_flops(model, history, candidates, rows) / 2
    if spec.retrieval is not None:
        sizes = [spec.retrieval.codes or CODES] * spec.retrieval.levels
        total += search_flops(
            spec.model,
            min(history, spec.model.max_positions // len(sizes)),
            sizes,
            spec.retrieval.beam_width,
            rows=last_layer(spec, "generate") or LastLayer.EVERY,
        )
    return total


def ranking_attention(model: HSTUConfig, history: int, candidates: int, rows: LastLayer = LastLayer.HALF) -> float:
    """Operations of `flops` that are attention's."""
    tokens = model.contextual_seq_len + history + candidates
    whole, last = (_attention_flops(model, tokens, candidates, n) for n in (tokens, rows.rows(tokens, candidates)))
    return float((model.layers - 1) * whole + last)


def fp8_flops(model: HSTUConfig, history: int, candidates: int, rows: LastLayer = LastLayer.HALF) -> float:
    """Operations of `flops` that engine.precision=fp8 does in e4m3: projections and the head's hidden product."""
    tokens = model.contextual_seq_len + history + candidates
    whole, last = (_projection_flops(model, tokens, n) for n in (tokens, rows.rows(tokens, candidates)))
    return (
        (model.layers - 1) * whole
        + last
        + 2.0 * candidates * model.head_dim * (model.embedding_dim + model.interactions)
    )


def weight_bytes(model: HSTUConfig, numbers: int, precision: str) -> int:
    """Bytes of a ranking model with this many parameters. precision: fp32, fp16 or bf16.

    fp8: of the products that `fp8_flops` counts, with an fp32 scale for each output channel; the rest: bf16.
    """
    if precision != "fp8":
        return numbers * BYTES[precision]
    E, keys, values = model.embedding_dim, model.heads * model.qk_dim, model.heads * model.v_dim
    head_inputs = E + model.interactions
    in_layers, channels = E * (2 * keys + (2 + _projected(model)) * values), 2 * (keys + values) + E
    rounded = model.layers * in_layers + model.head_dim * head_inputs
    padding = model.head_dim * (-head_inputs % FP8_STEP)
    scales = model.layers * channels + model.head_dim
    return (numbers - rounded) * BYTES["bf16"] + rounded + padding + scales * BYTES["fp32"]


def _layer_flops(model: HSTUConfig, tokens: int, candidates: int, new: int, rows: int) -> float:
    """Operations of a layer that makes keys and values of the last `new` tokens and all else of the last `rows`."""
    return _projection_flops(model, new, rows) + _attention_flops(model, tokens, candidates, rows)


def _attention_flops(model: HSTUConfig, tokens: int, candidates: int, rows: int) -> int:
    """Operations of a layer's attention whose queries are the last `rows` tokens."""
    pairs = visible_pairs(
        tokens, candidates, model.attended_contextual, model.max_attn_len, delta=rows,
        target_group_size=model.choices.target_group_size, min_full_attn_seq_len=model.choices.min_full_attn_seq_len,
    )  # fmt: skip
    return attention_flops(pairs, model.heads, model.qk_dim, model.v_dim)


def _projection_flops(model: HSTUConfig, new: int, rows: int) -> float:
    """Operations of a layer's projections: keys and values of `new` tokens, u, q and the output of `rows`."""
    keys = model.heads * (model.qk_dim + model.v_dim)
    return 2.0 * model.embedding_dim * (new * keys + rows * (keys + _projected(model) * model.heads * model.v_dim))


def _projected(model: HSTUConfig) -> int:
    """Return the vectors of a head's value size that the output projection reads."""
    return 3 if model.choices.output == "concat" else 1


def search_flops(
    model: HSTUConfig | DecoderConfig,
    history: int,
    sizes: Sequence[int],
    width: int,
    cached: int = 0,
    rows: LastLayer = LastLayer.EVERY,
) -> float:
    """Operations of one beam search with the exact mask and no padding; a multiply-add is 2.

    history: items. sizes: codes of each level. width: beams. cached: first tokens of the prompt in the KV cache. The
    other tokens of the prompt are encoded once, then the codes of every beam except the last one. A code sees the
    prompt, the codes of its beam and itself. Counts the layers' matrices, attention over the visible pairs, and the
    logits of every beam: of a level's codes, or of a decoder's whole vocabulary if it has one. rows: those of the
    prompt that HSTU's last layer computes beside keys and values; that of a decoder computes every row.
    """
    prompt, beams = prompt_tokens(model, history, len(sizes)), _beams(sizes, width)
    if isinstance(model, DecoderConfig):
        widths = 2 * (model.heads + model.kv_heads) * model.head_dim + 3 * model.mlp_dim
    else:
        widths = model.heads * (2 * model.qk_dim + (2 + _projected(model)) * model.v_dim)
    linear = 2 * (prompt - cached + sum(beams[1:])) * model.embedding_dim * widths
    attention = attention_flops(_search_pairs(prompt, beams, cached), model.heads, *_head_dims(model))
    tokens = [(isinstance(model, DecoderConfig) and model.vocabulary) or size for size in sizes]
    logits = sum(2 * n * model.embedding_dim * count for n, count in zip(beams, tokens, strict=True))
    return float(model.layers * (linear + attention) + logits - sum(_left_out(model, prompt, cached, rows)))


def _left_out(model: HSTUConfig | DecoderConfig, prompt: int, cached: int, rows: LastLayer) -> tuple[float, int]:
    """Operations of projections, and of attention, that the last layer leaves out of a prompt."""
    if isinstance(model, DecoderConfig):
        return 0.0, 0
    new = prompt - cached
    some = rows.rows(new, 1)
    pairs = visible_pairs(prompt, delta=new) - visible_pairs(prompt, delta=some)
    attention = attention_flops(pairs, model.heads, *_head_dims(model))
    return _projection_flops(model, new, new) - _projection_flops(model, new, some), attention


def _beams(sizes: Sequence[int], width: int) -> list[int]:
    """Beams before each level: the prompt alone, then at most `width`."""
    beams = [1]
    for size in sizes[:-1]:
        beams.append(min(width, beams[-1] * size))
    return beams


def search_attention(
    model: HSTUConfig | DecoderConfig, history: int, sizes: Sequence[int], width: int, rows: LastLayer = LastLayer.EVERY
) -> float:
    """Operations of `search_flops` that are attention's."""
    prompt = prompt_tokens(model, history, len(sizes))
    pairs = _search_pairs(prompt, _beams(sizes, width))
    total = model.layers * attention_flops(pairs, model.heads, *_head_dims(model))
    return float(total - _left_out(model, prompt, 0, rows)[1])


def _search_pairs(prompt: int, beams: Sequence[int], cached: int = 0) -> int:
    """Visible (row, column) pairs of a search."""
    codes = sum(rows * (prompt + level) for level, rows in enumerate(beams) if level)
    return visible_pairs(prompt, delta=prompt - cached) + codes


def _head_dims(model: HSTUConfig | DecoderConfig) -> tuple[int, int]:
    """Widths of a head's keys and of its values."""
    if isinstance(model, DecoderConfig):
        return model.head_dim, model.head_dim
    return model.qk_dim, model.v_dim


def prompt_tokens(model: HSTUConfig | DecoderConfig, history: int, levels: int) -> int:
    """Tokens of the prompt of `history` items: whole items within max_positions, at least one token."""
    return min(history, model.max_positions // levels) * levels or 1


def kv_bytes(model: HSTUConfig | DecoderConfig, history: int, precision: str) -> int:
    """Bytes of one user's KV cache over all layers. history: tokens, without the contextual ones.

    precision: fp32, fp16 or bf16; of HSTU int8 or fp8 too, with an fp32 scale of each token's keys and of its values
    in a head.
    """
    if isinstance(model, DecoderConfig):
        return model.layers * history * model.kv_heads * 2 * model.head_dim * BYTES[precision]
    tokens = model.contextual_seq_len + history
    numbers = model.qk_dim + model.v_dim
    a_head = numbers + 2 * BYTES["fp32"] if precision in EIGHT_BITS else numbers * BYTES[precision]
    return model.layers * tokens * model.heads * a_head


def parser() -> argparse.ArgumentParser:
    """Return the flags of the command."""
    about = "Print a model's parameters, mask-exact FLOPs and KV bytes, and how many users' KV caches a card holds."
    examples = [
        "sizing model=dlrm_v3 workload=synthetic_long",
        "sizing model=decoder_1p7b engine=hf retrieval.beam_width=256",
    ]
    parser = Arguments("sizing", about, examples, "overrides as in `grbench`: the model, the workload and the search")
    parser.add_argument(
        "--precision",
        choices=[*BYTES, "fp8"],
        default="bf16",
        help="precision of weights and KV cache; fp8: of products, all else in bf16 (default: %(default)s)",
    )
    parser.add_argument("--memory-gib", type=float, default=80.0, help="memory of the GPU (default: %(default)s)")
    parser.add_argument("--items", type=int, help="items in the catalogue (default: those of the workload)")
    return parser


def main(words: Sequence[str]) -> int:
    """Print the parameters and the cost of requests with several history lengths; for a pipeline, of both stages."""
    from grbench.config.compose import compose_spec

    args = parser().parse_intermixed_args(words)
    spec, _ = compose_spec(args.overrides, args.config_dir, refuse_unread=True)
    for flag, value in (("--items", args.items), ("--memory-gib", args.memory_gib)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{flag} {value}: allowed is a finite number > 0")
    if args.precision == "fp8":
        if spec.task != "rank":
            raise ConfigError(f"--precision fp8: only ranking has it, and the task is {spec.task}; set task=rank")
        if problem := without_fp8(spec.task, spec.ranking_model, "--precision "):
            raise ConfigError(problem)
    catalogue = _catalogue(spec, args.items)
    console = unwrapped(Console())
    for task, size in (("generate", _generating), ("rank", _ranking)):
        if spec.task == "recommend":
            console.print(f"to {task}", style="bold")
        if spec.task in (task, "recommend"):
            size(console, spec, catalogue, args.precision, args.memory_gib * 2**30)
    return 0


def _catalogue(spec: RunSpec, items: int | None) -> Catalogue:
    """Return the workload's catalogue, with another number of items if one is given. Raises ConfigError."""
    if items is not None:
        return Catalogue(num_users=1, num_items=items, num_actions=1)
    try:
        return workloads.catalogue(spec.workload)
    except DataError as e:
        raise ConfigError(f"{e}; or give --items") from None


def _ranking(console: Console, spec: RunSpec, catalogue: Catalogue, precision: str, memory: float) -> None:
    model, candidates = spec.ranking_model, spec.workload.num_candidates
    counts = parameters(model, catalogue)
    weights = weight_bytes(model, sum(counts.values()), precision)
    _print_parameters(console, model.name, counts, weights, precision, catalogue.num_items)
    in_fp8, gains = precision == "fp8", []
    rows = last_layer(spec, "rank") or LastLayer.EVERY
    table = _table("history", "candidates", *COLUMNS)
    for history in _histories(spec.workload.max_history):
        total, cached = (
            flops(model, history, candidates, done, rows) for done in (0, model.contextual_seq_len + history)
        )
        every = flops(model, history, candidates, rows=LastLayer.EVERY)
        attention = ranking_attention(model, history, candidates, rows)
        kv = kv_bytes(model, history, stored(spec.cache) or ("bf16" if in_fp8 else precision))
        gains.append(1 / (1 - fp8_flops(model, history, candidates, rows) / total / 2))
        _add_row(table, [history, candidates], total, attention, every, cached, kv, memory - weights)
    console.print(table)
    _print_units(console, "request", memory)
    if in_fp8:
        times = ", ".join(f"{gain:.2f}" for gain in gains)
        console.print(
            f"fp8: these requests, computed whole, are at most {times} times as fast as in bf16: products in e4m3 take "
            "half of their time, and attention as long as before.",
            soft_wrap=True,
        )


def _generating(console: Console, spec: RunSpec, catalogue: Catalogue, precision: str, memory: float) -> None:
    from grengines.semantic.ids import propose_codes

    assert spec.retrieval is not None
    model, levels, width = spec.model, spec.retrieval.levels, spec.retrieval.beam_width
    sizes = [spec.retrieval.codes or propose_codes(catalogue.num_items, levels)] * levels
    if isinstance(model, DecoderConfig) and (problem := too_few_rows(model, sum(sizes))):
        raise ConfigError(problem)
    counts = generator_parameters(model, sizes)
    weights = sum(counts.values()) * BYTES[precision]
    _print_parameters(console, model.name, counts, weights, precision, catalogue.num_items)
    rows, engine = last_layer(spec, "generate") or LastLayer.EVERY, _engine_of(spec, "generate")
    pages = stored_by_vllm(engine) if isinstance(engine, VLLMEngineConfig) else ""
    table = _table("items", "tokens", "beams", *COLUMNS)
    for history in _histories(min(spec.workload.max_history, model.max_positions // levels)):
        tokens = prompt_tokens(model, history, levels)
        total, cached = (search_flops(model, history, sizes, width, done, rows) for done in (0, tokens))
        every = search_flops(model, history, sizes, width)
        attention = search_attention(model, history, sizes, width, rows)
        kv = kv_bytes(model, tokens, pages or precision)
        _add_row(table, [history, tokens, width], total, attention, every, cached, kv, memory - weights)
    console.print(table)
    _print_units(console, "search", memory)


def _print_parameters(
    console: Console, name: str, counts: dict[str, int], weights: int, precision: str, items: int
) -> None:
    """Print the counts, and the bytes of the weights."""
    total = sum(counts.values())
    parts = ", ".join(f"{part} {count / 1e6:,.1f} M" for part, count in counts.items())
    line = f"{name}: {total / 1e6:,.1f} M parameters ({parts}), {weights / 2**30:.2f} GiB in {precision}"
    console.print(f"{line}; {items:,} items", soft_wrap=True)


def _table(*headings: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, collapse_padding=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _add_row(
    table: Table,
    sizes: Sequence[int],
    total: float,
    attention: float,
    every: float,
    cached: float,
    kv: int,
    free: float,
) -> None:
    table.add_row(
        *map(str, sizes),
        f"{total / 1e9:,.3f}",
        f"{attention / total:.0%}",
        f"{every / 1e9:,.3f}",
        f"{cached / 1e9:,.3f}",
        f"{kv / 2**20:,.2f}",
        f"{max(int(free // kv), 0):,}",
    )


def _print_units(console: Console, unit: str, memory: float) -> None:
    console.print(
        f"GFLOP: operations of one {unit} in this engine, exact mask, no padding. all rows: those of a full model, "
        "which computes every row of the last layer. all cached: with the whole history in the KV cache. "
        f"users per card: whole KV caches and the weights in {memory / 2**30:g} GiB.",
        style="dim",
        soft_wrap=True,
    )


def _histories(longest: int) -> list[int]:
    """Return a few lengths up to the workload's longest."""
    return sorted({max(longest >> k, 1) for k in (0, 1, 2, 4, 6)})
