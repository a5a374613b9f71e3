"""Every compiled piece of a training step, lowered for an H100 by a machine that has none, and counted.

    python tests/model/hopper.py             prints the table
    python tests/model/hopper.py --write     puts it into hopper.md, with which test_hopper.py compares it
    python tests/model/hopper.py 22          prints the part of this depth

The step is the product's own: a d24 and a d22 in fp8, rows and vocabulary of the published run, `GPT.compile_blocks`,
forward and backward, and the compiled update of one rank of eight. It runs on the meta device, where everything makes
the choices that it makes on a GPU (the flash-attention kernel, chunks of the loss, sizes of the update's parts) and
no number is computed. Dynamo and AOTAutograd trace it there. Before Inductor's first pass the graph is moved to a
CUDA device that nobody has: fake tensors, the properties of an H100, and Triton told that its target is sm_90. From
then on Inductor does what it does for a GPU (its passes, the cut between what is saved and what is computed again,
fusion, the code of the kernels) up to that code, which is counted and not run: what it costs in time is not seen
here, nor whether Triton compiles it.

Bytes are what Inductor counts: every tensor that a kernel reads or writes, once, however often the kernel goes over
it. The counts of kernels are the launches in the generated code.

All of this replaces functions of torch for the whole process: nothing else should run in it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

import locked  # noqa: E402

TABLE = HERE / "hopper.md"
UNAVAILABLE = 69
DEPTHS, ROWS, T, VOCAB, WORLD = (24, 22), 16, 2048, 32_768, 8
HEAD = """\
# What Inductor makes of a training step for an H100

Counted, not measured: `python tests/model/hopper.py --write` makes this table, and its head explains how. A micro-step
has 16 rows of 2048 tokens, in fp8; the update is rank 0's of eight. "saved" is what a graph's forward keeps for its
backward, weights left out.

