"""CORE's production path beside the plain one-item-at-a-time reference: same answers, how much sooner, and where the
time goes.

    python -m pytest tests/bench/bench_core.py --override-ini "python_files=bench_*.py" --capture=no

Seconds are CPU seconds of one thread; tokenising is in neither column.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers import load
from job.evaluation.bundle import open_bundle

ROOT = Path(__file__).parents[2]
ARCHIVE = ROOT.parent / "shared" / "data" / "core" / "core_bundle.tar.zst"


@pytest.fixture(scope="module")
def compare():
    module = load(ROOT / "tests/job/evaluation/compare.py", "core_compare")
    if not module.CORPUS.is_dir() or not ARCHIVE.is_file():
        pytest.skip(f"the corpus or the CORE bundle is not there ({module.CORPUS}, {ARCHIVE})")
    torch.set_num_threads(1)
    return module


@pytest.fixture(scope="module")
def bundle():
    return open_bundle(ARCHIVE)


def print_table(title, compared, scores=None):
    """The reference's seconds are for all items, from those that it was asked."""
    ours, theirs = sum(c.seconds for c in compared), sum(c.speedup * c.seconds for c in compared)
    print(
        f"\n{title}\n{'task':<34}{'items':>6}{'seconds':>9}{'share':>7}{'reference':>11}{'times':>7}{'differ':>8}{'margin':>9}"
    )
    for c in compared:
        margin = f"{max(c.differing):.1e}" if c.differing else ""
        cells = f"{len(c.answers):>6}{c.seconds:>9.2f}{c.seconds / ours:>7.1%}{c.speedup * c.seconds:>11.2f}"
        print(f"{c.label:<34}{cells}{c.speedup:>7.1f}{len(c.differing):>8}{margin:>9}")
    items, differing = sum(len(c.answers) for c in compared), sum(len(c.differing) for c in compared)
    print(f"{'all':<34}{items:>6}{ours:>9.2f}{'':>7}{theirs:>11.2f}{theirs / ours:>7.1f}{differing:>8}")
    print(f"items a second: {items / ours:.2f}, reference {items / theirs:.2f}", flush=True)
    if scores:
        print(f"score {scores[0]:.6f}, reference {scores[1]:.6f}", flush=True)


def test_every_answer_at_a_cap_of_100(compare, bundle):
    tokenizer, rows = compare.corpus_tokenizer(4096, 1)
    model = compare.trained_gpt(4, 4096, rows, 120)
    exact = [compare.compare_task(task, tokenizer, model, 100, whole=False) for task in bundle.tasks]
    print_table("d4 after 120 steps, fp32, cap 100, 4,096 tokens in the vocabulary", exact, compare.scores(exact))
    other = compare.in_bf16(model)
    rounded = [
        compare.again(other, task, tokenizer, 100, known) for task, known in zip(bundle.tasks, exact, strict=True)
    ]
    print_table("the same weights in bf16; reference in fp32", rounded, compare.scores(rounded))
    assert [margin for c in exact for margin in c.differing if margin >= 1e-5] == []


@pytest.mark.parametrize("depth", [4, 8])
def test_items_a_second(compare, bundle, depth):
    tokenizer, rows = compare.corpus_tokenizer(32768, 5)
    model = compare.trained_gpt(depth, 32768, rows, 3)
    compared = [compare.compare_task(task, tokenizer, model, 20, every=4) for task in bundle.tasks]
    print_table(
        f"d{depth}, fp32, cap 20, 32,768 tokens in the vocabulary; the reference is asked every fourth item", compared
    )
