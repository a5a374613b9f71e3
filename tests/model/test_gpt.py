"""The GPT against a second implementation that knows nothing of the first: one row, one head, one position at a
time."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.config import ConfigError, GPTConfig
from model.gpt import GPT, Linear

TINY = GPTConfig(depth=4, vocab_size=64, seq_len=12, width=32, head_dim=8, window_tile=3)  # windows 3, 3, 3, 12

SWITCHES: dict[str, dict[str, object]] = {
    "half_window": {"window_divisor": 2, "window_tile": 1},
    "third_window": {"window_divisor": 3},
    "pattern": {"window_pattern": "SL"},
    "rope_base": {"rope_base": 100.0},
    "qk_scale": {"qk_scale": 1.0},
    "softcap": {"softcap": 20.0},
    "ve_gate": {"ve_gate_channels": 32, "ve_gate_limit": 2.0},
    "no_smear": {"smear": False},
    "no_backout": {"backout": False},
    "padded_vocabulary": {"vocab_size": 50},
    "wider_heads": {"head_dim": 16},
    "odd_depth": {"depth": 3},
    "seq_len": {"seq_len": 7},  # the sequences below are longer: full-context layers see the last 7
}


# ---- the plainest possible implementation


def rms(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps)


def turned(x: Tensor, position: int, base: float) -> Tensor:
    """One head's vector, rotated clockwise by its position."""
    half = len(x) // 2
    angles = torch.tensor([position / base ** (2 * i / len(x)) for i in range(half)], dtype=x.dtype)
    first, second = x[:half], x[half:]
    return torch.cat([first * angles.cos() + second * angles.sin(), second * angles.cos() - first * angles.sin()])


def plain_windows(c: GPTConfig) -> list[int]:
    short = c.window_tile * math.ceil(c.seq_len / c.window_divisor / c.window_tile)
    kinds = (c.window_pattern * c.depth)[: c.depth - 1] + "L"
    return [min(short, c.seq_len) if kind == "S" else c.seq_len for kind in kinds]


def plain_attention(c: GPTConfig, w: dict[str, Tensor], layer: int, x: Tensor, idx: list[int]) -> Tensor:
    name = f"blocks.{layer}.attn."
    T, H = len(x), c.width // c.head_dim
    q, k, v = (torch.einsum("ti,oi->to", x, w[name + p + ".weight"]).view(T, H, -1) for p in "qkv")
    if layer % 2 == (c.depth - 1) % 2:
        table = w[f"value_embeds.{layer}.weight"]
        for t in range(T):
            for h in range(H):
                gate = c.ve_gate_limit / (1 + torch.exp(-(w[name + "ve_gate.weight"][h] @ x[t, : c.ve_gate_channels])))
                v[t, h] = v[t, h] + gate * table[idx[t]].view(H, -1)[h]
    out = torch.zeros_like(v)
    for h in range(H):
        queries = [c.qk_scale * rms(turned(q[t, h], t, c.rope_base)) for t in range(T)]
        keys = [c.qk_scale * rms(turned(k[t, h], t, c.rope_base)) for t in range(T)]
        for t in range(T):
            seen = range(max(0, t - plain_windows(c)[layer]), t + 1)
            scores = torch.stack([queries[t] @ keys[s] for s in seen]) / math.sqrt(c.head_dim)
            out[t, h] = sum(p * v[s, h] for p, s in zip(torch.softmax(scores, 0), seen, strict=True))
    return torch.einsum("ti,oi->to", out.reshape(T, -1), w[name + "o.weight"])


def plain_logits(c: GPTConfig, w: dict[str, Tensor], idx: list[int]) -> Tensor:
    x = torch.stack([rms(w["wte.weight"][i]) for i in idx])
    if c.smear:
        gates = [w["smear_lambda"] / (1 + torch.exp(-(w["smear_gate.weight"][0] @ row[:24]))) for row in x]
        x = torch.stack([x[0]] + [x[t] + gates[t] * x[t - 1] for t in range(1, len(x))])
    x0 = x
    for layer in range(c.depth):
        x = w["resid_lambdas"][layer] * x + w["x0_lambdas"][layer] * x0
        x = x + plain_attention(c, w, layer, rms(x), idx)
        up = torch.einsum("ti,oi->to", rms(x), w[f"blocks.{layer}.mlp.up.weight"])
        x = x + torch.einsum("ti,oi->to", up.clamp(min=0) ** 2, w[f"blocks.{layer}.mlp.down.weight"])
        if layer == c.depth // 2:
            middle = x
    if c.backout:
        x = x - w["backout_lambda"] * middle
    z = torch.einsum("ti,vi->tv", rms(x), w["head.weight"])[:, : c.vocab_size]
    return c.softcap * torch.tanh(z / c.softcap)


