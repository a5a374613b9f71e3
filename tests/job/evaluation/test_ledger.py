from __future__ import annotations

import collections
import csv
import math
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pytest

from job.errors import DataError
from job.evaluation import ledger
from job.evaluation.bundle import Task
from job.evaluation.ledger import Answer, Ledger, make_ledger
from job.reporter import Reporter

PUBLISHED = {"gpt2": 0.113891, "gpt2-medium": 0.184903, "gpt2-large": 0.214641, "gpt2-xl": 0.256525}


RIGHT, WRONG = Answer(1, 0, 0, True, None), Answer(1, 0, 1, False, None)


def answers(right: int, n: int) -> list[Answer]:
    return [RIGHT] * right + [WRONG] * (n - right)


def published_accuracies(core_archive, model: str) -> dict[str, float]:
    """The rows of the CSV that the bundle ships for `model`."""
    with pa.CompressedInputStream(core_archive, "zstd") as raw, tarfile.open(fileobj=raw, mode="r|") as archive:
        for member in archive:
            if member.name == f"openai-community-{model}.csv":
                rows = list(csv.reader(archive.extractfile(member).read().decode().splitlines()))[1:]
                return {row[0].strip(): float(row[1]) for row in rows if row[1].strip()}
    raise AssertionError(model)


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_published_gpt2_scores_follow_from_their_accuracies(core_archive, core_bundle, model):
    accuracies = published_accuracies(core_archive, model)
    assert accuracies.keys() == {task.label for task in core_bundle.tasks}
    centered = [ledger.centered_accuracy(accuracies[task.label], task.baseline) for task in core_bundle.tasks]
    assert ledger.metric_of(centered) == pytest.approx(PUBLISHED[model], abs=1e-6)


def test_item_sampling_error_is_the_known_one(core_archive, core_bundle):
    """GPT-2 XL's accuracies on all items: se 0.0065, 44 % of the variance from COPA's 100 items."""
    accuracies = published_accuracies(core_archive, "gpt2-xl")
    tasks = [
        (t, answers(round(accuracies[t.label] * len(t.examples)), len(t.examples)), 1.0) for t in core_bundle.tasks
    ]
    book = make_ledger("core", tasks, {"cap": None})
    assert book.metric == pytest.approx(PUBLISHED["gpt2-xl"], abs=2e-4)
    assert book.se == pytest.approx(0.0065, abs=5e-5)
    shares = {task.label: task.error_share for task in book.tasks}
    assert shares["copa"] == pytest.approx(0.44, abs=0.01) and math.fsum(shares.values()) == pytest.approx(1)


def test_a_uniform_guesser_scores_what_it_should(core_bundle):
    """20 seeds over the real bundle's own numbers of options: within 0.01 of -0.0007."""
    options = [
        collections.Counter(len(e.get("choices", e.get("context_options", ()))) for e in t.examples)
        for t in core_bundle.tasks
    ]
    scores = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        right = [int(sum(rng.binomial(n, 1 / k) for k, n in counts.items() if k)) for counts in options]
        tasks = [(t, answers(k, len(t.examples)), 0.0) for t, k in zip(core_bundle.tasks, right, strict=True)]
        scores.append(make_ledger("core", tasks, {}).metric)
    assert sum(scores) / 20 == pytest.approx(-0.0007, abs=0.003)
    assert all(abs(score + 0.0007) < 0.03 for score in scores)


def test_errors_are_binomial_and_shares_add_up():
    tasks = [Task("a", "multiple_choice", 0, " ", 0.5, "f", ()), Task("b", "language_modeling", 3, " ", 0.0, "f", ())]
    book = make_ledger("smoke_score", [(tasks[0], answers(30, 40), 2.0), (tasks[1], answers(0, 10), 3.0)], {"cap": 40})
    a, b = book.tasks
    assert (a.n, a.accuracy, a.centered, a.seconds, b.shots, b.centered) == (40, 0.75, 0.5, 2.0, 3, 0.0)
    assert a.se == pytest.approx(2 * math.sqrt(0.75 * 0.25 / 40)) and b.se == 0
    assert (a.error_share, b.error_share) == (1.0, 0.0)
    assert book.metric == 0.25 and book.se == pytest.approx(a.se / 2) and book.cap == 40


def test_answers_and_ledger_come_back_as_they_were_sealed(tmp_path):
    given = [
        Answer(3, 1, 1, True, 0.25),
        Answer(1, 0, 1, False, -1.5),
        Answer(2, 0, 0, True, None),
        Answer(9, None, None, False, -0.125),
    ]
    ledger.seal_answers(tmp_path, "t", {"weights": "w"}, given, 1.5)
    assert ledger.sealed_answers(tmp_path, "t", {"weights": "w"}, Reporter()) == (given, 1.5)
    assert ledger.sealed_answers(tmp_path, "t", {"weights": "other"}, Reporter()) is None
    assert ledger.sealed_answers(tmp_path, "u", {"weights": "w"}, Reporter()) is None
    book = make_ledger(
        "smoke_score", [(Task("t", "schema", 0, " ", 0.5, "f", ()), given, 1.5)], {"cap": None, "weights": "w"}
    )
    ledger.seal_ledger(tmp_path, book)
    assert Ledger.open(tmp_path) == book


def test_damaged_answers_are_not_believed(tmp_path):
    ledger.seal_answers(tmp_path, "t", {}, answers(1, 2), 0.0)
    file = tmp_path / "t" / "answers.csv"
    file.write_bytes(file.read_bytes().replace(b"1,0,1,0", b"1,0,0,1"))
    assert ledger.sealed_answers(tmp_path, "t", {}, Reporter()) is None
    (aside,) = tmp_path.glob(".t.damaged-*")
    file = aside / "answers.csv"
    file.write_text("line,gold,chosen,right,margin\n1,0,zero,1,\n")
    with pytest.raises(DataError, match="answer 1 cannot be read"):
        ledger.read_answers(file)


def test_reading_a_ledger_and_a_bundle_needs_no_torch():
    modules = ", ".join(f"job.evaluation.{name}" for name in ("ledger", "bundle", "prompts", "smoke_bundle"))
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
