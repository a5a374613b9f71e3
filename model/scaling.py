"""What follows from depth: parameters, FLOPs, tokens, batch, steps, learning rates, weight decay.

The published runs turn one knob, depth. Everything else was tuned on a 12-layer model, d12, with 2^19 tokens a step,
and is carried to other depths by power laws. With S the *scaling parameters* (transformer matrices and head: the count
that gave the cleanest scaling laws; the embedding tables cost no matrix product), r the tokens per scaling parameter
and D = r S the tokens to train on:

    batch                B  = 2^19 (D / D_d12)^0.383, to the nearest power of two   a longer run can afford larger steps
    steps                N  = floor(int(r S) / B)
    learning rates       *= sqrt(B / 2^19)                                           noise falls with sqrt(B)
    AdamW tables, head   *= (d / 768)^-1/2                                               wider layers, smaller steps
    Muon's weight decay  *= sqrt(B / 2^19) D_d12 / D                                 the same averaging time, in epochs
                    or    = base (12 / depth)^2 ("depth", until 6 February 2026)

D_d12 takes the same r, so that r cancels in every ratio D / D_d12 = S / S_d12; that is why these rules also hold when a
run names its steps or tokens itself.

FLOPs per token are counted as the leaderboard counts them: 6 for every weight of a matrix product (2 forward, 4
backward) and, for attention, 12 d min(window, T) a layer, which is the count without causality (the exact causal one is
about two thirds of it).

`derive` returns every such number as a `Value`, with a sentence of why and where it comes from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from model.config import SMEAR_CHANNELS, ConfigError, GPTConfig, width_for_depth
from model.hyper import GroupSpec
from model.partition import parameter_groups

REFERENCE_BATCH = 1 << 19  # tokens a step that d12 was tuned with
REFERENCE_WIDTH = 768  # d12's width
REFERENCE_DEPTH = 12
EPS = 1e-10

LEADERBOARD = "the leaderboard's training program"
PALM = "Chowdhery et al. 2022 (PaLM), appendix B"
POWER_LINES = "Bergsma et al. 2025 (Power Lines, arXiv 2505.13738)"
AVERAGING_TIME = "Wang and Aitchison 2024 (arXiv 2405.13698)"
ASKED = "asked for"


@dataclass(frozen=True)
class Value:
    """One derived number: what it is, a sentence of why, and the formula's source."""

    value: Any
    why: str
    source: str


@dataclass(frozen=True)
class GroupRule:
    """Base hyperparameters of one parameter group, as tuned on d12 at 2^19 tokens a step, and how they travel."""

    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.8, 0.95)
    by_batch: bool = True  # lr grows with sqrt(B / 2^19)
    by_width: bool = False  # lr shrinks with (d / 768)^-1/2


@dataclass(frozen=True)
class Rules:
    """How one generation trains: every group's base values (`groups["matrices"]` are Muon's) and Muon's switches."""

    ratio: float  # tokens per scaling parameter when nothing else is asked for
    decay_rule: str  # "horizon" or "depth"
    groups: Mapping[str, GroupRule]
    muon: Mapping[str, Any] = field(default_factory=dict)  # Muon's fields of GroupSpec

    def with_rates(self, lrs: Mapping[str, float]) -> Rules:
        """These rules with other base learning rates by group."""
        if unknown := lrs.keys() - self.groups.keys():
            raise ConfigError(f"no such parameter group: {min(unknown)!r}; there are {', '.join(self.groups)}")
        changed = {name: replace(self.groups[name], lr=lr) for name, lr in lrs.items()}
        return replace(self, groups={**self.groups, **changed})


RULES: dict[str, Rules] = {
    "feb": Rules(
        ratio=10.5,
        decay_rule="depth",
        groups={
            "matrices": GroupRule(0.02, weight_decay=0.2),
            "wte": GroupRule(0.3, by_width=True),
            "value_embeds": GroupRule(0.3, by_width=True),
            "head": GroupRule(0.004, by_width=True),
            "resid_lambdas": GroupRule(0.005),
            "x0_lambdas": GroupRule(0.5, betas=(0.96, 0.95)),
        },
        muon={"beta2": 0.95, "norm_factor": 1.02, "muon_eq": False, "muon_plus": False},
    ),
    "head": Rules(
        ratio=12.0,
        decay_rule="horizon",
        groups={
            "matrices": GroupRule(0.02, weight_decay=0.28),
            "wte": GroupRule(0.3, weight_decay=0.001, betas=(0.8, 0.995), by_width=True),
            "value_embeds": GroupRule(0.15, weight_decay=0.01, betas=(0.8, 0.995), by_width=True),
            "head": GroupRule(0.008, weight_decay=0.01, betas=(0.8, 0.96), by_width=True),
            "resid_lambdas": GroupRule(0.005, weight_decay=0.05),
            "x0_lambdas": GroupRule(0.5, betas=(0.96, 0.95)),
            "smear_backout": GroupRule(0.2, by_batch=False),
        },
        muon={"beta2": 0.9, "norm_factor": 1.01, "muon_eq": True, "muon_plus": True},
    ),
}