def random_model(config: GPTConfig) -> GPT:
    """Every weight away from its special initial value, so that no term of the forward pass vanishes."""
    model = GPT(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 1.0 if parameter.ndim < 2 else 1.0 / math.sqrt(parameter.size(1))
            parameter.normal_(0.0, scale, generator=generator)
        model.head.weight.mul_(4.0)
    return model


def assert_agrees(config: GPTConfig, T: int = 10) -> None:
    model = random_model(config)
    idx = torch.randint(0, config.vocab_size, (2, T), generator=torch.Generator().manual_seed(1))
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    expected = torch.stack([plain_logits(config, weights, row) for row in idx.tolist()])
    roundings = (
        16 * torch.finfo(torch.float32).eps * config.softcap
    )  # in which order products are summed is the processor's
    torch.testing.assert_close(model.logits(idx).double(), expected, rtol=0, atol=roundings)


@pytest.mark.parametrize(
    "names", [(), *((name,) for name in SWITCHES), *itertools.combinations(SWITCHES, 2)], ids="-".join
)
def test_forward_agrees_with_the_plain_one(names: tuple[str, ...]) -> None:
    changes = {key: value for name in names for key, value in SWITCHES[name].items()}
    assert_agrees(replace(TINY, **changes))


@pytest.mark.parametrize("generation", ["feb", "head"])
def test_forward_of_a_published_shape(generation: str) -> None:
    assert_agrees(GPTConfig.for_depth(2, 100, 8, generation), T=9)


def test_gradients_are_those_of_finite_differences() -> None:
    model = random_model(TINY).double()
    idx = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(2))
    inputs, targets = idx[:, :-1], idx[:, 1:]
    model.loss(inputs, targets).backward()
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        direction /= direction.norm()
        with torch.no_grad():
            parameter += 1e-5 * direction
            above = model.loss(inputs, targets)
            parameter -= 2e-5 * direction
            below = model.loss(inputs, targets)
            parameter += 1e-5 * direction
        assert parameter.grad is not None, name
        expected = (above - below).item() / 2e-5
        assert (parameter.grad * direction).sum().item() == pytest.approx(expected, rel=1e-4, abs=1e-8), name


# ---- losses and precision


def test_losses_are_those_of_the_logits() -> None:
    model = random_model(replace(TINY, vocab_size=50))
    idx = torch.randint(0, 50, (3, 11), generator=torch.Generator().manual_seed(4))
    inputs, targets = idx[:, :-1], idx[:, 1:]
    logits = model.logits(inputs)
    nll, greedy = model.token_losses(inputs, targets)
    expected = -logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    assert logits.shape == (3, 10, 50) and nll.dtype == logits.dtype == torch.float32 and greedy.dtype == torch.int64
    torch.testing.assert_close(nll, expected, rtol=0, atol=1e-5)
    assert torch.equal(greedy, logits.argmax(-1))
    torch.testing.assert_close(model.loss(inputs, targets), expected.mean(), rtol=0, atol=1e-5)


def test_bf16_keeps_fp32_masters_and_tables_in_bf16() -> None:
    config = GPTConfig.for_depth(2, 64, 16)
    model = GPT(config, torch.bfloat16)
    model.init_weights(0)
    tables = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert tables == {"wte.weight", "value_embeds.1.weight"}
    idx = torch.randint(0, 64, (2, 16))
    assert model.hidden(idx).dtype == torch.bfloat16
    loss = model.loss(idx, idx)
    loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad.dtype == p.dtype for p in model.parameters())


