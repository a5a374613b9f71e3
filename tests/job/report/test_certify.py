"""The verdict: statistics as SciPy's own tests give them, words that one run cannot earn, refusals, the leaderboard."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from job.cli.commands import main
from job.evaluation.bundle import Task
from job.evaluation.ledger import Answer, Ledger, make_ledger, seal_ledger, sealed_ledgers
from job.plan.published_runs import chance_of_passing, runs_needed
from job.recipe.leaderboard import GPT2_XL_CORE
from job.report import gpt2
from job.report.certify import MOST_RUNS, judge, shown_sentence
from job.report.result import build_result
from job.store.documents import hashed
from job.store.sealed import sealing

RUN_4 = [0.25373, 0.2584, 0.25489, 0.2568, 0.25732, 0.26765, 0.25119]
PUBLISHED = [RUN_4, [0.2729, 0.2626], [0.2571, 0.2472, 0.2406]]
TASKS = (("copa", "multiple_choice", 0, 0.5, 60, 100), ("squad", "language_modeling", 10, 0.0, 30, 100))


@pytest.mark.parametrize("cores", PUBLISHED, ids=len)
def test_published_runs_as_scipy_tests_them(cores: list[float]) -> None:
    verdict = judge(cores)
    assert verdict.p == pytest.approx(stats.ttest_1samp(cores, GPT2_XL_CORE, alternative="greater").pvalue, rel=1e-12)
    interval = stats.ttest_1samp(cores, GPT2_XL_CORE).confidence_interval(0.95)
    assert verdict.interval == pytest.approx(tuple(interval), rel=1e-12)
    assert (verdict.law, verdict.shown) == ("t", "not shown")


def test_a_known_sd_and_a_single_run() -> None:
    known, single = judge(RUN_4, sd=0.0057), judge([0.2690], se=0.0065)
    z = (np.mean(RUN_4) - GPT2_XL_CORE) / (0.0057 / math.sqrt(7))
    assert known.p == pytest.approx(0.5 * math.erfc(z / math.sqrt(2)), rel=1e-12)
    assert single.interval == pytest.approx((0.2690 - 1.959964 * 0.0065, 0.2690 + 1.959964 * 0.0065), rel=1e-6)
    assert single.p == pytest.approx(0.5 * math.erfc((0.2690 - GPT2_XL_CORE) / 0.0065 / math.sqrt(2)), rel=1e-12)


def test_published_power() -> None:
    assert [round(chance_of_passing(core, 0.0057), 2) for core in (0.2571, 0.2626, 0.2690)] == [0.54, 0.86, 0.99]
    assert [runs_needed(GPT2_XL_CORE + margin, 0.0057) for margin in (0.006, 0.0125)] == [9, 5]
    assert runs_needed(GPT2_XL_CORE + 0.002, 0.0057) == pytest.approx(50, abs=3)
    for core in (GPT2_XL_CORE, GPT2_XL_CORE + 1e-7):
        assert runs_needed(core, 0.0057, most=MOST_RUNS) is None
    assert runs_needed(GPT2_XL_CORE + 0.006, 0.0057, known=True) == math.ceil((2.3263479 * 0.0057 / 0.006) ** 2)


def test_beats_is_said_from_that_many_runs_on() -> None:
    for number in (8, 9):  # of sd 0.0057 and mean 0.006 above
        around = [(-1) ** i for i in range(number)] if number % 2 == 0 else [*[1, -1] * (number // 2), 0]
        scale = 0.0057 / np.std(around, ddof=1)
        verdict = judge([GPT2_XL_CORE + 0.006 + scale * step for step in around])
        assert (verdict.shown == "beats") == (number == 9) and verdict.needed == 9


@settings(deadline=None, max_examples=30)
@given(core=st.floats(-0.99, 1), sd=st.none() | st.floats(1e-6, 1), cap=st.none() | st.integers(1, 5000))
def test_one_run_and_capped_runs_never_beat(core: float, sd: float | None, cap: int | None) -> None:
    verdicts = [judge([core], sd=sd, se=1e-6, cap=cap), judge([core, core - 1e-3], sd=sd, cap=cap or 1)]
    assert [verdict.shown for verdict in verdicts] == [verdicts[0].shown, "not shown"]
    assert verdicts[0].shown != "beats"
    sentence = shown_sentence({"runs": [core], "cap": cap, **dataclasses.asdict(verdicts[0])})
    assert "beats" not in sentence.replace("cannot show that its recipe beats", "")


@pytest.mark.slow
def test_the_interval_covers_the_truth_as_often_as_it_says(core_tasks: list[tuple[str, int, float, float]]) -> None:
    """2000 CORE tables (1,000 items a task) of a model with GPT-2 XL's accuracies; 2000 sets of seven runs."""
    generator, right, wrong = np.random.default_rng(23), Answer(1, 0, 0, True, 0.0), Answer(1, 0, 0, False, 0.0)
    truth = sum((accuracy - base) / (1 - base) for _, _, base, accuracy in core_tasks) / len(core_tasks)
    tasks = [(Task(name, "schema", 0, " ", base, "f", ()), min(n, 1000), a) for name, n, base, a in core_tasks]
    drawn = [generator.binomial(n, accuracy, 2000).tolist() for _, n, accuracy in tasks]
    covered = 0
    for numbers in zip(*drawn, strict=True):
        answered = [(t, [right] * k + [wrong] * (n - k), 0.0) for (t, n, _), k in zip(tasks, numbers, strict=True)]
        ledger = make_ledger("core", answered, {"cap": None})
        low, high = judge([ledger.metric], se=ledger.se).interval
        covered += low <= truth <= high
    assert 0.93 <= covered / 2000 <= 0.97
    intervals = [judge(cores).interval for cores in generator.normal(0.26, 0.0057, (2000, 7)).tolist()]
    assert 0.93 <= np.mean([low <= 0.26 <= high for low, high in intervals]) <= 0.97


