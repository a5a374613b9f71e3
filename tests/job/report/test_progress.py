"""What the page says while a run lives, and what it gives to paste when it is done."""

from __future__ import annotations

import dataclasses
from decimal import Decimal

import pytest

from job.plan import money
from job.plan.money import Stage
from job.plan.published_runs import RUNS
from job.recipe.config import from_document, resolve
from job.report import gpt2
from job.report.progress import figures, line_parts, progress_sentence, utilization, warnings
from job.report.receipt import receipt
from job.report.render import report_files
from job.report.words import to_paste
from job.store.attempt import Attempt, Life, Record, fold
from job.store.documents import recipe_of

TASKS = tuple((name, "schema", 0, 0.0, 30, 100) for name in gpt2.ACCURACY)


def test_progress_has_step_loss_speed_and_time_left(run) -> None:
    attempt = run.start()
    assert progress_sentence(figures(from_document(recipe_of(run.path)), fold(run.path))) == ""
    run.prepare(attempt)
    run.pretrain(attempt, last=50)
    text = report_files(run.path)[1]["report.html"]
    assert (
        "Step 50 of 200 (25 %), loss 5.115, 16,384 tokens a second; at this pace 1 min 15 s of steps are left." in text
    )
    run.pretrain(attempt, first=50)
    assert "at this pace" not in report_files(run.path)[1]["report.html"]


def test_the_line_and_the_page_have_one_source_of_dollars_and_forecast(run) -> None:
    """36 dollars an hour are a cent a second: 10 s of boot, 20 of preparing, 25 of 50 steps; 75 s of steps are left,
    and of the quote three quarters of the checkpoints' minute, and the score's minutes."""
    attempt = Attempt.claim(run.path)
    attempt.emit("attempt.started", price={"hour": 36.0, "source": "a test"}, boot={"id": "b", "up_s": 10.0})
    stages = [Stage(money.CHECKPOINTS, 1.0, 1.0, ""), Stage(money.SCORE, 1.0, 2.0, "")]
    attempt.emit("quote", stages=[dataclasses.asdict(stage) for stage in stages], price={"hour": 36.0})
    run.prepare(attempt)
    run.pretrain(attempt, last=50)
    found = figures(from_document(recipe_of(run.path)), fold(run.path))
    assert found and (found.usd, found.forecast) == (Decimal("0.55"), Decimal("0.55") + Decimal("2.40"))
    assert progress_sentence(found).endswith("$0.55 are spent of $2.95 that the run will cost at this pace.")
    assert progress_sentence(found) in report_files(run.path)[1]["report.html"]
    bill = receipt(run.path)
    assert bill and bill["rows"][0]["why"] == "1 attempt"
    smoothed = found.loss
    assert smoothed and run.loss_at(49) < smoothed < run.loss_at(20)
    assert line_parts(found) == [
        *("step 50/200, 1 min 15 s left", f"loss {smoothed:.3f}", "bpb 2.469", "16.4 k tok/s", "$0.55 of $2.95")
    ]


@pytest.mark.parametrize(
    ("lines", "said"), [(1, "1 line of the event files was cut"), (2, "2 lines of the event files were")]
)
def test_lines_that_cannot_be_used_are_counted(run, lines: int, said: str) -> None:
    run.start().close()
    with (run.path / "events" / "1.jsonl").open("a") as file:
        file.write("{torn\n" * lines)
    assert [text.startswith(said) for text in warnings(fold(run.path))] == [True]


def test_the_page_leads_to_its_receipt_where_a_price_is_known(run) -> None:
    link = '<a href="receipt.json">'
    run.start().close()
    assert link not in report_files(run.path)[1]["report.html"]
    Attempt.claim(run.path).emit("attempt.started", argv=[], price={"hour": 24.0, "source": "--price"})
    files = report_files(run.path)[1]
    assert link in files["report.html"] and "receipt.json" in files


def test_utilization_by_both_conventions() -> None:
    """Run 6 by its published seconds: 59 % by the leaderboard's count, of which attention is overcounted by a third."""
    run6 = next(run for run in RUNS if run.name == "Run 6")
    train, gpus = {"attempt": 1, "device": "cuda", "world_size": 8}, ["NVIDIA H100 80GB HBM3"] * 8

    def on(provenance: dict | None) -> Record:
        return Record([Life(1, 0.0, 0.0, {"provenance": provenance}, again=False)], train=train)

    causal, counted = utilization(resolve("run6"), on({"gpus": gpus}), run6.batch_tokens / run6.step_seconds)
    assert counted == pytest.approx(4775225616 * run6.batch_tokens / run6.step_seconds / (8 * 989e12))
    attention = 12 * 1536 * (18 * 512 + 6 * 2048)
    assert (counted - causal) / counted == pytest.approx((1 - 0.68) * attention / 4775225616, rel=0.1)
    assert utilization(resolve("run6"), on({"gpus": ["GeForce"]}), 1.0) is None
    assert utilization(resolve("run6"), on(None), 1.0) is None


def test_warnings_are_shown_once_and_escaped(run) -> None:
    first = run.start()
    first.emit("attempt.ended", exit_code=14, reason="no <memory>")
    second = run.start()
    for text in ("<b>old</b>", "slow disk", "<b>old</b>"):
        second.emit("warning", text=text)
    assert warnings(fold(run.path)) == ["Attempt 1 ended with exit 14: no <memory>", "<b>old</b>", "slow disk"]
    page = report_files(run.path)[1]["report.html"]
    assert page.count("&lt;b&gt;old&lt;/b&gt;") == 1 and "<b>old" not in page and "no &lt;memory&gt;" in page


def test_a_full_core_has_gpt2_beside_it_and_something_to_paste(make_run) -> None:
    run = make_run(tasks=TASKS, steps=20)
    attempt = run.start()
    run.prepare(attempt)
    run.pretrain(attempt)
    run.evaluate(attempt, core=True)
    result, files = report_files(run.path)
    assert "four sizes" in files["report.html"] and "To paste" in files["report.html"]
    pasted = to_paste(result)
    assert pasted["row"].startswith("|  | 0.00 | 1.70000 | 0.3000 | smoke | 12ab34 |")
    assert "CORE 0.3000 ± 0.0098" in pasted["paragraph"] and "One run shows no recipe better" in pasted["paragraph"]
    assert "beats" not in files["report.html"] and len(files["report.html"]) < 2e6
    assert to_paste(result | {"core": result["core"] | {"cap": 20}}) is None
    assert to_paste(result | {"core": None, "smoke_score": result["core"]}) is None


def test_other_tasks_are_not_put_beside_gpt2(run) -> None:
    page = report_files(run.whole().path)[1]["report.html"]
    assert "four sizes" not in page and "To paste" not in page