| step | graph | calls | Triton kernels | other kernels | GB a call | saved, bytes/(token x channel) |
|---|---|---:|---:|---|---:|---:|
"""
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    regs_per_multiprocessor=65_536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49_152,
    shared_memory_per_block_optin=232_448,
    shared_memory_per_multiprocessor=233_472,
    L2_cache_size=50 << 20,
    gcnArchName="",
)
BF16_TFLOPS, GIGABYTES_A_SECOND = 989, 3350  # the data sheet's; Inductor asks whether a product is bound by arithmetic


@dataclass
class Graph:
    """One compiled graph: a row of the table."""

    step: str
    name: str
    triton: int
    other: Counter[str]
    bytes: int
    saved: str
    calls: int = 0

    def row(self) -> str:
        other = ", ".join(f"{count} {name}" for name, count in sorted(self.other.items())) or "-"
        kernels = f"{self.triton} | {other} | {self.bytes / 1e9:.4f}"
        return f"| {self.step} | {self.name} | {self.calls} | {kernels} | {self.saved} |"


def pretend() -> None:
    """Make torch, Inductor and Triton take this machine for one with an H100."""
    import torch
    import torch._inductor.config as config
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import utils
    from torch._inductor.fx_passes import joint_graph, post_grad
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    joint_graph.lazy_init()  # the patterns of the passes are traced with autograd: while there is no GPU, on the CPU
    post_grad.lazy_init()
    config.compile_threads, config.force_disable_caches = 1, True
    target = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_device_interface=lambda: torch.cuda,
    )
    driver.set_active(target)
    torch.version.cuda = "13.0"
    torch._C._cuda_getDevice = lambda: 0
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": H100,
        "_get_device_properties": H100,
        "get_device_capability": (9, 0),
        "get_device_name": H100.name,
        "is_bf16_supported": True,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "_lazy_init": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda._initialized = True
    CudaInterface.is_available = staticmethod(lambda: True)
    CudaInterface.current_device = staticmethod(lambda: 0)
    CudaInterface.get_compute_capability = staticmethod(lambda _=None: 90)
    CudaInterface.Worker.get_device_properties = staticmethod(lambda _=None: H100)
    utils.get_device_tflops = lambda _: BF16_TFLOPS
    utils.get_gpu_dram_gbps = lambda: GIGABYTES_A_SECOND
    copy = torch.Tensor.copy_

    def copy_(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        """The method asks for CUDA itself where the operator is content with a fake tensor."""
        if self.device.type == "cuda":
            return torch.ops.aten.copy_.default(self, source, non_blocking)
        return copy(self, source, non_blocking)

    torch.Tensor.copy_ = copy_


class Counting:
    """Inductor from the first pass to the generated code, for the pretended GPU; `graphs` are those that it has
    made."""

    def __init__(self) -> None:
        self.graphs: list[Graph] = []
        self.names: dict[str, str] = {}
        self.step, self.width, self.rows = "", 0, ROWS

    def install(self) -> None:
        import torch
        from torch._inductor import compile_fx
        from torch._inductor.fx_passes import joint_graph
        from torch._inductor.graph import GraphLowering

        passes, generate = compile_fx._recursive_joint_graph_passes, compile_fx.fx_codegen_and_compile
        fold = joint_graph.constant_fold_uniform_value

        def joint_passes(gm: Any, *args: Any, **kwargs: Any) -> Any:
            _to_gpu(gm)
            return passes(gm, *args, **kwargs)

        def generated(gm: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            _to_gpu(gm)
            return generate(gm, [_on_gpu(x) for x in inputs], *args, **kwargs)

        def folded_on_the_cpu(gm: Any) -> None:
            """Constants are found by computing them, which a pretended GPU cannot."""
            moved = [node for node in gm.graph.nodes if node.kwargs.get("device") == torch.device("cuda", 0)]
            for node in moved:
                node.kwargs = node.kwargs | {"device": torch.device("cpu")}
            fold(gm)
            for node in moved:
                if not node._erased:
                    node.kwargs = node.kwargs | {"device": torch.device("cuda", 0)}

        compile_fx._recursive_joint_graph_passes, compile_fx.fx_codegen_and_compile = joint_passes, generated
        joint_graph.constant_fold_uniform_value = folded_on_the_cpu
        GraphLowering.compile_to_module = lambda lowered: self.count(lowered)

    def count(self, lowered: Any) -> Any:
        """Instead of loading the code of `lowered`: a row of the table, and a function that makes outputs of the
        right shapes."""
        nodes = list(lowered.orig_gm.graph.nodes)
        inputs, outputs = [node for node in nodes if node.op == "placeholder"], nodes[-1].args[0]
        written = lowered.codegen()[0]
        lines = [line for line in getattr(written, "value", written).splitlines() if not line.lstrip().startswith("#")]
        code = "\n".join(lines)
        calls = re.findall(r"(?:extern_kernels|torch\.ops)\.([\w.]+)\(|\.(copy_)\(", code)
        saved = _saved(inputs) / (self.rows * T * self.width) if lowered.is_backward else None
        graph = Graph(
            self.step,
            self.name(nodes, inputs, lowered.is_backward),
            len(re.findall(r"\btriton_\w+\.run\(", code)),
            Counter((kernel or copy).removesuffix(".default") for kernel, copy in calls),
            sum(node.get_read_write_buffers_sizes() for node in lowered.scheduler.nodes),
            "" if saved is None else f"{saved:.2f}",
        )
        self.graphs.append(graph)
        return SimpleNamespace(call=_stand_in(graph, inputs, outputs), runner=None)

    def name(self, nodes: list[Any], inputs: list[Any], backward: bool) -> str:
        """Of a block: its kind and the direction; else the function that was compiled and the shape of what it is
        about."""
        from torch._guards import CompileContext

        compiled = str(CompileContext.current_compile_id())
        if backward:
            return f"{self.names[compiled]}, backward"
        attention = [node for node in nodes if "_varlen_attn" in str(node.target)]
        if not attention:
            function = next(re.search(r", in (\w+)\n", node.stack_trace)[1] for node in nodes if node.stack_trace)
            shape, dtype = max(
                ((x.meta["val"].shape, x.meta["val"].dtype) for x in inputs), key=lambda found: found[0].numel()
            )
            return f"{function} of {' x '.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
        streams = sum(node.meta["val"].shape == (self.rows, T, self.width) for node in inputs)
        kind = ("first block", "block", "block with value embedding")[streams - 1]
        window = next(arg for arg in attention[0].args if isinstance(arg, list | tuple))[0]
        self.names[compiled] = f"{kind}, window {T if window < 0 else window}"
        return f"{self.names[compiled]}, forward"


def _on_gpu(x: Any) -> Any:
    """A meta tensor as a fake one of the pretended GPU; anything else, a number in host memory for one, as it is."""
    import torch

    if not isinstance(x, torch.Tensor) or x.device.type != "meta":
        return x
    with x.fake_mode:
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cuda:0")


def _to_gpu(gm: Any) -> None:
    import torch
    from torch.utils._pytree import tree_map

    for node in gm.graph.nodes:
        if str(node.kwargs.get("device")) == "meta":
            node.kwargs = node.kwargs | {"device": torch.device("cuda", 0)}
        if "val" in node.meta:
            node.meta["val"] = tree_map(_on_gpu, node.meta["val"])
    gm.recompile()


def _saved(inputs: list[Any]) -> int:
    """Bytes that a backward is handed by its forward: neither the gradients from above nor fp32 weights, which are
    there anyway."""
    import torch

    values = [(node.name, node.meta["val"]) for node in inputs if not node.name.startswith("tangents")]
    return sum(x.nbytes for name, x in values if not (name.startswith("primals") and x.dtype == torch.float32))


def _stand_in(graph: Graph, inputs: list[Any], outputs: list[Any]) -> Callable[[list[Any]], tuple[Any, ...]]:
    """What is called in the compiled graph's place."""
    import torch

    def made(out: Any, args: list[Any]) -> Any:
        if out is None or out in inputs:
            return None if out is None else args[inputs.index(out)]
        x = out.meta["val"]
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")

    def call(args: list[Any]) -> tuple[Any, ...]:
        graph.calls += 1
        made_here = tuple(made(out, args) for out in outputs)
        args.clear()
        return made_here

    return call


