from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from job.errors import DataError
from job.evaluation import score
from job.evaluation.batches import plan_batches
from job.evaluation.prompts import Item, items_of


def test_the_head_on_scored_positions_gives_the_models_own_losses(tiny_gpt, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 512, (3, 40), generator=generator)
    targets = torch.randint(0, 512, (3, 40), generator=generator)
    logits = tiny_gpt.logits(ids).detach()
    targets[0] = logits[0].argmax(-1)
    keep = torch.rand(3, 40, generator=generator) < 0.3
    monkeypatch.setattr(score, "HEAD_ROWS", 7)
    nll, greedy, lead = score.Forward(tiny_gpt)(ids, keep.flatten().nonzero().squeeze(1), targets[keep])
    torch.testing.assert_close(nll, torch.nn.functional.cross_entropy(logits[keep], targets[keep], reduction="none"))
    assert greedy.tolist() == (logits[keep].argmax(-1) == targets[keep]).tolist() and 0 < greedy.sum() < len(greedy)
    top = logits[keep].topk(2).values
    own = logits[keep].gather(1, targets[keep][:, None])[:, 0]
    torch.testing.assert_close(lead, torch.where(greedy, top[:, 0] - top[:, 1], own - top[:, 0]))


def losses(*means: float) -> list[np.ndarray]:
    return [np.array([] if math.isnan(mean) else [mean, mean], dtype=np.float32) for mean in means]


NOTHING = math.nan


@pytest.mark.parametrize(
    ("means", "gold", "chosen", "margin"),
    [
        ((2.0, 1.0, 3.0), 1, 1, 1.0),
        ((2.0, 1.0, 3.0), 2, 1, -2.0),
        ((1.0, 1.0), 0, 0, 0.0),
        ((1.0, 1.0), 1, 0, 0.0),
        ((NOTHING, 1.0), 1, 0, None),
        ((NOTHING, 1.0), 0, 0, None),
        ((1.0, NOTHING), 0, 0, None),
        ((1.0, NOTHING), 1, 0, None),
        ((3.0, NOTHING, 1.0), 2, 2, 2.0),
    ],
)
def test_the_lowest_mean_wins_and_an_empty_option_only_in_first_place(means, gold, chosen, margin):
    reference_choice = list(means).index(min(means))
    answer, gap = score.decide_by_loss(Item(5, gold, np.array([]), (), ()), losses(*means))
    assert (answer.line, answer.gold, answer.chosen, answer.right, answer.margin) == (
        5,
        gold,
        chosen,
        chosen == gold,
        margin,
    )
    assert chosen == reference_choice and gap >= 0


@pytest.mark.parametrize("share_prefix", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_answer_of_the_real_bundle_equals_the_references(
    core_bundle, reference, tiny_gpt, tokenizer, share_prefix
):
    """All 22 tasks under a cap of 12; four items of each are also scored one by one, with all logits."""
    forward = score.Forward(tiny_gpt)
    seen = set()
    for task in core_bundle.tasks:
        items = list(items_of(task, tokenizer, 12))
        answers = score.score_items(forward, task.kind, items, plan_batches(items, 8000, share_prefix))
        pool = reference.pool_of(list(task.examples), 12)
        for i in range(0, 12, 3):
            rows, starts = reference.rows_of(task.kind, pool, i, task.shots, task.delimiter, tokenizer.encode, 0)
            right, chosen, gap = reference.answer(tiny_gpt.logits, task.kind, rows, starts, pool[i].get("gold"))
            assert (answers[i].right, answers[i].chosen) == (right, chosen) or gap < 1e-5, (task.label, i)
            if task.kind != "language_modeling":
                seen.add(right)
                if right and answers[i].margin is not None:
                    assert answers[i].margin == pytest.approx(gap, abs=2e-5)
    assert seen == {True, False}


def test_answers_do_not_depend_on_the_budget_even_where_options_nearly_tie(
    core_bundle, tiny_gpt, tokenizer, monkeypatch
):
    task = next(task for task in core_bundle.tasks if task.label == "arc_easy")
    items = list(items_of(task, tokenizer, 60))[:24]
    monkeypatch.setattr(score, "TIE", 0.02)
    forward = score.Forward(tiny_gpt)
    plans = [
        plan_batches(items, budget, True, fine)
        for budget, fine in ((1, False), (1, True), (3000, False), (60_000, False))
    ]
    runs = [score.score_items(forward, task.kind, items, plan) for plan in plans]
    for answers in runs[1:]:
        for i in range(len(items)):
            assert (answers[i].chosen, answers[i].right) == (runs[0][i].chosen, runs[0][i].right)
            assert answers[i].margin == pytest.approx(runs[0][i].margin, abs=2e-5)
    assert any(abs(answer.margin) < 0.02 for answer in runs[0].values())


@pytest.mark.parametrize("share_prefix", [True, False])
def test_padding_shared_prefixes_and_company_change_nothing(tiny_gpt, share_prefix):
    generator = np.random.default_rng(0)
    items = [
        Item.of_rows(i, 0, [generator.integers(0, 512, n) for n in (m, m + 3)], [m // 2] * 2)
        for i, m in enumerate(range(4, 90, 7))
    ]
    forward = score.Forward(tiny_gpt)
    together = score.score_items(forward, "multiple_choice", items, plan_batches(items, 100_000, share_prefix))
    for i, item in enumerate(items):
        alone = score.score_items(forward, "multiple_choice", [item], plan_batches([item], 1))[0]
        assert (alone.chosen, alone.right) == (together[i].chosen, together[i].right)
        assert alone.margin == pytest.approx(together[i].margin, abs=2e-5)


@pytest.mark.parametrize("kind", ["multiple_choice", "language_modeling"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_names_task_and_item(kind, value):
    class Overflowing:
        """A model whose logits after token 7 hold `value`."""

        def hidden(self, idx, shared=None, positions=None):
            return torch.nn.functional.one_hot(idx, 16).float().flatten(0, 1)[positions]

        def lm_head(self, hidden):
            logits = hidden.clone()
            logits[hidden[:, 7] == 1, 3] = value
            return logits

    rows = [[np.array([1, 2, 4]), np.array([1, 2, 5])], [np.array([1, 7, 4]), np.array([1, 7, 5])]]
    items = [Item.of_rows(line, 0, options, [2, 2]) for line, options in enumerate(rows, 11)]
    forward = score.Forward(Overflowing(), share_prefix=False)
    with pytest.raises(DataError, match="boolq, item of line 12: the model's loss is NaN or infinite"):
        score.score_items(forward, kind, items, plan_batches(items, 100), label="boolq")
