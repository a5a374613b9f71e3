"""The evaluate stage through the command line: several ranks, kills, items made by the prepare stage."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from helpers import ranks_of, wait_for
from job.evaluation.ledger import Ledger, newest
from job.store.attempt import read_events
from job.store.sealed import open_sealed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory, speedrun) -> Path:
    """A run whose model is trained and not evaluated, in fp32."""
    out = tmp_path_factory.mktemp("trained")
    speedrun(speedrun.tiny("pretrain", out, "-o", "train.dtype=fp32", "-o", "eval.packed_val=true"))
    return out


@pytest.fixture
def copied(trained, tmp_path):
    def copy(name: str) -> Path:
        shutil.copytree(trained, tmp_path / name)
        return tmp_path / name

    return copy


@pytest.fixture(scope="module")
def alone(trained, tmp_path_factory, speedrun) -> Path:
    """Evaluated by one rank, undisturbed."""
    out = tmp_path_factory.mktemp("alone") / "out"
    shutil.copytree(trained, out)
    speedrun(evaluate(speedrun, out))
    return out


def evaluate(speedrun, out: Path, *more: str) -> list[str]:
    return speedrun.command("evaluate", "--out", str(out), "--run-id", "t", *more)


def findings(out: Path) -> dict:
    """Everything the evaluation found, but how long it took."""
    evaluations = out / "runs" / "t" / "eval"
    folder = newest(evaluations)
    ledger = Ledger.open(folder).as_dict()
    for task in ledger["tasks"]:
        del task["seconds"]
    answers = {task["label"]: (folder / task["label"] / "answers.csv").read_text() for task in ledger["tasks"]}
    return {"ledger": ledger, "answers": answers, "bpb": open_sealed(evaluations / "bpb", kind="bpb").facts}


def wait_until(condition, process) -> None:
    def met() -> bool:
        assert process.poll() is None, process.communicate()
        return condition()

    wait_for(met, 120, every=0.01)


@pytest.mark.parametrize("ranks", ["2", "4"])
def test_any_number_of_ranks_finds_the_same(alone, copied, speedrun, ranks):
    out = copied(ranks)
    speedrun(evaluate(speedrun, out, "--ranks", ranks))
    assert findings(out) == findings(alone)


def test_kills_in_several_tasks_leave_the_same_ledger(alone, copied, speedrun):
    out = copied("killed")
    whole = newest(alone / "runs" / "t" / "eval")
    folder = out / "runs" / "t" / "eval" / whole.name
    labels = [task.label for task in Ledger.open(whole).tasks]
    sealed_at: dict[str, int] = {}
    for label in (labels[2], labels[9], labels[16]):
        process = speedrun.start(evaluate(speedrun, out))
        wait_until((folder / label).is_dir, process)
        process.kill()
        process.communicate()
        for known, when in sealed_at.items():
            assert (folder / known / "answers.csv").stat().st_mtime_ns == when, "a sealed task was scored again"
        sealed_at = {
            known: (folder / known / "answers.csv").stat().st_mtime_ns for known in labels if (folder / known).is_dir()
        }
    assert 17 <= len(sealed_at) < 22 and not (folder / "ledger").exists()
    speedrun(evaluate(speedrun, out))
    assert findings(out) == findings(alone)


def test_a_killed_rank_ends_all_of_them(copied, speedrun):
    out = copied("rank")
    process = speedrun.start(evaluate(speedrun, out, "--ranks", "2"))
    wait_until(lambda: (out / "runs" / "t" / "eval").is_dir(), process)
    ranks = ranks_of(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75 and "rank 1 of evaluate was killed by SIGKILL" in said
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def test_a_damaged_model_is_not_scored(copied, speedrun):
    """One rank hashes for both; no other has sealed anything by then."""
    out = copied("damaged")
    weights = max(out.glob("runs/t/checkpoints/*/weights-00000.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    said = speedrun(evaluate(speedrun, out, "--ranks", "2"), code=11).stderr
    assert f"{weights} is not the file that was sealed" in said and not (out / "runs" / "t" / "eval").exists()


def test_prepare_makes_the_items_and_evaluation_finds_them(trained, alone):
    (made,) = (trained / "prepared").glob("*/items/*-6")
    ledger = Ledger.open(newest(alone / "runs" / "t" / "eval"))
    assert made.name == f"{ledger.made_from['bundle']}-6" and len(list(made.iterdir())) == 22
    manifests = [json.loads((made / task.label / "manifest.json").read_text()) for task in ledger.tasks]
    assert {manifest["made_from"]["tokenizer"] for manifest in manifests} == {ledger.made_from["tokenizer"]}
    found = alone / made.relative_to(trained)
    assert [(found / p.name).stat().st_mtime_ns for p in sorted(made.iterdir())] == [
        p.stat().st_mtime_ns for p in sorted(made.iterdir())
    ]
    assert not (alone / "runs" / "t" / "eval" / "items").exists()


def test_the_events_tell_the_rows_of_the_validation(alone):
    (event,) = [event for event in read_events(alone / "runs" / "t") if event["kind"] == "eval.bpb"]
    assert event["tokens"] == event["val_rows"] * 64 and 0 < event["tokens"] <= 4096
    assert event["packed_bpb"] > 0 and event["packed_bpb"] != event["bpb"]
