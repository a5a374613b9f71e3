"""Two runs side by side: exact p by enumeration, the paired error, and sentences no bolder than what was measured."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from job.cli.commands import main
from job.report import compare as comparison
from job.report.compare import compare, mcnemar
from job.store.documents import hashed

EVIL = "<script>alert(1)</script>"


def test_mcnemar_is_exact() -> None:
    """Against all 2^n ways in which n discordant items can fall, for every table up to n = 12."""
    for n in range(13):
        falls = [sum(way) for way in itertools.product((0, 1), repeat=n)]
        for only_a in range(n + 1):
            as_far = sum(abs(fall - n / 2) >= abs(only_a - n / 2) for fall in falls)
            assert mcnemar(only_a, n - only_a) == pytest.approx(as_far / 2**n, rel=1e-12)


def pair(make_run, b: dict[str, Any] | None = None, *, right: int = 14, **evaluated: Any) -> tuple[Path, Path]:
    """Runs a and b, of which b answers `right` of word_choice's 20 instead of 10, and of next_word 1 instead of 3."""
    runs = (
        make_run(run_id="a", steps=60),
        make_run(
            run_id="b",
            **{
                "steps": 60,
                "loss_at": lambda step: 4.0 - step / 100,
                "bpb_at": lambda step: 2.0,
                "tasks": (
                    ("word_choice", "multiple_choice", 3, 0.25, right, 20),
                    ("which_subject", "schema", 0, 0.5, 8, 20),
                    ("next_word", "language_modeling", 0, 0.0, 1, 20),
                ),
            }
            | (b or {}),
        ),
    )
    for run, bpb in zip(runs, (1.7, 1.69), strict=True):
        attempt = run.start()
        run.prepare(attempt)
        run.pretrain(attempt, every=20)
        run.evaluate(attempt, bpb=bpb, **evaluated)
        (run.path / "checkpoints").rename(run.path / "gone")  # synthetic ones have equal weights
        attempt.close()
    return runs[0].path, runs[1].path


def test_two_runs_are_paired_item_by_item(make_run) -> None:
    document, _ = compare(*pair(make_run))
    items = document["items"]
    assert [row["only"] for row in items["tasks"]] == [[0, 4], [0, 0], [2, 0]]
    assert [row["p"] for row in items["tasks"]] == [0.125, 1.0, 0.5]
    d = [np.repeat([-1, 0], [4, 16]) / 0.75, np.zeros(20), np.repeat([1, 0], [2, 18])]
    assert items["difference"] == pytest.approx(np.mean([each.mean() for each in d]))
    assert items["difference"] == pytest.approx(items["metric"][0] - items["metric"][1])
    assert items["se"] == pytest.approx(math.sqrt(sum(each.var() / 20 for each in d)) / 3)
    assert document["conclusion"].startswith("Neither model is shown to be better: on the same items their smoke score")
    assert document["bpb"]["difference"] == pytest.approx(0.01)
    assert [point["tokens"] for point in document["curve"]] == [20 * 32 * 256, 40 * 32 * 256]
    assert document["recipe"] == [] and document["clocks"][0]["steps"] == 60


def test_one_item_a_task_shows_nothing(make_run) -> None:
    kinds = (("x", "multiple_choice", 0, 0.25), ("y", "schema", 0, 0.5), ("z", "language_modeling", 0, 0.0))
    paths = []
    for name, right in (("a", 1), ("b", 0)):
        run = make_run(run_id=name, tasks=tuple((*kind, right, 1) for kind in kinds))
        run.evaluate(run.start(), core=True, cap=1)
        paths.append(run.path)
    items = comparison.paired_items(*paths)
    assert items and items["difference"] > 0 and items["se"] == 0
    assert items["p"] == pytest.approx(2 * 0.5**3), "three items that A alone has right"


def test_a_run_beside_itself_says_so(make_run) -> None:
    run, other = pair(make_run, b={"loss_at": lambda step: 3.2 + 5.1 * math.exp(-step / 40)})
    assert "one and the same run (it is compared with itself)" in compare(run, run)[0]["conclusion"]
    assert "one and the same run (both had the same loss at every step)" in compare(run, other)[0]["conclusion"]
    for path in (run, other):
        (path / "gone").rename(path / "checkpoints")
    assert "one and the same run (both have the same weights" in compare(run, other)[0]["conclusion"]
    itself = comparison.paired_items(run, run)
    assert itself and (itself["difference"], itself["p"]) == (0, 1) and all(row["p"] == 1 for row in itself["tasks"])


@pytest.mark.parametrize(
    ("core", "cap", "large", "says"),
    [
        (False, None, True, "of their recipes one run each says nothing"),
        (True, 500, True, "of their recipes one run each says nothing"),
        (True, None, False, "of their recipes one run each says nothing"),
        (True, None, True, "by more than two runs of one recipe would"),
    ],
)
def test_a_recipe_is_judged_by_the_published_sd_of_large_models_full_core_alone(
    make_run, monkeypatch, core: bool, cap: int, large: bool, says: str
) -> None:
    monkeypatch.setattr(comparison, "PUBLISHED_SIZE", 1_000 if large else 10**10)
    conclusion = compare(*pair(make_run, right=20, core=core, cap=cap))[0]["conclusion"]
    assert conclusion.startswith("On the same items the model of b has the higher") and says in conclusion
    assert ("CORE" in conclusion) == core and "beats" not in conclusion


def test_what_is_not_comparable_is_not_compared(make_run, tmp_path: Path) -> None:
    a, b = pair(make_run)
    (b / "eval").rename(b / "away")
    assert "of which nobody knows how much they vary from run to run" in compare(a, b)[0]["conclusion"]
    recipe = json.loads((b / "recipe.json").read_text())
    recipe["recipe"]["train"]["val_tokens"] = 7
    (b / "recipe.json").write_text(json.dumps(hashed(recipe)))
    assert "Nothing may be concluded" in compare(a, b)[0]["conclusion"]
    (b / "away").rename(b / "eval")
    answers = next(b.glob("eval/*/next_word/answers.csv"))
    answers.write_bytes(answers.read_bytes().replace(b"1,0,0,1", b"1,0,0,0"))
    ended = CliRunner().invoke(main, ["compare", "a", "b", "--out", str(tmp_path)])
    assert ended.exit_code == 11 and "is not the file that was sealed" in ended.stderr


def test_the_terminal_and_the_page(make_run, tmp_path: Path) -> None:
    tasks = ((EVIL.replace("/", ""), "schema", 0, 0.5, 8, 20),)
    make_run(run_id="c", steps=60, tasks=tasks).whole()
    pair(make_run, b={"tasks": tasks})
    file, words = tmp_path / "two.html", ["compare", "c", "b", "--out", str(tmp_path)]
    text = CliRunner().invoke(main, [*words, "--page", str(file)], catch_exceptions=False).stdout
    assert "<script>" in text and "training clock" in text and "the recipes are equal" in text
    html = file.read_text()
    assert "<script" not in html and "&lt;script&gt;" in html and html.count("<svg") == 2 and len(html) < 2e6
    document = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
    assert document["conclusion"] in text and document["conclusion"] in html.replace("&#39;", "'")
    for page, why in ((file / "x.html", r"cannot be written \(.*\): name another file"), (tmp_path, "is a directory")):
        for command in (words, ["certify", "--table", str(tmp_path)]):
            ended = CliRunner().invoke(main, [*command, "--page", str(page)])
            assert ended.exit_code == 2 and re.search(f"^speedrun: --page .*{why}$", ended.stderr.strip())
