"""Sampling: prompts go through the model once, then each new token alone, beside what the cache keeps of the others.

Every sequence draws from a generator of its own, on the CPU and in double precision, so that what it becomes depends
neither on the sequences beside it nor on the device, but for logits that differ in their last bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ConfigError
from model.gpt import GPT
from model.kv_cache import KVCache

ENDED = -1
"""what stands for the tokens of a sequence after its end"""


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: at temperature 0 the likeliest, else of those that pass top_k, top_p, min_p if given."""

    temperature: float = 1.0
    top_k: int | None = None  # among the k most probable (and those as probable as the last of them)
    top_p: float = 1.0  # among the most probable that together have this probability
    min_p: float = 0.0  # at least this share of the most probable one's probability
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "temperature": (self.temperature >= 0, "it must not be negative"),
            "top_k": (self.top_k is None or self.top_k >= 1, "it must be at least 1"),
            "top_p": (0 < self.top_p <= 1, "it must be above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "it must be between 0 and 1"),
        }
        for name, (right, rule) in bounds.items():
            if not right:
                raise ConfigError(f"{name} is {getattr(self, name)}: {rule}")

    def generator(self, sequence: int) -> torch.Generator:
        """The source of randomness of one sequence of a batch, by its number."""
        digest = hashlib.sha256(f"{self.seed}/{sequence}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8]))

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, V) -> what a token is drawn by, (B, V) float64 on the CPU, 0 for tokens that do not pass."""
        logits = logits.double().cpu()
        if self.temperature == 0:
            return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.size(-1)).double()
        below = logits - logits.amax(dim=-1, keepdim=True)  # so that no quotient overflows upwards
        p = (below / self.temperature).softmax(dim=-1)
        if self.top_k is None and self.top_p == 1 and self.min_p == 0:
            return p
        falling = p.sort(dim=-1, descending=True).values
        passes = (falling.cumsum(dim=-1) - falling < self.top_p) & (falling >= self.min_p * falling[:, :1])
        count = passes.sum(dim=-1, keepdim=True).clamp(1, self.top_k)
        return p * (p >= falling.gather(1, count - 1))


def draw(probabilities: Tensor, generator: torch.Generator) -> int:
    """A token by (V,) probabilities, which need not sum to 1."""
    cumulative = probabilities.cumsum(dim=-1)
    at = (1 - torch.rand(1, generator=generator, dtype=torch.float64)) * cumulative[-1]  # above 0
    return int(torch.searchsorted(cumulative, at))


class Decoder:
    """Sequences that grow by a token each at a time; `logits`, (B, V) fp32, are those of the token that comes next."""

    @torch.inference_mode()
    def __init__(self, model: GPT, prompts: Sequence[Sequence[int]], most: int) -> None:
        """most: tokens that a sequence may grow to. ConfigError for an empty prompt."""
        if not prompts or not all(prompts):
            raise ConfigError("nothing to continue: give at least one token, the one that begins a document")
        self._model, table = model, model.wte.weight
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        rows = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
        self._cache = KVCache(model.config, lengths, max(most, longest), table)
        last = torch.tensor([row * longest + length - 1 for row, length in enumerate(lengths)], device=table.device)
        self._step(torch.tensor(rows, device=table.device), last)

    @torch.inference_mode()
    def append(self, tokens: Sequence[int]) -> None:
        """One more token for each sequence."""
        idx = torch.tensor(tokens, device=self._model.wte.weight.device).unsqueeze(1)  # (B, 1)
        self._step(idx, torch.arange(len(tokens), device=idx.device))

    def _step(self, idx: Tensor, last: Tensor) -> None:
        self.logits = self._model.lm_head(self._model.hidden(idx, cache=self._cache, positions=last))
        self._cache.advance()


def generate(
    model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling, stop: Collection[int] = ()
) -> Iterator[list[int]]:
    """The next token of every prompt, up to `max_new_tokens` times; ENDED from a prompt's first token of `stop` on."""
    decoder = Decoder(model, prompts, max(map(len, prompts), default=0) + max_new_tokens)
    generators = [sampling.generator(number) for number in range(len(prompts))]
    ended = [False] * len(prompts)
    for left in reversed(range(max_new_tokens)):
        probabilities = sampling.probabilities(decoder.logits)
        tokens = [draw(p, generator) for p, generator in zip(probabilities, generators, strict=True)]
        ended = [was or token in stop for was, token in zip(ended, tokens, strict=True)]
        yield [ENDED if over else token for over, token in zip(ended, tokens, strict=True)]
        if all(ended):
            return
        if left:
            decoder.append(tokens)
