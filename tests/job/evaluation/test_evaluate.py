from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from job.errors import UsageError
from job.evaluation import score
from job.evaluation.bundle import open_bundle
from job.evaluation.ledger import Ledger, newest
from job.reporter import Reporter
from job.train.ranks import ProcessRanks

FROM = {"weights": "w", "tokenizer": "t", "dtype": "float32", "backend": "sdpa"}


class Recorder(Reporter):
    def __init__(self) -> None:
        self.events: list[tuple[str, dict]] = []
        self.done: list[tuple] = []

    def emit(self, kind, **fields):
        json.dumps(fields)
        self.events.append((kind, fields))

    def progress(self, stage, done, total, unit):
        self.done.append((stage, done, total, unit))


class Killed(BaseException):
    pass


def run(model, tokenizer, bundle, out, cap=None, reporter=None, made_from=FROM, **options) -> Ledger:
    forward = score.Forward(model)
    return score.evaluate(
        forward, tokenizer, bundle, out, cap=cap, reporter=reporter or Reporter(), made_from=made_from, **options
    )


def timeless(ledger: Ledger) -> dict:
    document = ledger.as_dict()
    for task in document["tasks"]:
        task["seconds"] = None
    return document


def test_a_bundle_is_scored_sealed_and_told(make_bundle, tmp_path, tiny_gpt, tokenizer):
    bundle = open_bundle(make_bundle())
    seen = Recorder()
    ledger = run(tiny_gpt, tokenizer, bundle, tmp_path / "eval", reporter=seen)
    folder = newest(tmp_path / "eval")
    assert Ledger.open(folder) == ledger and ledger.name == "smoke_score"
    assert ledger.made_from["bundle"] == bundle.id and ledger.made_from["dtype"] == "float32"
    assert [task.n for task in ledger.tasks] == [9, 7, 8]
    assert [kind for kind, _ in seen.events] == ["eval.task"] * 3 + ["eval.done"]
    assert seen.events[0][1].keys() == {"task", "type", "n", "shots", "accuracy", "baseline", "centered", "seconds"}
    assert seen.events[-1][1]["metric"] == ledger.metric and seen.events[-1][1]["name"] == "smoke_score"
    assert seen.done[-1] == ("evaluate", 24, 24, "items")
    lines = (folder / "who" / "answers.csv").read_text().splitlines()
    assert lines[0] == "line,gold,chosen,right,margin" and len(lines) == 8


def test_what_is_sealed_is_not_scored_again_and_a_kill_goes_on_where_it_fell(
    make_bundle, tmp_path, tiny_gpt, tokenizer
):
    bundle = open_bundle(make_bundle())
    whole = run(tiny_gpt, tokenizer, bundle, tmp_path / "whole")
    tasks: list[str] = []

    class KilledInTheLastTask(Recorder):
        def progress(self, stage, done, total, unit):
            if done > 9:
                raise Killed

    with pytest.raises(Killed):
        run(tiny_gpt, tokenizer, bundle, tmp_path / "eval", reporter=KilledInTheLastTask())
    assert sorted(p.name for p in newest(tmp_path / "whole").iterdir()) == ["ledger", "next", "pick", "who"]
    half = tmp_path / "eval" / newest(tmp_path / "whole").name
    assert sorted(p.name for p in half.iterdir()) == ["pick", "who"]

    original = score._score_task

    def counting(forward, task, *rest):
        tasks.append(task.label)
        return original(forward, task, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "_score_task", counting)
        resumed = run(tiny_gpt, tokenizer, bundle, tmp_path / "eval")
        assert tasks == ["next"]
        assert run(tiny_gpt, tokenizer, bundle, tmp_path / "eval") == resumed
        assert tasks == ["next"]
        run(tiny_gpt, tokenizer, bundle, tmp_path / "eval", made_from={**FROM, "weights": "others"})
        assert tasks == ["next", "pick", "who", "next"]
        run(tiny_gpt, tokenizer, bundle, tmp_path / "eval", made_from={**FROM, "weights": "others"}, cap=3)
        assert len(tasks) == 7
    assert timeless(resumed) == timeless(whole)


def test_the_cap_cuts_each_task_and_one_not_above_the_shots_leaves_nothing(make_bundle, tmp_path, tiny_gpt, tokenizer):
    bundle = open_bundle(make_bundle())
    ledger = run(tiny_gpt, tokenizer, bundle, tmp_path / "eval", cap=8)
    assert [task.n for task in ledger.tasks] == [8, 7, 8] and ledger.cap == 8
    with pytest.raises(UsageError):
        run(tiny_gpt, tokenizer, bundle, tmp_path / "nothing", cap=2)
    assert not (tmp_path / "nothing").exists()


def _rank(rank: int, size: int, store: str, bundle_path: str, out: str, model, tokenizer) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    ranks = ProcessRanks(Reporter())
    ledger = run(model, tokenizer, open_bundle(bundle_path), Path(out), token_budget=100 * size, ranks=ranks)
    torch.distributed.destroy_process_group()
    assert timeless(Ledger.open(newest(Path(out)))) == timeless(ledger)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_any_number_of_ranks_and_any_budget_give_the_same_ledger(make_bundle, tmp_path, tiny_gpt, tokenizer, size):
    folder = make_bundle()
    alone = run(tiny_gpt, tokenizer, open_bundle(folder), tmp_path / "alone")
    arguments = (size, str(tmp_path / "store"), str(folder), str(tmp_path / "many"), tiny_gpt, tokenizer)
    torch.multiprocessing.spawn(_rank, arguments, nprocs=size)
    assert timeless(Ledger.open(newest(tmp_path / "many"))) == timeless(alone)
    for label in ("pick", "who", "next"):
        many, one = (newest(tmp_path / name) / label / "answers.csv" for name in ("many", "alone"))
        assert many.read_bytes() == one.read_bytes()


def test_cudnn_plans_no_attention_while_tasks_are_scored(make_bundle, tmp_path, tiny_gpt, tokenizer):
    """The switch is torch's own and exists on a CPU too; a foreign model (--hf) is scored by the same function."""
    seen = []

    class Asking(score.Forward):
        def __call__(self, *args):
            seen.append(torch.backends.cuda.cudnn_sdp_enabled())
            return super().__call__(*args)

    assert torch.backends.cuda.cudnn_sdp_enabled()
    bundle = open_bundle(make_bundle())
    score.evaluate(Asking(tiny_gpt), tokenizer, bundle, tmp_path / "eval", cap=3, reporter=Reporter(), made_from=FROM)
    assert seen and not any(seen)
    assert torch.backends.cuda.cudnn_sdp_enabled()
