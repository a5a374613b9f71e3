"""What follows from depth, to the digit: the published runs are the reference."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import ConfigError, GPTConfig
from model.gpt import GPT
from model.scaling import (
    RULES,
    Derived,
    accumulation_steps,
    derive,
    flops_per_token,
    parameter_counts,
    scaling_parameters,
)


def published(depth: int, generation: str, **changes: object) -> GPTConfig:
    return GPTConfig.for_depth(depth, 32768, 2048, generation, **changes)


def meta_model(config: GPTConfig) -> GPT:
    with torch.device("meta"):
        return GPT(config, torch.bfloat16)


# ---- the leaderboard's numbers


@pytest.mark.parametrize(
    ("depth", "generation", "ratio", "batch", "steps", "flops"),
    [
        (24, "feb", 12, 1 << 19, 16704, 4.330784131228946e19),  # run 1
        (26, "feb", 8.5, 1 << 19, 14889, 4.8283e19),  # run 2
        (26, "feb", 8.25, 1 << 20, 7226, 4.6866e19),  # run 3
        (26, "feb", 7.25, 1 << 19, 12700, 4.1185e19),  # run 4
        (24, "feb", 9.5, 1 << 20, 6612, 3.4285e19),
        (24, "head", 8, 1 << 20, 5568, 2.7880e19),  # run 6
    ],
)
def test_published_runs(depth: int, generation: str, ratio: float, batch: int, steps: int, flops: float) -> None:
    derived = derive(published(depth, generation), RULES[generation], ratio=ratio, batch_tokens=batch)
    assert derived.steps.value == steps
    assert float(f"{derived.flops.value:.4e}") == float(f"{flops:.4e}")
    assert derived.tokens.value == steps * batch


def test_run_1_flops_to_the_last_digit() -> None:
    derived = derive(published(24, "feb"), RULES["feb"], ratio=12, batch_tokens=524288)
    assert derived.flops.value == 43307841312289456128
    assert float(derived.flops.value) == 4.330784131228946e19


def test_run_5_before_smear_with_windows_of_a_third() -> None:
    config = published(24, "head", window_divisor=3, smear=False, backout=False)
    derived = derive(config, RULES["head"], ratio=8.7, batch_tokens=1 << 20)
    assert (derived.flops_per_token.value, derived.steps.value) == (4_860_160_128, 6055)


TABLE = {  # depth: wte = head, value embeddings, then FEB and HEAD: matrices, total, scaling parameters
    12: (25165824, 150994944, (84935808, 286262424, 110101632), (84935088, 286261730, 110100912)),
    22: (46137344, 507510784, (523374368, 1123159884, 569511712), (523371948, 1123157490, 569509292)),
    24: (50331648, 603979776, (679481856, 1384124976, 729813504), (679478976, 1384122122, 729810624)),
    26: (54525952, 708837376, (863900960, 1681790292, 918426912), (863897580, 1681786938, 918423532)),
}


@pytest.mark.parametrize("generation", ["feb", "head"])
@pytest.mark.parametrize("depth", TABLE)
def test_parameters(depth: int, generation: str) -> None:
    config = published(depth, generation)
    table, value_embeds, *generations = TABLE[depth]
    matrices, total, scaling = generations[generation == "head"]
    counts = parameter_counts(config)
    assert (counts["wte"], counts["head"], counts["value_embeds"], counts["matrices"]) == (
        table,
        table,
        value_embeds,
        matrices,
    )
    assert (sum(counts.values()), scaling_parameters(config)) == (total, scaling)
    built = {name: sum(p.numel() for _, p in group) for name, group in meta_model(config).groups().items()}
    assert built == counts


@pytest.mark.parametrize("config", [GPTConfig.for_depth(5, 300, 128), GPTConfig.for_depth(1, 1000, 64, "feb")])
def test_closed_forms_hold_for_odd_depths_and_padding(config: GPTConfig) -> None:
    built = {name: sum(p.numel() for _, p in group) for name, group in meta_model(config).groups().items()}
    assert built == parameter_counts(config)


@pytest.mark.parametrize(
    ("depth", "generation", "flops"),
    [(12, "head", 759_696_048), (22, "head", 3_763_085_976), (24, "head", 4_775_225_616), (26, "head", 5_991_051_288),
     (24, "feb", 4_945_112_064), (26, "feb", 6_185_320_128)],
)  # fmt: skip
def test_flops_per_token(depth: int, generation: str, flops: int) -> None:
    assert flops_per_token(published(depth, generation)) == flops


@pytest.mark.parametrize("generation", ["feb", "head"])
def test_automatic_batch(generation: str) -> None:
    expected = {
        8: 18,
        **dict.fromkeys(range(10, 18, 2), 19),
        **dict.fromkeys(range(18, 32, 2), 20),
        **dict.fromkeys(range(32, 52, 2), 21),
    }
    actual = {L: derive(published(L, generation), RULES[generation]).batch_tokens.value for L in expected}
    assert actual == {L: 1 << power for L, power in expected.items()}


# ---- FLOPs, counted by torch


def counted(config: GPTConfig, rows: int) -> dict[str, int]:
    with torch.device("meta"):
        idx = torch.zeros(rows, config.seq_len, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            GPT(config).loss(idx, idx).backward()
    return {str(op).split(".")[-1]: flops for op, flops in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("generation", ["feb", "head"])
def test_matrix_products_counted_by_torch(generation: str) -> None:
    config, rows = GPTConfig.for_depth(4, 512, 256, generation), 3
    attention = sum(12 * config.width * window for window in config.windows)
    formula = (flops_per_token(config) - attention) * rows * config.seq_len
    unsmeared = 6 * 24 * rows * config.smear  # a row's first token has no predecessor: its gate is not computed
    assert counted(config, rows)["mm"] == formula - unsmeared


def test_attention_is_counted_without_causality() -> None:
    config, rows = GPTConfig.for_depth(3, 64, 128, window_pattern="L"), 2
    assert counted(config, rows)["bmm"] == 12 * config.width * 128 * 3 * rows * 128


# ---- learning rates and weight decay


def at(depth: int, generation: str, batch: int, weight_decay: float | None = None, **changes: object) -> Derived:
    rules = dataclasses.replace(RULES[generation], **changes)
    if weight_decay is not None:
        matrices = dataclasses.replace(rules.groups["matrices"], weight_decay=weight_decay)
        rules = dataclasses.replace(rules, groups={**rules.groups, "matrices": matrices})
    return derive(published(depth, generation), rules, batch_tokens=batch)


@pytest.mark.parametrize(
    ("depth", "generation", "batch", "changes", "expected"),
    [
        (24, "feb", 1 << 19, {}, 0.0500),
        (26, "feb", 1 << 20, {}, 0.0426),
        (26, "feb", 1 << 19, {"decay_rule": "horizon"}, 0.0240),
        (22, "head", 1 << 20, {}, 0.0766),
        (24, "head", 1 << 20, {}, 0.0597),
        (26, "head", 1 << 20, {}, 0.0475),
    ],
)
def test_weight_decay(depth: int, generation: str, batch: int, changes: dict, expected: float) -> None:
    derived = at(depth, generation, batch, **changes)
    assert round(derived.weight_decay.value, 4) == expected
    assert derived.specs["matrices"].weight_decay == derived.weight_decay.value


def test_learning_rates_of_run_6() -> None:
    lrs = {name: spec.lr for name, spec in at(24, "head", 1 << 20).specs.items()}
    root2 = math.sqrt(2)  # at d24 and 2^20 the batch and width rules cancel
    expected = {"matrices": 0.02 * root2, "wte": 0.3, "value_embeds": 0.15, "head": 0.008,
                "resid_lambdas": 0.005 * root2, "x0_lambdas": 0.5 * root2, "smear_backout": 0.2}  # fmt: skip
    assert lrs == pytest.approx(expected)


def test_learning_rates_of_run_2() -> None:
    lrs = {name: spec.lr for name, spec in at(26, "feb", 1 << 19).specs.items()}
    width = (1664 / 768) ** -0.5
    expected = {"matrices": 0.02, "wte": 0.3 * width, "value_embeds": 0.3 * width, "head": 0.004 * width,
                "resid_lambdas": 0.005, "x0_lambdas": 0.5}  # fmt: skip
    assert lrs == pytest.approx(expected)


def test_specs_of_both_generations() -> None:
    feb, head = (at(24, generation, 1 << 20).specs for generation in ("feb", "head"))
    assert {(s.betas, s.weight_decay) for name, s in feb.items() if name not in ("matrices", "x0_lambdas")} == {
        ((0.8, 0.95), 0.0)
    }
    assert (feb["x0_lambdas"].betas, feb["x0_lambdas"].weight_decay) == ((0.96, 0.95), 0.0)
    assert {name: (s.betas, s.weight_decay) for name, s in head.items() if name != "matrices"} == {
        "wte": ((0.8, 0.995), 0.001),
        "value_embeds": ((0.8, 0.995), 0.01),
        "head": ((0.8, 0.96), 0.01),
        "resid_lambdas": ((0.8, 0.95), 0.05),
        "x0_lambdas": ((0.96, 0.95), 0.0),
        "smear_backout": ((0.8, 0.95), 0.0),
    }
    for specs in (feb, head):
        assert {s.kind for name, s in specs.items() if name != "matrices"} == {"adamw"} and specs[
            "matrices"
        ].kind == "muon"
        assert all(name == s.name and s.eps == 1e-10 for name, s in specs.items())
    muon = [(s.norm_factor, s.muon_eq, s.muon_plus, s.beta2) for s in (feb["matrices"], head["matrices"])]
    assert muon == [(1.02, False, False, 0.95), (1.01, True, True, 0.9)]


def test_base_values_can_be_changed() -> None:
    derived = derive(published(12, "head"), RULES["head"].with_rates({"wte": 0.6}), batch_tokens=1 << 19)
    assert derived.specs["wte"].lr == pytest.approx(0.6)
    assert at(12, "head", 1 << 19, weight_decay=0.1).weight_decay.value == pytest.approx(0.1)
    assert RULES["head"].groups["wte"].lr == 0.3
    with pytest.raises(ConfigError, match="no such parameter group: 'lm_head'"):
        RULES["head"].with_rates({"lm_head": 1.0})


# ---- horizons and explanations


def test_horizon_by_steps_or_ratio() -> None:
    config, rules = GPTConfig.for_depth(4, 4096, 256), RULES["head"]
    scaling = scaling_parameters(config)
    assert derive(config, rules, steps=100, batch_tokens=8192).tokens.value == 819200
    assert derive(config, rules, ratio=1.5, batch_tokens=8192).steps.value == int(1.5 * scaling) // 8192
    assert derive(config, rules, batch_tokens=8192).steps.value == 12 * scaling // 8192
    assert derive(config, rules, steps=100, batch_tokens=8192).ratio.value == 819200 / scaling


def test_every_value_says_why_and_whence() -> None:
    derived = derive(published(24, "head"), RULES["head"], ratio=8)
    values = dict(derived.values())
    assert values["steps"].value == 5568 and values["batch_tokens"].source.startswith("Bergsma")
    assert values["steps"].why == "floor(int(8 x 729,810,624) / 1,048,576)"
    assert {"parameters.matrices", "learning_rates.wte", "weight_decay", "flops"} <= set(values)
    assert all(value.why and value.source for value in values.values())


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        ({"ratio": 8, "steps": 100}, "ratio and steps are given"),
        ({"ratio": 0}, "ratio is 0: it must be positive"),
        ({"ratio": float("nan")}, "ratio is nan"),
        ({"steps": -1}, "steps is -1"),
        ({"ratio": 1e-4, "batch_tokens": 8192}, r"\d+ tokens are less than one batch of 8,192"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"batch_tokens": 1000}, "1,000 tokens is not a whole number of rows of 256"),
    ],
)
def test_bad_requests_are_refused(request_: dict, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        derive(GPTConfig.for_depth(4, 4096, 256), RULES["head"], **request_)


def test_unknown_decay_rule() -> None:
    with pytest.raises(ConfigError, match="no such weight decay rule: 'width'"):
        at(12, "head", 1 << 19, decay_rule="width")


def test_accumulation() -> None:
    assert accumulation_steps(1 << 20, 2048, 32, 8) == 2
    with pytest.raises(ConfigError, match="take 983,040 or 1,179,648"):
        accumulation_steps(1 << 20, 2048, 12, 8)
    with pytest.raises(ConfigError, match=r"take 524,288$"):
        accumulation_steps(1 << 18, 2048, 32, 8)
    with pytest.raises(ConfigError, match="the device batch is 0"):
        accumulation_steps(1 << 18, 2048, 0, 8)
