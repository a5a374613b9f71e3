"""Random models of both generations with a real tokenizer, as sources and as exports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from job.data.tokenizer import Tokenizer, train_tokenizer
from job.inference.export import export
from job.inference.sources import Source
from model.config import GPTConfig
from model.gpt import GPT


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(topics.values(), vocab_size=500, max_chars=100_000, document_chars=10_000)[0]


@pytest.fixture(scope="session")
def make_source(tokenizer: Tokenizer) -> Callable[[str], Source]:
    def make(generation: str) -> Source:
        """Four layers, windows of 16 and 64; every parameter random; tables in bf16 as a GPU trains them."""
        shape = {"width": 64, "head_dim": 32, "window_divisor": 4, "window_tile": 16}
        model = GPT(GPTConfig.for_depth(4, tokenizer.vocab_size, 64, generation, **shape), torch.bfloat16)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 0.3, generator=generator))
        tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
        where = Path(f"a-{generation}")
        return Source(where, model.config, tokenizer, frozenset(tensors), tensors.__getitem__, {"made": generation})

    return make


@pytest.fixture(scope="session", params=["feb", "head"])
def exported(
    request: pytest.FixtureRequest, make_source: Callable[[str], Source], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Source, Path]:
    """A model and its export."""
    source = make_source(request.param)
    folder = tmp_path_factory.mktemp("export") / request.param
    export(source, folder, "mit")
    return source, folder