@dataclass(frozen=True)
class Derived:
    """Everything that follows from a configuration and a horizon. `specs` is what the optimizer takes."""

    parameters: dict[str, Value]  # by group
    total_parameters: Value
    scaling_parameters: Value
    flops_per_token: Value
    batch_tokens: Value
    ratio: Value
    steps: Value
    tokens: Value
    flops: Value
    learning_rates: dict[str, Value]  # by group
    weight_decay: Value  # Muon's at the start of the run
    specs: dict[str, GroupSpec]

    def values(self) -> Iterator[tuple[str, Value]]:
        """Every derived value by name, those of a group as "parameters.wte", in the order of derivation."""
        for name, value in vars(self).items():
            if isinstance(value, Value):
                yield name, value
            elif name != "specs":
                yield from ((f"{name}.{group}", v) for group, v in value.items())


def derive(
    config: GPTConfig,
    rules: Rules,
    *,
    ratio: float | None = None,
    steps: int | None = None,
    batch_tokens: int | None = None,
) -> Derived:
    """All that follows from `config`, trained by `rules` over `ratio` tokens per scaling parameter, or `steps`.

    At most one horizon may be given; none means the rules' own ratio. `batch_tokens` (a multiple of config.seq_len)
    None means the batch rule. Raises ConfigError for a horizon of no step and for values that are not positive.
    """
    _check_request(config, ratio, steps, batch_tokens)
    counts = parameter_counts(config)
    scaling = scaling_parameters(config)
    batch = _batch(config, batch_tokens)
    n = _steps(scaling, rules.ratio if ratio is None else ratio, batch.value, steps)
    trained = n.value * batch.value
    per_token = flops_per_token(config)
    lrs = {name: _learning_rate(name, rules.groups[name], config, batch.value) for name in counts}
    decay = _weight_decay(config, rules, batch.value)
    return Derived(
        parameters={name: Value(count, _COUNTED[name], LEADERBOARD) for name, count in counts.items()},
        total_parameters=Value(sum(counts.values()), "all groups together", LEADERBOARD),
        scaling_parameters=Value(
            scaling, "matrices and head: the count that scaling laws are cleanest in", LEADERBOARD
        ),
        flops_per_token=Value(
            per_token, "6 per weight of a matrix product, plus 12 d min(window, T) a layer for attention", PALM
        ),
        batch_tokens=batch,
        ratio=Value(trained / scaling, f"{trained:,} tokens over {scaling:,} scaling parameters", LEADERBOARD),
        steps=n,
        tokens=Value(trained, f"{n.value:,} steps of {batch.value:,} tokens", LEADERBOARD),
        flops=Value(per_token * trained, f"{per_token:,} a token times {trained:,} tokens", LEADERBOARD),
        learning_rates=lrs,
        weight_decay=decay,
        specs={name: _spec(name, rules, lrs[name].value, decay.value) for name in counts},
    )


_COUNTED = {
    "matrices": "12 d^2 a layer (attention 4 d^2, MLP 8 d^2) and the value embeddings' gates; Muon's",
    "wte": "one vector of width d a word, the vocabulary padded to a multiple of 64",
    "value_embeds": "one table of the same size for every second layer",
    "head": "one vector of width d a word, not tied to the embedding",
    "resid_lambdas": "one factor of the residual stream a layer",
    "x0_lambdas": "one factor of the embedding a layer",
    "smear_backout": f"smear's gate of {SMEAR_CHANNELS} channels, its factor, and backout's",
}


def parameter_counts(config: GPTConfig) -> dict[str, int]:
    """Parameters by group, under the names of `GPT.groups`."""
    groups = parameter_groups(config, None, None)
    return {name: sum(p.size for p in groups[name]) for name in _COUNTED if name in groups}


def scaling_parameters(config: GPTConfig) -> int:
    """Transformer matrices (value-embedding gates included) and head."""
    counts = parameter_counts(config)
    return counts["matrices"] + counts["head"]


def flops_per_token(config: GPTConfig) -> int:
    """Forward and backward, as the leaderboard counts them."""
    products = scaling_parameters(config) + SMEAR_CHANNELS * config.smear
    return 6 * products + sum(12 * config.width * window for window in config.windows)


def causal_flops_per_token(config: GPTConfig) -> float:
    """The same, but of attention only the pairs that causality and the window leave."""
    unseen = sum(window * (window - 1) / (2 * config.seq_len) for window in config.windows)
    return flops_per_token(config) - 12 * config.width * unseen


def reference(config: GPTConfig) -> GPTConfig:
    """d12 with the same vocabulary, context and switches: the model that the base values were tuned on."""
    return replace(config, depth=REFERENCE_DEPTH, width=width_for_depth(REFERENCE_DEPTH))


