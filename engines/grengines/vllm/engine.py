"""The engine that generates through vLLM: its scheduler, pages and prefix cache; the search over them is ours."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grengines.api import Finished, GenerateResult, Request, Setup
from grengines.base import GeneratingEngine
from grengines.models.decoder.config import DecoderConfig
from grengines.models.hstu.config import HSTUConfig
from grengines.runtime import kernels as kernel_choice
from grengines.runtime.device import Placement
from grengines.runtime.graphs import first_batches
from grengines.semantic.ids import prompt_of
from grengines.semantic.trie import Trie
from grengines.vllm.beam_selector import Choice
from grengines.vllm.config import VLLMEngineConfig

# Steps of this many tokens are captured unless told otherwise: beams of one or a few searches. Not prompts: to measure
# memory vLLM 0.25 takes, for a moment, as many pages as the largest of them has tokens.
GRAPH_TOKENS = [16, 32, 64, 128, 192, 256, 320, 384, 512, 576, 768, 1024, 1280, 1536, 2048]


DECODER_FAMILIES = ("paged_write", "beam_attention", "beam_rows", "beam_keys")  # a decoder's other kernels are vLLM's


@dataclass
class Search:
    """One request under way: a beam search of as many vLLM requests as there are levels."""

    key: int
    prompt: np.ndarray  # int64 [tokens]
    ids: list[int]  # the same
    nodes: Tensor  # int64 [beams] of the trie
    scores: Tensor  # fp32 [beams]
    paths: np.ndarray  # int64 [beams, level]: tokens of each beam so far
    hidden: Tensor | None = None  # where the pooler puts rows
    hashes: list[Any] = field(default_factory=list)  # of the prompt's whole blocks; empty at the first level
    details: dict[str, float] = field(default_factory=lambda: {"prefix_hit_tokens": 0.0, "reread_tokens": 0.0})

    @property
    def level(self) -> int:
        return self.paths.shape[1]


class VLLMEngine(GeneratingEngine):
    """HSTU or a decoder in vLLM, in this process. Satisfies grengines.api.ContinuousEngine.

    A search is one vLLM request a level, whose last rows are the beams (grengines.vllm.rows). The prompt's keys and
    values come from the prefix cache after the first level.

    Raises UnavailableError for a device or a kernel that this machine lacks, ValueError for options that don't fit.
    """

    name = "vllm"

    def __init__(self, options: VLLMEngineConfig, setup: Setup) -> None:
        super().__init__(setup, Placement.of(options), cuda_graphs=options.cuda_graphs)
        if options.block_size & (options.block_size - 1):
            raise ValueError(f"engine.block_size={options.block_size}: must be a power of two")
        self._options, model = options, setup.model
        if isinstance(model, HSTUConfig) and model.qk_dim != model.v_dim:
            raise ValueError(
                f"model.qk_dim={model.qk_dim}, model.v_dim={model.v_dim}: engine vllm needs them equal, "
                "a page holds both in rows of one size"
            )
        families = setup.kernels if isinstance(model, HSTUConfig) else DECODER_FAMILIES
        self._kernels = kernel_choice.choose(
            {family: setup.kernels[family] for family in families},
            model,
            self._device.type,
            self._precision,
            page=options.block_size,
            captured=options.cuda_graphs,
        )
        self._core: Any = None
        self._hashes: dict[str, list[Any]] = {}  # of the blocks that vLLM requests to come begin with
        self._vllm: Any = None  # its configuration
        self._model: Any = None
        self._choice: Any = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._searches: dict[str, Search] = {}  # by vLLM request
        self._under_way = self._longest_prompt = self._steps = 0
        self._number = 0  # of the next vLLM request
        self._process = (torch.set_num_threads, os.environ.get("LD_PRELOAD"))

    def _load(self, sample: Sequence[Request], max_batch: int) -> None:
        """Start vLLM with the model. Raises ValueError where the pages can't hold the longest search."""
        self._longest_prompt = max(len(self._prompt(r)) for r in sample)
        # Of every search: the trie's root, and its score.
        self._root = torch.zeros(1, dtype=torch.int64, device=self._device), torch.zeros(1, device=self._device)
        self._start()
        self._choice = self._choices(max_batch)

    def _warm_up(self, sample: Sequence[Request], max_batch: int) -> None:
        longest = self._longest(sample, max_batch)
        for n in first_batches(max_batch, self._device):
            self.generate(longest[-n:])
            self.reset_cache()

    def generate(self, requests: Sequence[Request]) -> GenerateResult:
        """As grengines.api.Generator, by `admit` and `step`. Raises RuntimeError unprepared or with others begun."""
        if self._core is None or self._under_way:
            raise RuntimeError("the engine is not prepared, is closed, or has requests under way")
        begun = time.perf_counter()
        for i, request in enumerate(requests):
            self.admit(i, request)
        admitted = time.perf_counter()
        steps = self._steps
        done: dict[int, Finished] = {}
        while self.unfinished:
            done |= {f.key: f for f in self.step()}
        ended = time.perf_counter()
        answers = [done[i] for i in range(len(requests))]
        details = {name: sum(a.details[name] for a in answers) for name in answers[0].details}
        tokens = sum(a.tokens for a in answers)
        return GenerateResult(
            items=[a.items for a in answers],
            scores=[a.scores for a in answers],
            batch_ms=(admitted - begun) * 1e3,
            transfer_ms=0.0,  # within vLLM's steps
            compute_ms=(ended - admitted) * 1e3,
            tokens=tokens,
            padded_tokens=tokens,
            details={**details, "vllm_steps": float(self._steps - steps)},
        )

    @property
    def unfinished(self) -> int:
        """Requests under way."""
        return self._under_way

    def admit(self, key: int, request: Request) -> None:
        """Begin one request. Raises ValueError for a prompt longer than those that the engine was prepared for."""
        self._ready(self._choice)
        prompt = self._prompt(request)
        if len(prompt) > self._longest_prompt:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens; the engine was prepared for up to {self._longest_prompt}"
            )
        search = Search(key, prompt, prompt.tolist(), *self._root, np.zeros((1, 0), np.int64))
        self._under_way += 1
        self._submit(search)

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        """One step of vLLM's scheduler, and the next level of every search that it brought to the end of one.

        Raises RuntimeError with vLLM's own error; the engine is of no use then.
        """
        from grengines.vllm import compat

        if not self._under_way:
            return []
        try:
            outputs = self._core.get_output().outputs
        except Exception as e:
            reason = " ".join(str(e).split()) or "no message"
            if isinstance(e, torch.OutOfMemoryError | MemoryError):
                raise
            told = "; ".join([f"{type(e).__name__}: {reason}", *compat.last_log_lines()])
            raise RuntimeError(f"vLLM's engine core died: {told}; the log has the rest") from e
        self._steps += 1
        levelled: dict[int, list[Search]] = {}
        for output in outputs:
            if not output.finished:
                continue
            search = self._searches.pop(output.request_id)
            missing = int((~self._model.pooler.sinks.pop(output.request_id).arrived).sum())
            if missing:  # those rows were in the prefix cache, so that nobody computed them
                raise RuntimeError(f"{missing} rows of beams hit the prefix cache: they must all be different")
            self._count(search, output)
            if search.level:
                self._model.rows_under_way -= 1
            levelled.setdefault(search.level, []).append(search)
        finished: list[Finished] = []
        for level, searches in levelled.items():
            finished += self._advance(level, searches)
        return finished

    def reset_cache(self, keep_host: bool = False) -> None:
        """Empty the prefix cache. Raises RuntimeError with requests under way."""
        if self._core is not None and self._options.prefix_caching and not self._core.reset_prefix_cache():
            raise RuntimeError("vLLM didn't empty its prefix cache: requests are under way")

    def _describe(self) -> dict[str, Any]:
        return {
            "beams": "rows of one vLLM request",
            "timer": "perf_counter; vLLM waits for the device every step",
            **self._actual_vllm(),
        }

    def _unload(self) -> None:
        """End vLLM and put back what it changed in the process."""
        core, self._core, self._vllm, self._model, self._choice = self._core, None, None, None, None
        self._searches, self._under_way = {}, 0
        if core is not None:
            from grengines.vllm import compat

            compat.close(core)
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        torch.set_num_threads, preload = self._process
        if preload is None:
            os.environ.pop("LD_PRELOAD", None)
        else:
            os.environ["LD_PRELOAD"] = preload

    def _prompt(self, request: Request) -> np.ndarray:
        """int64 [tokens]: the last whole items within max_positions tokens; the begin token where there are none."""
        sizes = self._retrieval.ids.sizes
        return prompt_of(self._retrieval.prompt(request), sizes, self._model_config.max_positions)

    def _max_rows(self) -> int:
        """Most tokens after a prompt in one vLLM request."""
        return self._retrieval.beam_width * (self._retrieval.ids.levels - 1)

    def _submit(self, search: Search) -> None:
        """The vLLM request of the search's next level."""
        from grengines.vllm import compat
        from grengines.vllm.model import Sink

        sequence, ids, wanted, name = search.prompt, search.ids, 1, str(self._number)
        if search.level:
            rows = self._beams.ids(search.paths.reshape(-1), self._number)
            sequence, ids, wanted = np.concatenate([sequence, rows]), ids + rows.tolist(), len(rows)
            self._model.rows_under_way += 1
        self._number += 1
        search.hidden = torch.empty(wanted, self._width, dtype=self._dtype, device=self._device)
        self._searches[name] = search
        self._model.pooler.sinks[name] = Sink(search.hidden, len(sequence) - wanted, np.zeros(wanted, np.bool_))
        if caching := self._options.prefix_caching:  # hashed once for all levels
            self._hashes[name] = search.hashes
        self._core.add_request(compat.core_request(name, compat.TokenIds(ids, sequence), name, caching))
        if caching and not search.level:
            search.hashes = compat.hashes_of(self._core, name)

    def _count(self, search: Search, output: Any) -> None:
        """Tokens of the prompt that a returning user's first level found, and that later levels didn't."""
        from grengines.vllm import compat

        hit = min(compat.cached_tokens(output), len(search.prompt))
        if search.level == 0:
            search.details["prefix_hit_tokens"] += hit
        else:
            search.details["reread_tokens"] += len(search.prompt) - hit

    def _advance(self, level: int, searches: Sequence[Search]) -> list[Finished]:
        """Take the next code of searches that have all rows of this level: submit them again, or end them."""
        # A beam's own rows are adjacent, and its last is the one that says what follows.
        hidden = [s.hidden[level - 1 :: level] if level else s.hidden for s in searches if s.hidden is not None]
        nodes, scores = ([getattr(s, name) for s in searches] for name in ("nodes", "scores"))
        told, nodes, scores = self._choice(level, hidden, nodes, scores)
        found = told.cpu().numpy()
        if level + 1 < self._retrieval.ids.levels:
            for i, search in enumerate(searches):
                search.nodes, search.scores = nodes[i], scores[i]
                search.paths = np.column_stack([search.paths[found[0, i]], found[1, i]])
                self._submit(search)
            return []
        ended = []
        for i, search in enumerate(searches):
            real = found[0, i] >= 0
            one = found[0, i, real].astype(np.int64), found[1, i, real].astype(np.float32)
            ended.append(Finished(search.key, *one, tokens=len(search.prompt), details=search.details))
        self._under_way -= len(searches)
        return ended

    @torch.inference_mode()
    def _choices(self, most: int) -> Choice:
        """most: how many searches are under way at once, as a rule."""
        trie, retrieval = Trie.of(self._retrieval.ids).on(self._device), self._retrieval
        return Choice(
            self._model,
            trie,
            width=retrieval.beam_width,
            k=retrieval.k,
            graphs=most if self._options.cuda_graphs else 0,
            embedding_dim=self._width,
            dtype=self._dtype,
        )

    def _start(self) -> None:
        """vLLM over a folder with the model's configuration and weights."""
        from grengines.vllm import compat, model, plugin

        del model  # imported before the plugin registers it
        plugin.register()
        config = self._options
        if compat.running is not None:
            raise RuntimeError("another engine of this process runs vLLM, which can't be there twice; close it first")
        self._folder = tempfile.TemporaryDirectory(prefix="grbench-vllm-")
        self._write(Path(self._folder.name))
        limit = self._longest_prompt + self._max_rows()
        if not config.chunked_prefill and config.max_num_batched_tokens < limit:
            raise ValueError(
                f"engine.chunked_prefill=false: a search of {limit} tokens needs "
                f"engine.max_num_batched_tokens={limit} or more"
            )
        needed = -(-limit // config.block_size) + 1  # vLLM keeps one for itself
        if 0 < config.kv_blocks < needed:
            raise ValueError(f"engine.kv_blocks={config.kv_blocks}: a search of {limit} tokens needs {needed}")
        arguments: dict[str, Any] = {
            "model": self._folder.name,
            "runner": "pooling",
            "skip_tokenizer_init": True,
            "dtype": str(self._dtype).removeprefix("torch."),
            "seed": self._setup.seed,
            "max_model_len": limit + 1,
            "max_num_seqs": min(config.max_num_seqs or self._max_batch, config.max_num_batched_tokens),
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "block_size": config.block_size,
            "enable_prefix_caching": config.prefix_caching,
            "enable_chunked_prefill": config.chunked_prefill,
            "enforce_eager": not config.cuda_graphs,
            "async_scheduling": False,
            "disable_log_stats": True,
            "gpu_memory_utilization": config.gpu_memory_utilization,
        }
        if config.kv_blocks:
            arguments["num_gpu_blocks_override"] = config.kv_blocks
        if self._device.type == "cpu":
            arguments["kv_cache_memory_bytes"] = int(config.kv_cache_gb * 2**30)
        if config.cuda_graphs:
            # Other attention is launched by the lengths of a step's requests, so it can't be captured.
            attention = self._kernels.variants.get("hstu_attention", "triton")  # a decoder's is Triton's
            mode = "FULL" if attention in ("triton", "cutlass") else "PIECEWISE"
            sizes = sorted(config.graph_tokens) or GRAPH_TOKENS
            arguments["compilation_config"] = {"cudagraph_mode": mode, "cudagraph_capture_sizes": sizes}
        try:
            self._core, self._vllm = compat.start(arguments)
        except ValueError as e:
            raise ValueError(f"vLLM refuses: {' '.join(str(e).split())}") from e
        self._hashes = compat.known_hashes(self._core)
        self._model = compat.model_of(self._core)
        self._model.rows_under_way = 0
        blocks = self._vllm.cache_config.num_gpu_blocks
        if blocks < needed:
            raise ValueError(f"memory for {blocks} pages: a search of {limit} tokens needs {needed}; give vLLM more")
        if blocks > self._beams.numbers:
            raise ValueError(
                f"{blocks} pages for {self._beams.numbers} different requests: rows of beams might hit the prefix "
                f"cache; set engine.kv_blocks={self._beams.numbers} or less"
            )

    def _write(self, folder: Path) -> None:
        """config.json and weights, as vLLM loads them."""
        from grengines.vllm.rows import BeamRows

        ids, dtype = self._retrieval.ids, self._dtype
        model = self._model_config
        self._width = model.embedding_dim
        self._beams = BeamRows(ids.sizes, self._max_rows())
        # Places go up to here while vLLM measures memory; positions never do.
        ours = {
            "sizes": list(ids.sizes),
            "max_rows": self._max_rows(),
            "max_position_embeddings": self._longest_prompt + self._max_rows() + 1,
            "kernels": self._kernels.variants,
        }
        if isinstance(model, DecoderConfig):
            from grengines.models.decoder.weights import write

            write(model, ids.sizes, folder, seed=self._setup.seed, dtype=dtype, weights=self._retrieval.weights)
            described = json.loads((folder / "config.json").read_text())
            described |= {"architectures": ["DecoderForRetrieval"], **ours}
        else:
            from grengines.models.hstu.generator import HSTUGenerator
            from grengines.models.hstu.weights import save_weights
            from grkernels.operators import Operators

            generator = HSTUGenerator.build(
                model,
                ids.sizes,
                Operators.eager(),
                seed=self._setup.seed,
                device="cpu",
                dtype=dtype,
                weights=self._retrieval.weights,
            )
            save_weights(generator, folder / "model.safetensors")
            described = {
                "architectures": ["HSTUForRetrieval"],
                "model_type": "grbench_hstu",
                "dtype": str(dtype).removeprefix("torch."),
                "vocab_size": self._beams.vocabulary,
                "hidden_size": model.embedding_dim,
                "num_hidden_layers": model.layers,
                "num_attention_heads": model.heads,
                "num_key_value_heads": model.heads,
                "head_dim": model.qk_dim,
                "hstu": dataclasses.asdict(model),
                **ours,
            }
        (folder / "config.json").write_text(json.dumps(described, indent=1))

    def _actual_vllm(self) -> dict[str, Any]:
        """What vLLM says of itself."""
        if self._vllm is None:
            return {}
        from grengines.vllm import compat

        config = self._vllm
        layer = next(m for m in self._model.modules() if isinstance(m, compat.Attention))
        graphs = config.compilation_config
        return {
            "vllm": compat.VERSION,
            "attention_backend": layer.attn_backend.__name__,
            "kernels": self._model.kernels,
            "kernel_choice": self._kernels.passed_over,
            "prefix_caching": bool(config.cache_config.enable_prefix_caching),
            "chunked_prefill": bool(config.scheduler_config.enable_chunked_prefill),
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "max_model_len": config.model_config.max_model_len,
            "block_size": config.cache_config.block_size,
            "kv_blocks": config.cache_config.num_gpu_blocks,
            "compilation": graphs.mode.name,
            "cuda_graphs": graphs.cudagraph_mode.name,
            "graph_tokens": list(graphs.cudagraph_capture_sizes or []),
            "parameters": sum(p.numel() for p in self._model.parameters()),
        }
