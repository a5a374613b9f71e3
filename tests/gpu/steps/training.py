"""The step that is rented: compiled, timed, profiled; in fp8 beside bf16; beside the same step of plain torch
modules."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Collection
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch._dynamo
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import compilation_time_metrics, counters

import model.attention
import model.gpt
from bench import Bench, Result, Trainee, relative
from model import fp8
from model.hyper import StepHyper

PHASES = 14
"""of the compiler's own clock, the largest"""
PARTS = ["part", "ms on the device", "ms on the host to queue it"]
BLOCK_TIMES = ["forward ms", "backward ms", "seconds to compile"]
CURVE_SECONDS = 80
"""after which a curve ends where it is, compiling included"""


def compiled(bench: Bench) -> Result:
    """Build the model and warm up as a run does: seconds by phase, graphs, peak memory; then one compiled block
    against fp32."""
    bench.free()
    torch._dynamo.reset()
    counters.clear()
    compilation_time_metrics.clear()
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    result, clock = Result(), time.perf_counter
    marks = [("build and fill the model", clock())]
    trainee = Trainee(bench.sizes, bench.device, in_fp8=True)
    rows = bench.batch(0)
    for number in range(2):
        bench.wait()
        marks.append((f"step {number}: forward", clock()))
        loss = trainee.model.loss(rows[:, :-1], rows[:, 1:])
        bench.wait()
        marks.append((f"step {number}: backward", clock()))
        loss.backward()
        bench.wait()
        marks.append((f"step {number}: update", clock()))
        trainee.optimizer.step(StepHyper())
    bench.wait()
    marks.append(("", clock()))
    phases = [[name, f"{end - began:.2f}"] for (name, began), (_, end) in itertools.pairwise(marks)]
    result.tables.append((["phase", "seconds"], phases))
    spent = sorted(((sum(times), name) for name, times in compilation_time_metrics.items()), reverse=True)[:PHASES]
    result.tables.append(
        (["the compiler's own clock (phases contain each other)", "seconds"], [[n, f"{s:.2f}"] for s, n in spent])
    )
    stats = dict(counters["stats"])
    result.facts |= {"graphs": stats.get("unique_graphs"), "graph breaks": sum(counters["graph_break"].values())}
    result.check(not counters["graph_break"], f"graph breaks: {dict(counters['graph_break'])}")
    result.check(bool(torch.isfinite(loss).all()), f"the loss is {loss.item()}")
    result.facts |= _memory(bench)
    bench.keep(trainee)
    _block_against_fp32(bench, trainee, result)
    return result


def _memory(bench: Bench) -> dict[str, str]:
    try:
        from job.plan.memory import step_memory
    except ImportError as error:
        return {"the plan's peak": f"job.plan.memory cannot be imported here: {error}"}
    planned = step_memory(bench.sizes.config, bench.sizes.rows, 1, True).total
    facts = {"the plan's peak, 10^9 bytes": f"{planned / 1e9:.3g}"}
    if bench.on_gpu:
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        facts |= {
            "peak allocated": f"{peak / 1e9:.2f} ({peak / planned - 1:+.1%})",
            "peak reserved": f"{reserved / 1e9:.2f}",
        }
    return facts


