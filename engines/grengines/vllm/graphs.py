"""Choice of the CUDA graphs in vLLM: whether there are any, and the sizes of steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from grengines.api import UnavailableError
from grengines.vllm.config import VLLMEngineConfig
from grkernels.choice import KernelChoice

# Sizes of captured steps, in tokens of prompts.
SIZES = [16, 32, 64, 128, 192, 256, 320, 384, 512, 576, 768, 1024, 1280, 1536, 2048, 2560, 3072, 4096, 5120, 6144, 8192]
COMMON = 2048  # up to here sizes are captured whatever a batch has
PROFILED = 0.25  # share of vLLM's memory that its pages may take while it measures the rest
WHOLE = ("triton", "cutlass")  # variants of hstu_attention whose launches do not depend on the lengths of a step


class GraphChoice(NamedTuple):
    """The kernels of an engine, and whether its steps are captured."""

    kernels: KernelChoice
    captured: bool
    why_not: str = ""  # why auto captures nothing on a GPU

    @property
    def whole(self) -> bool:
        """Return whether a graph can hold a whole step, attention included. A decoder's always can."""
        return self.kernels.variants.get("hstu_attention", WHOLE[0]) in WHOLE


def choose(options: VLLMEngineConfig, device: str, kernels: Callable[[bool], KernelChoice]) -> GraphChoice:
    """Choose graphs as engine.cuda_graphs asks. Auto captures on a GPU, if one graph can hold a whole step.

    device: cuda or cpu. kernels: chooses the variants, for captured steps or for others. Raises what it raises.
    """
    if device != "cuda" or options.cuda_graphs == "false":
        return GraphChoice(kernels(False), captured=False)
    if options.cuda_graphs == "true":
        return GraphChoice(kernels(True), captured=True)
    if options.tensor_parallel > 1:
        why = f"engine.tensor_parallel={options.tensor_parallel}: ranks launch kernels one by one"
    else:
        try:
            made = GraphChoice(kernels(True), captured=True)
        except UnavailableError as e:
            why = str(e)
        else:
            if made.whole:
                return made
            why = f"kernel.hstu_attention={made.kernels.variants['hstu_attention']}: a graph can't hold it"
    return GraphChoice(kernels(False), captured=False, why_not=why)


def step_sizes(batch: int, most: int) -> list[int]:
    """Return the sizes of steps to capture, ascending: up to 2048 tokens, and on until a batch of prompts fits.

    batch: tokens of the prompts of a batch. most: tokens beyond which nothing is captured, but the smallest size.
    """
    enough = next((size for size in SIZES if size >= max(batch, COMMON)), SIZES[-1])
    return [size for size in SIZES if size <= min(enough, most)] or SIZES[:1]


def profiled_pages(page_bytes: int, memory_bytes: float) -> int:
    """Return the most tokens of a captured step for this memory of vLLM's.

    While vLLM 0.25 measures memory, it takes as many pages as the largest captured step has tokens.
    """
    return int(PROFILED * memory_bytes / page_bytes)
