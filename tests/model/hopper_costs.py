"""What a training step moves, computes and costs on an H100, counted as `hopper.py` counts, beside the published step.

    python tests/model/hopper_costs.py                       d24 and d22, 16 and 32 rows, without levers
    python tests/model/hopper_costs.py fast frontier         the same with the levers of these presets

A step of 2^20 tokens on eight GPUs. Pieces are compiled graphs; what is not compiled (look-ups and their gradients,
sums of gradients, the head's products) is counted operation by operation: every tensor read or written once, rows of
a table that are looked up as many as there are tokens. Attention's scratch is not seen. Two columns of milliseconds:

    assumed    products at 1.15 PFLOP/s in fp8 and 0.59 in bf16, attention at 0.5; all else at 85 % of 3.35 TB/s. None
               of these rates is fitted to anything
    fitted     the step model (job/plan/steptime.py): what it gives arithmetic and passes in a step of a d24 with 16
               rows and no lever is spread over the FLOPs and bytes counted there, which prices any other step

The published steps are of 8xH100; d22 with 32 rows has the vocabulary of PR #830, whose number of steps is derived.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import hopper

TOKENS = 1 << 20
SHAPES = ((24, 16, 32_768, "Run 6"), (22, 16, 32_768, "PR #733"), (22, 32, 49_152, "PR #830"), (24, 32, 32_768, ""))
"""depth, rows, vocabulary, the published run"""
RATES = {"fp8": 1.15e15, "bf16": 0.6 * 989e12, "attention": 0.5e15}
BANDWIDTH = 0.85 * 3.35e12
SMALL_GB = 0.05
"""of a step, below which operations share a row"""
LARGEST = 12
HEAD = """\
| piece | calls a step | launches a call | GB | TFLOP | ms assumed | ms fitted |
|---|---:|---|---:|---:|---:|---:|
"""
OVERWRITTEN = ("copy_", "zero_", "fill_", "_foreach_copy_")
UNTOUCHED = ("empty", "new_empty", "detach", "alias", "_unsafe_view", "lift_fresh", "_local_scalar_dense")


@dataclass
class Kernel:
    """A launch: bytes, FLOPs by kind of product, and the line that it comes from."""

    name: str
    bytes: int
    flops: Counter[str] = field(default_factory=Counter)
    source: str = ""

    @property
    def seconds(self) -> float:
        """By the assumed rates."""
        computing = sum(flops / RATES[kind] for kind, flops in self.flops.items())
        return max(computing, self.bytes / BANDWIDTH) if self.flops else self.bytes / BANDWIDTH


@dataclass
class Piece:
    """A compiled graph, or an operation that is not compiled."""

    name: str
    launches: str
    kernels: list[Kernel] = field(default_factory=list)
    """of a call"""
    calls: int = 0
    inside: bool = False
    """part of a micro-step"""

    @property
    def bytes(self) -> int:
        """Of all calls, as all that follows."""
        return self.calls * sum(kernel.bytes for kernel in self.kernels)

    @property
    def flops(self) -> int:
        return self.calls * sum(kernel.flops.total() for kernel in self.kernels)

    @property
    def seconds(self) -> float:
        return self.calls * sum(kernel.seconds for kernel in self.kernels)


class Costs(hopper.Counting):
    """Pieces by name; those called while the step is counted count their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: dict[str, Piece] = {}

    def count(self, lowered: Any) -> Any:
        made, graph = super().count(lowered), self.graphs[-1]
        launches = ", ".join([f"{graph.triton} Triton", *(f"{n} {op}" for op, n in sorted(graph.other.items()))])
        kernels = [_kernel(node) for node in lowered.scheduler.nodes]
        name = graph.name
        while name in self.pieces:
            name += ", another"
        piece = self.pieces[name] = Piece(name, launches, [kernel for kernel in kernels if kernel.bytes])
        stand_in = made.call

        def call(args: list[Any]) -> Any:
            from torch.utils._python_dispatch import _disable_current_modes

            piece.calls += 1
            with _disable_current_modes():
                return stand_in(args)

        made.call = call
        return made


def _kernel(node: Any) -> Kernel:
    origins = [origin for part in node.get_nodes() if part.node for origin in part.node.get_origins()]
    flops: Counter[str] = Counter()
    name = "Triton"
    if node.is_extern():
        name = str(node.node.python_kernel_name or node.node.op_overload).split("::")[-1].removesuffix(".default")
        for origin in origins:
            flops += _flops(origin.target, *_values((origin.args, origin.kwargs)), origin.meta["val"])
    return Kernel(name, node.get_read_write_buffers_sizes(), flops, _source(origins))


