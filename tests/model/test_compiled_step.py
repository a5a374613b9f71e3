"""The compiled step: one graph a block, nothing compiled twice, gradients as they come, the same bits from run to
run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from job.machine.host import compute_dtype
from model import fp8
from model.config import GPTConfig
from model.gpt import GPT
from model.optimizer import Optimizer
from model.scaling import RULES, derive
from model.schedule import Schedule

V, T, B, STEPS = 512, 128, 2, 50
CONFIG = GPTConfig.for_depth(4, V, T, width=128, head_dim=64, window_tile=32)  # two windows, value embeddings or none
DTYPE = compute_dtype("auto")
"""bf16 products take fifty times as long as fp32's on a processor without instructions for them; what is compiled is
the same"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    """The code that Inductor writes depends on their number: with one for all tests, its cache serves the next one
    too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def rows(step: int) -> tuple[Tensor, Tensor]:
    block = torch.randint(0, V, (B, T + 1), generator=torch.Generator().manual_seed(step))
    return block[:, :-1], block[:, 1:]


def prepared(compiled: bool, in_fp8: bool = False, config: GPTConfig = CONFIG) -> tuple[GPT, Optimizer]:
    model = GPT(config, compute_dtype=DTYPE)
    model.init_weights(0)
    if in_fp8:
        fp8.apply(model, B * T)
    if compiled:
        model.compile_blocks()
    specs = derive(config, RULES["head"], ratio=None, steps=STEPS, batch_tokens=B * T).specs
    return model, Optimizer(model.groups(), specs, compile=compiled, polar_dtype=DTYPE)


def steps(model: GPT, optimizer: Optimizer, count: int, first: int = 0) -> list[float]:
    schedule, losses = Schedule.for_generation(STEPS, "head"), []
    for step in range(first, first + count):
        loss = model.loss(*rows(step))
        loss.backward()
        optimizer.step(schedule.at(step))
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("in_fp8", "traced"), [(False, False), (True, True), pytest.param(True, False, marks=pytest.mark.by_hand)]
)
def test_no_break_and_nothing_compiled_again_in_50_steps(
    in_fp8: bool, traced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`traced`: the graphs run as Dynamo traced them, without Inductor's minutes, for ten steps."""
    if traced:
        run_as_traced(monkeypatch)
    torch._dynamo.reset()
    counters.clear()
    model, optimizer = prepared(True, in_fp8)
    compiled = steps(model, optimizer, 1)
    after_one = dict(counters["stats"])
    assert after_one["unique_graphs"] >= 4 + 1, "four kinds of block, and the loss"
    compiled += steps(model, optimizer, 9 if traced else STEPS - 1, first=1)
    assert dict(counters["stats"]) == after_one and not counters["graph_break"]
    assert compiled[:3] == pytest.approx(steps(*prepared(False, in_fp8), 3), abs=0.01), "as the eager step"
    if traced:
        torch._dynamo.reset()  # no other test is to find these graphs


def run_as_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, *_, **__: graph.forward)


def test_blocks_of_one_kind_share_their_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block (x is x0), and with a short window those without and with a value embedding, and those with a
    long one.

    Which graphs there are is Dynamo's business: they run as they were traced, without Inductor's minute.
    """
    run_as_traced(monkeypatch)
    torch._dynamo.reset()
    counters.clear()
    model, _ = prepared(True, config=replace(CONFIG, depth=12))
    model.loss(*rows(0)).backward()
    torch._dynamo.reset()  # no other test is to find these graphs
    assert counters["stats"]["unique_graphs"] == 4 + 1, "and the loss"


def test_the_same_bits_from_run_to_run() -> None:
    runs = []
    for _ in range(2):
        model, optimizer = prepared(True)
        steps(model, optimizer, 5)
        runs.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    assert all(torch.equal(tensor, runs[1][name]) for name, tensor in runs[0].items())


def test_gradients_of_a_block_are_there_before_the_backward_of_those_below() -> None:
    model, _ = prepared(True)
    missing: dict[int, int] = {}
    for number, block in enumerate(model.blocks):
        below = [p for lower in model.blocks[:number] for p in lower.parameters()]
        for parameter in block.parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda _, number=number, below=below: missing.update({number: sum(p.grad is None for p in below)})
            )
    model.loss(*rows(0)).backward()
    assert missing == {
        number: sum(len(list(lower.parameters())) for lower in model.blocks[:number]) for number in range(4)
    }