def _block_against_fp32(bench: Bench, trainee: Trainee, result: Result) -> None:
    """Output and gradients of the compiled fp8 block 0 against the same block in fp32, not compiled: faults of joined
    kernels show."""
    block, config = trainee.model.blocks[0], bench.sizes.config
    plain = _without_fp8(copy.deepcopy(block))
    generator = torch.Generator(bench.device).manual_seed(0)
    shape = (bench.sizes.rows, config.seq_len, config.width)
    x, x0, dy = (torch.randn(shape, generator=generator, device=bench.device).bfloat16() for _ in range(3))
    mix = [torch.tensor(value, device=bench.device) for value in (1.1, 0.2)]

    def computed(which: torch.nn.Module, dtype: torch.dtype) -> list[Tensor]:
        inputs = x.to(dtype).requires_grad_()
        out = which(
            inputs,
            x0.to(dtype),
            mix,
            None,
            trainee.model._rotary.tables(config.seq_len, inputs),
            model.attention.attention,
        )
        return [out.detach(), *torch.autograd.grad(out, [inputs, *which.parameters()], dy.to(dtype))]

    _fill(block)
    _fill(plain)
    names = ["output", "gradient by the input", *(name for name, _ in block.named_parameters())]
    pairs = zip(names, computed(block, torch.bfloat16), computed(plain, torch.float32), strict=True)
    rows = [[name, f"{relative(got, right):.4f}"] for name, got, right in pairs]
    result.tables.append((["block 0 in fp8, compiled, against fp32", "relative error"], rows))
    worst = max(float(error) for _, error in rows)
    result.check(worst < 0.3, f"a compiled block is wrong by {worst:.1%}")


@torch.no_grad()
def _fill(block: torch.nn.Module) -> None:
    """Give numbers to the weights that begin as zeros: through them nothing would come."""
    for weight in block.parameters():
        if not weight.any():
            weight.normal_(0, 0.02, generator=torch.Generator(weight.device).manual_seed(2))


def _without_fp8(block: torch.nn.Module) -> torch.nn.Module:
    block._compiled_call_impl = None
    for parent in list(block.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, torch.nn.Linear) and type(layer) is not model.gpt.Linear:
                plain = model.gpt.Linear(layer.in_features, layer.out_features)
                plain.weight = layer.weight
                setattr(parent, name, plain)
    return block


def steps(bench: Bench) -> Result:
    """Tokens per second, the host's time against the GPU's, and that nothing inside a step waits."""
    trainee, result = bench.trainee(), Result()
    before = dict(counters["stats"])
    with _nothing_waits(bench, result):
        rows = [bench.batch(number) for number in range(3)]
        bench.wait()
        for batch in rows:
            trainee.step(batch, 1)
    batches = [bench.batch(number) for number in range(bench.sizes.steps)]
    bench.wait()
    losses, marks, began = [], [bench.moment()], time.perf_counter()
    for number, batch in enumerate(batches):
        losses.append(trainee.step(batch, number))
        marks.append(bench.moment())
    bench.wait()
    wall = time.perf_counter() - began
    median = statistics.median(bench.between(*pair) for pair in itertools.pairwise(marks))
    result.facts |= {
        "tokens a second": f"{bench.sizes.tokens / median * 1000:,.0f}",
        "ms a step (one micro-step and the update), median": f"{median:.1f}",
        "seconds of all steps": f"{wall:.2f}",
        "graphs compiled meanwhile": counters["stats"]["unique_graphs"] - before.get("unique_graphs", 0),
        "loss of the last step": f"{losses[-1].item():.4f}",
    }
    result.tables.append((PARTS, _parts(bench, trainee)))
    result.check(result.facts["graphs compiled meanwhile"] == 0, "something was compiled again")
    result.check(bool(torch.isfinite(torch.stack(losses)).all()), "a loss is no number")
    return result