def _values(tree: Any) -> Any:
    from torch.fx import Node
    from torch.utils._pytree import tree_map

    return tree_map(lambda x: x.meta["val"] if isinstance(x, Node) else x, tree)


def _flops(operator: Any, args: Any, kwargs: Any, out: Any) -> Counter[str]:
    """Of a product or of attention, exact pairs of query and key; no other arithmetic counts."""
    from torch.utils.flop_counter import flop_registry

    name = str(operator)
    if "_varlen_attn" in name:
        (tokens, heads, width), window = args[1].shape, next(a for a in args if isinstance(a, list | tuple))[0]
        seen = hopper.T if window < 0 else window
        pairs = sum(min(seen + 1, i + 1) for i in range(hopper.T)) * tokens // hopper.T
        return Counter(attention=4 * pairs * heads * width * 5 // (2 if "backward" in name else 5))
    formula = flop_registry.get(getattr(operator, "overloadpacket", None))
    if formula is None:
        return Counter()
    return Counter({"fp8" if "_scaled_mm" in name else "bf16": formula(*args, **kwargs, out_val=out)})


def _source(origins: list[Any]) -> str:
    """The lines of `model/` that a kernel's first operations come from."""
    found: Counter[str] = Counter()
    for origin in origins:
        frames = re.findall(r'File "[^"]*/model/(\w+)\.py", line (\d+)', origin.stack_trace or "")
        own = [f"{file}.py:{line}" for file, line in frames if file not in ("fp8_tensor", "fp8_linear")]
        found.update(own[-1:])
    return ", ".join(sorted(line for line, _ in found.most_common(3)))


def watching(kernels: dict[str, list[Kernel]]) -> Any:
    """A mode in which operations that are not compiled put what they move into `kernels`, by name."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    def size(x: torch.Tensor) -> int:
        return x.element_size() * math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)

    class Watching(TorchDispatchMode):
        @classmethod
        def ignore_compile_internals(cls) -> bool:
            return True

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            out, name = func(*args, **kwargs), func._schema.name.split("::")[-1]
            if func.is_view or name.startswith(UNTOUCHED):
                return out
            inputs = {id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
            outputs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and id(x) not in inputs]
            if name == "embedding":
                moved = 2 * size(out) + size(args[1])
            else:
                changed = [
                    x
                    for argument, value in zip(func._schema.arguments, args, strict=False)
                    if argument.alias_info and argument.alias_info.is_write
                    for x in tree_leaves(value)
                ]
                moved = sum(map(size, [*inputs.values(), *outputs]))
                moved += 0 if name in OVERWRITTEN else sum(map(size, changed))
            kernels.setdefault(name, []).append(Kernel(name, moved, _flops(func, args, kwargs, out)))
            return out

    return Watching()


def counted(depth: int, rows: int, vocab: int, levers: Collection[str]) -> list[Piece]:
    """The pieces of a step, their calls those of all its micro-steps; of what is not compiled all calls are one."""
    costs = COUNTING
    costs.pieces, costs.rows = {}, rows
    gpt, ids, update = hopper.trainee(depth, costs, vocab, levers)
    gpt.loss(ids, ids).backward()  # compiles
    update()
    micro_steps = TOKENS // hopper.WORLD // (rows * hopper.T)
    total: dict[str, Piece] = {}
    ways: list[tuple[int, str, Callable[[], Any]]] = [
        (1, "", lambda: gpt.loss(ids, ids).backward()),  # weights have changed, and there are no gradients to add to
        (micro_steps - 1, "", lambda: gpt.loss(ids, ids).backward()),
        (1, "update, ", update),
    ]
    for times, phase, way in ways:
        for piece in costs.pieces.values():
            piece.calls = 0
        seen: dict[str, list[Kernel]] = {}
        with watching(seen):
            way()
        for piece in (piece for piece in costs.pieces.values() if piece.calls):
            whole = total.setdefault(piece.name, Piece(piece.name, piece.launches, piece.kernels, 0, not phase))
            whole.calls += times * piece.calls
        for operation, kernels in seen.items():
            name = f"{phase}not compiled: {operation}"
            whole = total.setdefault(name, Piece(name, "", [], 1, not phase))
            whole.kernels += kernels * times
    for name, piece in total.items():
        if "not compiled" in name:
            piece.launches = f"{len(piece.kernels)} in all"
    return [piece for piece in total.values() if piece.bytes]


COUNTING = Costs()


def prices(pieces: list[Piece]) -> tuple[float, float]:
    """Seconds of a FLOP and of a byte by the fitted model, from the pieces of the first shape without levers."""
    from job.plan.published_runs import RUNS
    from job.plan.steptime import REFERENCE, published_fit
    from model.scaling import flops_per_token

    config, fit = next(run.config for run in RUNS if run.name == SHAPES[0][3]), published_fit()
    tokens, inside = TOKENS / hopper.WORLD, [piece for piece in pieces if piece.inside]
    computing = tokens * flops_per_token(config) / fit.flops
    passes = tokens * fit.passes * 2 * config.width * config.depth / REFERENCE.bandwidth
    return computing / sum(piece.flops for piece in inside), passes / sum(piece.bytes for piece in inside)


def tables(title: str, pieces: list[Piece], price: tuple[float, float], others: tuple[float, float]) -> list[float]:
    """Print a step's pieces and largest kernels; GB, ms assumed, ms fitted of all. others: seconds of transport, and of
    what the fitted model has for transport and update together."""
    fitted = {piece.name: piece.flops * price[0] + piece.bytes * price[1] if piece.inside else 0.0 for piece in pieces}
    print(f"\n## {title}\n\n{HEAD}", end="")
    small = Piece("what is smaller", "")
    for piece in sorted(pieces, key=lambda piece: -piece.seconds):
        if piece.bytes < SMALL_GB * 1e9:
            small.kernels += piece.kernels * piece.calls
            fitted[small.name] = fitted.get(small.name, 0) + fitted[piece.name]
        else:
            print(_row(piece, fitted[piece.name]))
    small.calls = 1
    print(_row(small, fitted.get(small.name, 0)))
    total = [
        sum(piece.bytes for piece in pieces) / 1e9,
        1000 * (sum(piece.seconds for piece in pieces) + others[0]),
        1000 * (sum(fitted[piece.name] for piece in pieces) + others[1]),
    ]
    print(
        f"| transport; in the last column with the update | | | | | {others[0] * 1000:.1f} | {others[1] * 1000:.1f} |"
    )
    print(f"| a step | | | {total[0]:.0f} | | {total[1]:.0f} | {total[2]:.0f} |")
    print("\n| largest kernels of blocks | in | GB | lines of model/ |\n|---|---|---:|---|")
    where: dict[tuple[int, str, str], list[str]] = {}
    for piece in (piece for piece in pieces if "block" in piece.name):
        for kernel in piece.kernels:
            where.setdefault((kernel.bytes, kernel.name, kernel.source), []).append(piece.name)
    for (size, name, source), found in sorted(where.items(), reverse=True)[:LARGEST]:
        print(f"| {name} | {'; '.join(dict.fromkeys(found))} | {size / 1e9:.3f} | {source} |")
    return total


def _row(piece: Piece, fitted: float) -> str:
    cells = f"{piece.bytes / 1e9:.2f} | {piece.flops / 1e12:.2f} | {1000 * piece.seconds:.2f}"
    return f"| {piece.name} | {piece.calls} | {piece.launches} | {cells} | {1000 * fitted:.2f} |"


def main() -> None:
    hopper.with_triton()
    hopper.pretend()
    COUNTING.install()
    from job.plan.published_runs import RUNS
    from job.plan.steptime import POLAR_EFFICIENCY, REFERENCE, optimizer_seconds, polar_flops
    from job.recipe.config import resolve
    from model.config import GPTConfig

    published = {run.name: 1000 * run.step_seconds for run in RUNS}
    sets: dict[str, Collection[str]] = {"none": ()} | {name: resolve(name).train.levers for name in sys.argv[1:]}
    price, summary = None, []
    for depth, rows, vocab, run in SHAPES:
        config = GPTConfig.for_depth(depth, vocab, hopper.T)
        update = optimizer_seconds(config, REFERENCE, hopper.WORLD)
        transport = update - polar_flops(config, hopper.WORLD) / (POLAR_EFFICIENCY * REFERENCE.bf16)
        for name, levers in sets.items():
            pieces = counted(depth, rows, vocab, levers)
            price = price or prices(pieces)
            title = f"d{depth}, {rows} rows, {vocab} words, levers: {name}"
            found = tables(title, pieces, price, (transport, update))
            right = published.get(run, 0.0) if not levers else 0.0
            off = [f"{ms:.0f} ({ms / right - 1:+.1%})" if right else f"{ms:.0f}" for ms in found[1:]]
            summary.append(
                f"| {title} | {found[0]:.0f} | {' | '.join(off)} | {run} {right:.1f} |"
                if right
                else f"| {title} | {found[0]:.0f} | {' | '.join(off)} | |"
            )
    print("\n## Steps\n\n| step | GB | ms assumed | ms fitted | ms published |\n|---|---:|---:|---:|---:|")
    print("\n".join(summary))


if __name__ == "__main__":
    main()
