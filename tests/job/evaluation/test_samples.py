"""The samples of the evaluate stage: whatever a held-out document begins with, it is continued."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from job.data.tokenizer import Tokenizer
from job.evaluation.stage import write_samples
from job.reporter import Reporter
from model.config import GPTConfig
from model.gpt import GPT


class Recorder(Reporter):
    def __init__(self) -> None:
        self.prompts: list[str] = []

    def emit(self, kind: str, **fields: Any) -> None:
        assert kind == "sample" and fields["text"]
        self.prompts.append(fields["prompt"])


def test_a_document_that_begins_with_a_page_of_blanks_is_continued_from_its_first_word() -> None:
    words = "one or more words " * 20
    tokenizer = Tokenizer([bytes([byte]) for byte in range(256)])
    held_out = ["too short", "\n" * 150 + words, " " * 300, words]
    prepared: Any = SimpleNamespace(tokenizer=tokenizer, held_out_documents=lambda: held_out)
    settings = SimpleNamespace(eval=SimpleNamespace(samples=3, sample_tokens=4), train=SimpleNamespace(seed=0))
    context: Any = SimpleNamespace(recipe=lambda: settings, reporter=(seen := Recorder()))
    model = GPT(GPTConfig.for_depth(2, tokenizer.vocab_size, 32, "head"))
    model.init_weights(0)
    model.freeze()
    write_samples(context, model, prepared)
    assert seen.prompts == [words[:80].rsplit(None, 1)[0]] * 2