def accumulation_steps(batch_tokens: int, seq_len: int, device_rows: int, ranks: int) -> int:
    """Micro-steps in a step: batch / (device_rows x seq_len x ranks), or ConfigError that names the nearest batches."""
    for name, value in (("device batch", device_rows), ("number of ranks", ranks)):
        if value < 1:
            raise ConfigError(f"the {name} is {value}: it must be at least 1")
    micro = device_rows * seq_len * ranks
    if batch_tokens % micro:
        lower = batch_tokens // micro * micro
        nearest = " or ".join(f"{b:,}" for b in (lower, lower + micro) if b)
        rows = f"{device_rows} rows of {seq_len} tokens on each of {ranks} rank{'s' * (ranks > 1)}"
        raise ConfigError(f"a batch of {batch_tokens:,} tokens is not a multiple of {rows} ({micro:,}): take {nearest}")
    return batch_tokens // micro


def _check_request(config: GPTConfig, ratio: float | None, steps: int | None, batch_tokens: int | None) -> None:
    if ratio is not None and steps is not None:
        raise ConfigError("ratio and steps are given: each alone decides how long to train, give one of them")
    for name, value in {"ratio": ratio, "steps": steps, "batch_tokens": batch_tokens}.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{name} is {value}: it must be positive")
    if batch_tokens is not None and batch_tokens % config.seq_len:
        raise ConfigError(
            f"a batch of {batch_tokens:,} tokens is not a whole number of rows of {config.seq_len} tokens"
        )


def _batch(config: GPTConfig, asked: int | None) -> Value:
    if asked is not None:
        return Value(asked, f"{asked // config.seq_len:,} rows of {config.seq_len:,} tokens", ASKED)
    growth = scaling_parameters(config) / scaling_parameters(reference(config))
    exponent = math.log2(REFERENCE_BATCH * growth**0.383)
    why = f"2^19 x {growth:.3f}^0.383 = 2^{exponent:.2f}, to the nearest power of two"
    batch = 1 << round(exponent)
    if batch % config.seq_len:
        raise ConfigError(
            f"the batch rule gives {batch:,} tokens, no whole number of rows of {config.seq_len}: "
            "give the batch yourself"
        )
    return Value(batch, why, POWER_LINES)


def _steps(scaling: int, ratio: float, batch: int, steps: int | None) -> Value:
    if steps is not None:
        return Value(steps, "the number of optimizer steps", ASKED)
    tokens = int(ratio * scaling)
    if tokens < batch:
        raise ConfigError(
            f"{tokens:,} tokens are less than one batch of {batch:,}: train on more tokens or take a smaller batch"
        )
    return Value(tokens // batch, f"floor(int({ratio:g} x {scaling:,}) / {batch:,})", LEADERBOARD)


def _learning_rate(name: str, rule: GroupRule, config: GPTConfig, batch: int) -> Value:
    lr, why = rule.lr, [f"{rule.lr:g} on d12 at 2^19 tokens a step"]
    if rule.by_batch:
        factor = math.sqrt(batch / REFERENCE_BATCH)
        lr, why = lr * factor, [*why, f"x {factor:.4f} = sqrt(B / 2^19)"]
    if rule.by_width:
        factor = (config.width / REFERENCE_WIDTH) ** -0.5
        lr, why = lr * factor, [*why, f"x {factor:.4f} = (d / {REFERENCE_WIDTH})^-1/2"]
    return Value(lr, ", ".join(why), LEADERBOARD)


def _weight_decay(config: GPTConfig, rules: Rules, batch: int) -> Value:
    base = rules.groups["matrices"].weight_decay
    if rules.decay_rule == "depth":
        why = f"{base:g} x (12 / {config.depth})^2: deeper models decay less"
        return Value(base * (REFERENCE_DEPTH / config.depth) ** 2, why, LEADERBOARD)
    if rules.decay_rule != "horizon":
        raise ConfigError(f"no such weight decay rule: {rules.decay_rule!r}; there are 'depth' and 'horizon'")
    noise = math.sqrt(batch / REFERENCE_BATCH)
    share = scaling_parameters(reference(config)) / scaling_parameters(config)
    why = (
        f"{base:g} x {noise:.4f} x {share:.4f} = base x sqrt(B / 2^19) x D_d12 / D: "
        "the averaging time stays the same part of a run"
    )
    return Value(base * noise * share, why, AVERAGING_TIME)


def _spec(name: str, rules: Rules, lr: float, muon_decay: float) -> GroupSpec:
    rule = rules.groups[name]
    if name == "matrices":
        return GroupSpec(name, "muon", lr=lr, weight_decay=muon_decay, **rules.muon)
    return GroupSpec(name, "adamw", lr=lr, weight_decay=rule.weight_decay, betas=rule.betas, eps=EPS)