def test_a_fresh_model_knows_nothing() -> None:
    model = GPT(GPTConfig.for_depth(2, 500, 16))
    model.init_weights(0)
    idx = torch.randint(0, 500, (4, 16))
    assert model.loss(idx, idx).item() == pytest.approx(math.log(500), abs=0.01)


def test_later_tokens_do_not_change_earlier_ones() -> None:
    model = random_model(TINY)
    idx = torch.randint(0, 64, (1, 20), generator=torch.Generator().manual_seed(5))
    whole, part = model.logits(idx), model.logits(idx[:, :13])
    torch.testing.assert_close(whole[:, :13], part, rtol=0, atol=1e-5)


def test_training_goes_on_after_evaluation_in_inference_mode() -> None:
    model = random_model(TINY)
    idx = torch.randint(0, 64, (1, 10))
    with torch.inference_mode():
        evaluated = model.loss(idx, idx)
    trained = model.loss(idx, idx)
    trained.backward()
    assert trained.item() == pytest.approx(evaluated.item(), rel=1e-6)


def test_training_is_bitwise_repeatable_on_two_threads() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, second = (trained_a_little() for _ in range(2))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first[name], second[name]) for name in first)


def trained_a_little() -> dict[str, Tensor]:
    model = GPT(GPTConfig.for_depth(2, 512, 128))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        idx = torch.randint(0, 512, (4, 129), generator=generator)
        model.zero_grad()
        model.loss(idx[:, :-1], idx[:, 1:]).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= parameter.grad
    return model.state_dict()


# ---- initialisation


def test_weights_depend_on_seed_and_name_alone() -> None:
    config = GPTConfig.for_depth(3, 300, 64)
    plain = GPT(config)
    torch.manual_seed(99)  # the global generator plays no part
    with torch.device("meta"):
        moved = GPT(config)
    moved.to_empty(device="cpu")
    for model in (plain, moved):
        torch.rand(7)
        model.init_weights(5)
    weights = moved.state_dict()
    assert all(torch.equal(p, weights[name]) for name, p in plain.state_dict().items())

    deeper = GPT(replace(config, depth=5))  # other parameters come before and after: the shared ones are equal
    deeper.init_weights(5)
    assert torch.equal(deeper.blocks[2].mlp.up.weight, plain.blocks[2].mlp.up.weight)
    assert torch.equal(deeper.head.weight, plain.head.weight)

    plain.init_weights(6)
    assert not torch.equal(plain.head.weight, moved.head.weight)


def test_creation_order_does_not_matter() -> None:
    class Reversed(GPT):
        def named_parameters(self, *args, **kwargs):
            return iter(reversed(list(super().named_parameters(*args, **kwargs))))

    forward, backward = (cls(GPTConfig.for_depth(2, 128, 64)) for cls in (GPT, Reversed))
    forward.init_weights(1)
    backward.init_weights(1)
    weights = backward.state_dict()
    assert all(torch.equal(p, weights[name]) for name, p in forward.state_dict().items())


@pytest.mark.parametrize("generation", ["feb", "head"])
def test_initial_distributions(generation: str) -> None:
    feb = generation == "feb"
    model = GPT(GPTConfig.for_depth(4, 2048, 64, generation))
    model.init_weights(0)
    w = model.state_dict()
    bound = math.sqrt(3 / 256)

    def is_uniform(name: str, low: float, high: float) -> None:
        assert low <= w[name].min() and w[name].max() <= high, name
        assert w[name].std().item() == pytest.approx(
            (high - low) / math.sqrt(12), rel=0.3 if w[name].numel() < 100 else 0.02
        ), name

    def is_normal(name: str, std: float) -> None:
        assert w[name].std().item() == pytest.approx(std, rel=0.01) and abs(w[name].mean().item()) < 0.01 * std, name

    is_normal("wte.weight", 1.0 if feb else 0.8)
    is_normal("head.weight", 0.001)
    for name in ("blocks.0.attn.q.weight", "blocks.1.attn.k.weight", "blocks.3.attn.v.weight", "value_embeds.3.weight"):
        is_uniform(name, -bound, bound)
    is_uniform("blocks.2.mlp.up.weight", -bound if feb else -0.4 * bound, bound if feb else 0.4 * bound)
    assert not w["blocks.1.attn.o.weight"].any() and not w["blocks.1.mlp.down.weight"].any()
    if feb:
        assert not w["blocks.3.attn.ve_gate.weight"].any()
        assert torch.equal(w["resid_lambdas"], torch.ones(4)) and torch.equal(w["x0_lambdas"], torch.full((4,), 0.1))
        assert not any(name.startswith(("smear", "backout")) for name in w)
        return
    is_uniform("blocks.3.attn.ve_gate.weight", 0.0, 0.02)
    is_uniform("smear_gate.weight", 0.0, 0.02)
    assert w["smear_lambda"] == 0 and w["backout_lambda"].item() == pytest.approx(0.2)
    torch.testing.assert_close(w["resid_lambdas"], torch.tensor([1.15 - 0.10 * i / 3 for i in range(4)]))
    torch.testing.assert_close(w["x0_lambdas"], torch.tensor([0.20 - 0.15 * i / 3 for i in range(4)]))


