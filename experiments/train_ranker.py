"""Train a small ranking model on MovieLens-100K, so that the AUC of precisions can be compared.

    python experiments/train_ranker.py --out outputs/ml_100k.safetensors [model=hstu_tiny ...]

PyTorch and autograd, a few minutes on two cores. Tasks are the workload's actions: rated (did the user rate the
candidate in this visit) and liked (with at least four of five stars). The last requests of the trace are held out:
`grbench/gate/quality.py` ranks them. A run takes the file as

    python -m grbench workload.max_history=128 'model.tasks=[rated,liked]' model.weights=outputs/ml_100k.safetensors
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import common
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from grbench import workloads
from grbench.gate import quality
from grbench.workloads.item_map import save_items
from grengines.models.hstu.model import HSTULayer, HSTURanker
from grengines.models.hstu.weights import save_weights
from grengines.runtime.batch import JaggedBatch, pack
from grkernels.hstu_attention.reference import hstu_mask
from grkernels.operators import Operators

CPU = torch.device("cpu")
DEFAULTS = ["workload=ml_100k", "workload.max_history=128", "model=hstu_tiny", "model.tasks=[rated,liked]"]


def forward(model: HSTURanker, batch: JaggedBatch) -> Tensor:
    """Logits as HSTURanker.forward gives them, for autograd: nothing changes in place, attention pads sequences."""
    config, kernels = model.config, model.kernels
    n, offsets = batch.max_q_len, batch.q_offsets
    lengths, targets = offsets.diff().tolist(), batch.num_targets.tolist()
    mask = torch.zeros(len(lengths), 1, n, n)
    for b, (length, t) in enumerate(zip(lengths, targets, strict=True)):
        mask[b, 0, :length, :length] = hstu_mask(length, t, config.contextual_seq_len, config.max_attn_len)
    rows = (offsets[:-1, None] + torch.arange(n)).clamp(max=batch.token_rows.shape[0] - 1)
    real = torch.arange(n) < offsets.diff()[:, None]
    x = model.embed(batch)
    for layer in model.layers:
        assert isinstance(layer, HSTULayer)
        u, q, k, v = layer.project(x, kernels)
        q, k, v = (y[rows].transpose(1, 2) for y in (q, k, v))  # [B, H, n, d]
        weights = F.silu(model.alpha * q @ k.transpose(2, 3)) * mask / config.scaling_seqlen
        a = (weights @ v).transpose(1, 2)[real]
        norm = layer.attention_norm
        x = x + kernels.norm_gate(u, a, norm.weight, norm.bias, eps=1e-6) @ layer.out.weight.T
    return model.score(x[batch.candidate_rows], batch)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=32, help="requests per step (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=2e-3, help="of learning (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="of the model and the workload, such as model.layers=3")
    args = parser.parse_args(arguments)
    [spec] = common.specs_of(parser, DEFAULTS, args.overrides, multirun=False)
    trace = workloads.build(spec.workload, spec.seed, spec.latency_limit_ms)
    tasks = spec.model.tasks
    labels = [quality.labels_of(trace, i, tasks) for i in range(len(trace.requests))]
    if labels[0] is None:
        known = ", ".join(trace.events.action_names)
        parser.error(f"model.tasks={tasks}: allowed are the actions that the workload labels: {known}")
    torch.manual_seed(spec.seed)
    model = HSTURanker.build(
        spec.model, trace.catalogue, Operators.eager(), seed=spec.seed, device="cpu", dtype=torch.float32
    ).requires_grad_()
    torch.nn.init.normal_(model.token_table, std=0.1)  # random vectors of unit size would take long to forget
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.rate, weight_decay=0.05)
    train = len(trace.requests) - spec.gate.quality_requests
    steps = args.epochs * -(-train // args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, args.rate, total_steps=steps, pct_start=0.1)
    rng = np.random.default_rng(spec.seed)

    def logits(indices: list[int]) -> Tensor:
        return forward(model, pack([trace.requests[i] for i in indices], model.encoding).to(CPU))

    begun = time.perf_counter()
    for epoch in range(args.epochs):
        order, total = rng.permutation(train), 0.0
        for start in range(0, train, args.batch):
            chosen = order[start : start + args.batch].tolist()
            truth = torch.from_numpy(np.concatenate([labels[i] for i in chosen])).float()
            loss = F.binary_cross_entropy_with_logits(logits(chosen), truth)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            total += float(loss.detach()) * len(chosen)
        with torch.no_grad():
            held = range(train, len(trace.requests))
            found = [logits([i]).numpy() for i in held]
        figures = quality.compare(found, found, [labels[i] for i in held], tasks, "fp32").tasks
        text = ", ".join(f"{task} AUC {f.auc:.4f} NE {f.ne:.4f}" for task, f in figures.items())
        print(f"epoch {epoch + 1}: loss {total / train:.4f}; held out: {text}; {time.perf_counter() - begun:.0f} s")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_weights(model, args.out)
    items = save_items(trace.events, args.out)
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()):,} parameters; {items}: the item of each table row")


if __name__ == "__main__":
    main()
