"""Text as it comes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from job.cli.commands import main
from job.data.tokenizer import Tokenizer
from job.errors import DataError, UsageError
from job.inference.sample import Text, TextModel
from job.inference.sources import Source, open_source
from model.generate import ENDED, Sampling


@pytest.fixture(scope="session")
def text_model(make_source: Callable[[str], Source]) -> TextModel:
    source = make_source("head")
    return TextModel(source.model(), source.tokenizer)


def streamed(tokenizer: Tokenizer, text: str, stop: list[str], ends: bool = False) -> list[str]:
    """What is told after each token, and at the end."""
    stream = Text(tokenizer, stop)
    told = []
    for token in [*tokenizer.encode(text), *([ENDED] if ends else [])]:
        stream.take(token)
        told.append(stream.new())
        if stream.ended:
            break
    stream.end()
    return [*told, stream.new()]


def test_no_character_is_broken(tokenizer: Tokenizer) -> None:
    text = "naïve 日本語 👩‍👩‍👧!"
    told = streamed(tokenizer, text, [])
    assert "".join(told) == text and "\ufffd" not in "".join(told)
    assert streamed(tokenizer, "日", [], ends=True)[-1] == "" and len(tokenizer.encode("日")) == 3


def test_half_a_character_at_the_end_is_told_as_such(tokenizer: Tokenizer) -> None:
    stream = Text(tokenizer, [])
    stream.take(tokenizer.encode("日")[0])
    assert stream.new() == ""
    stream.end()
    assert stream.new() == "\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "left"),
    [
        ("one, two. Three", ["."], "one, two"),
        ("one\n\ntwo", ["\n\n"], "one"),
        ("one\ntwo\n", ["\n\n"], "one\ntwo\n"),
        ("aaab", ["aab"], "a"),
        ("stop", ["stop"], ""),
        ("a b c", ["c", "b"], "a "),
        ("abc", [""], "abc"),
    ],
)
def test_nothing_of_a_stop_string_is_told(tokenizer: Tokenizer, text: str, stop: list[str], left: str) -> None:
    told = streamed(tokenizer, text, stop)
    for number in range(len(told)):
        assert left.startswith("".join(told[: number + 1]))
    assert "".join(told) == left


def test_continuations_are_streamed_counted_and_reproducible(text_model: TextModel) -> None:
    pieces: list[str] = []
    asked = {"number": 3, "max_tokens": 12, "sampling": Sampling(temperature=1.0, seed=2)}
    texts, speed = text_model.continuations("The import", write=pieces.append, **asked)
    again, _ = text_model.continuations("The import", **asked)
    assert texts == again and "".join(pieces) == texts[0] and len(set(texts)) == 3
    assert "tokens, " in speed and "is full" not in speed
    assert "context of 64 tokens is full" in text_model.continuations("x", **asked | {"max_tokens": 500})[1]


def test_a_prompt_longer_than_the_context_is_said(text_model: TextModel) -> None:
    with pytest.raises(UsageError, match=r"the prompt has 101 tokens and the model's context 64.*shorten the prompt"):
        text_model.ids("\x00" * 100)


def test_every_way_to_give_a_prompt(exported: tuple[Source, Path], tmp_path: Path) -> None:
    words = ["sample", "--model", str(exported[1]), "--temperature", "0", "--max-tokens", "5"]
    (tmp_path / "prompt.txt").write_text("The import")
    argument = CliRunner().invoke(main, [*words, "The import"])
    assert argument.exit_code == 0 and argument.stdout.startswith("The import") and "a second" in argument.stderr
    for other in (
        CliRunner().invoke(main, words, input="The import"),
        CliRunner().invoke(main, [*words, "--file", str(tmp_path / "prompt.txt")]),
    ):
        assert other.stdout == argument.stdout
    foreign = CliRunner().invoke(main, words, input=b"caf\xe9")
    assert foreign.exit_code == 2 and "stdin cannot be read as UTF-8 text" in foreign.stderr
    several = CliRunner().invoke(main, [*words, "--number", "2", "The import"]).stdout
    assert several.count(argument.stdout) == 2


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--model", "nowhere", "x"], 11, "nowhere holds no model of ours (no manifest.json): give a run"),
        (["--model", "MODEL", "--run-id", "a", "x"], 2, "say which model: --run-id ID for a run's, or --model"),
        (["x"], 2, "say which model"),
        (["--run-id", "nothing", "x"], 2, "no run nothing below"),
        (
            ["--model", "s3://bucket/x", "x"],
            2,
            "--model s3://bucket/x names no model: write s3://bucket/prefix/runs/ID",
        ),
        (["--model", "MODEL", "--temperature", "-1", "x"], 2, "--temperature is -1.0: it must not be negative"),
        (["--model", "MODEL", "--top-p", "0", "x"], 2, "--top-p is 0.0: it must be above 0"),
        (["--model", "MODEL", "x " * 500], 2, "and the model's context 64"),
        (["--model", "MODEL", "--file", "nowhere"], 2, "--file nowhere cannot be read as UTF-8 text"),
        (["--model", "MODEL", "--file", "f", "x"], 2, "give the prompt itself or --file, not both"),
    ],
)
def test_what_cannot_be_sampled_is_one_sentence(
    exported: tuple[Source, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(main, ["sample", *(str(exported[1]) if w == "MODEL" else w for w in words)])
    assert ended.exit_code == code and said in ended.stderr and len(ended.stderr.splitlines()) == 1


def test_a_truncated_export_is_refused(exported: tuple[Source, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported[1], tmp_path / "copy"))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"model.safetensors has \d+ bytes, not"):
        open_source(folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_000001.pt").touch()
    with pytest.raises(DataError, match="make it one of ours first, speedrun import"):
        open_source(tmp_path / "other")