def test_groups_hold_every_parameter_once() -> None:
    model = GPT(GPTConfig.for_depth(4, 128, 64))
    groups = model.groups()
    grouped = [name for group in groups.values() for name, _ in group]
    assert sorted(grouped) == sorted(name for name, _ in model.named_parameters())
    assert {name.split(".")[-2] for name, _ in groups["matrices"]} == {"q", "k", "v", "o", "ve_gate", "up", "down"}
    assert {name for name, _ in groups["smear_backout"]} == {"smear_gate.weight", "smear_lambda", "backout_lambda"}
    assert all(isinstance(m, Linear) for m in model.modules() if isinstance(m, torch.nn.Linear))


# ---- configuration


@pytest.mark.parametrize(
    ("depth", "width"), [(1, 128), (2, 128), (3, 256), (12, 768), (22, 1408), (24, 1536), (26, 1664)]
)
def test_width_follows_depth(depth: int, width: int) -> None:
    config = GPTConfig.for_depth(depth, 32768, 2048)
    assert (config.width, config.heads, config.head_dim) == (width, width // 128, 128)


@pytest.mark.parametrize(
    ("generation", "changes", "T", "short"),
    [("feb", {}, 2048, 1024), ("head", {}, 2048, 512), ("head", {"window_divisor": 3}, 2048, 768),
     ("head", {}, 256, 128), ("head", {}, 64, 64), ("feb", {}, 256, 128), ("head", {}, 513, 256)],
)  # fmt: skip
def test_windows(generation: str, changes: dict[str, object], T: int, short: int) -> None:
    config = GPTConfig.for_depth(10, 256, T, generation, **changes)
    assert config.windows == (short, short, short, T, short, short, short, T, short, T)


def test_softcaps_and_odd_depths() -> None:
    assert GPTConfig.for_depth(24, 32768, 2048, "feb").softcap == GPTConfig.for_depth(24, 32768, 2048).softcap == 15.0
    assert GPTConfig.for_depth(5, 256, 64).value_embed_layers == (0, 2, 4)
    assert GPTConfig.for_depth(4, 256, 64).value_embed_layers == (1, 3)
    model = GPT(GPTConfig.for_depth(1, 256, 64))
    model.init_weights(0)
    assert model.logits(torch.zeros(1, 1, dtype=torch.int64)).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"depth": 0}, "depth is 0: it must be a whole number"),
        ({"depth": True}, "depth is True"),
        ({"seq_len": -4}, "seq_len is -4"),
        ({"vocab_size": 2.5}, "vocab_size is 2.5"),
        ({"vocab_size": 65537}, "at most 65536"),
        ({"head_dim": 12}, "head_dim 12 must be even and divide the width 32: choose one of 16, 32"),
        ({"width": 16, "head_dim": 8}, "width 16 has fewer channels than the gates read (24): make it wider"),
        ({"window_pattern": "SXL"}, "window_pattern is 'SXL'"),
        ({"window_pattern": ""}, "window_pattern is ''"),
        ({"softcap": 0.0}, "softcap is 0.0"),
    ],
)
def test_bad_configurations_are_refused(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        replace(TINY, **changes)


def test_unknown_generation() -> None:
    with pytest.raises(ConfigError, match="no such generation: 'march'; there are head, feb"):
        GPTConfig.for_depth(2, 64, 16, "march")
