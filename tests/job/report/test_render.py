"""The report's three files: sealed, self-contained, escaped, and sensible whatever is missing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from job.evaluation.ledger import newest
from job.report.figures import step_figures
from job.report.render import write_report
from job.report.result import build_result
from job.report.words import short, summary_lines
from job.store.attempt import fold
from job.store.documents import hashed
from job.store.sealed import open_sealed

EVIL = "<script>alert('x')</script> & | `tick` \x1b[31m"


class Page(HTMLParser):
    """The elements, their attributes, and the text of a page; checks that elements nest."""

    VOID = frozenset({"meta", "link", "br", "wbr"})

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def page_of(run) -> Page:
    write_report(run.path)
    return Page(run.path / "report" / "report.html")


def plots(page: Page) -> list[str]:
    return [svg["aria-label"] for svg in page.all("svg")]


def test_the_folder_is_sealed_and_holds_the_result(run):
    result = write_report(run.whole().path)
    sealed = open_sealed(run.path / "report", kind="report")
    assert sorted(sealed.files) == ["report.html", "report.md", "result.json"]
    assert json.loads((sealed.path / "result.json").read_text()) == result == build_result(run.path)
    assert set(sealed.made_from["files"]) == {
        "recipe.json",
        "events/1.jsonl",
        "eval/bpb/manifest.json",
        f"eval/{newest(run.path / 'eval').name}/ledger/manifest.json",
    }


def test_equal_runs_give_equal_bytes(run):
    run.whole()
    write_report(run.path)
    before = {file.name: file.read_bytes() for file in (run.path / "report").iterdir()}
    write_report(run.path)
    assert {file.name: file.read_bytes() for file in (run.path / "report").iterdir()} == before


def test_the_page_asks_for_nothing_outside_itself(run):
    page = page_of(run.whole())
    assert not page.all("script") and not page.all("iframe") and not page.all("img")
    links = [attrs["href"] for attrs in page.all("a")]
    assert links == ["result.json", "report.md", "../checkpoints/000000000006400/"], "beside it, and only when asked to"
    assert all((run.path / "report" / link).exists() for link in links)
    for tag, attrs in page.tags:
        if tag == "a":
            continue
        assert not any(name.startswith("on") for name in attrs)
        for name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            assert (attrs.get(name) or "#").startswith(("#", "data:")), (tag, attrs)
    source = (run.path / "report" / "report.html").read_text()
    assert "http" not in source.replace("http-equiv", "")
    assert "@import" not in source and "url(" not in source.replace("url(#", "")


def test_ids_are_unique_and_every_reference_has_one(run, clock):
    run.start().close()
    page = page_of(run.whole())
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    references = [attrs["href"] for attrs in page.all("use")] + [
        attrs["aria-labelledby"] for attrs in page.all("section")
    ]
    clips = [attrs["clip-path"][len("url(") : -1] for _, attrs in page.tags if "clip-path" in attrs]
    assert references and clips
    assert {reference.lstrip("#") for reference in references + clips} <= set(ids)


def test_the_page_shows_what_was_measured(run):
    page = page_of(run.whole())
    assert page.all("h1") and "The model has learned" in page.text
    assert "24 % below the 2.250 of a bigram model" in page.text
    assert "It is not CORE" in page.text
    bpb, loss, rate, speed = plots(page)
    assert rate == "Learning rate: 1.000 at step 1, 1.000 at step 200"
    assert speed == "Speed: 16,384 at step 1, 16,384 at step 200"
    assert "What each task asks</summary>" in (run.path / "report" / "report.html").read_text(), "no items are there"
    assert bpb == "Validation bits per byte, 2.469 at step 50, 1.700 at step 200; the bigram model is at 2.250"
    assert loss.startswith("Training loss in nats per token, 8.30 at first, 3.2")
    assert "args):\n    return 0" in page.text
    for word in (
        "word_choice",
        "50.0 %",
        "−0.200",
        "multiple choice",
        "train",
        "-o",
        "feedc0de",
        "Imaginary CPU",
        "8 x NVIDIA H100",
        "12ab34",
    ):
        assert word in page.text


def test_documents_shared_with_the_tasks_show_a_line_each(run):
    attempt = run.start()
    page = page_of(run)
    assert "shared with the tasks" not in page.text
    by_task = {"copa": 0, "squad": 1234}
    attempt.emit("prepare.leaks", bundle="b0b0", words=13, documents=50_000, shared=1234, by_task=by_task)
    page, text = page_of(run), (run.path / "report" / "report.md").read_text()
    for shown in (page.text, text):
        assert "1,234 of 50,000 training documents hold 13 words in a row" in shown
    assert "| `copa` | 0 |\n| `squad` | 1,234 |\n\n## Time" in text and "squad1,234" in page.text


def test_plots_follow_the_theme(run):
    source = page_of(run.whole()) and (run.path / "report" / "report.html").read_text()
    svg = source[source.index("<svg") :]
    assert "var(--accent)" in svg and "var(--reference)" in svg and "font-family" not in svg
    assert "prefers-color-scheme: dark" in source


def test_both_pages_say_what_published_run_is_nearest(run):
    run.whole()
    page, text = page_of(run), (run.path / "report" / "report.md").read_text()
    for shown in (page.text, text):
        assert "It repeats no published run; from the nearest, Run " in shown
    assert "\n\n\n" not in text[: text.index("## Tasks")]


@pytest.mark.parametrize("file", ["report.html", "report.md"])
def test_what_people_and_models_wrote_is_escaped(run, file):
    document = json.loads((run.path / "recipe.json").read_text())
    document["recipe"]["data"]["paths"] = [EVIL]
    document["sources"]["data.paths"] = "--data"
    (run.path / "recipe.json").write_text(json.dumps(hashed(document)))
    attempt = run.start()
    run.pretrain(attempt, 0, 3)
    attempt.emit("sample", prompt=EVIL, text=EVIL)
    write_report(run.path)
    text = (run.path / "report" / file).read_text()
    if file.endswith("html"):
        page = Page(run.path / "report" / file)
        assert "<script" not in text and page.text.count("<script>alert('x')</script>") >= 3
    else:
        row = next(line for line in text.splitlines() if line.startswith("| `data.paths`"))
        assert "| ``<script>alert('x')</script> & \\| `tick` " in row
        sample = "```\n<script>alert('x')</script> & | `tick` \N{SYMBOL FOR ESCAPE}[31m\n```"
        assert (
            f"## Samples\n\nBeginnings of held-out documents, and below each how the model goes on.\n\n{sample}" in text
        )


def test_a_core_score_is_called_core_and_beats_nothing(run):
    attempt = run.start()
    run.pretrain(attempt)
    run.evaluate(attempt, core=True, cap=20)
    page = page_of(run)
    markdown = (run.path / "report" / "report.md").read_text()
    for text in (page.text, markdown):
        assert (
            "CORE is 0.0944 ± " in text
            and "at most 20 items each" in text
            and "0.256525 is published for GPT-2 XL" in text
        )
        assert "smoke score" not in text.lower() and "beats" not in text


def test_a_smoke_score_is_never_called_core(run):
    result = write_report(run.whole().path)
    markdown = (run.path / "report" / "report.md").read_text()
    assert "**smoke score**" in markdown and "**CORE**" not in markdown
    assert [line for line in summary_lines(result, Path("p")) if "CORE" in line] == []


def test_before_the_first_attempt(run):
    page = page_of(run)
    assert "Not trained yet" in page.text and "0 of 200 steps" in page.text and not plots(page)
    markdown = (run.path / "report" / "report.md").read_text()
    assert "speedrun run --preset smoke -o train.steps=200 --out" in markdown


def test_a_single_step(make_run):
    run = make_run(steps=1)
    run.pretrain(run.start())
    page = page_of(run)
    assert "Trained, but not evaluated yet" in page.text and "there are no others yet" in page.text
    assert len(plots(page)) == 1


def test_nothing_but_nan(make_run):
    run = make_run(loss_at=lambda step: math.nan, bpb_at=lambda step: math.nan)
    run.pretrain(run.start(), 0, 60)
    page = page_of(run)
    assert "Training diverged" in page.text and "not a finite number" in page.text
    assert not [label for label in plots(page) if label.startswith(("Validation", "Training"))]
    assert " nan" not in page.text.lower()


def test_nan_after_good_steps_keeps_the_good_part_of_the_curve(make_run):
    run = make_run(loss_at=lambda step: math.nan if step >= 30 else 8.0 - step / 10)
    run.pretrain(run.start(), 0, 40)
    loss, *_ = plots(page_of(run))
    assert loss == "Training loss in nats per token, 8.00 at first, 5.10 at step 30"


def test_tasks_show_before_the_score_does(run):
    attempt = run.start()
    run.pretrain(attempt)
    answers = {"n": 20, "shots": 3, "accuracy": 0.5, "baseline": 0.25, "centered": 1 / 3, "seconds": 1.0}
    attempt.emit("eval.task", task="word_choice", type="multiple_choice", **answers)
    page = page_of(run)
    assert "Scored so far" in page.text and "word_choice" in page.text and "was not scored on tasks yet" in page.text


def test_attempts_have_a_time_axis_from_the_second_on(run, clock):
    first = run.start()
    run.prepare(first)
    run.pretrain(first, 0, 80)
    first.close()
    clock.pass_(60.0)
    second = run.start()
    run.pretrain(second, 50, 90)
    second.emit("attempt.ended", exit_code=75, reason="interrupted")
    assert plots(page_of(run))[-1] == "attempt 1: no end seen; attempt 2: exit 75"


def test_the_page_of_12000_steps_is_below_2_mb_and_shows_all_that_a_step_measured(make_run):
    """Eight ranks, all curves; the events are written as earlier versions did, which is quicker."""
    run = make_run(steps=12_000)
    attempt = run.start()
    run.pretrain(attempt, 0, 1)
    attempt.close()
    of_all = {"attempt": 1, "t": run.clock.now, "lr_mult": 0.5, "tokens": 8192}
    lines = []
    for step in range(1, 12_000):
        seen = {"seq": 9 + 3 * step, "step": step, "rows": 32 * (step + 1)} | of_all
        loss = math.sin(step)
        lines.append(seen | {"kind": "train.step", "loss": 3 + loss, "ms": 500 + loss, "grad_norm": 1 + loss / 2})
        if step % 50 == 49:
            ranks = [400.0 + rank + 9 * (rank == 3) for rank in range(8)]
            lines.append(seen | {"kind": "train.ranks", "seq": seen["seq"] + 1, "steps": 50, "ms": ranks})
            lines.append(seen | {"kind": "train.val", "seq": seen["seq"] + 2, "bpb": 1 + 99 / step})
    with (run.path / "events" / "1.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    page = page_of(run)
    assert "means of 20 steps" in page.text
    assert [label.partition(":")[0] for label in plots(page)[2:]] == [
        "Learning rate",
        "Speed",
        "Gradient norm",
        "Step time by rank",
    ]
    assert plots(page)[-1].endswith("the slowest is rank 3 with 412.0 ms in the end")
    assert (run.path / "report" / "report.html").stat().st_size < 2_000_000


def test_speed_has_an_axis_of_mfu_where_the_peak_is_known(run):
    run.pretrain(run.start(), 0, 20)
    record = fold(run.path)
    (_, without), (_, share) = (step_figures(record, factor) for factor in (None, 0.5 / 16384))
    assert "50%" in share.svg and "MFU" in share.caption and "%" not in without.svg and "MFU" not in without.caption


def test_a_run_with_a_bucket_says_where_everything_is(run):
    attempt = run.start()
    attempt.emit("attempt.started", argv=[], bucket="s3://mine/gpt2")
    assert "everything, in the buckets3://mine/gpt2/runs/smoke" in page_of(run).text.replace("\n", "")


def test_continuing_repeats_what_was_asked_for(run):
    run.pretrain(run.start(), 0, 10)
    write_report(run.path)
    out = run.path.parent.parent
    markdown = (run.path / "report" / "report.md").read_text()
    assert f"`speedrun run --preset smoke -o train.steps=200 --out {out} --run-id smoke`" in markdown


def test_repeating_a_run_that_went_on_from_another_begins_there_again(run):
    document = json.loads((run.path / "recipe.json").read_text())
    document["from"] = {"run": "mine", "step": 100, "rows": 3200, "sha256": "f" * 64}
    (run.path / "recipe.json").write_text(json.dumps(hashed(document)))
    attempt = run.start()
    run.pretrain(attempt, first=100)
    run.evaluate(attempt)
    write_report(run.path)
    markdown = (run.path / "report" / "report.md").read_text()
    for steps, name in ((200, "smoke-again"), (400, "smoke-longer")):
        command = f"--preset smoke -o train.steps={steps} --from mine --at 100 --out {run.out} --run-id {name}`"
        assert command in markdown


def test_the_recipe_that_a_run_really_writes(run):
    from job.recipe.config import resolve
    from job.run.launch import recipe_document

    recipe = resolve(
        "smoke", {"data.source": ("--data", "local"), "data.paths": ("--data", ("my texts", "more"))}, ["train.seed=7"]
    )
    document = recipe_document(recipe, "smoke")
    (run.path / "recipe.json").write_text(json.dumps(document))
    run.pretrain(run.start(), 0, 10)
    page = page_of(run)
    assert short(document["derived"]["total_parameters"]["value"]) in page.text
    assert "learning_rates.matrices" in page.text and "preset smoke" in page.text
    assert "-o data.source=local -o 'data.paths=my texts,more' -o train.seed=7" in page.text


def test_summary_lines(run):
    result = build_result(run.whole().path)
    assert summary_lines(result, Path("out/runs/smoke/report/report.html")) == [
        "The model has learned.",
        "",
        "  validation bpb  1.700   (bigram model of the same tokens: 2.250)",
        "  smoke score     0.0944 ± 0.0923   (3 tasks, all items)",
        "  trained         1.64 M tokens in 200 of 200 steps, 44.5 TFLOP",
        "  time            2 min 30 s",
        "  of which        prepare 20 s, pretrain 1 min 40 s, evaluate 30 s",
        "  page            out/runs/smoke/report/report.html",
    ]
    on_gpu = result | {
        "machine": result["machine"] | {"device": "cuda:0"},
        "clocks": result["clocks"] | {"training_s": 18.9},
    }
    assert (
        summary_lines(on_gpu, Path("p"))[-1]
        == "  step            100 ms, 81,920 tokens a second (measured, by the training clock)"
    )


def test_neither_torch_nor_plots_are_needed_to_read_a_result():
    code = "import sys, job.report.render, job.report.result, job.report.words; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "matplotlib", "jinja2", "boto3"} & set(modules)


@pytest.mark.parametrize("file", ["report.html", "report.md"])
def test_slow_ranks_are_named_with_what_they_cost(run, file):
    """200 steps of 500 ms; in two windows of 50 the others wait 40 ms a step: 4 of 100 s; without what was undone."""
    attempt = run.start()
    run.pretrain(attempt, 0, 160)
    for step, rank in ((49, "3"), (99, "3"), (149, "5")):
        slow = {"steps": 50, "behind": {rank: 0.085}, "lost_ms": 40.0, "step_ms": 500.0}
        attempt.emit("train.slow_ranks", step=step, rows=(step + 1) * 32, **slow)
    attempt.close()
    again = run.start()
    run.pretrain(again, 120)
    write_report(run.path)
    text = Page(run.path / "report" / file).text if file.endswith("html") else (run.path / "report" / file).read_text()
    assert "Rank 3 was slower than the median rank in 2 comparisons of about 50 steps, by 8.5 % at most." in text
    assert "The other ranks waited 4 s for the slowest: 4.0 % of all steps' time." in text
    assert "Rank 5" not in text


def test_no_rank_is_named_where_none_was_slow(run):
    assert "slower than the median" not in page_of(run.whole()).text
