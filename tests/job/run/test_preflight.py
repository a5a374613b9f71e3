"""What a machine is refused for before it trains, and what is only said."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from job.cli.commands import main
from job.errors import PreflightError, UsageError
from job.machine.host import Machine, memory_bytes
from job.plan.measured import KEY
from job.recipe.config import resolve
from job.run import preflight
from job.run.preflight import COMPAT, CUDA_13_DRIVER, about_comm, about_try8, check, this_machine
from job.store import open_store
from job.train.kernels import choose_kernels, machine_of, price_of
from model import kernels
from model.kernels import FA4_FITS

H100 = Machine(8, "NVIDIA H100 80GB HBM3", (9, 0))
A100 = Machine(8, "NVIDIA A100-SXM4-80GB", (8, 0))
RTX = Machine(1, "NVIDIA RTX 6000 Ada Generation", (8, 9))
MISSING = "flash-attn-4==4.0.0b12 is not installed"
COST = "7% of each step slower (estimated: 6.9 minutes or $2.78 of this run at $24 an hour)"
FP8_ON_H100 = "fp8: NVIDIA H100 80GB HBM3 (Hopper) multiplies fp8 at twice its bf16 rate"


def said(preset: str = "run6", ranks: int = 8, *overrides: str, machine: Machine = H100, **rules) -> list[str]:
    rules = {"strict": True, "allow_fa2": False, "memory": 1e12, "environment": {}} | rules
    return check(resolve(preset, {}, overrides), ranks, machine=machine, **rules)


@pytest.fixture
def only_fa2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "installed", lambda: {"fa2": torch.__version__})


@pytest.mark.usefixtures("only_fa2")
def test_a_slower_kernel_is_refused_with_what_it_costs_or_allowed_and_said() -> None:
    with pytest.raises(PreflightError) as refused:
        said()
    assert str(refused.value) == (
        f"attention would run on FlashAttention 2, {COST}: {MISSING}; install it, or accept that with --allow-fa2"
    )
    taken = ["8 GPUs: NVIDIA H100 80GB HBM3", f"attention: FlashAttention 2, {COST}: {MISSING}", FP8_ON_H100]
    assert said(allow_fa2=True) == said(strict=False) == taken


@pytest.mark.usefixtures("only_fa2")
def test_the_recipe_may_ask_for_the_slower_kernel() -> None:
    assert said("run6", 8, "train.attention=fa2")[1] == "attention: FlashAttention 2, part of torch"


def test_with_the_fast_kernel_there_is_nothing_to_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "installed", lambda: {"fa2": "2.13.0", "fa4": FA4_FITS})
    activated = []
    monkeypatch.setattr(kernels, "activate", activated.append)
    assert said() == ["8 GPUs: NVIDIA H100 80GB HBM3", f"attention: FlashAttention 4 ({FA4_FITS})", FP8_ON_H100]
    assert [backend.name for backend in activated] == ["fa4"]


def test_a_kernel_that_cannot_be_loaded_is_an_error_and_not_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "installed", lambda: {"fa2": "2.13.0", "fa3": "unversioned"})
    for strict in (True, False):
        with pytest.raises(PreflightError, match="fa3 cannot be used: "):
            choose_kernels(resolve("run6"), H100, 8, strict=strict, allow_fa2=True)


@pytest.mark.parametrize("strict", [True, False])
def test_fp8_is_refused_where_there_is_none(strict: bool) -> None:
    with pytest.raises(
        PreflightError, match=r"\(Ampere\) has no fp8 matrix units .*: set train.fp8=false, which takes 17% longer"
    ):
        said(machine=A100, strict=strict)
    assert said("run1", machine=A100)[-1] == "fp8: off"


SMALL = ("model.depth=2", "model.seq_len=64", "train.device_batch_size=4", "train.fp8=true")
CPU = torch.device("cpu")


def test_a_rank_that_trains_proves_fp8_first() -> None:
    found = choose_kernels(resolve("smoke", overrides=SMALL), Machine(), 1, prove_on=CPU)
    assert found["proof"].startswith("fp8 agrees with fp32 (at most ")
    for recipe, ranks, device in (
        (resolve("smoke", overrides=SMALL), None, CPU),  # evaluates
        (resolve("smoke", overrides=SMALL), 1, None),  # the supervisor, which touches no GPU
        (resolve("smoke"), 1, CPU),
    ):
        assert "proof" not in choose_kernels(recipe, Machine(), ranks, prove_on=device)


def test_wrong_fp8_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *operands, **options: right(*operands, **options) * 2)
    with pytest.raises(
        PreflightError, match=r"fp8 computes something else on this device: blocks\.0\.attn\.q \(128 to 128 channels\)"
    ):
        choose_kernels(resolve("smoke", overrides=SMALL), Machine(), 1, prove_on=CPU)


@pytest.mark.parametrize(
    ("ranks", "environment", "sentence"),
    [
        (1, {}, "7 of 8 GPUs would stay idle: give --ranks 8"),
        (8, {"TORCH_COMPILE_DISABLE": "1"}, "the compiler is switched off by TORCH_COMPILE_DISABLE in the environment"),
    ],
)
def test_other_slow_ways_are_refused_or_said(ranks: int, environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(PreflightError, match=sentence):
        said(ranks=ranks, environment=environment, allow_fa2=True)
    assert said(ranks=ranks, environment=environment, strict=False)[1].startswith(f"warning: {sentence}")


@pytest.mark.parametrize("strict", [True, False])
def test_more_ranks_than_gpus(strict: bool) -> None:
    with pytest.raises(PreflightError, match="--ranks 8 needs as many GPUs and torch sees 1 GPU: give --ranks 1"):
        said(machine=RTX, strict=strict)


@pytest.mark.usefixtures("only_fa2")
def test_a_machine_without_the_memory_for_checkpoints_is_refused_or_said() -> None:
    """A d24's 10 GB of state are 56 on eight GPUs: in blocks of powers of two, and eight times all weights for the
    warm-up."""
    sentence = "checkpoints and the warm-up take 55.3 GB of this machine's memory on 8 ranks, and there are 48.0 GB: "
    with pytest.raises(PreflightError, match=sentence):
        said(allow_fa2=True, memory=48e9)
    assert said(strict=False, memory=48e9)[1].startswith(f"warning: {sentence}")
    assert not any("memory" in line for line in said(allow_fa2=True, memory=64e9))


def test_what_a_group_may_use_is_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.machine.cgroup.memory_limit", lambda: None)
    whole = memory_bytes()
    monkeypatch.setattr("job.machine.cgroup.memory_limit", lambda: 5)
    assert whole > 1 << 28 and memory_bytes() == 5


@pytest.mark.parametrize(
    ("overrides", "world_size", "gpus", "sentences"),
    [
        ((), 8, 8, []),
        (("comm.high_priority=true", "comm.sm_carveout=16", "comm.bf16=true", "comm.overlap=false"), 8, 8, []),
        (("comm.overlap=false", "train.dtype=fp32"), 2, 0, []),
        (("comm.high_priority=true",), 2, 0, ["comm.high_priority does nothing here: there is no GPU"]),
        (("comm.bf16=true", "train.dtype=fp32"), 1, 0, ["comm.bf16 does nothing here: one rank sends nothing"]),
    ],
)
def test_keys_that_do_nothing_here_are_said(overrides: tuple, world_size: int, gpus: int, sentences: list[str]) -> None:
    assert about_comm(resolve("run6", {}, overrides), world_size, gpus) == sentences


def test_weights_are_not_sent_as_bf16_where_fp32_is_computed() -> None:
    with pytest.raises(
        UsageError, match=r"comm.bf16=true cannot be used where training computes in fp32: .* say -o train.dtype=bf16"
    ):
        about_comm(resolve("smoke", {}, ["comm.bf16=true", "train.dtype=fp32"]), 2, 0)


def test_a_dry_run_says_which_keys_do_nothing(tmp_path: Path) -> None:
    words = [
        "run",
        "--preset",
        "smoke",
        "-o",
        "comm.sm_carveout=8",
        "--ranks",
        "1",
        "--dry-run",
        "--out",
        str(tmp_path / "out"),
    ]
    said = CliRunner().invoke(main, words)
    assert said.exit_code == 0 and said.stdout.endswith("comm.sm_carveout does nothing here: one rank sends nothing\n")


def test_a_price_only_where_one_is_known() -> None:
    assert price_of(0.03, resolve("run6"), H100, 8) == "3.0 minutes or $1.19 of this run at $24 an hour"
    assert price_of(0.03, resolve("run1"), A100, 8).endswith(" minutes")
    assert price_of(0.03, resolve("run6"), RTX, 1) == price_of(0.03, resolve("run6"), H100, 3) == ""


def test_this_machine() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert this_machine() == machine_of(torch.device("cpu")) == Machine()
    assert check(resolve("smoke"), 4, strict=False, allow_fa2=False) == []


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("kill -SEGV $$", "torch ended with -11 and said nothing"),
        ("echo first >&2; echo no device >&2; exit 1", "no device"),
        ("exec sleep 60", "no answer within 1 s"),
    ],
)
def test_gpus_that_cannot_be_asked_are_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(preflight, "gpu_count", lambda: 1)
    monkeypatch.setattr(preflight, "ANSWER_SECONDS", 1.0)
    with pytest.raises(PreflightError, match=f"^the GPUs cannot be used: {reason}; check the driver with nvidia-smi$"):
        this_machine()


@pytest.mark.parametrize("command", ["run", "pretrain"])
def test_no_gpu_where_one_is_paid_for_ends_with_10_and_writes_nothing(tmp_path: Path, speedrun, command: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    words = speedrun.command(command, "--preset", "smoke", "--strict", "--out", str(tmp_path / "out"))
    ended = speedrun.here(words, code=10)
    assert ended.stderr.startswith("speedrun: --strict is set and torch sees no GPU here (")
    assert (
        ended.stderr.endswith("): mend that, or leave --strict out to train on the CPU\n")
        and ended.stderr.count("\n") == 1
    )
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_warned_where_no_trial_of_its_image_and_gpu_has_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPEEDRUN_REVISION", "mine")
    store, stack = open_store(str(tmp_path)), {"revision": "mine", "gpu": H100.name}
    for document, warned in (
        (None, True),
        ({"passed": False, "stack": {}}, True),  # the doctor refused
        ({"passed": False, "stack": stack}, True),
        ({"passed": True, "stack": stack}, False),
        ({"passed": True, "stack": stack | {"revision": "other"}}, True),
        ({"passed": True, "stack": stack | {"gpu": A100.name}}, True),
    ):
        if document:
            store.put(KEY, json.dumps(document).encode(), "application/json")
        sentences = about_try8(store, H100)
        assert len(sentences) == warned
        assert all(s.endswith(f"(mine) on {H100.name}: sky/try8.yaml finds in ten minutes what may end this run")
                   for s in sentences)  # fmt: skip
    for damaged in (b'{"passed": tr', b'["passed"]'):
        store.put(KEY, damaged, "application/json")
        assert len(about_try8(store, H100)) == 1


@pytest.mark.usefixtures("only_fa2")
def test_the_driver_and_what_was_done_about_it_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.run.preflight.driver", lambda: "535.104.05")
    assert said(allow_fa2=True)[1] == "driver 535.104.05"
    path = {"LD_LIBRARY_PATH": f"{COMPAT}:/mine"}
    sentence = "driver 535.104.05, too old for CUDA 13: its forward-compatibility libraries are used"
    assert said(allow_fa2=True, environment=path)[1] == sentence
    monkeypatch.setattr("torch.version.cuda", "13.0")
    with pytest.raises(
        PreflightError, match=r"\(driver 535.104.05 is older than the 580 of CUDA 13.0: take a host with"
    ):
        said(machine=Machine())


def test_the_script_and_the_preflight_mean_the_same() -> None:
    script = (Path(__file__).parents[3] / "docker" / "speedrun").read_text()
    assert f"compat={COMPAT}\n" in script and f"-lt {CUDA_13_DRIVER} ]" in script
