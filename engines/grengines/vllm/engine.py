"""The engine that generates through vLLM: its scheduler, pages and prefix cache, and our beam search over them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from grengines.api import Finished, GenerateResult, Int64Array, Request, Setup, Tier
from grengines.base import GeneratingEngine, placement_of
from grengines.cache.pool import page_bytes
from grengines.models.decoder.config import DecoderConfig
from grengines.models.decoder.weights import shapes
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.generator import PromptKeys
from grengines.runtime import kernels as kernel_choice
from grengines.runtime.buckets import first_batches
from grengines.runtime.team import Alone, Team
from grengines.semantic.ids import prompt_of
from grengines.semantic.trie import Trie
from grengines.vllm import graphs, ranks
from grengines.vllm.config import VLLMEngineConfig, stored
from grengines.vllm.folder import ModelFolder
from grengines.vllm.levels import Levels
from grkernels.pages import EIGHT_BITS

if TYPE_CHECKING:
    from grengines.vllm.core import VLLMCore
    from grengines.vllm.searches import Searches

STEP_TOKENS = 8192  # most tokens of a step by default, at least
LONGEST_STEP = 32768  # most tokens of a step by default, at most
DECODER_FAMILIES = ("paged_write", "beam_attention")  # a decoder's other kernels are vLLM's


class VLLMEngine(GeneratingEngine):
    """HSTU or a decoder in vLLM, in this process. Satisfies grengines.api.ContinuousEngine.

    With engine.tensor_parallel it is rank 0 of a decoder, and its team has the others. Raises UnavailableError for a
    device or a kernel that this machine lacks.
    """

    name = "vllm"

    def __init__(self, options: VLLMEngineConfig, setup: Setup) -> None:
        super().__init__(setup, placement_of(options), cuda_graphs=options.cuda_graphs == "true")
        self._options, model, kernels = options, setup.model, setup.kernels
        self._stored = stored(options)
        if not isinstance(model, HSTUConfig):
            kernels = {family: kernels[family] for family in DECODER_FAMILIES}
        self._graphs = graphs.choose(
            options,
            self._device.type,
            lambda captured: kernel_choice.choose(
                kernels,
                model,
                self._device.type,
                self._precision,
                page=options.block_size,
                stored=self._stored,
                captured=captured,
                ranks=options.tensor_parallel,
                beams=self._retrieval.beam_width,
            ),
        )
        self._kernels = self._graphs.kernels
        self._longest_prompt = self._median_prompt = 0  # tokens
        self.team: Team | Alone = Alone(self._device)
        self.core: VLLMCore | None = None
        self.folder: ModelFolder | None = None
        self.searches: Searches | None = None

    def _load(self, sample: Sequence[Request], max_batch: int) -> None:
        """Start vLLM with the model. Raises ValueError if the pages can't hold the longest search."""
        from grengines.vllm.core import VLLMCore
        from grengines.vllm.searches import Searches

        lengths = [len(self._prompt(r)) for r in sample]
        self._longest_prompt, self._median_prompt = max(lengths), int(median(lengths))
        beams = 0 if isinstance(self._model_config, HSTUConfig) else self._beam_tokens()
        limit = self._longest_prompt + beams
        self._check_options(limit)
        self.folder = ModelFolder(
            self._setup,
            self._kernels.variants,
            self._dtype,
            max_tokens=limit,
            beam_tokens=beams,
            stored=self._stored,
        )
        arguments, count = self.core_arguments(self.folder, limit, max_batch), self._options.tensor_parallel
        port = ranks.free_port() if count > 1 else 0
        if count > 1:
            self.team = Team(count, self._device, ranks.follow, self._recipe(arguments, port), collectives=False)
        with self.team.waiting():
            self.core = VLLMCore(arguments, ranks.variables(0, count, port) if count > 1 else {})
        self._check_pages(self.core.blocks, limit)
        self.core.model.pooler.levels = self._levels(self.core, limit)
        self.searches = Searches(self.core)
        self.team.ready()

    def _recipe(self, arguments: dict[str, Any], port: int) -> dict[str, Any]:
        """Return the arguments of `ranks.follow`."""
        search = {"width": self._retrieval.beam_width, "k": self._retrieval.k}
        return {"arguments": arguments, "port": port, "trie": Trie.of(self._retrieval.ids), **search}

    def _warm_up(self, sample: Sequence[Request], max_batch: int) -> None:
        longest = self._longest(sample, max_batch)
        for n in first_batches(max_batch, self._device):
            self.generate(longest[-n:])
            self.reset_cache()

    def generate(self, requests: Sequence[Request]) -> GenerateResult:
        """Generate as grengines.api.Generator describes, with `admit` and `step`.

        Raises RuntimeError before `prepare` and while requests are in flight, ValueError as `admit`, admitting none.
        """
        searches = self.searches
        if searches is None or searches.unfinished:
            raise RuntimeError("the engine is not prepared, is closed, or has requests in flight")
        begun = time.perf_counter()
        for i, prompt in enumerate([self._checked_prompt(request) for request in requests]):
            self._admit(searches, i, prompt)
        admitted = time.perf_counter()
        steps = searches.steps
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
            details={**details, "vllm_steps": float(searches.steps - steps)},
        )

    @property
    def unfinished(self) -> int:
        """Return the number of requests in flight."""
        return self.searches.unfinished if self.searches is not None else 0

    def admit(self, key: int, request: Request) -> None:
        """Begin one request. Raises ValueError for a prompt longer than those that the engine was prepared for."""
        self._admit(self._ready(self.searches), key, self._checked_prompt(request))

    def _admit(self, searches: Searches, key: int, prompt: Int64Array) -> None:
        """Begin one search, on every rank."""
        with self.team.call("admit", [], key=key, prompt=prompt):
            searches.admit(key, prompt)

    def step(self) -> list[Finished]:
        """Run one step of vLLM's scheduler. Return the requests that have finished since the last call.

        With asynchronous scheduling they are of an earlier step: the device may still compute the latest. Raises
        RuntimeError with vLLM's own error. The engine is then unusable.
        """
        if self.searches is None:
            return []
        with self.team.call("step", []):
            return self.searches.step()

    def reset_cache(self, keep: Tier = Tier.NONE) -> None:
        """Empty the prefix cache. Raises RuntimeError while requests are in flight."""
        if self.unfinished:  # an error within a call would end the other ranks
            raise RuntimeError("the prefix cache can't be emptied: requests are in flight")
        if self.core is not None:
            with self.team.call("reset", []):
                self.core.reset_prefix_cache()

    def core_arguments(self, folder: ModelFolder, limit: int, max_batch: int) -> dict[str, Any]:
        """Return the arguments of vLLM's EngineArgs. limit: most tokens of a search."""
        options, tokens = self._options, self._step_tokens(limit, max_batch)
        arguments: dict[str, Any] = {
            "model": str(folder.path),
            "runner": "pooling",
            "skip_tokenizer_init": True,
            "dtype": str(self._dtype).removeprefix("torch."),
            "seed": self._setup.seed,
            "max_model_len": limit + 1,
            "max_num_seqs": min(options.max_num_seqs or max_batch, tokens),
            "max_num_batched_tokens": tokens,
            "block_size": options.block_size,
            "enable_prefix_caching": options.prefix_caching,
            "enable_chunked_prefill": options.chunked_prefill,
            "enforce_eager": not self._graphs.captured,
            "async_scheduling": options.async_scheduling and options.tensor_parallel == 1,
            "disable_log_stats": True,
            "gpu_memory_utilization": options.gpu_memory_utilization,
        }
        arguments |= ranks.arguments_of(options.tensor_parallel)
        if options.kv_blocks:
            arguments["num_gpu_blocks_override"] = options.kv_blocks
        if not self._cuda:
            arguments["kv_cache_memory_bytes"] = int(options.kv_cache_gb * 1e9)
        if self._graphs.captured:
            arguments["compilation_config"] = {
                "cudagraph_mode": "FULL" if self._graphs.whole else "PIECEWISE",
                "cudagraph_capture_sizes": sorted(options.graph_tokens) or self._step_sizes(tokens, max_batch),
            }
        return arguments

    def _describe(self) -> dict[str, Any]:
        return {
            "beams": "in the step that ends the prompt",
            "timer": "perf_counter; vLLM waits for the device every step",
            "kernel_choice": self._kernels.reasons,
            "cache_precision": self._stored or self._precision,
            **({"graph_choice": self._graphs.why_not} if self._graphs.why_not else {}),
            **(self.core.describe() if self.core is not None else {}),
            **self.team.actual(),
            **self._whole_model(),
        }

    def _whole_model(self) -> dict[str, int]:
        """Return the parameters of all ranks together, each counted once."""
        if not isinstance(self._model_config, DecoderConfig) or self.team.size == 1:
            return {}
        return {
            "parameters": sum(
                math.prod(shape) for shape in shapes(self._model_config, self._retrieval.ids.sizes).values()
            )
        }

    def _unload(self) -> None:
        """End vLLM and restore the process."""
        core, folder = self.core, self.folder
        self.searches = self.core = self.folder = None
        self.team.close(core.close if core is not None else lambda: None)
        if folder is not None:
            folder.close()

    def _prompt(self, request: Request) -> Int64Array:
        """Return int64 [tokens]: the last whole items within max_positions tokens, or the begin token for none."""
        sizes = self._retrieval.ids.sizes
        return prompt_of(self._retrieval.prompt(request), sizes, self._model_config.max_positions)

    def _checked_prompt(self, request: Request) -> Int64Array:
        """Return the prompt of a request. Raises ValueError for one longer than those that `prepare` was given."""
        prompt = self._prompt(request)
        if len(prompt) > self._longest_prompt:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens; the engine was prepared for up to {self._longest_prompt}"
            )
        return prompt

    def _check_options(self, limit: int) -> None:
        """Raise ValueError for options with which a search of `limit` tokens can't run."""
        options = self._options
        if not options.chunked_prefill and 0 < options.max_num_batched_tokens <= limit:
            raise ValueError(
                f"engine.chunked_prefill=false: a search of {limit} tokens needs "
                f"engine.max_num_batched_tokens={limit + 1} or more"
            )
        if 0 < options.kv_blocks < self._pages_for(limit):
            raise ValueError(
                f"engine.kv_blocks={options.kv_blocks}: a search of {limit} tokens needs "
                f"{self._pages_for(limit)} or more"
            )

    def _step_tokens(self, limit: int, max_batch: int) -> int:
        """Return the most tokens of a step. limit: of a search.

        On a GPU it has room for half a batch of the longest prompts, within STEP_TOKENS and LONGEST_STEP: the host
        prepares one half while the device computes the other.
        """
        if self._options.max_num_batched_tokens:
            return self._options.max_num_batched_tokens
        half = -(-max_batch // 2) * self._longest_prompt if self._cuda else 0
        whole = 0 if self._options.chunked_prefill else limit + 1
        return max(STEP_TOKENS, min(half, LONGEST_STEP), whole)

    def _check_pages(self, pages: int, limit: int) -> None:
        """Raise ValueError for too few pages."""
        if pages < self._pages_for(limit):
            raise ValueError(
                f"vLLM has memory for {pages} pages, a search of {limit} tokens needs {self._pages_for(limit)}; "
                "raise engine.gpu_memory_utilization, or engine.kv_cache_gb on a CPU"
            )

    def _pages_for(self, tokens: int) -> int:
        """Return the pages that a search needs. vLLM keeps one for itself."""
        return -(-tokens // self._options.block_size) + 1

    def _step_sizes(self, tokens: int, max_batch: int) -> list[int]:
        """Return the sizes of steps to capture. tokens: most of a step.

        A decoder's long prompts are not captured: outside graphs FlashAttention reads them.
        """
        model = self._model_config
        heads, dim = (model.heads, model.qk_dim) if isinstance(model, HSTUConfig) else (model.kv_heads, model.head_dim)
        dtype = EIGHT_BITS.get(self._stored, self._dtype)
        page = page_bytes(
            layers=model.layers, page=self._options.block_size, heads=heads, qk_dim=dim, v_dim=dim, dtype=dtype
        )
        memory = self._options.gpu_memory_utilization * torch.cuda.get_device_properties(self._device).total_memory
        batch = max_batch * self._median_prompt if isinstance(model, HSTUConfig) else 0
        return graphs.step_sizes(batch, min(tokens, graphs.profiled_pages(page, memory)))

    def _beam_tokens(self) -> int:
        """Return the most codes that a search encodes: of all levels but the last."""
        return self._retrieval.beam_width * (self._retrieval.ids.levels - 1)

    @torch.inference_mode()
    def _levels(self, core: VLLMCore, limit: int) -> Levels:
        """Return what runs the levels after a prompt, with CUDA graphs for as many searches as end in a step."""
        trie = Trie.of(self._retrieval.ids).on(self._device)
        levels = Levels(core.model, trie, width=self._retrieval.beam_width, k=self._retrieval.k)
        if self._graphs.captured and self._graphs.whole:
            last = torch.zeros(1, self._model_config.embedding_dim, dtype=self._dtype, device=self._device)
            table = torch.zeros(1, -(-limit // self._options.block_size), dtype=torch.int32, device=self._device)
            lengths = torch.zeros(1, dtype=torch.int64, device=self._device)
            levels.capture(
                core.config.scheduler_config.max_num_seqs, last, PromptKeys(lengths, table, self._longest_prompt)
            )
        return levels