def trainee(
    depth: int, counting: Counting, vocab: int = VOCAB, levers: Collection[str] = ()
) -> tuple[Any, Any, Callable[[], None]]:
    """A model of `depth` layers on rank 0 of eight, a micro-batch of `counting.rows` rows, and the optimizer's step."""
    import torch

    import model.hyper
    import model.loss
    import model.optimizer
    from model import fp8
    from model.collectives import Collectives
    from model.config import GPTConfig
    from model.gpt import GPT
    from model.scaling import RULES, derive

    class OneOfEight(Collectives):
        """Sends nothing: the shapes are what is wanted."""

        def __init__(self, _: object) -> None:
            super().__init__(None)
            self.world = WORLD

        def reduce_scatter(self, output: Any, full: Any) -> Any:
            return SimpleNamespace(wait=lambda: None)

        all_gather = reduce_scatter

        def all_reduce(self, full: Any) -> Any:
            return SimpleNamespace(wait=lambda: None)

    torch._dynamo.reset()
    model.loss.fused.cache_clear()
    config = GPTConfig.for_depth(depth, vocab, T)
    counting.step, counting.width = f"d{depth}", config.width
    with torch.device("meta"):
        gpt, ids = GPT(config, compute_dtype=torch.bfloat16), torch.empty(counting.rows, T, dtype=torch.int64)
    fp8.apply(gpt, counting.rows * T, levers=levers)
    gpt.compile_blocks()
    specs = derive(config, RULES["head"], ratio=None, steps=100, batch_tokens=counting.rows * T).specs
    model.optimizer.Collectives = OneOfEight
    optimizer = model.optimizer.Optimizer(gpt.groups(), specs, compile=True)
    return gpt, ids, lambda: optimizer.step(model.hyper.StepHyper())


def step(depth: int, counting: Counting) -> None:
    """One micro-step and the update of a model of `depth` layers, on rank 0 of eight."""
    from torch._dynamo.utils import counters

    gpt, ids, update = trainee(depth, counting)
    gpt.loss(ids, ids).backward()
    update()
    assert not counters["graph_break"], counters["graph_break"]


def with_triton() -> None:
    """Return where Triton is; else run this command again in an environment that has the locked one, and exit as it
    does."""
    if find_spec("triton"):
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            python = locked.environment(Path(folder) / "env", "triton")
        except locked.Unavailable as error:
            print(f"the locked Triton cannot be had here: {error}", file=sys.stderr)
            sys.exit(UNAVAILABLE)
        sys.exit(subprocess.run([python, *sys.argv], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode)


def main() -> None:
    with_triton()
    pretend()
    counting = Counting()
    counting.install()
    for depth in [int(word) for word in sys.argv[1:] if word.isdigit()] or DEPTHS:
        step(depth, counting)
    text = HEAD + "".join(f"{graph.row()}\n" for graph in counting.graphs)
    if "--write" in sys.argv[1:]:
        TABLE.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
