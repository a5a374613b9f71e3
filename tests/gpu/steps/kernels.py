"""Kernels by themselves: fp8 products and loss against fp32, attention, CORE's forks."""

from __future__ import annotations

import importlib.util
import random
import time
import traceback
from collections.abc import Callable

import torch
from torch import Tensor

from bench import USED, Bench, Result, relative, use_kernel
from model import attention, fp8, fp8_proof
from model.fp8_tensor import E4M3, E5M2, matmul, transposed
from model.gpt import GPT
from model.shared_prefix import SharedPrefix


def products(bench: Bench) -> Result:
    """Each fp8 layer shape's three products, and the head's loss, against fp32 (what a run proves before it trains)."""
    with torch.device("meta"):
        gpt = GPT(bench.sizes.config)
    fp8.apply(gpt, bench.sizes.tokens)
    result, rows = Result(), []
    measured = fp8_proof.measurements(gpt, bench.sizes.tokens, bench.device)
    while True:
        began = time.perf_counter()
        try:
            name, agreements = next(measured)
        except StopIteration:
            break
        for found in agreements:
            rows.append([name, found.what, f"{found.error:.4f}", f"{found.bound:.4f}", "yes" if found.holds else "NO"])
            result.check(found.holds, f"{name}, {found.what}: {found.error:.4f} > {found.bound:.4f}")
        result.facts[f"seconds of {name}"] = round(time.perf_counter() - began, 2)
    result.tables.append((["layer", "product", "error", "bound", "holds"], rows))
    return result


def rates(bench: Bench) -> Result:
    """What the card gives: a copy's bytes, and each matrix product of a block and the head, in fp8 and in bf16."""
    config, result, rows = bench.sizes.config, Result(), []
    D, tokens = config.width, bench.sizes.tokens
    big = torch.randn(tokens * D * 4, device=bench.device, dtype=torch.bfloat16)
    into = torch.empty_like(big)
    copied = bench.medians({"copy": lambda: into.copy_(big)})["copy"]
    result.facts["copy, 10^9 bytes read and written a second"] = f"{4 * big.numel() / copied / 1e6:.0f}"
    scale = torch.ones((), device=bench.device)
    shapes = {"q, k, v": (D, D), "q, k, v in one": (D, 3 * D), "MLP in": (D, 4 * D), "MLP out": (4 * D, D)}
    for name, (k, n) in (shapes | {"head": (D, config.vocab_size - config.vocab_size % 16)}).items():
        m = tokens // 16 if name == "head" else tokens
        x, w = (torch.randn(shape, device=bench.device).bfloat16() for shape in ((m, k), (n, k)))
        dy = torch.randn(m, n, device=bench.device).bfloat16()
        x8, w8, dy8 = x.to(E4M3), w.to(E4M3), dy.to(E5M2)
        turned = {"w": transposed(w8), "x": transposed(x8), "dy": transposed(dy8)}
        ways = {
            "forward": lambda x8=x8, w8=w8: matmul(x8, scale, w8.t(), scale, torch.bfloat16, fast=True),
            "forward, exact sums": lambda x8=x8, w8=w8: matmul(x8, scale, w8.t(), scale, torch.bfloat16),
            "by the input": lambda dy8=dy8, w=turned["w"]: matmul(dy8, scale, w.t(), scale, torch.bfloat16),
            "by the weight": lambda t=turned: matmul(t["dy"], scale, t["x"].t(), scale, torch.bfloat16),
            "bf16 forward": lambda x=x, w=w: x @ w.t(),
            "bf16 by the weight": lambda dy=dy, x=x: dy.t() @ x,
        }
        took = bench.medians(ways)
        rows.append([f"{name}: {m} x {k} x {n}", *(f"{2e-9 * m * k * n / ms:.0f}" for ms in took.values())])
    result.tables.append((["product, TFLOP/s", *took], rows))
    return result


def attend(bench: Bench) -> Result:
    """Forward and backward of each kernel at the model's shapes and windows, against fp32 on blocks; the fastest is
    used from here on."""
    result, rows = Result(), []
    for kernel in ("fa2", "fa4") if bench.on_gpu else ("blocks",):
        if kernel == "fa4" and importlib.util.find_spec("flash_attn") is None:
            result.facts["fa4"] = "flash-attn-4 is not installed"
            continue
        began = time.perf_counter()
        try:
            use_kernel(kernel)
            rows += _kernel_rows(bench, kernel, result)
        except Exception as error:  # the other kernel's figures stay
            traceback.print_exc()
            result.wrong.append(f"{kernel}: {type(error).__name__}: {error}".splitlines()[0])
        result.facts[f"seconds of {kernel}, compiling included"] = round(time.perf_counter() - began, 1)
        if not result.wrong:
            result.facts[USED] = kernel
        elif kernel == "fa4":
            torch.nn.attention.restore_flash_attention_impl()
    columns = ["kernel", "window", "forward ms", "backward ms", "TFLOP/s forward / backward", "worst error"]
    result.tables.append((columns, rows))
    return result


