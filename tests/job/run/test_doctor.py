"""What the doctor says of this machine, refuses, and leaves in the bucket."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from job.errors import ExitCode, PreflightError
from job.machine.finding import Finding, Verdict
from job.machine.host import Machine
from job.recipe.config import resolve
from job.recipe.derive import derive
from job.run import doctor
from job.train.kernels import choose_kernels
from model import fp8_passes

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
ALONE = [*("-o", "data.source=embedded"), *("-o", "eval.core_bundle="), *("-o", "model.depth=4")]
"""a recipe that takes nothing from the network, and little disk"""


def look(preset: str, findings: Sequence[Finding] = (), **rules: bool) -> dict[str, Any]:
    return doctor.look(resolve(preset), list(findings), strict=False, allow_fa2=False, **{"deep": True} | rules)


@NO_GPU
@pytest.mark.slow
def test_a_deep_look_computes_and_is_kept_in_the_bucket(tmp_path: Path, speedrun) -> None:
    words = (
        "doctor",
        "--deep",
        "--json",
        "--bucket",
        str(tmp_path / "bucket"),
        "--run-id",
        "mine",
        "--out",
        str(tmp_path / "out"),
        *ALONE,
    )
    said = json.loads(speedrun(speedrun.command(*words)).stdout)
    assert said["refused"] is None and "no GPU that torch can use: the CPU would train" in said["found"]
    proven = {row["what"]: row for row in said["proofs"]}
    assert len(proven) == 2 + 3 * 3 + 3 and all(0 <= row["error"] <= row["bound"] for row in proven.values())
    assert json.loads((tmp_path / "bucket" / "runs" / "mine" / "doctor.json").read_text()) == said
    assert not (tmp_path / "out").exists()


@NO_GPU
def test_no_gpu_where_one_is_paid_for(tmp_path: Path, speedrun) -> None:
    words = speedrun.command("doctor", "--strict", "--out", str(tmp_path / "out"), *ALONE)
    ended = speedrun.here(words, code=int(ExitCode.PREFLIGHT))
    assert ended.stdout.startswith("card: none") and "CPU: " in ended.stdout
    assert (
        ended.stderr.startswith("speedrun: --strict is set and torch sees no GPU here")
        and ended.stderr.count("\n") == 1
    )


@NO_GPU
def test_a_machine_that_computes_wrongly_is_refused_and_the_table_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *operands, **options: right(*operands, **options) * 1.5)
    document = look("run6")
    assert document["refused"].startswith("blocks.0.attn.q (128 to 128 channels), forward product is wrong by 5")
    assert len(document["proofs"]) == 14 and "what was computed agrees" not in doctor.page(document)
    assert "| attention, window 32 | " in doctor.page(document)


@NO_GPU
def test_a_broken_lever_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = "train.levers: kept_columns computes something else on this device: block with levers, attention, "
    monkeypatch.setattr(fp8_passes, "transposed", lambda x: x.t().roll(1, 0).contiguous())
    overrides = ["train.levers=kept_columns", "model.depth=2", "model.seq_len=128", "data.vocab_size=512"]
    recipe = resolve("run6", overrides=overrides)
    refused = doctor.look(recipe, [], strict=False, allow_fa2=False, deep=True)["refused"]
    assert refused.startswith(broken) and "; say -o train.levers= (none)" in refused
    with pytest.raises(PreflightError, match=broken):  # as a rank does before it trains
        choose_kernels(recipe, Machine(), 1, prove_on=torch.device("cpu"))


def test_a_recipe_without_fp8_proves_attention_only() -> None:
    document = look("smoke")
    assert [row["what"] for row in document["proofs"]] == ["attention, window 32", "attention, window 128"]


def test_a_window_is_proven_as_a_window_and_a_kernel_that_fails_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the real model's windows are longer than the proof's rows."""
    proven = []

    def disagreement(_: torch.device, window: int, gradients: bool) -> float:
        proven.append(window)
        if len(proven) > 2:
            raise RuntimeError("no kernel image is available\nand so on")
        return 0.0

    real = derive(resolve("run6")).config
    monkeypatch.setattr(doctor.GPTConfig, "for_depth", lambda *_, **__: real)
    monkeypatch.setattr(doctor.attention, "disagreement", disagreement)
    monkeypatch.setattr(doctor, "_attention_ms", lambda *_: (1.0, 3.0))
    examined = [look("smoke") for _ in range(2)]
    short, full = proven[:2]
    assert short < doctor.attention.PROOF_LENGTH - 1 <= full and examined[0]["refused"] is None
    assert examined[1]["refused"].startswith(
        "attention, window 512, fails on this machine: no kernel image is available; take"
    )


def test_what_is_no_number_is_refused_and_can_be_written_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.attention, "disagreement", lambda *_, **__: float("inf"))
    document = look("smoke")
    assert document["refused"].startswith("attention, window 32 is no number where rounding explains 3.0%")
    assert json.loads(json.dumps(document, allow_nan=False))["proofs"][0]["error"] is None
    assert "| attention, window 32 | no number | 0.0300 | " in doctor.page(document)


def test_every_check_has_a_line_and_one_that_is_slow_is_refused_unless_accepted() -> None:
    findings = [Finding("ECC", Verdict.OK, "on"), Finding("NVLink", Verdict.SLOW, "no link", "take another node")]
    refused, accepted = (look("smoke", findings, deep=False, accept_slow=accept) for accept in (False, True))
    assert refused["refused"] == "NVLink: no link; take another node, or accept it with --accept-slow"
    assert accepted["refused"] is None
    for document in (refused, accepted):
        lines = doctor.page(json.loads(json.dumps(document))).splitlines()
        assert "ok       ECC: on" in lines and "slow     NVLink: no link; take another node" in lines
