"""A model in a folder, as vLLM loads it: config.json and weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from grengines.api import Retrieval, Setup
from grengines.models.decoder import weights as decoder_weights
from grengines.models.decoder.config import DecoderConfig
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.generator import HSTUGenerator
from grengines.models.hstu.weights import save_weights
from grengines.runtime.scratch import Scratch
from grkernels.operators import Operators


class ModelFolder:
    """A temporary folder with HSTU or a decoder, until `close`.

    variants: of each operator family. max_tokens: of a search. beam_tokens: of these, the codes of beams whose keys and
    values are in vLLM's pages. stored: int8 or fp8 for pages of HSTU in 8 bits. Raises ValueError for bad weights.
    """

    def __init__(
        self,
        setup: Setup,
        variants: dict[str, str],
        dtype: torch.dtype,
        *,
        max_tokens: int,
        beam_tokens: int = 0,
        stored: str = "",
    ) -> None:
        assert setup.retrieval is not None, "a task that generates has semantic IDs"
        self._folder = Scratch("grbench-model-")
        self.path = self._folder.path
        try:
            common = {
                "sizes": list(setup.retrieval.ids.sizes),
                "beam_tokens": beam_tokens,
                "max_position_embeddings": max_tokens + 1,  # positions go up to here while vLLM measures memory
                "kernels": variants,
                "stored": stored,
            }
            model, options = setup.model, (setup.retrieval, setup.seed, dtype)
            own = (
                _write_decoder(self.path, model, *options)
                if isinstance(model, DecoderConfig)
                else _write_hstu(self.path, model, *options)
            )
            config = own | common
            (self.path / "config.json").write_text(json.dumps(config, indent=1))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Delete the folder. A second call does nothing."""
        self._folder.close()


def _write_decoder(
    folder: Path, model: DecoderConfig, retrieval: Retrieval, seed: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Write a decoder's weights. Return its config.json."""
    decoder_weights.write(model, retrieval.ids.sizes, folder, seed=seed, dtype=dtype, weights=retrieval.weights)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config | {"architectures": ["DecoderForRetrieval"], "vocabulary": model.vocabulary}


def _write_hstu(folder: Path, model: HSTUConfig, retrieval: Retrieval, seed: int, dtype: torch.dtype) -> dict[str, Any]:
    """Write HSTU's weights. Return its config.json."""
    sizes = retrieval.ids.sizes
    generator = HSTUGenerator.build(
        model, sizes, Operators.eager(), seed=seed, device="cpu", dtype=dtype, weights=retrieval.weights
    )
    save_weights(generator, folder / "model.safetensors")
    return {
        "architectures": ["HSTUForRetrieval"],
        "model_type": "grbench_hstu",
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": sum(sizes) + 1,
        "hidden_size": model.embedding_dim,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.heads,
        "head_dim": model.qk_dim,
        "hstu": dataclasses.asdict(model),
    }