def _kernel_rows(bench: Bench, kernel: str, result: Result) -> list[list[object]]:
    config, rows = bench.sizes.config, []
    for window in sorted(set(config.windows)):
        forward, both, error = _attention_at(bench, window)
        causal = sum(min(window + 1, i + 1) for i in range(config.seq_len))
        flops = 4 * config.head_dim * config.heads * bench.sizes.rows * causal
        rate = f"{flops / forward / 1e9:.0f} / {2.5 * flops / (both - forward) / 1e9:.0f}" if both > forward else "-"
        rows.append([kernel, window, f"{forward:.3f}", f"{both - forward:.3f}", rate, f"{error:.4f}"])
        result.check(error < attention.PROOF_BOUND, f"{kernel} at window {window} is wrong by {error:.1%}")
    return rows


def _attention_at(bench: Bench, window: int) -> tuple[float, float, float]:
    """Milliseconds forward, and with backward, of a micro-batch; the worst relative error of output and gradients of
    two rows."""
    config, generator = bench.sizes.config, torch.Generator(bench.device).manual_seed(0)
    shape = (bench.sizes.rows, config.seq_len, config.heads, config.head_dim)
    q, k, v, weight = (torch.randn(shape, generator=generator, device=bench.device).bfloat16() for _ in range(4))

    def computed(rows: int, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x[:rows].to(dtype).detach().requires_grad_() for x in (q, k, v)]
        out = attention.attention(*inputs, window)
        return [out.detach(), *torch.autograd.grad(out, inputs, weight[:rows].to(dtype))]

    few = min(2, len(q))
    error = max(
        relative(mine, right)
        for mine, right in zip(computed(few, torch.bfloat16), computed(few, torch.float32), strict=True)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    ways: dict[str, Callable] = {
        "forward": lambda: attention.attention(*inputs, window),
        "both": lambda: torch.autograd.grad(attention.attention(*inputs, window), inputs, weight),
    }
    took = bench.medians(ways)
    return took["forward"], took["both"], error


def forks(bench: Bench) -> Result:
    """Shapes of CORE's branches (masked SDPA), each for the first and the second time, with cuDNN's kernel allowed
    and not."""
    result, outputs, rows = Result(), {}, []
    shapes = _fork_shapes(bench)
    for allowed in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(allowed)
        times, outputs[allowed] = [], []
        for fork, q, k, v in _fork_inputs(bench, shapes):
            bench.wait()
            taken = []
            for _ in range(2):
                began = time.perf_counter()
                out = fork.attention(q, k, v, bench.sizes.config.windows[0])
                bench.wait()
                taken.append(1000 * (time.perf_counter() - began))
            times.append(taken)
            outputs[allowed].append(out.float().cpu())
        first, second = (sum(taken[i] for taken in times) for i in (0, 1))
        rows.append(
            [
                "allowed" if allowed else "off",
                f"{first:.0f}",
                f"{second:.0f}",
                f"{max(taken[0] for taken in times):.1f}",
            ]
        )
        result.facts[f"ms of {len(shapes)} first calls, cuDNN {'allowed' if allowed else 'off'}"] = round(first, 1)
    torch.backends.cuda.enable_cudnn_sdp(False)
    result.tables.append(
        (["cuDNN's SDPA", "ms of all first calls", "ms of all second calls", "ms of the slowest first call"], rows)
    )
    differ = max(relative(a, b) for a, b in zip(outputs[True], outputs[False], strict=True))
    result.facts["largest difference between the two"] = f"{differ:.5f}"
    result.check(differ < 0.02, f"cuDNN's and the other kernels' outputs differ by {differ:.1%}")
    return result


def _fork_shapes(bench: Bench) -> list[tuple[int, int, list[int]]]:
    """(rows, prefix, lengths of the branches): as widths of CORE's items are, each a distinct shape."""
    draw, found = random.Random(0), {}
    while len(found) < bench.sizes.forks:
        prefix = draw.randrange(8, bench.sizes.longest_prefix, 8)
        tails = [draw.randrange(2, 24) for _ in range(draw.choice((2, 4)))]
        found[prefix, sum(tails)] = (max(1, min(16, 16_384 // (prefix + sum(tails)))), prefix, tails)
    return list(found.values())


def _fork_inputs(bench: Bench, shapes: list[tuple[int, int, list[int]]]):
    config, generator = bench.sizes.config, torch.Generator(bench.device).manual_seed(0)
    for rows, prefix, tails in shapes:
        position, branch = list(range(prefix)), [0] * prefix
        for number, tail in enumerate(tails, 1):
            position += range(prefix, prefix + tail)
            branch += [number] * tail
        columns = [torch.tensor(x, device=bench.device).expand(rows, -1) for x in (position, branch)]
        fork = SharedPrefix(prefix, *columns, columns[0])
        shape = (rows, len(position), config.heads, config.head_dim)
        q, k, v = (torch.randn(shape, generator=generator, device=bench.device).bfloat16() for _ in range(3))
        fork.mask(config.windows[0])
        yield fork, q, k, v
