"""result.json: every number from its one source, strict JSON, the schema kept."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jsonschema
import pytest

from job.errors import DataError, UsageError
from job.evaluation.ledger import newest
from job.report import result as results
from job.report.result import build_result
from job.report.words import bpb_sentence

SCHEMA = json.loads(Path(results.__file__).with_name("result.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def checked(path: Path) -> dict:
    result = build_result(path)
    VALIDATOR.validate(json.loads(json.dumps(result, allow_nan=False)))
    return result


def test_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_whole_run_exactly(run):
    result = checked(run.whole().path)
    hashes, newest_attempt, begun = (result.pop(key) for key in ("hashes", "newest_attempt", "from"))
    assert [each["name"] for each in result.pop("evaluations")] == ["smoke_score"] and result.pop("unhashed") == []
    assert result.pop("provenance")["gpus"] == ["NVIDIA H100"] * 8 and result.pop("packed_bpb") is begun is None
    assert result == {
        "schema": 1,
        "run_id": "smoke",
        "preset": "smoke",
        "evidence": "measured",
        "state": "complete",
        "learned": True,
        "val_bpb": 1.7,
        "bigram_bpb": 2.25,
        "core": None,
        "smoke_score": {
            "metric": pytest.approx((1 / 3 - 0.2 + 0.15) / 3),
            "se": pytest.approx(math.sqrt(0.25 / 20 / 0.75**2 + 0.24 / 20 / 0.25 + 0.1275 / 20) / 3),
            "cap": None,
            "baselines": {"word_choice": 0.25, "which_subject": 0.5, "next_word": 0.0},
            "tasks": [
                task(
                    "word_choice",
                    "multiple_choice",
                    shots=3,
                    accuracy=0.5,
                    centered=1 / 3,
                    se=math.sqrt(0.25 / 20) / 0.75,
                ),
                task("which_subject", "schema", shots=0, accuracy=0.4, centered=-0.2, se=math.sqrt(0.24 / 20) / 0.5),
                task(
                    "next_word", "language_modeling", shots=0, accuracy=0.15, centered=0.15, se=math.sqrt(0.1275 / 20)
                ),
            ],
        },
        "leaks": None,
        "steps": 200,
        "planned_steps": 200,
        "parameters": 7340114,
        "tokens": 200 * 32 * 256,
        "flops": 200 * 32 * 256 * 27132336,
        "clocks": {"training_s": 189 * 0.5, "node_s": 20.0 + 100.0 + 30.0, "billed_s": None},
        "stages_s": {"prepare": 20.0, "pretrain": 100.0, "evaluate": 30.0},
        "attempts": 1,
        "unusable_events": 0,
        "usd": None,
        "machine": {
            "cpu": "Imaginary CPU",
            "cores": 2,
            "cpu_bf16": True,
            "device": "cpu",
            "world_size": 1,
            "threads": 2,
            "dtype": "bfloat16",
        },
        "versions": {"python": "3.11.2", "torch": "2.13.0+cpu"},
    }
    assert (hashes["prepared"], hashes["bundle"], newest_attempt["exit_code"]) == ("feedc0de", "b0b0b0b0b0b0b0b0", 0)
    assert len({hashes["recipe"], hashes["tokenizer"], hashes["checkpoint"]}) == 3


def task(name: str, kind: str, *, shots: int, accuracy: float, centered: float, se: float) -> dict:
    measured = {"accuracy": accuracy, "centered": pytest.approx(centered), "se": pytest.approx(se), "seconds": 1.5}
    return {"task": name, "kind": kind, "n": 20, "shots": shots} | measured


def test_a_core_ledger_is_core_and_no_smoke_score(run):
    attempt = run.start()
    run.pretrain(attempt)
    run.evaluate(attempt, core=True, cap=20)
    result = checked(run.path)
    assert result["core"]["cap"] == 20
    assert result["smoke_score"] is None


def test_the_newest_count_of_shared_documents(run):
    attempt = run.start()
    counted = {"bundle": "b0b0", "words": 13, "documents": 5000, "shared": 3, "by_task": {"copa": 0, "squad": 3}}
    attempt.emit("prepare.leaks", **counted | {"documents": 4000}, texts_too_short={"copa": 9, "squad": 0})
    attempt.emit("prepare.leaks", **counted, texts_too_short={"copa": 9, "squad": 0})
    assert checked(run.path)["leaks"] == counted


def test_the_packer_s_first_rows_are_reported_beside_the_sample(run):
    attempt = run.start()
    run.pretrain(attempt)
    run.evaluate(attempt, packed=1.625)
    result = checked(run.path)
    assert (result["val_bpb"], result["packed_bpb"]) == (1.7, 1.625)
    assert bpb_sentence(result).endswith("On the packer's first rows, where published runs validate, it is 1.625.")


def test_schema_refuses_unknown_keys(run):
    result = build_result(run.whole().path)
    for part in (result, result["evaluations"][0], result["provenance"]):
        part["gpu"] = "none"
        with pytest.raises(jsonschema.ValidationError):
            VALIDATOR.validate(result)
        del part["gpu"]
    VALIDATOR.validate(result)


def test_the_score_is_the_fullest_of_its_name_and_all_are_listed(run):
    run.whole()
    attempt = run.start()
    for core, cap in ((True, 20), (False, 5), (True, 500)):
        run.evaluate(attempt, core=core, cap=cap)
    result = checked(run.path)
    assert [(e["name"], e["cap"]) for e in result["evaluations"]] == [
        ("core", 500),
        ("core", 20),
        ("smoke_score", None),
        ("smoke_score", 5),
    ]
    assert (result["core"]["cap"], result["smoke_score"]["cap"]) == (500, None)


def test_steps_done_again_count_once_in_the_clock_and_twice_on_the_node(run, clock):
    first = run.start()
    run.pretrain(first, 0, 80, ms=500.0)
    first.close()
    clock.pass_(1000.0)
    second = run.start()
    run.pretrain(second, 50, ms=250.0)
    run.evaluate(second)
    result = checked(run.path)
    assert (result["steps"], result["attempts"], result["state"]) == (200, 2, "complete")
    assert result["clocks"]["training_s"] == pytest.approx((50 - 11) * 0.5 + 150 * 0.25)
    assert result["clocks"]["node_s"] == pytest.approx(40.0 + 150 * 0.25 + 30.0)
    assert result["tokens"] == 200 * 32 * 256


def test_steps_beyond_the_newest_start_are_no_part_of_the_run(run):
    first = run.start()
    run.pretrain(first, 0, 120)
    first.close()
    second = run.start()
    run.pretrain(second, 50, 60)
    result = checked(run.path)
    assert (result["steps"], result["tokens"], result["state"]) == (60, 60 * 32 * 256, "incomplete")
    assert result["val_bpb"] == pytest.approx(run.bpb_at(50))


@pytest.mark.parametrize("vocabulary_too_large", [True, False])
def test_learned_is_below_the_bigram_model_and_null_without_one(run, vocabulary_too_large):
    attempt = run.start()
    run.pretrain(attempt)
    run.evaluate(attempt, bpb=2.25, bigram=None if vocabulary_too_large else 2.25)
    assert checked(run.path)["learned"] is (None if vocabulary_too_large else False)


def test_before_the_first_attempt(run):
    result = checked(run.path)
    assert (result["steps"], result["tokens"], result["flops"], result["attempts"]) == (0, 0, 0, 0)
    assert (result["val_bpb"], result["learned"], result["state"]) == (None, None, "incomplete")
    assert result["hashes"]["checkpoint"] is None


def test_a_loss_that_is_not_a_number_is_divergence_and_null(make_run):
    run = make_run(loss_at=lambda step: math.nan if step >= 30 else 5.0, bpb_at=lambda step: math.nan)
    run.pretrain(run.start(), 0, 60)
    result = checked(run.path)
    assert (result["state"], result["val_bpb"]) == ("diverged", None)


def test_a_last_update_that_breaks_the_model_is_divergence(run):
    attempt = run.start()
    run.pretrain(attempt)
    run.evaluate(attempt, bpb=math.inf)
    assert checked(run.path)["state"] == "diverged"


def test_a_checkpoint_that_was_swept_leaves_its_hash_null(run):
    attempt = run.start()
    run.pretrain(attempt, 0, 60)
    attempt.emit("checkpoint.sealed", step=50, rows=1600, folder="000000000001600", bytes=7, seconds=0.1)
    assert checked(run.path)["hashes"]["checkpoint"] is None


def test_no_run_names_the_remedy(tmp_path):
    with pytest.raises(UsageError, match=r"no run at .*--run-id"):
        build_result(tmp_path / "runs" / "nobody")


def test_a_damaged_recipe_is_named(run):
    (run.path / "recipe.json").write_text("{")
    with pytest.raises(DataError, match=r"recipe\.json.*--fresh"):
        build_result(run.path)


def test_a_damaged_ledger_is_named(run):
    run.whole()
    (newest(run.path / "eval") / "ledger" / "ledger.json").write_text("{}")
    with pytest.raises(DataError, match=r"ledger\.json"):
        build_result(run.path)