def _parts(bench: Bench, trainee: Trainee) -> list[list[str]]:
    """Forward, backward and update by themselves, nothing before them in the queue: a full queue makes the host wait,
    which would look like its own slowness."""
    found: dict[str, list[tuple[float, float]]] = {"forward": [], "backward": [], "update": []}
    for number in range(max(2, bench.sizes.steps // 4)):
        rows, schedule, kept = bench.batch(number), trainee.schedule.at(number), []
        trainee.optimizer.begin_overlap()
        ways: dict[str, Callable[[], object]] = {
            "forward": lambda rows=rows, kept=kept: kept.append(trainee.model.loss(rows[:, :-1], rows[:, 1:])),
            "backward": lambda kept=kept: kept[0].backward(),
            "update": lambda schedule=schedule: trainee.optimizer.step(schedule),
        }
        for name, way in ways.items():
            bench.wait()
            began, clock = bench.moment(), time.perf_counter()
            way()
            queued = 1000 * (time.perf_counter() - clock)
            found[name].append((bench.between(began, bench.moment()), queued))
    return [
        [name, *(f"{statistics.median(values):.1f}" for values in zip(*times, strict=True))]
        for name, times in found.items()
    ]


def doubled(bench: Bench) -> Result:
    """The parts of a step with twice the rows a micro-batch, compiled anew."""
    bench.free()
    torch._dynamo.reset()
    result, sizes, began = Result(), bench.sizes, time.perf_counter()
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    bench.sizes = dataclasses.replace(sizes, rows=2 * sizes.rows)
    try:
        trainee = bench.trainee()
        bench.wait()
        result.facts["seconds to the third step"] = f"{time.perf_counter() - began:.1f}"
        parts = _parts(bench, trainee)
        micro = sum(float(ms) for part, ms, _ in parts if part != "update")
        result.facts["tokens a second, without the update"] = f"{bench.sizes.tokens / micro * 1000:,.0f}"
    finally:
        bench.sizes = sizes
    if bench.on_gpu:
        result.facts["peak allocated, 10^9 bytes"] = f"{torch.cuda.max_memory_allocated() / 1e9:.2f}"
    result.tables.append((PARTS, parts))
    bench.free()
    torch._dynamo.reset()
    return result


class OneBlock:
    """A block of the model in fp8, by itself: what a micro-step asks of it."""

    def __init__(self, bench: Bench, layer: int, levers: Collection[str] = ()) -> None:
        config = bench.sizes.config
        with bench.device:
            self.model = model.gpt.GPT(config, compute_dtype=torch.bfloat16)
        self.model.init_weights(42)
        fp8.apply(self.model, bench.sizes.tokens, levers=levers)
        self.block = self.model.blocks[layer]
        _fill(self.block)
        generator = torch.Generator(bench.device).manual_seed(0)
        shape = (bench.sizes.rows, config.seq_len, config.width)
        x, x0, value_embed, self.dy = (
            torch.randn(shape, generator=generator, device=bench.device).bfloat16() for _ in range(4)
        )
        embeds = [value_embed.requires_grad_()] if layer in config.value_embed_layers else []
        self.inputs = [x.requires_grad_(), x0.requires_grad_(), *embeds, *self.block.parameters()]
        mix = [torch.tensor(value, device=bench.device) for value in (1.1, 0.2)]
        tables = self.model._rotary.tables(config.seq_len, x)
        self.arguments = (x, x0, mix, *(embeds or [None]), tables, model.attention.attention)

    def forward(self) -> Tensor:
        return self.block(*self.arguments)

    def both(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.inputs, self.dy)


def tuned(bench: Bench) -> Result:
    """A block, forward and backward, under settings of Inductor that may find better tiles: is there something to
    win?"""
    bench.free()
    result, rows = Result(), []
    one = OneBlock(bench, min(2, bench.sizes.depth - 1))
    for settings in ((), ("max_autotune_pointwise",), ("coordinate_descent_tuning",)):
        with torch._inductor.config.patch(dict.fromkeys(settings, True)):
            rows.append([settings[0] if settings else "as trained", *block_times(bench, one)])
    result.tables.append((["one block, fp8", *BLOCK_TIMES], rows))
    return result


def block_times(bench: Bench, one: OneBlock) -> list[str]:
    """What BLOCK_TIMES names, the block compiled anew."""
    torch._dynamo.reset()
    one.block.compile(fullgraph=True, dynamic=False)
    began = time.perf_counter()
    one.both()
    bench.wait()
    compiling = time.perf_counter() - began
    took = bench.medians({"forward": one.forward, "both": one.both})
    torch._dynamo.reset()
    return [f"{took['forward']:.3f}", f"{took['both'] - took['forward']:.3f}", f"{compiling:.1f}"]


@contextmanager
def _nothing_waits(bench: Bench, result: Result):
    """CUDA raises where the host waits for it; on a CPU there is nothing to wait for."""
    if not bench.on_gpu:
        result.facts["no waiting inside a step"] = "can be seen on a GPU only"
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
        result.facts["no waiting inside a step"] = "3 steps with set_sync_debug_mode('error')"
    except RuntimeError as error:
        result.wrong.append(f"a step waits for the GPU: {error}".splitlines()[0])
        bench.trainee().optimizer.zero_grad()  # a step that was broken off: the next ones are still timed
    finally:
        torch.cuda.set_sync_debug_mode("default")


def curves(bench: Bench) -> Result:
    """The same rows through fp8 and through bf16, from the same weights, as many steps as time allows."""
    result = Result()
    losses = {name: _curve(bench, name == "fp8") for name in ("fp8", "bf16")}
    count = min(map(len, losses.values()))
    every = max(1, count // 10)
    rows = [
        [i, losses["fp8"][i], losses["bf16"][i], losses["fp8"][i] - losses["bf16"][i]]
        for i in [*range(0, count, every), count - 1]
    ]
    result.tables.append(
        (["step", "fp8", "bf16", "difference"], [[i, *(f"{value:.4f}" for value in values)] for i, *values in rows])
    )
    last = {name: statistics.mean(found[count - every : count]) for name, found in losses.items()}
    result.facts |= {f"mean of the last {every} of {count} steps, {name}": f"{loss:.4f}" for name, loss in last.items()}
    result.check(all(last[name] < found[0] for name, found in losses.items()), "the loss did not fall")
    result.check(
        abs(last["fp8"] - last["bf16"]) < 0.05 * last["bf16"], "fp8 and bf16 differ by more than 5 % of the loss"
    )
    return result


def _curve(bench: Bench, in_fp8: bool) -> list[float]:
    bench.free()
    trainee, found, began = Trainee(bench.sizes, bench.device, in_fp8=in_fp8), [], time.perf_counter()
    for number in range(bench.sizes.curve_steps):
        found.append(trainee.step(bench.batch(number), number))
        if number % 10 == 9:
            bench.wait()
            if time.perf_counter() - began > CURVE_SECONDS:
                break
    return torch.stack(found).float().tolist()


def plain(bench: Bench) -> Result:
    """The step of torch's own modules, half the rows: bf16, SDPA without windows, logits of all tokens, AdamW, blocks
    compiled."""
    bench.free()
    result, rows = Result(), bench.batch(0)[: max(1, bench.sizes.rows // 2)]
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with patch.object(model.gpt, "attention", _plain_attention), patch.object(model.gpt, "cross_entropy", _plain_loss):
        with bench.device:
            gpt = model.gpt.GPT(bench.sizes.config, compute_dtype=torch.bfloat16)
        gpt.init_weights(42)
        for block in gpt.blocks:
            block.compile()
        adamw = torch.optim.AdamW(gpt.parameters(), lr=1e-3, fused=bench.on_gpu)

        def step() -> None:
            gpt.loss(rows[:, :-1], rows[:, 1:]).backward()
            adamw.step()
            adamw.zero_grad()

        began = time.perf_counter()
        step()
        bench.wait()
        result.facts["seconds to compile"] = f"{time.perf_counter() - began:.1f}"
        step()
        median = statistics.median(bench.ms(step) for _ in range(bench.sizes.steps // 2))
    tokens = len(rows) * bench.sizes.seq_len
    result.facts |= {"ms a step, median": f"{median:.1f}", "tokens a second": f"{tokens / median * 1000:,.0f}"}
    if bench.on_gpu:
        result.facts["peak allocated, 10^9 bytes"] = f"{torch.cuda.max_memory_allocated() / 1e9:.2f}"
    return result


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)


def _plain_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, vocab_size: int, **_: object
) -> Tensor:
    logits = (hidden @ weight.to(hidden.dtype).mT)[:, :vocab_size].float()
    return F.cross_entropy(softcap * torch.tanh(logits / softcap), targets)
