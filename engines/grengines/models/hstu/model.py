"""HSTU for ranking: token encoder, layers, multi-task head. Zhai et al., ICML 2024, in DLRM-v3's form.

One layer, E the embedding width, H heads of dqk and dv:

    y = LayerNorm(x);  [u|v|q|k] = y W + b;  u = SiLU(u)
    a = attention(q, k, v);  out = x + [u | a | u * LayerNorm(a)] Wo

variant.py has what other owners' layers do otherwise, head.py what follows the last layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grengines.api import Catalogue
from grengines.cache.host import Onload
from grengines.cache.places import PagedBatch
from grengines.cache.pool import PagePool
from grengines.last_layer import LastLayer
from grengines.models.hstu.config import HSTUConfig, not_read
from grengines.models.hstu.head import Clock, FinalNorm, ItemMLP, activation
from grengines.models.hstu.weights import fill
from grengines.runtime.batch import Encoding, JaggedBatch
from grengines.runtime.group import Group
from grkernels.fp8 import STEP
from grkernels.hstu_attention.extras import Extras
from grkernels.norm_gate.reference import moments_of
from grkernels.operators import Operators
from grkernels.parts import Parts
from grkernels.variant import Projected


@dataclass
class UserState:
    """Keys and values of the users' histories: one pair for each layer, tokens of all users one after another."""

    k: list[Tensor]  # [tokens, H, dqk], contiguous
    v: list[Tensor]  # [tokens, H, dv], contiguous
    offsets: Tensor  # int64 [B + 1]


# Of a layer's number and new keys and values: those that attention takes, and its further arguments (kv_offsets, ...).
Keys: TypeAlias = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor, dict[str, Any]]]


