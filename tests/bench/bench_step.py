"""The training step on this CPU: tokens per second of a d4, plain against ours, and what bounds it.

"Plain" is the same model as one would write it down: fp32, eager, attention with a T x T mask, the logits of the
whole batch, the update in fp32. Configurations take turns, and the best of their rounds counts, so that a busy
machine disturbs all alike. bf16 is left out on a processor without instructions for it, where a step would take
minutes.
"""

from __future__ import annotations

import math
import time
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import model.gpt
import model.loss
from job.machine.host import has_fast_bf16
from model.config import GPTConfig
from model.gpt import GPT
from model.hyper import StepHyper
from model.optimizer import Optimizer
from model.scaling import RULES, derive

V, T, B, ROUNDS = 8192, 512, 16, 3
CONFIG = GPTConfig.for_depth(4, V, T)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None) -> Tensor:
    t = torch.arange(q.size(1))
    seen = (t[None, :] <= t[:, None]) & (t[None, :] >= t[:, None] - window)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, vocab_size: int, **_: object) -> Tensor:
    return F.cross_entropy(softcap * torch.tanh((hidden @ weight.mT)[:, :vocab_size].float() / softcap), targets)


class Plain(GPT):
    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        with (
            patch.object(model.gpt, "attention", plain_attention),
            patch.object(model.gpt, "cross_entropy", plain_loss),
        ):
            return super().loss(idx, targets)


class Trainee:
    """One configuration of the step; `times` holds each round's seconds of the model and of the update."""

    def __init__(self, kind: type[GPT], dtype: torch.dtype, compiled: bool) -> None:
        self.model = kind(CONFIG, compute_dtype=dtype)
        self.model.init_weights(0)
        if compiled:
            self.model.compile_blocks()
        specs = derive(CONFIG, RULES["head"], ratio=None, steps=100, batch_tokens=B * T).specs
        self.optimizer = Optimizer(self.model.groups(), specs, polar_dtype=dtype, compile=compiled)
        self.times: list[tuple[float, float]] = []
        self.loss = math.nan

    def step(self, rows: Tensor) -> None:
        began = time.perf_counter()
        loss = self.model.loss(rows[:, :-1], rows[:, 1:])
        loss.backward()
        middle = time.perf_counter()
        self.optimizer.step(StepHyper())
        self.times.append((middle - began, time.perf_counter() - middle))
        self.loss = loss.item()


def gigaflops(dtype: torch.dtype) -> float:
    """What this machine's matrix product reaches at the MLP's shape."""
    x, w = torch.randn(B * T, CONFIG.width).to(dtype), torch.randn(4 * CONFIG.width, CONFIG.width).to(dtype)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        x @ w.mT
        times.append(time.perf_counter() - began)
    return 2 * x.numel() * len(w) / min(times) / 1e9


def test_tokens_per_second() -> None:
    trainees = {
        "plain: fp32, eager": Trainee(Plain, torch.float32, compiled=False),
        "fp32, eager": Trainee(GPT, torch.float32, compiled=False),
        "fp32, compiled": Trainee(GPT, torch.float32, compiled=True),
    }
    if has_fast_bf16():
        trainees["bf16, eager"] = Trainee(GPT, torch.bfloat16, compiled=False)
        trainees["bf16, compiled"] = Trainee(GPT, torch.bfloat16, compiled=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(ROUNDS + 1):  # the first compiles
        rows = torch.randint(0, V, (B, T + 1), generator=generator)
        for trainee in trainees.values():
            trainee.step(rows)
    flops = derive(CONFIG, RULES["head"], ratio=None, steps=100, batch_tokens=B * T).flops_per_token.value * B * T
    print(f"\nd4, T {T}, V {V}, {B * T} tokens a step, {torch.get_num_threads()} threads, best of {ROUNDS}")
    bf16 = f"{gigaflops(torch.bfloat16):.0f} bf16" if has_fast_bf16() else "no bf16 instructions"
    print(f"matrix product at the MLP's shape: {gigaflops(torch.float32):.0f} GFLOP/s fp32, {bf16}\n")
    print(f"{'':20} {'tokens/s':>9} {'times plain':>12} {'model ms':>9} {'update ms':>10} {'GFLOP/s':>8} {'loss':>8}")
    reference = None
    for name, trainee in trainees.items():
        in_model, in_update = min(trainee.times[1:], key=sum)
        seconds = in_model + in_update
        reference = reference or seconds
        print(
            f"{name:20} {B * T / seconds:9.0f} {reference / seconds:12.2f} {in_model * 1e3:9.0f} "
            f"{in_update * 1e3:10.0f} {flops / in_model / 1e9:8.0f} {trainee.loss:8.4f}"
        )


def test_the_loss_by_chunk_size() -> None:
    """The last two columns: without blocks, and the plain loss."""
    tokens, sizes = B * T // 4, [1 << e for e in range(19, 26, 2)]
    dtype = torch.bfloat16 if has_fast_bf16() else torch.float32
    print(f"\nloss and gradients, {tokens} tokens, width {CONFIG.width}, {str(dtype)[6:]}: ms by logits a chunk")
    names = [*(f"2^{size.bit_length() - 1}" for size in sizes), "no blocks", "plain"]
    print(f"{'V':>8}" + "".join(f"{name:>10}" for name in names))
    for words in (V, 4 * V):
        hidden = torch.randn(tokens, CONFIG.width).to(dtype).requires_grad_()
        weight = torch.randn(words, CONFIG.width).mul_(0.02).requires_grad_()
        targets = torch.randint(0, words, (tokens,))
        ways = {name: {"CPU_CHUNK_ELEMENTS": size} for name, size in zip(names, sizes, strict=False)}
        ways["no blocks"] = {"BLOCK_ELEMENTS": model.loss.CPU_CHUNK_ELEMENTS}
        took = dict.fromkeys(names, math.inf)
        for _ in range(ROUNDS):
            for name in names:
                began = time.perf_counter()
                with patch.multiple(model.loss, **ways.get(name, {})):
                    loss = plain_loss if name == "plain" else model.loss.cross_entropy
                    loss(hidden, weight.to(dtype) if name == "plain" else weight, targets, 15.0, words).backward()
                took[name] = min(took[name], time.perf_counter() - began)
        print(f"{words:8}" + "".join(f"{1e3 * seconds:10.0f}" for seconds in took.values()))
