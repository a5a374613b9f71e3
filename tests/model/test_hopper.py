"""A step's compiled pieces, lowered for an H100 by a machine that has none (hopper.py tells how), against the table
in hopper.md.

A change that moves a number here moves it on purpose: `python tests/model/hopper.py --write`, and the table's
difference is reviewed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
UNAVAILABLE = 69
REWRITE = "if that is meant: python tests/model/hopper.py --write"

pytestmark = pytest.mark.slow
Table = dict[tuple[str, str], list[str]]


def table(text: str) -> Table:
    """(step, graph) -> calls, Triton kernels, other kernels, GB, saved."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| d")
    ]
    assert len({(step, graph) for step, graph, *_ in rows}) == len(rows), "a graph was compiled twice"
    return {(step, graph): numbers for step, graph, *numbers in rows}


DEPTHS = [24, pytest.param(22, marks=pytest.mark.by_hand)]


@pytest.fixture(scope="module", params=DEPTHS)
def depth(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def lowered(depth: int) -> Table:
    ended = subprocess.run(
        [sys.executable, HERE / "hopper.py", str(depth)], capture_output=True, text=True, check=False
    )
    if ended.returncode == UNAVAILABLE:
        pytest.skip(ended.stderr.strip().splitlines()[-1])
    assert ended.returncode == 0, ended.stderr
    return table(ended.stdout)


@pytest.fixture(scope="module")
def kept(depth: int) -> Table:
    whole = table((HERE / "hopper.md").read_text())
    assert {step for step, _ in whole} == {"d24", "d22"}
    return {(step, graph): numbers for (step, graph), numbers in whole.items() if step == f"d{depth}"}


def test_every_graph_stands_in_the_table(lowered: Table, kept: Table) -> None:
    assert sorted(lowered) == sorted(kept), REWRITE


def test_launches_are_the_tables(lowered: Table, kept: Table) -> None:
    assert {graph: numbers[:3] for graph, numbers in lowered.items()} == {
        graph: numbers[:3] for graph, numbers in kept.items()
    }, REWRITE


def test_bytes_are_the_tables(lowered: Table, kept: Table) -> None:
    for graph, numbers in kept.items():
        for now, then in zip(lowered[graph][3:], numbers[3:], strict=True):
            assert float(now or 0) == pytest.approx(float(then or 0), rel=0.01), f"{graph}: {REWRITE}"


def test_blocks_of_one_kind_share_one_graph(lowered: Table, depth: int) -> None:
    for way in ("forward", "backward"):
        calls = [int(n[0]) for (_, graph), n in lowered.items() if "block" in graph and graph.endswith(way)]
        assert len(calls) == 4 and sum(calls) == depth


def test_the_loss_holds_no_fp32_tensor_of_a_chunk(lowered: Table) -> None:
    """bf16 in, e5m2 out: three bytes a logit, a kernel's input counted once. One fp32 tensor would be eight more."""
    (numbers,) = [n for (_, graph), n in lowered.items() if graph.startswith("_loss_and_gradient")]
    assert float(numbers[3]) * 1e9 <= 3.1 * 2048 * 32_768


@pytest.fixture(scope="module")
def levers() -> dict[str, list[str]]:
    """Preset -> GB of a block without and with value embedding, launches, saved, GB and ms of a step."""
    command = [sys.executable, HERE / "hopper_levers.py", "frontier"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode == UNAVAILABLE:
        pytest.skip(ended.stderr.strip().splitlines()[-1])
    assert ended.returncode == 0, ended.stderr
    rows = [line.strip("|").split("|") for line in ended.stdout.splitlines()[2:]]
    return {name.strip(): [number.strip() for number in numbers] for name, *numbers in rows}


def test_levers_leave_a_fifth_of_a_micro_step_out(levers: dict[str, list[str]]) -> None:
    plain, frontier = levers["none"], levers["frontier"]
    assert float(frontier[0]) <= 11.4 and float(frontier[1]) < 12.1
    assert max(int(launches) for launches in frontier[2].split(",")) <= 50
    assert max(float(saved) for saved in frontier[3].split(",")) <= 25
    assert float(frontier[4]) < 0.8 * float(plain[4])
