"""The production path against the plain reference on every task of the real bundle, with a trained model.

The reference is asked for every other item; `make bench` asks it for all at a cap of 100 items a task.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers import load

CAP = 11
TIE = 1e-5
BF16_ERROR = 0.05
"""nats: 8 bits of mantissa on logits of up to 15, averaged over a few tokens"""


@pytest.fixture(scope="module")
def compare():
    module = load(Path(__file__).with_name("compare.py"), "core_compare")
    if not module.CORPUS.is_dir():
        pytest.skip(f"the corpus is not there ({module.CORPUS})")
    return module


@pytest.mark.slow
def test_a_trained_d2_answers_as_the_reference_in_fp32_and_nearly_so_in_bf16(compare, core_bundle):
    torch.set_num_threads(1)
    tokenizer, rows = compare.corpus_tokenizer(4096, 1)
    model = compare.trained_gpt(2, 4096, rows, 40)
    exact = [compare.compare_task(task, tokenizer, model, CAP, every=2, whole=False) for task in core_bundle.tasks]
    assert [margin for task in exact for margin in task.differing if margin >= TIE] == []
    assert len({answer.right for task in exact for answer in task.answers}) == 2
    other = compare.in_bf16(model)
    rounded = [
        compare.again(other, task, tokenizer, CAP, known) for task, known in zip(core_bundle.tasks, exact, strict=True)
    ]
    flips = [margin for task in rounded for margin in task.differing]
    assert len(flips) <= 0.02 * sum(len(task.answers) for task in rounded)
    assert all(margin < BF16_ERROR for margin in flips)
