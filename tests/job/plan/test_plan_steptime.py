"""The step time against the published runs: each predicted from the others."""

from __future__ import annotations

import pytest

from job.machine.gpus import GPUS
from job.plan.published_runs import RUNS
from job.plan.steptime import (
    BEYOND,
    LEFT_OUT_GB,
    REFERENCE,
    Fit,
    expected_error,
    optimizer_seconds,
    polar_flops,
    predicted_step,
    published_fit,
    step_seconds,
    token_seconds,
)
from model.config import LEVERS, SAME_NUMBERS, GPTConfig
from model.kernels import BF16_TIME

BY_NAME = {run.name: run for run in RUNS}


def test_the_published_runs_are_as_published() -> None:
    steps = {
        "Run 1": 16_704, "Run 2": 14_889, "Run 3": 7_226, "Run 4 (seed)": 12_700, "Run 4 (upstream)": 6_612,
        "Run 5": 6_055, "Run 6": 5_568, "PR #733": 6_001, "PR #830": 5_312,
    }  # fmt: skip
    milliseconds = {
        "Run 1": 655.9, "Run 2": 705.2, "Run 3": 1375.0, "Run 4 (seed)": 706.6, "Run 4 (upstream)": 1096, "Run 5": 1072,
        "Run 6": 1067.7, "PR #733": 883.8, "PR #830": 926,
    }  # fmt: skip
    assert {run.name: run.steps for run in RUNS} == steps
    assert {run.name: run.step_seconds * 1e3 for run in RUNS} == pytest.approx(milliseconds, rel=3e-4)


@pytest.mark.parametrize("name", [run.name for run in RUNS if run.fp8])
def test_every_fp8_run_is_predicted_from_the_others(name: str) -> None:
    assert abs(published_fit().errors[name]) < 0.05


def test_the_bf16_run_is_predicted_with_the_published_ratio() -> None:
    assert BF16_TIME == 740 / 630
    run = BY_NAME["Run 1"]
    assert predicted_step(run, published_fit()) == pytest.approx(run.step_seconds, rel=0.05)


def test_a_run_that_is_left_out_has_no_part_in_its_own_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from job.plan import steptime

    slower = [dataclasses.replace(run, seconds=run.seconds * 2) if run.name == "Run 6" else run for run in RUNS]
    monkeypatch.setattr(steptime, "RUNS", slower)
    moved = published_fit.__wrapped__()
    assert moved.errors["Run 6"] == pytest.approx((1 + published_fit().errors["Run 6"]) / 2 - 1)
    assert moved.errors["Run 2"] != published_fit().errors["Run 2"]


def test_the_fit_is_physically_possible() -> None:
    fit = published_fit()
    assert REFERENCE.bf16 * 0.5 < fit.flops < REFERENCE.fp8
    assert 20 < fit.passes < 200
    assert fit.worst == max(map(abs, fit.errors.values()))


def test_the_optimizers_part_is_the_difference_of_runs_2_and_3() -> None:
    config = BY_NAME["Run 2"].config
    exposed = 2 * BY_NAME["Run 2"].step_seconds - BY_NAME["Run 3"].step_seconds
    assert optimizer_seconds(config, REFERENCE, 8) == pytest.approx(exposed, rel=0.02)


@pytest.mark.parametrize(("name", "teraflops"), [("Run 6", 3.26), ("Run 2", 5.11)])
def test_polar_express_on_the_busiest_rank(name: str, teraflops: float) -> None:
    assert polar_flops(BY_NAME[name].config, 8) / 1e12 == pytest.approx(teraflops, rel=2e-3)


def test_the_expected_error_is_the_fits_own_only_where_runs_were_published() -> None:
    config = BY_NAME["Run 6"].config
    assert expected_error(config, GPUS["h100"]) == published_fit().worst < BEYOND
    assert expected_error(config, GPUS["h200"]) == BEYOND
    assert expected_error(GPTConfig.for_depth(12, 32768, 2048), GPUS["h100"]) == BEYOND


def test_other_gpus_go_with_their_data_sheets() -> None:
    config = BY_NAME["Run 6"].config
    fit = Fit(flops=1e15, passes=0.0, errors={})
    h100, a100 = (token_seconds(config, GPUS[name], False, fit) for name in ("h100", "a100-80gb"))
    assert a100 / h100 == pytest.approx(989 / 312)
    assert token_seconds(config, GPUS["h200"], True) < token_seconds(config, GPUS["h100"], True)


def test_one_gpu_takes_eight_times_the_tokens_and_sends_nothing() -> None:
    run = BY_NAME["Run 6"]
    one, eight = (step_seconds(run.config, run.batch_tokens, REFERENCE, ranks, True) for ranks in (1, 8))
    assert 7.7 < one / eight < 8
    assert optimizer_seconds(run.config, REFERENCE, 1) == pytest.approx(polar_flops(run.config, 1) / (0.6 * 989e12))


def test_levers_take_their_counted_bytes_from_the_passes() -> None:
    run = BY_NAME["Run 6"]
    plain, fast, frontier, bf16 = (
        step_seconds(run.config, run.batch_tokens, REFERENCE, 8, fp8, levers=levers)
        for levers, fp8 in (((), True), (SAME_NUMBERS, True), (LEVERS, True), (LEVERS, False))
    )
    assert [round(1000 * step) for step in (plain, fast, frontier)] == [1087, 1058, 1001], "the counter's last column"
    assert bf16 == step_seconds(run.config, run.batch_tokens, REFERENCE, 8, False), "no fp8, no levers"
    assert LEFT_OUT_GB.keys() == set(LEVERS)
