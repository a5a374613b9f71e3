"""What ranks exchange in a step, seen on gloo: each other's times, gradients with overlap and without, and as NCCL
would be asked for."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from helpers import loopback, on_ranks
from job.recipe.config import Recipe, resolve
from job.recipe.derive import derive
from job.reporter import Reporter
from job.train import loop, step_metrics
from job.train.context import StopSignal
from job.train.loop import Batches, Run, take_step
from job.train.step_metrics import WINDOW, Computing, Reading, SlowRanks, StepMetrics
from model.gpt import GPT
from model.optimizer import Optimizer

CPU = torch.device("cpu")
TINY = ["model.depth=2", "model.seq_len=32", "data.vocab_size=300", "train.steps=60", "train.total_batch_size=128"]


def recipe_of(*overrides: str) -> Recipe:
    return resolve("smoke", overrides=[*TINY, "train.device_batch_size=1", "train.dtype=fp32", *overrides])


class Rows:
    """Row i is `words` words drawn with seed i."""

    def __init__(self, words: int) -> None:
        self.words = words

    def take(self, start: int, count: int) -> np.ndarray:
        return np.stack(
            [
                np.random.default_rng(row).integers(0, 300, self.words).astype(np.uint16)
                for row in range(start, start + count)
            ]
        )


class Recorder(Reporter):
    def __init__(self) -> None:
        self.events: list[dict] = []

    def emit(self, kind: str, **fields: object) -> None:
        self.events.append({"kind": kind, **fields})


def build(rank: int, world: int, recipe: Recipe, folder: Path) -> Run:
    context = SimpleNamespace(
        rank=rank,
        local_rank=rank,
        world_size=world,
        run=folder,
        attempt=1,
        reporter=Recorder(),
        stop_signal=StopSignal(),
    )
    derived = derive(recipe)
    model = GPT(derived.config)
    model.init_weights(0)
    batches = Batches(
        Rows(recipe.model.seq_len + 1),
        rows_per_step=derived.rows_per_step,
        device_rows=1,
        rank=rank,
        world_size=world,
        device=CPU,
    )
    optimizer = Optimizer(
        model.groups(), derived.specs, dist.group.WORLD, polar_dtype=torch.float32, bucket_bytes=1 << 16
    )
    return Run(context, recipe, derived, SimpleNamespace(id="0" * 16), model, optimizer, batches)


# ---- on the ranks


def scenario_times(rank: int, world: int, folder: Path):
    """A clock that each rank turns by hand: its step s computes for (s + 1)(rank + 1) seconds. By lag: readings,
    collectives."""
    clock, found = 0.0, {}
    all_reduce, calls = dist.all_reduce, []
    dist.all_reduce = lambda *args, **kwargs: calls.append(args) or all_reduce(*args, **kwargs)
    step_metrics.time = SimpleNamespace(perf_counter=lambda: clock)
    for lag in (0, 3):
        seen: list[Reading] = []
        reader = StepMetrics(CPU, ["a"], seen.append, lag=lag)
        calls.clear()
        for step in range(12):
            reader.begin_step()
            clock += (step + 1) * (rank + 1)
            reader.end_backward()
            clock += 100.0  # waiting for the others
            reader.end_step(step, torch.tensor(1.0 + rank), torch.tensor([False]), torch.tensor(0.0), 1.0)
            if step == 7:
                reader.flush()
        reader.flush()
        found[lag] = [(r.loss, r.seconds, r.computing) for r in seen], len(calls)
    return found


def scenario_signals(rank: int, world: int, folder: Path):
    """Rank r asks for a checkpoint before step 4 + r, rank 1 for a stop before step 9; a checkpoint flushes before step
    10. By lag: (step, signal) of what this rank does."""
    found = {}
    for lag in (0, 3):
        signals, done = StopSignal(), []

        def read(reading: Reading, lag: int = lag, signals: StopSignal = signals) -> None:
            signals.agreed(reading.signal, before=reading.step + lag + 1)

        reader = StepMetrics(CPU, ["a"], read, lag=lag)
        for step in range(16):
            if (signal := signals.due(step)) != "go on":
                reader.flush()
                done.append((step, signal))
            if step == 10:
                reader.flush()
            if step == 4 + rank:
                signals.ask("checkpoint")
            if step == 9 and rank == 1:
                signals.ask("checkpoint")
                signals.ask("stop")
            reader.begin_step()
            reader.end_step(step, torch.tensor(1.0), torch.tensor([False]), torch.tensor(0.0), 1.0, signals.take())
        found[lag] = done
    return found


def scenario_slow(rank: int, world: int, folder: Path):
    """Rank 1 sleeps in each forward pass; what each rank says of it."""
    run = build(rank, world, recipe_of("model.depth=1", "model.seq_len=16", "train.total_batch_size=32"), folder)
    loss = run.model.loss
    if rank == 1:
        run.model.loss = lambda *rows: time.sleep(0.03) or loss(*rows)
    for _ in range(WINDOW + 1):
        take_step(run)
    return [event for event in run.context.reporter.events if event["kind"] == "train.slow_ranks"]


def scenario_overlap(rank: int, world: int, folder: Path):
    """By overlap: the weights after four steps, and how many reductions each step had launched at the end of its
    backward pass."""
    found = {}
    for overlap in (True, False):
        run = build(rank, world, recipe_of(f"comm.overlap={str(overlap).lower()}"), folder)
        calls, launched, ended = run.optimizer.traffic.calls, [], run.metrics.end_backward
        run.metrics.end_backward = lambda calls=calls, launched=launched, ended=ended: (
            launched.append(calls.total()) or ended()
        )
        for _ in range(4):
            calls.clear()
            take_step(run)
        found[overlap] = {name: p.detach().clone() for name, p in run.model.named_parameters()}, launched
        found["norms"] = [event["grad_norm"] for event in run.context.reporter.events if event["kind"] == "train.step"]
    return found


@pytest.fixture(autouse=True)
def _loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", loopback())


# ---- whose GPU is slow


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_signal_is_done_by_all_ranks_before_the_same_step(tmp_path: Path, world: int) -> None:
    """A fixed number of steps after the all-reduce that carried it, also when a flush has read it sooner; the greatest
    of all ranks counts."""
    for seen in on_ranks(world, tmp_path, scenario_signals, tmp_path):
        for lag in (0, 3):
            checkpoints = [(4 + rank + lag + 1, "checkpoint") for rank in range(world)]
            stop = [(9 + lag + 1, "stop")] if world > 1 else []
            assert seen[lag] == checkpoints + stop


def test_ranks_learn_each_others_times_by_the_one_collective_of_a_step(tmp_path: Path) -> None:
    """Every step once and in order: those that had been read when the collective was queued, after a settling all of
    these."""
    ranks = on_ranks(2, tmp_path, scenario_times, tmp_path)
    for lag, first in ((0, 1), (3, 4)):
        (told, collectives), others = ranks[0][lag], ranks[1][lag][0]
        assert collectives == 12
        assert [computing for *_, computing in told] == [computing for *_, computing in others]
        assert [loss for loss, *_ in told] == [1.5] * 12
        assert [seconds for _, seconds, _ in told] == [100.0 + step + 1 for step in range(12)]
        covered = [computing.steps for *_, computing in told]
        sums = {0: [0] + [1] * 11, 3: [0] * 4 + [1] * 4 + [4, 0, 0, 0]}[lag]
        assert covered == sums and covered[first] == 1
        at = 0
        for *_, computing in told:
            mine = sum(step + 1 for step in range(at, at + computing.steps))
            assert computing.seconds == (mine, 2 * mine)
            at += computing.steps


def test_a_slow_rank_is_named_once_a_window(tmp_path: Path) -> None:
    """A forward pass takes 30 ms more; only rank 0 speaks."""
    (event,), others = on_ranks(2, tmp_path, scenario_slow, tmp_path)
    assert others == [] and event["behind"].keys() == {"1"} and event["behind"]["1"] > 0.03
    assert event["steps"] == WINDOW - 1 and event["step"] == WINDOW - 1 and event["rows"] == 2 * WINDOW
    assert 15 < event["lost_ms"] < event["step_ms"]


def window(*seconds: float, steps: int = 1) -> dict | None:
    slow = SlowRanks()
    reading = Reading(0, 1.0, (), 1.0, 2.0, Computing(tuple(seconds), steps))
    said = [slow.take(reading) for _ in range(2 * WINDOW)]
    assert [at for at, events in enumerate(said) if events] in ([], [WINDOW - 1, 2 * WINDOW - 1])
    times = said[WINDOW - 1].get("train.ranks")
    assert times == ({"steps": WINDOW, "ms": [1000 * own for own in seconds]} if len(seconds) > 1 and steps else None)
    return said[WINDOW - 1].get("train.slow_ranks")


def test_a_rank_is_slow_beyond_three_percent_of_the_median() -> None:
    assert window(1.0, 1.0, 1.029, 0.9) is None and window(1.0) is None and window(0.0, 0.0, steps=0) is None
    event = window(1.0, 1.0, 1.05, 1.0, 1.1, 0.2, 1.0, 1.0)
    assert event["behind"] == pytest.approx({"2": 0.05, "4": 0.1})
    assert event["lost_ms"] == pytest.approx(100) and event["step_ms"] == 2000 and event["steps"] == WINDOW


# ---- keys of [comm]


def test_without_overlap_nothing_is_sent_before_the_backward_ends_and_no_bit_changes(tmp_path: Path) -> None:
    ranks = on_ranks(2, tmp_path, scenario_overlap, tmp_path)
    alone = build(0, 1, recipe_of(), tmp_path)
    take_step(alone)
    (event,) = (event for event in alone.context.reporter.events if event["kind"] == "train.step")
    assert event["grad_norm"] > 0 and ranks[0]["norms"][0] == pytest.approx(event["grad_norm"], rel=1e-5)
    for found in ranks:
        (on, early), (off, late) = found[True], found[False]
        assert all(torch.equal(on[name], off[name]) for name in on)
        assert late == [0, 0, 0, 0] and early[0] == 0 and all(count > 3 for count in early[1:])


def test_what_nccl_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no NCCL in torch's build for CPUs: its options are a stand-in of the same attributes."""
    asked = []
    options = lambda **given: SimpleNamespace(config=SimpleNamespace(), **given)  # noqa: E731
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=options), raising=False)
    monkeypatch.setattr(
        dist,
        "init_process_group",
        lambda backend, **given: asked.append((backend, given["pg_options"], given["device_id"], given["timeout"])),
    )
    plain, special = recipe_of(), recipe_of("comm.high_priority=true", "comm.sm_carveout=16")
    context, gpu = SimpleNamespace(rank=0, world_size=8), torch.device("cuda", 0)
    try:
        loop.join_ranks(context, plain, gpu)
        loop.join_ranks(context, special, CPU)
        longest = datetime.timedelta(seconds=1800)
        assert asked == [("nccl", None, gpu, longest), ("gloo", None, None, longest)]
        assert torch._C._get_sm_carveout_experimental() is None
        loop.join_ranks(context, special, gpu)
        assert torch._C._get_sm_carveout_experimental() == 16
    finally:
        torch._C._set_sm_carveout_experimental(None)
    assert asked[2][0] == "nccl" and asked[2][1].is_high_priority_stream and asked[2][1].config.max_ctas == 16