@pytest.fixture
def core_tasks() -> list[tuple[str, int, float, float]]:
    """(task, items, baseline, GPT-2 XL's published accuracy), as the bundle has them."""
    items = (10042, 2117, 20321, 2376, 1172, 100, 1221, 1838, 500, 5153, 10042, 273, 1267, 1000, 230, 1320, 210, 32,
             10570, 7983, 3270, 10000)  # fmt: skip
    quarter, half = dict.fromkeys((0, 3, 4, 8, 10), 0.25), dict.fromkeys((5, 7, 11, 12), 0.5)
    base = quarter | half | {6: 0.2, 14: 0.2, 20: 0.62, 21: 0.091}
    return [(name, items[i], base.get(i, 0.0), a[-1]) for i, (name, a) in enumerate(gpt2.ACCURACY.items())]


def test_gpt2s_accuracies_give_its_published_core(core_tasks: list[tuple[str, int, float, float]]) -> None:
    rows = [[(a - base) / (1 - base) for a in gpt2.ACCURACY[name]] for name, _, base, _ in core_tasks]
    published = [0.113891, 0.184904, 0.214641, GPT2_XL_CORE]
    assert [sum(column) / 22 for column in zip(*rows, strict=True)] == pytest.approx(published, abs=1e-6)


# --- runs


@pytest.fixture
def scored(make_run) -> Callable[..., Any]:
    """scored(run_id, right answers of copa, ..., keys of the recipe) -> a run with CORE (or a smoke score)."""

    def make(run_id: str, right: int = 60, *, core: bool = True, cap: int | None = None, keys: Any = (), **made_from):
        run = make_run(run_id=run_id, steps=3, tasks=((*TASKS[0][:4], right, 100), TASKS[1]))
        if keys:
            document = json.loads((run.path / "recipe.json").read_text())
            document["recipe"]["train"] |= dict(keys)
            (run.path / "recipe.json").write_text(json.dumps(hashed(document)))
        attempt = run.start()
        run.prepare(attempt)
        run.pretrain(attempt)
        run.evaluate(attempt, core=core, cap=cap, **made_from)
        attempt.close()
        return run

    return make


def speedrun(*words: str) -> Result:
    return CliRunner().invoke(main, words, catch_exceptions=False)


def test_runs_are_certified_and_printed_as_json(scored, tmp_path: Path) -> None:
    for name, right in (("a", 60), ("b", 64), ("c", 66)):
        scored(name, right, keys={"seed": right})
    cores = [((right / 100 - 0.5) / 0.5 + 0.3) / 2 for right in (60, 64, 66)]
    document = json.loads(speedrun("certify", "a", "b", "c", "--out", str(tmp_path), "--json").stdout)
    assert [run["core"] for run in document["runs"]] == pytest.approx(cores)
    assert document["p"] == pytest.approx(stats.ttest_1samp(cores, GPT2_XL_CORE, alternative="greater").pvalue)
    assert document["passed"] == 2 and document["bpb"]["mean"] == 1.7 and document["bpb"]["published"] is None
    text = speedrun("certify", "a", "b", "c", "--out", str(tmp_path)).stdout
    assert text.splitlines()[:2] == document["sentences"]
    assert "2 of 3 runs pass" in text and "Not shown whether this recipe beats" in text and "1.70000" in text
    single = speedrun("certify", "a", "--out", str(tmp_path)).stdout
    assert "one run cannot show" in single and "item sampling alone" in single


