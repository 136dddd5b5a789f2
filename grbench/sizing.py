"""What a model costs before anything runs: parameters, mask-exact FLOPs, KV bytes, users that a card holds.

python -m grbench.sizing model=dlrm_v3 workload=synthetic_long
"""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.table import Table

from grengines.api import Catalogue, Request
from grengines.hstu.config import HSTUConfig
from grkernels.hstu_attention.spec import BYTES, visible_pairs
from grkernels.hstu_attention.spec import flops as attention_flops


def parameters(model: HSTUConfig, catalogue: Catalogue) -> dict[str, int]:
    """Parameter counts: embedding tables, layers, and everything else (output norm and head)."""
    import torch

    from grengines.hstu.model import HSTURanker
    from grkernels.operators import Operators

    with torch.device("meta"):  # shapes only, no memory
        ranker = HSTURanker(model, catalogue, Operators.reference())
    counts = {"tables": 0, "layers": 0, "head": 0}
    for name, p in ranker.named_parameters():
        part = "layers" if name.startswith("layers.") else "tables" if "." not in name else "head"
        counts[part] += p.numel()
    return counts


def request_flops(model: HSTUConfig, request: Request) -> float:
    """Floating-point operations that ranking one request needs; see `flops`."""
    return flops(model, len(request.history_items), len(request.candidates))


def flops(model: HSTUConfig, history: int, candidates: int, cached: int = 0) -> float:
    """Operations of one request with the exact mask and no padding; a multiply-add is 2.

    Counts the layers' two projections, attention over the visible (row, column) pairs, and the head. Look-ups,
    norms and activations are left out: under 1%. The keys and values of the first `cached` tokens are there already.
    """
    tokens = model.contextual_seq_len + history + candidates
    new = tokens - cached
    pairs = visible_pairs(tokens, candidates, model.contextual_seq_len, model.max_attn_len, delta=new)
    widths = 2 * model.heads * (model.qk_dim + model.v_dim) + 3 * model.heads * model.v_dim
    linear = 2 * new * model.embedding_dim * widths
    inputs = model.embedding_dim + model.interactions
    head = 2 * candidates * (model.head_dim * (inputs + len(model.tasks)) + model.interactions * model.embedding_dim)
    return float(model.layers * (linear + attention_flops(pairs, model.heads, model.qk_dim, model.v_dim)) + head)


def kv_bytes(model: HSTUConfig, history: int, precision: str) -> int:
    """Bytes of one user's keys and values over all layers."""
    tokens = model.contextual_seq_len + history
    return model.layers * tokens * model.heads * (model.qk_dim + model.v_dim) * BYTES[precision]


def main() -> int:
    """Print two tables: the model, and what requests of several history lengths cost."""
    parser = argparse.ArgumentParser(prog="python -m grbench.sizing", description=__doc__)
    parser.add_argument("--precision", choices=BYTES, default="bf16", help="of weights and KV (default: %(default)s)")
    parser.add_argument("--memory-gib", type=float, default=80.0, help="of the card (default: %(default)s)")
    parser.add_argument("--items", type=int, default=1_000_000, help="in the catalogue (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, such as model=dlrm_v3")
    args = parser.parse_args()
    from grbench.compose import compose_spec
    from grbench.config import ConfigError

    try:
        spec, _ = compose_spec(args.overrides)
    except ConfigError as e:
        print(f"grbench.sizing: {e}", file=sys.stderr)
        return 2
    if args.items < 1 or not args.memory_gib > 0:
        print(f"grbench.sizing: --items {args.items} --memory-gib {args.memory_gib}: allowed is > 0", file=sys.stderr)
        return 2
    model, candidates = spec.model, spec.workload.num_candidates
    counts = parameters(model, Catalogue(num_users=1, num_items=args.items, num_actions=1))
    weights = sum(counts.values()) * BYTES[args.precision]
    free = args.memory_gib * 2**30 - weights
    console = Console()
    console.print(
        f"{model.name}: {sum(counts.values()) / 1e6:,.1f} M parameters "
        f"({', '.join(f'{part} {count / 1e6:,.1f} M' for part, count in counts.items())}), "
        f"{weights / 2**30:.2f} GiB in {args.precision}; {args.items:,} items",
        soft_wrap=True,
    )
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("history", "candidates", "GFLOP", "of it attention", "all cached", "KV MiB a user", "users a card"):
        table.add_column(heading, justify="right")
    for history in _histories(spec.workload.max_history):
        total, cached = (
            flops(model, history, candidates),
            flops(model, history, candidates, model.contextual_seq_len + history),
        )
        tokens = model.contextual_seq_len + history + candidates
        pairs = visible_pairs(tokens, candidates, model.contextual_seq_len, model.max_attn_len)
        attention = model.layers * attention_flops(pairs, model.heads, model.qk_dim, model.v_dim)
        kv = kv_bytes(model, history, args.precision)
        table.add_row(
            f"{history}",
            f"{candidates}",
            f"{total / 1e9:,.3f}",
            f"{attention / total:.0%}",
            f"{cached / 1e9:,.3f}",
            f"{kv / 2**20:,.2f}",
            f"{max(int(free // kv), 0):,}",
        )
    console.print(table)
    console.print(
        "GFLOP: operations of one request, exact mask, no padding; all cached: with the history's KV there; "
        f"users a card: whole KV caches beside the weights in {args.memory_gib:g} GiB.",
        style="dim",
        soft_wrap=True,
    )
    return 0


def _histories(longest: int) -> list[int]:
    """A few lengths up to the workload's longest."""
    return sorted({max(longest >> k, 1) for k in (0, 1, 2, 4, 6)})


if __name__ == "__main__":
    sys.exit(main())