class HSTULayer(nn.Module):
    """One layer without its attention, which comes between `project` and `combine`."""

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__()
        E, H, choices = config.embedding_dim, config.heads, config.choices
        self.eps, self.silu_all = choices.eps, choices.silu == "uvqk"
        self.concat, self.norm_by_head = choices.output == "concat", choices.group_norm
        gate: dict[str, Any] = {"groups": H if self.norm_by_head else 1, "concat": self.concat}
        self.gate = gate if config.gate_extras else {}
        self.group: Group | None = None  # of the ranks, each of which has some of the heads (shard.py)
        self.heads, self.qk_dim, self.v_dim = H, config.qk_dim, config.v_dim
        self.widths = [H * config.v_dim, H * config.v_dim, H * config.qk_dim, H * config.qk_dim]
        self.norm = nn.LayerNorm(E, self.eps)
        self.uvqk = nn.Linear(E, sum(self.widths))
        self.attention_norm = nn.LayerNorm(H * config.v_dim, self.eps)
        self.out = nn.Linear((3 if self.concat else 1) * H * config.v_dim, E, bias=choices.output_bias)
        self.position_bias = nn.Parameter(torch.empty(config.max_positions)) if choices.position_bias else None
        self.time_bias = nn.Parameter(torch.empty(choices.time_bias)) if choices.time_bias else None
        # Of products in fp8, which fp8.py sets: options of what writes their operands, and the projections one by one.
        self.operands: Mapping[str, str] = {}
        self.parts: Sequence[Callable[[Any], Tensor]] = ()  # to u, v, q and k

    def project(self, x: Tensor, kernels: Operators) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Project x [L, E] to u [L, H * dv] before its SiLU, q and k [L, H, dqk], v [L, H, dv]: views of one tensor."""
        projected = self.uvqk(self._normed(x, kernels))
        if self.silu_all:  # u's is part of norm_gate
            F.silu(projected[:, self.widths[0] :], inplace=True)
        u, v, q, k = projected.split(self.widths, dim=-1)
        return u, *self._by_head(q, k, v)

    def project_rows(self, x: Tensor, rows: Tensor, kernels: Operators) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Project x [L, E] as `project` does, but u and q of `rows` (int64 [M]) alone: u [M, H * dv], q [M, H, dqk]."""
        y = self._normed(x, kernels)
        chosen = y[rows]
        inputs = (chosen, y, chosen, y)  # of u, v, q and k
        u, v, q, k = (part(i) for part, i in zip(self._parts(), inputs, strict=True))
        if self.silu_all:
            v, q, k = F.silu(v), F.silu(q), F.silu(k)
        return u, *self._by_head(q, k, v)

    def project_operands(
        self, x: Tensor, rows: Tensor | None, blocks: Any, kernels: Operators, projected: Projected
    ) -> tuple[Tensor, Any]:
        """Project x [L, E] as `project` does, or as `project_rows` with `rows`, to u and what `projected` attends to.

        blocks: of the batch's sequences, from `projected`.
        """
        y = self._normed(x, kernels)
        chosen = y if rows is None else y[rows]
        weight, scales, bias = self.uvqk.weight, getattr(self.uvqk, "scales", None), self.uvqk.bias
        sizes = {"heads": self.heads, "qk_dim": self.qk_dim, "v_dim": self.v_dim}
        u, operands = projected.project(chosen, y, weight, scales, bias, **sizes, blocks=blocks)
        return u, operands

    def _normed(self, x: Tensor, kernels: Operators) -> Any:
        """Return the operand of the input projection: y [L, E], in fp8 with scales."""
        return kernels.layer_norm(x, self.norm.weight, self.norm.bias, eps=self.eps, **self.operands)

    def _parts(self) -> Sequence[Callable[[Any], Tensor]]:
        """Return the projections to u, v, q and k."""
        if self.parts:
            return self.parts
        parts = zip(self.uvqk.weight.split(self.widths), self.uvqk.bias.split(self.widths), strict=True)
        return [partial(F.linear, weight=weight, bias=bias) for weight, bias in parts]

    def _by_head(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = (self.heads, -1)
        return q.unflatten(1, heads), k.unflatten(1, heads), v.unflatten(1, heads)

    def combine(self, x: Tensor, u: Tensor, a: Tensor, kernels: Operators) -> Tensor:
        """Combine x [L, E], u [L, H * dv] and a [L, H, dv] to the layer's output [L, E], which overwrites x."""
        norm, moments = self.attention_norm, {}
        group = None if self.group is None or not len(x) else self.group  # no rank needs the others for no rows
        if group is not None and not self.norm_by_head:
            moments = {"moments": group.gather(moments_of(a))}
        options = {**self.gate, **self.operands, **moments}
        gated = kernels.norm_gate(u, a, norm.weight, norm.bias, eps=self.eps, **options)
        if self.operands:
            return x.add_(self.out(gated))
        if group is not None and group.rank:  # the residual and the bias are rank 0's
            return group.sum_(torch.mm(gated, self.out.weight.T, out=x))
        x = x.addmm_(gated, self.out.weight.T)
        x = x if self.out.bias is None else x.add_(self.out.bias)
        return x if group is None else group.sum_(x)


class HSTURanker(nn.Module):
    """The ranking model: scores of candidates, given a user's history.

    `build` makes it, since it initialises every parameter. `kernels` may be replaced at any time. In half precision,
    norms compute their statistics in fp32, because the squares of attention's small output would vanish in fp16. The
    head's last product is in fp32, so that logits have no rounding beyond that of the layers.

    The head reads candidates alone. So the last layer computes u, q, attention and its output for candidates only; it
    still computes keys and values of every token, which other visits may need. `computed` says when: by default where
    candidates are at most half of the rows. The reference computes every row.
    """

    computed = LastLayer.HALF

    not_used: ClassVar[tuple[str, ...]] = not_read("rank")

    def __init__(self, config: HSTUConfig, catalogue: Catalogue, kernels: Operators) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        self.group: Group | None = None  # as of HSTULayer
        self.operands: Mapping[str, str] = {}  # as of HSTULayer, of the head
        self.encoding = encoding = Encoding.of(config, catalogue)
        self.alpha = config.score_scale
        self.masks = masks_of(config)
        self.attended_contextual = config.attended_contextual
        E = config.embedding_dim
        rows = encoding.item_rows + encoding.user_rows + encoding.blank_rows
        self.token_table = nn.Parameter(torch.empty(rows, E))
        self.token_parts: Parts | None = None  # instead of `token_table`, from `use_parts` on
        self.action_table = nn.Parameter(torch.empty(encoding.action_rows, E))
        self.weight_vector = nn.Parameter(torch.empty(E))
        self.position_table = nn.Parameter(torch.empty(config.max_positions + config.contextual_seq_len, E))
        self.time_table = nn.Parameter(torch.empty(config.time_buckets, E))
        self.layers = nn.ModuleList(HSTULayer(config) for _ in range(config.layers))
        choices = config.choices
        self.norm = FinalNorm(E, choices.final_norm, choices.head_eps)
        self.head_hidden = nn.Linear(E + config.interactions, config.head_dim)
        self.head_out = nn.Linear(config.head_dim, len(config.tasks))
        self.head_norm = activation(config)
        self.clock = Clock(E) if choices.clock else None
        self.tower = ItemMLP(config) if choices.item_tower == "mlp" else None
        self.tower_table = nn.Parameter(torch.empty(rows, E)) if choices.item_tower == "table" else None

    @classmethod
    def build(
        cls,
        config: HSTUConfig,
        catalogue: Catalogue,
        kernels: Operators,
        *,
        seed: int,
        device: torch.device | str,
        dtype: torch.dtype,
        host_table: bool = False,
    ) -> HSTURanker:
        """Build a model for inference with the weights of `config.weights`, or random ones from `seed`.

        Random weights are drawn in fp32 on the CPU, then rounded to `dtype`: they are the same on every device. Raises
        ValueError for a weights file that doesn't fit.

        host_table: `token_table` stays on the host; that of a file is memory-mapped and in the file's dtype. Before the
        model runs, the caller sets a table on the device with the rows of the batch, and renumbers the batch's rows.
        """
        with torch.device("meta"):
            model = cls(config, catalogue, kernels)
        fill(model, config.weights, seed, mapped=["token_table"] if host_table else ())
        if not host_table:
            return model.to(device=device, dtype=dtype)
        table = model.token_table
        model.use_table(torch.empty(0))
        model.to(device=device, dtype=dtype)
        model.use_table(table.data if config.weights else table.data.to(dtype))
        return model

    @property
    def device(self) -> torch.device:
        return self.position_table.device

    @property
    def dtype(self) -> torch.dtype:
        return self.position_table.dtype

    def use_table(self, table: Tensor, tower: Tensor | None = None) -> None:
        """Take token vectors from `table` [rows, E], which has a row numbering of its own. tower: of `tower_table`."""
        self.token_table = nn.Parameter(table, requires_grad=False)
        if tower is not None:
            self.tower_table = nn.Parameter(tower, requires_grad=False)

    def use_parts(self, parts: Parts) -> None:
        """Take token vectors from a table in parts, and drop `token_table`."""
        self.use_table(torch.empty(0, device=self.device, dtype=self.dtype))
        self.token_parts = parts

    def _vectors(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return a table on the device, and where the token rows int64 [n] are in it."""
        if self.token_parts is None:
            return self.token_table, rows
        return self.token_parts.gather(rows), torch.arange(len(rows), device=rows.device)

    def forward(self, batch: JaggedBatch) -> Tensor:
        """Encode whole histories: returns logits fp32 [M, tasks] of the batch's candidates."""
        if (projected := self.projected_attention) is not None:
            return self.score(self._encode_projected(batch, projected), batch)
        return self.score(self.encode(batch, lambda i, k, v: (k, v, {"kv_offsets": batch.kv_offsets})), batch)

    def prefill(self, batch: JaggedBatch) -> UserState:
        """Return the keys and values of every token of a batch that was packed without candidates."""
        state = UserState([], [], batch.kept_offsets)

        def keys(i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
            state.k.append(k.contiguous())
            state.v.append(v.contiguous())
            return k, v, {"kv_offsets": batch.kv_offsets}

        self.encode(batch, keys)
        return state

    def delta(self, batch: JaggedBatch, state: UserState, *, keep: bool = True) -> tuple[Tensor, UserState | None]:
        """Append: encode the new tokens of a batch that was packed with `cached`, given the state of the tokens before.

        Returns logits fp32 [M, tasks], and the state with the new events but without candidates, or None with
        keep=False.
        """
        extended = UserState([], [], batch.kept_offsets) if keep else None

        def keys(i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
            k, v = self._extend(state.k[i], k, batch), self._extend(state.v[i], v, batch)
            if extended is not None:
                extended.k.append(self._keep(k, batch))
                extended.v.append(self._keep(v, batch))
            return k, v, {"kv_offsets": batch.kv_offsets}

        return self.score(self.encode(batch, keys), batch), extended

    def paged(
        self,
        batch: JaggedBatch,
        pool: PagePool,
        places: PagedBatch,
        *,
        write: bool = True,
        read: bool = True,
        onload: Onload | None = None,
    ) -> Tensor:
        """Append to a state in pages. Returns logits fp32 [M, tasks].

        batch: packed with the cached tokens of `places`. write: store the new events' keys and values; without it they
        are in the pages already, and the batch has candidates only. read: some request has cached tokens; without it
        attention reads no pages. onload: copies from the host that are still running.
        """
        lengths = places.paged_lengths if write else places.stored_lengths
        table = {"page_table": places.page_table, "paged_lengths": lengths}

        def keys(i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
            if onload is not None:
                onload.layer(i)
            if write:
                self.kernels.paged_write(k, v, places.slots, **pool.layer(i))
            pages = pool.layer(i) | table if read else {}
            return k, v, {"kv_offsets": batch.q_offsets, **pages}  # keys outside the pages are those of this batch

        return self.score(self.encode(batch, keys), batch)

    @property
    def projected_attention(self) -> Projected | None:
        """Attention whose operands the projection writes, where nobody else needs q, k and v, or None."""
        own = self.masks is None and self.config.choices.silu == "u" and self.config.embedding_dim % STEP == 0
        return self.kernels.projected_attention if own else None

    def encode(self, batch: JaggedBatch, keys: Keys) -> Tensor:
        """Return the candidates' rows [M, E] after the last layer."""
        x, pruned = self.embed(batch), self._pruned_layer(batch)
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, HSTULayer)
            if i == pruned:
                u, q, k, v = layer.project_rows(x, batch.candidate_rows, self.kernels)
            else:
                u, q, k, v = layer.project(x, self.kernels)
            k, v, options = keys(i, k, v)
            if i == pruned and not batch.max_candidates:
                return x[:0]
            a = self._attend(layer, q, k, v, batch, i == pruned, **options)
            x = layer.combine(x[batch.candidate_rows] if i == pruned else x, u, a, self.kernels)
        return x if pruned >= 0 else x[batch.candidate_rows]

    def _encode_projected(self, batch: JaggedBatch, projected: Projected) -> Tensor:
        """Do as `encode` for whole histories, without a q, k or v in the model's dtype."""
        x, pruned = self.embed(batch), self._pruned_layer(batch)
        blocks = projected.blocks_of(batch.q_offsets, x.shape[0])
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, HSTULayer)
            if i == pruned and not batch.max_candidates:
                return x[:0]
            rows = batch.candidate_rows if i == pruned else None
            u, operands = layer.project_operands(x, rows, blocks, self.kernels, projected)
            a = projected.attend(operands, x.dtype, **self._attended(batch, i == pruned))
            x = layer.combine(x if rows is None else x[rows], u, a, self.kernels)
        return x if pruned >= 0 else x[batch.candidate_rows]

    def _pruned_layer(self, batch: JaggedBatch) -> int:
        """Return the layer that computes candidates alone: the last, or -1.

        Where all rows are candidates, gathers and separate products would save nothing; `LastLayer.HALF` has the rule.
        """
        prunes = self.computed.skips(batch.token_rows.shape[0], batch.candidate_rows.shape[0])
        return len(self.layers) - 1 if prunes else -1

    def _attend(
        self, layer: HSTULayer, q: Tensor, k: Tensor, v: Tensor, batch: JaggedBatch, pruned: bool, **options: Any
    ) -> Tensor:
        """Compute the attention of one layer.

        pruned: q has the candidates, which are the last rows of each sequence. options: kv_offsets and, for keys in
        pages, the page arguments.
        """
        if self.masks is not None:
            options["extras"] = self._extras(layer, self.masks, batch, pruned)
        attended: Tensor = self.kernels.hstu_attention(q, k, v, **self._attended(batch, pruned), **options)
        return attended

    def _attended(self, batch: JaggedBatch, pruned: bool) -> dict[str, Any]:
        """Return the arguments of attention that say which rows see which keys, except where the keys are."""
        return {
            "q_offsets": batch.candidate_offsets if pruned else batch.q_offsets,
            "num_targets": batch.num_targets,
            "max_q_len": batch.max_candidates if pruned else batch.max_q_len,
            "max_kv_len": batch.max_kv_len,
            "scaling_seqlen": self.config.scaling_seqlen,
            "alpha": self.alpha,
            "contextual_seq_len": self.attended_contextual,
            "max_attn_len": self.config.max_attn_len,
        }

    @staticmethod
    def _extras(layer: HSTULayer, masks: Mapping[str, Any], batch: JaggedBatch, pruned: bool) -> Extras:
        until = batch.until[batch.candidate_rows] if pruned and batch.until is not None else batch.until
        return Extras(
            **masks,
            num_contextuals=batch.num_contextuals,
            position_bias=layer.position_bias,
            time_bias=layer.time_bias,
            row_times=until,
            column_times=batch.times,
        )

    def embed(self, batch: JaggedBatch) -> Tensor:
        """Embed tokens to x [L, E]. Encoding defines each index."""
        table, rows = self._vectors(batch.token_rows)
        embedded: Tensor = self.kernels.token_embedding(
            rows,
            batch.actions,
            batch.weights,
            batch.positions,
            batch.time_buckets,
            token_table=table,
            action_table=self.action_table,
            weight_vector=self.weight_vector,
            position_table=self.position_table,
            time_table=self.time_table,
        )
        return embedded

    def _extend(self, cached: Tensor, new: Tensor, batch: JaggedBatch) -> Tensor:
        """Concatenate keys or values of cached and new tokens sequence by sequence: [cached + new, H, d]."""
        extended: Tensor = self.kernels.jagged_concat(
            cached,
            new,
            first_offsets=batch.kv_offsets - batch.q_offsets,
            second_offsets=batch.q_offsets,
            rows=cached.shape[0] + new.shape[0],
        )
        return extended

    def _keep(self, x: Tensor, batch: JaggedBatch) -> Tensor:
        """Return a stream's keys or values without its candidates: [tokens - M, H, d]."""
        candidates = batch.candidate_rows.shape[0]
        kept: Tensor = self.kernels.jagged_split(
            x,
            first_offsets=batch.kept_offsets,
            second_offsets=batch.kv_offsets - batch.kept_offsets,
            first_rows=x.shape[0] - candidates,
            second_rows=candidates,
        )[0]
        return kept

    def score(self, candidates: Tensor, batch: JaggedBatch) -> Tensor:
        """Return logits fp32 [M, tasks] of the candidates' rows [M, E] after the last layer."""
        kernels, rows = self.kernels, batch.candidate_rows
        if self.clock is not None and batch.times is not None:
            candidates = self.clock(candidates, batch.times[rows])
        features = self.norm(candidates, kernels)
        if self.config.interaction:
            table, own = self._vectors(batch.token_rows[rows])
            item = F.embedding(own, table)
            position = F.embedding(batch.positions[rows], self.position_table)
            gap = F.embedding(batch.time_buckets[rows], self.time_table)
            features = kernels.interaction(torch.stack([features, item, position, gap], dim=1))
        if self.tower is not None:
            table, own = self._vectors(batch.token_rows[rows])
            features = features * self.tower(own, table, kernels)
        elif self.tower_table is not None:
            features = features * F.embedding(batch.token_rows[rows], self.tower_table)
        if self.operands:
            features = kernels.quantise(features, **self.operands)
        hidden = self.head_norm(self.head_hidden(features))
        return F.linear(hidden.float(), self.head_out.weight.float(), self.head_out.bias.float())


def masks_of(config: HSTUConfig) -> Mapping[str, Any] | None:
    """Return the fields of Extras that no batch changes, or None for the attention that is grbench's own."""
    if not config.attention_extras:
        return None
    choices = config.choices
    return {n: getattr(choices, n) for n in ("target_group_size", "min_full_attn_seq_len")}


def build_model(
    model: HSTUConfig,
    catalogue: Catalogue,
    seed: int,
    device: torch.device | str,
    dtype: torch.dtype,
    kernels: Operators | None = None,
    *,
    host_table: bool = False,
) -> HSTURanker:
    """Build the model of the ranking engines: weights from `model.weights`, or random ones from the seed.

    kernels: by default the fp32 references. host_table: as `HSTURanker.build`. From here on this process computes fp32
    products without TF32. Raises ValueError for bad weights.
    """
    torch.set_float32_matmul_precision("highest")
    kernels = kernels or Operators.reference()
    return HSTURanker.build(model, catalogue, kernels, seed=seed, device=device, dtype=dtype, host_table=host_table)