def test_the_results_show_what_certify_says() -> None:
    results = (Path(__file__).parents[3] / "docs" / "results.md").read_text(encoding="utf-8")
    words = re.search(r"`speedrun (certify [^`]+)`", results)
    assert words and speedrun(*words[1].split()).stdout.splitlines()[1] in results


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ({"cap": 500}, "cap: None and 500"),
        ({"bundle": "d0d0"}, "bundle: c0c0c0c0c0c0c0c0 and d0d0"),
        ({"scorer": 2}, "scorer: None and 2"),
        ({"core": False}, "a smoke score, which is not CORE"),
        ({"right": 60}, "the same answers"),
        ({"keys": {"warmup_steps": 7}}, "different recipes (train.warmup_steps"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_runs_that_do_not_belong_together_are_refused(scored, tmp_path: Path, second: dict, says: str) -> None:
    scored("a")
    scored("b", **{"right": 64} | second)
    ended = speedrun("certify", "a", "b", "--out", str(tmp_path))
    assert ended.exit_code == 2 and says in ended.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "say what is certified"),
        (["a", "--core", "0.2"], "say what is certified"),
        (["--core", "nan"], "a number between -1 and 1"),
        (["--core", "26.5"], "a number between -1 and 1"),
        (["--core", "0.26", "--core", "0.26"], "all figures are equal"),
        (["--core", "0.26", "--sd", "0"], "a standard deviation is above 0"),
        (["a", "a"], "named twice"),
        (["--core", "0.26", "--page", "x.html"], "--page is for --table"),
        (["--table", "nowhere"], "is no folder"),
    ],
    ids=" ".join,
)
def test_bad_words_are_refused(words: list[str], says: str) -> None:
    ended = speedrun("certify", *words)
    assert ended.exit_code == 2 and says in ended.stderr


def test_other_baselines_are_refused(scored, tmp_path: Path, make_run) -> None:
    scored("a")
    other = make_run(run_id="b", steps=3, tasks=((*TASKS[0][:3], 0.4, 60, 100), TASKS[1]))
    other.evaluate(other.start(), core=True)
    ended = speedrun("certify", "a", "b", "--out", str(tmp_path))
    assert ended.exit_code == 2 and "other tasks or baselines" in ended.stderr


def test_a_core_that_is_no_number_is_an_error(scored, tmp_path: Path) -> None:
    run = scored("a")
    (folder,) = sealed_ledgers(run.path / "eval")
    ledger = Ledger.open(folder)
    shutil.rmtree(folder / "ledger")
    seal_ledger(folder, dataclasses.replace(ledger, metric=math.nan))
    ended = speedrun("certify", "a", "--out", str(tmp_path))
    assert ended.exit_code == 11 and "is not a number" in ended.stderr


def test_a_half_written_event_changes_nothing(scored, tmp_path: Path) -> None:
    run = scored("a")
    before = speedrun("certify", "a", "--out", str(tmp_path)).stdout
    with open(run.path / "events" / "1.jsonl", "a") as file:
        file.write('{"t": 1, "kind": "train.st')
    assert speedrun("certify", "a", "--out", str(tmp_path)).stdout == before


# --- the leaderboard


EVIL = "<script>alert('x')</script>|`"


