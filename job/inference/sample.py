"""Text from a model, as it comes: whole characters, nothing of a stop string, never beyond the context."""

from __future__ import annotations

import codecs
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from job.data.tokenizer import Tokenizer
from job.errors import UsageError
from job.inference.sources import open_source
from job.machine import host
from model.generate import ENDED, Sampling, generate
from model.gpt import GPT


@dataclasses.dataclass(frozen=True)
class TextModel:
    """A model with its tokenizer, ready to continue text."""

    gpt: GPT
    tokenizer: Tokenizer

    @classmethod
    def load(cls, path: Path) -> TextModel:
        """Of a checkpoint or an export, on a GPU where there is one."""
        source = open_source(path)
        gpu = torch.cuda.is_available()
        return cls(source.model("cuda" if gpu else "cpu", host.compute_dtype("auto", gpu=gpu)), source.tokenizer)

    def ids(self, prompt: str) -> list[int]:
        """BOS and the prompt; UsageError unless the context has room for them and a token more."""
        ids, context = [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)], self.gpt.config.seq_len
        if len(ids) >= context:
            raise UsageError(
                f"the prompt has {len(ids):,} tokens and the model's context {context:,}, of which one at least is for"
                " the continuation: shorten the prompt"
            )
        return ids

    def continuations(
        self,
        prompt: str,
        *,
        number: int,
        max_tokens: int,
        sampling: Sampling,
        stop: Sequence[str] = (),
        write: Callable[[str], None] = lambda _: None,
    ) -> tuple[list[str], str]:
        """`number` texts that go on from `prompt`, drawn as one batch, and a sentence about them.

        `write` is given the first one piece by piece. A text ends with the document, before one of `stop`, after
        `max_tokens`, or where the context does.
        """
        ids = self.ids(prompt)
        room = min(max_tokens, self.gpt.config.seq_len - len(ids))
        texts = [Text(self.tokenizer, stop) for _ in range(number)]
        began, count = time.perf_counter(), 0
        for tokens in generate(self.gpt, [ids] * number, room, sampling, {self.tokenizer.bos_id}):
            for text, token in zip(texts, tokens, strict=True):
                if not text.ended:
                    count += token != ENDED
                    text.take(token)
            write(texts[0].new())
            if all(text.ended for text in texts):
                break
        is_cut = room < max_tokens and not all(text.ended for text in texts)
        for text in texts:
            text.end()
        write(texts[0].new())
        seconds = time.perf_counter() - began
        full = f"; the context of {self.gpt.config.seq_len:,} tokens is full" * is_cut
        return [text.whole for text in texts], f"{count:,} tokens, {count / seconds:,.1f} a second{full}"


class Text:
    """One continuation."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._told = 0
        self.whole = ""
        self.ended = False

    def take(self, token: int) -> None:
        """The next token."""
        if token == ENDED:
            self.end()
            return
        self._held += self._characters.decode(self._tokenizer.bytes_of([token]))
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self._held = self._held[: min(found)]
            self._characters.reset()
            self.end()
            return
        certain = len(self._held) - max((_overlap(self._held, stop) for stop in self._stop), default=0)
        self.whole, self._held = self.whole + self._held[:certain], self._held[certain:]

    def end(self) -> None:
        """There is no more: what was held back belongs to it."""
        if not self.ended:
            self.whole += self._held + self._characters.decode(b"", final=True)
            self._held, self.ended = "", True

    def new(self) -> str:
        """What has come since this was asked last."""
        text, self._told = self.whole[self._told :], len(self.whole)
        return text


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that may be the beginning of `stop`."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))
