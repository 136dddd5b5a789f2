"""CUDA graphs of engine=vllm: a GPU has them by default, with sizes that a batch needs and the memory allows."""

from __future__ import annotations

from itertools import pairwise

import pytest

from grengines.api import UnavailableError
from grengines.vllm import graphs
from grengines.vllm.config import VLLMEngineConfig
from grkernels.choice import KernelChoice


def choose(attention: str | None = "triton", device: str = "cuda", waits: str = "", **options: object) -> tuple:
    """Return whether steps are captured, why not, and for which the kernels were chosen. waits: a refused variant."""
    asked = []

    def kernels(captured: bool) -> KernelChoice:
        asked.append(captured)
        if captured and waits:
            raise UnavailableError(waits)
        return KernelChoice({"paged_write": "triton"} | ({"hstu_attention": attention} if attention else {}), {})

    made = graphs.choose(VLLMEngineConfig(**options), device, kernels)  # type: ignore[arg-type]
    assert asked[-1] == made.captured
    return made.captured, made.why_not


@pytest.mark.parametrize("attention", ["triton", "cutlass", None])
def test_a_gpu_has_graphs_by_default(attention: str | None) -> None:
    """None: a decoder's attention can always be captured."""
    assert choose(attention) == (True, "")
    assert choose(attention, cuda_graphs=True) == (True, "")
    assert choose(attention, cuda_graphs=False) == (False, "")
    assert choose(attention, device="cpu") == (False, "")


def test_auto_says_why_it_has_none() -> None:
    assert choose("torch") == (False, "kernel.hstu_attention=torch: a graph can't hold it")
    assert choose("torch", cuda_graphs=True) == (True, "")  # the parts between attention calls
    ranks = "engine.tensor_parallel=2: ranks launch kernels one by one"
    assert choose(None, tensor_parallel=2) == (False, ranks)
    waits = "kernel.beam_attention=torch waits for the device"
    assert choose(None, waits=waits) == (False, waits)
    with pytest.raises(UnavailableError, match=waits):
        choose(None, waits=waits, cuda_graphs=True)


def test_a_batch_of_median_prompts_finds_a_captured_step() -> None:
    movielens = graphs.step_sizes(16 * 3 * 83, 8192)  # 83 items of three codes
    assert movielens[0] == 16 and movielens[-2:] == [3072, 4096]
    assert max(b / a for a, b in pairwise(movielens) if a >= 192) <= 1.5  # little of a step is padding
    assert graphs.step_sizes(0, 8192)[-1] == 2048
    assert graphs.step_sizes(10**6, 32768)[-1] == 8192
    assert graphs.step_sizes(4096, 4096)[-1] == 4096


def test_captured_steps_fit_the_memory() -> None:
    page = 64 * 12 * 8 * 2 * 128 * 2  # hstu_0p2b in bf16
    for gigabytes in (8, 24, 80, 141):
        most = graphs.profiled_pages(page, 0.8 * gigabytes * 1e9)
        sizes = graphs.step_sizes(10**6, most)
        assert sizes[-1] * page <= 0.8 * gigabytes * 1e9 / 4
    assert sizes[-1] == 8192 and graphs.step_sizes(10**6, 10) == [16]
