"""One profiled micro-step and update, by component, beside what an H100 took in November 2026."""

from __future__ import annotations

from collections import Counter
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import model.gpt
from bench import Bench, Result
from model.hyper import StepHyper

MARK = "speedrun: "
"""of our own marks, which also appear on the device's time line, over the kernels that they hold"""
MEASURED: dict[str, float | None] = {
    "fp8 products": 107.0,
    "attention": 30.6,
    "forward: norms, rotary, quantising and the rest": 34.7,
    "backward: quantising (maxima, casts, transposed copies)": 64.2,
    "backward: the rest": 16.6,
    "loss between its products": 8.2,
    "tables: look-up and gradient": 6.3,
    "adding to the weights' gradients": None,
    "update (all of it, on one rank)": 72.8,
    "not attributed": None,
}
"""ms of a micro-step of d24, 16 x 2048 tokens, with FlashAttention 4: measured on one H100 80GB HBM3 with torch 2.11
(LOG, 2026-11-26)"""


def profiled(bench: Bench) -> Result:
    trainee, result, rows = bench.trainee(), Result(), bench.batch(0)
    real = model.gpt.cross_entropy

    def marked(*arguments, **options):
        with record_function("speedrun: loss"):
            return real(*arguments, **options)

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * bench.on_gpu
    with patch.object(model.gpt, "cross_entropy", marked):
        trainee.step(rows, 0)
        bench.wait()
        with profile(activities=activities) as seen:
            with record_function("speedrun: forward"):
                loss = trainee.model.loss(rows[:, :-1], rows[:, 1:])
            loss.backward()
            with record_function("speedrun: update"):
                trainee.optimizer.step(StepHyper(lr_mult=0.0))
            bench.wait()
    seen.export_chrome_trace(str(bench.out / "trace.json.gz"))
    spent = _by_component(seen.events(), bench.on_gpu)
    if bench.on_gpu:
        spent["not attributed"] = sum(_kernels(seen.events(), True).values()) - sum(spent.values())
    total = sum(spent.values())
    run6 = bench.sizes.depth == 24 and bench.on_gpu
    table = [
        [name, f"{spent.get(name, 0):.2f}", f"{spent.get(name, 0) / total:.1%}", before if run6 and before else "-"]
        for name, before in MEASURED.items()
    ]
    result.tables.append(
        (["component", "ms", "share", "ms in November 2026"], [*table, ["sum", f"{total:.2f}", "", ""]])
    )
    kernels = sorted(_kernels(seen.events(), bench.on_gpu).items(), key=lambda item: -item[1])[:60]
    result.tables.append((["kernel", "ms"], [[name[:110], f"{ms:.2f}"] for name, ms in kernels]))
    result.check(total > 0 and spent.get("fp8 products", 0) > 0, "the profile has no product in fp8")
    return result


def _by_component(events, on_gpu: bool) -> dict[str, float]:
    """Milliseconds of each component: of the kernels that an operation launched, on a CPU of the operation itself.

    The profiler lists some kernels (cuBLAS's) with the operation and again with its launch: each counts once."""
    spent: dict[str, float] = {}
    ran = Counter((event.name, round(event.self_device_time_total, 3)) for event in events if _on_device(event))
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        took = 0.0 if on_gpu else event.self_cpu_time_total
        for kernel in event.kernels:
            key = (kernel.name, round(kernel.duration, 3))
            if ran[key]:
                ran[key] -= 1
                took += kernel.duration
        if took:
            name = component(_lineage(event))
            spent[name] = spent.get(name, 0.0) + took / 1000
    return spent


def _lineage(event) -> list[str]:
    """The names of an operation and of what it was called from, innermost first."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


def component(names: list[str]) -> str:
    """What an operation with these callers (innermost first) is counted as."""
    own, all_names = names[0], " | ".join(name for name in names if not name.startswith("triton_"))
    if "speedrun: update" in names:
        return "update (all of it, on one rank)"
    if "_scaled_mm" in all_names:
        return "fp8 products"
    if "attn" in all_names or "attention" in all_names:
        return "attention"
    if "speedrun: loss" in names:
        return "loss between its products"
    if "embedding" in all_names.lower():
        return "tables: look-up and gradient"
    if "AccumulateGrad" in all_names:
        return "adding to the weights' gradients"
    if "speedrun: forward" in names:
        return "forward: norms, rotary, quantising and the rest"
    if any(word in own for word in ("amax", "abs", "clamp", "transpose", "float8", "fp8")):
        return "backward: quantising (maxima, casts, transposed copies)"
    return "backward: the rest"


def _on_device(event) -> bool:
    return event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(MARK)


def _kernels(events, on_gpu: bool) -> dict[str, float]:
    spent: dict[str, float] = {}
    for event in events:
        if _on_device(event) if on_gpu else event.device_type == torch.autograd.DeviceType.CPU:
            took = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            spent[event.name] = spent.get(event.name, 0.0) + took / 1000
    return spent