def reseal(report: Path, change: Callable[[dict], None], *, again: bool = True) -> None:
    """Change result.json; `again`: and its manifest, as a forger would."""
    result = json.loads((report / "result.json").read_text())
    change(result)
    data = json.dumps(result).encode()
    (report / "result.json").write_bytes(data)
    if again:
        manifest = json.loads((report / "manifest.json").read_text())
        manifest["files"]["result.json"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (report / "manifest.json").write_text(json.dumps(hashed(manifest)))


def test_the_table_has_what_can_be_believed(scored, tmp_path: Path) -> None:
    runs = {}
    for number, name in enumerate(("good", "forged", "nan", "smoke", "capped", "unsealed", "edited", "odd", "other")):
        scoring: dict[str, Any] = {"smoke": {"core": False}, "capped": {"cap": 20}}.get(name, {})
        runs[name] = scored(name, 60 + number, **scoring)
        with sealing(runs[name].path / "report", kind="report", made_from={}) as folder:
            (folder.path / "result.json").write_text(json.dumps(build_result(runs[name].path)))
    reports = {name: run.path / "report" for name, run in runs.items()}
    reseal(reports["forged"], lambda result: result["core"].update(metric=0.3))
    reseal(reports["nan"], lambda result: result.update(val_bpb=math.nan))
    reseal(reports["edited"], lambda result: result.update(val_bpb=0.5), again=False)
    reseal(reports["odd"], lambda result: result.update(run_id=EVIL))
    reseal(reports["other"], lambda result: result["hashes"].update(recipe="0" * 64))
    (reports["unsealed"] / "manifest.json").unlink()
    copied = tmp_path / "copy" / "report"
    copied.mkdir(parents=True)
    for file in reports["good"].iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    page = tmp_path / "page" / "table.html"
    document = json.loads(speedrun("certify", "--table", str(tmp_path), "--json", "--page", str(page)).stdout)
    measured = {row["run"]: row for row in document["rows"] if row["evidence"] == "measured"}
    assert set(measured) == {"good", EVIL} and len(document["rows"]) == 11
    assert measured["good"]["of"].startswith("preset smoke, in ")
    assert measured["good"]["core"] == pytest.approx(0.25) and not measured["good"]["passes"]
    assert [row["passes"] for row in document["rows"]] == [True] * 10 + [False]
    why = {Path(entry["file"]).parts[-3]: entry["why"] for entry in document["left_out"]}
    expected = {
        "forged": "not the mean of its own tasks", "nan": "NaN is no number", "smoke": "which is not CORE",
        "capped": "capped at 20 items", "unsealed": "not sealed", "edited": "SHA-256 differs",
        "other": "recipe beside it", "runs": "same answers",
    }  # fmt: skip
    found = {name: next((said for said in why.values() if text in said), None) for name, text in expected.items()}
    assert None not in found.values() and len(document["left_out"]) == len(expected), document["left_out"]
    html = page.read_text()
    assert "<script" not in html and "&lt;script&gt;" in html
    text = speedrun("certify", "--table", str(tmp_path)).stdout
    assert text.count("| published |") == 9 and text.count("| measured |") == 2 and "Left out:" in text


def test_a_damaged_entry_is_left_out_and_the_others_are_shown(scored, tmp_path: Path) -> None:
    damages: dict[str, Callable[[Path], object]] = {
        "recipe": lambda run: (run / "recipe.json").write_text('{"recipe'),
        "ledger": lambda run: next(run.glob("eval/*/ledger/ledger.json")).write_text('{"metric": nul'),
        "baseline": lambda run: reseal(run / "report", lambda result: result["core"]["baselines"].popitem()),
        "evaluations": lambda run: reseal(run / "report", lambda result: result.update(evaluations=[])),
        "whole": lambda run: None,
    }
    for number, (name, damage) in enumerate(damages.items()):
        run = scored(name, 60 + number).path
        with sealing(run / "report", kind="report", made_from={}) as folder:
            (folder.path / "result.json").write_text(json.dumps(build_result(run)))
        damage(run)
    document = json.loads(speedrun("certify", "--table", str(tmp_path), "--json").stdout)
    assert [row["run"] for row in document["rows"] if row["evidence"] == "measured"] == ["whole"]
    why = {Path(entry["file"]).parts[-3]: entry["why"] for entry in document["left_out"]}
    assert "the recipe beside it cannot be read" in why["recipe"] and "ledger beside it cannot be read" in why["ledger"]
    assert "has no baseline of its task" in why["baseline"] and "none of its evaluations" in why["evaluations"]


@pytest.mark.parametrize("cap", [1, None])
def test_a_run_whose_items_show_no_error_is_refused(make_run, tmp_path: Path, cap: int | None) -> None:
    run = make_run(run_id="a", steps=3, tasks=((*TASKS[0][:4], 1, 1), (*TASKS[1][:4], 0, 1)))
    run.evaluate(run.start(), core=True, cap=cap)
    ended = speedrun("certify", "a", "--out", str(tmp_path))
    assert ended.exit_code == 2 and "every task has all items right or all wrong" in ended.stderr
