"""State: what a checkpoint costs training, whether resuming is exact, whether two ranks end where one does."""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.utils.deterministic
from torch import Tensor

from bench import Bench, Result, relative
from model.config import GPTConfig
from model.gpt import GPT
from model.optimizer import Optimizer
from model.scaling import RULES, derive
from model.schedule import Schedule
from model.shards import Slice

RANKED = GPTConfig.for_depth(3, 512, 128, width=128, head_dim=64, window_tile=32)
RANKED_ROWS, RANKED_STEPS = 8, 5


def checkpoint(bench: Bench) -> Result:
    """Host buffers for the whole state, and the copy that training waits for."""
    trainee, result = bench.trainee(), Result()
    slices = _slices(trainee.optimizer)
    size = sum(s.tensor.numel() * s.tensor.element_size() for s in slices)
    before, began = _available(), time.perf_counter()
    buffers = _buffers(slices, bench.on_gpu)
    made = time.perf_counter() - began
    stalls = []
    for _ in range(3):
        bench.wait()
        began = time.perf_counter()
        _copy(slices, buffers)
        bench.wait()
        stalls.append(time.perf_counter() - began)
    result.facts |= {
        "state, 10^9 bytes": f"{size / 1e9:.3g}",
        "seconds to make the buffers": f"{made:.2f}",
        "host memory that they took, 10^9 bytes": f"{(before - _available()) / 1e9:.3g}",
        "seconds that training waits": ", ".join(f"{stall:.3f}" for stall in stalls),
        "10^9 bytes a second": f"{size / min(stalls) / 1e9:.1f}",
    }
    result.check(
        all(torch.equal(s.tensor.cpu(), buffers[s.name, s.start]) for s in slices[:8]), "a copy differs from the state"
    )
    return result


def resume(bench: Bench) -> Result:
    """Two steps, from the state that was kept, twice: the same bits where kernels are asked for fixed sums, and how far
    apart the ends are where they are not."""
    trainee, result = bench.trainee(), Result()
    kept, first = (_buffers(_slices(trainee.optimizer), bench.on_gpu) for _ in range(2))
    _copy(_slices(trainee.optimizer), kept)
    bench.wait()
    torch.utils.deterministic.fill_uninitialized_memory = False
    for fixed in (False, True):
        torch.use_deterministic_algorithms(fixed, warn_only=True)  # which compiles everything anew
        for buffers in (first, None):
            _load(trainee, kept)
            for number in range(2):
                trainee.step(bench.batch(number), number)
            if buffers:
                _copy(_slices(trainee.optimizer), buffers)
            bench.wait()
        moved, differing = 0, {}
        for s in _slices(trainee.optimizer):
            right = first[s.name, s.start].to(s.tensor.device)
            moved += not torch.equal(right, kept[s.name, s.start].to(s.tensor.device))
            if not torch.equal(s.tensor, right):
                differing[s.name] = relative(s.tensor, right)
        sums = "fixed sums" if fixed else "sums in any order"
        result.facts |= {f"{sums}: tensors": len(first), f"{sums}: of them moved by the steps": moved}
        result.facts[f"{sums}: tensors that differ"] = len(differing)
        if differing:
            worst = max(differing, key=differing.__getitem__)
            weights = [difference for name, difference in differing.items() if name.startswith("weight/")]
            result.facts[f"{sums}: largest relative difference"] = f"{differing[worst]:.2e} ({worst})"
            result.facts[f"{sums}: largest of the weights"] = f"{max(weights, default=0.0):.2e}"
        result.check(moved > len(first) // 2, "the steps moved next to nothing")
        result.check(not (fixed and differing), "resuming ends elsewhere")
        result.check(max(differing.values(), default=0.0) < 0.05, "resuming ends far elsewhere")
    torch.use_deterministic_algorithms(False)
    return result


def _slices(optimizer: Optimizer) -> list[Slice]:
    return [*optimizer.weight_slices(), *optimizer.state_slices()]


def _buffers(slices: list[Slice], pinned: bool) -> dict[tuple[str, int], Tensor]:
    found = {}
    for s in slices:
        zeros = torch.zeros(s.tensor.shape, dtype=s.tensor.dtype)
        found[s.name, s.start] = zeros.pin_memory() if pinned and s.tensor.is_cuda else zeros.fill_(0)
    return found


def _copy(slices: list[Slice], buffers: dict[tuple[str, int], Tensor]) -> None:
    for s in slices:
        buffers[s.name, s.start].copy_(s.tensor, non_blocking=True)


@torch.no_grad()
def _load(trainee, kept: dict[tuple[str, int], Tensor]) -> None:
    trainee.optimizer.zero_grad()
    for s in trainee.optimizer.weight_slices():
        s.tensor.copy_(kept[s.name, s.start])
    trainee.optimizer.load_slices(lambda name, start, stop: kept[name, start])


def _available() -> int:
    """Bytes of host memory that nobody uses; 0 where Linux does not say."""
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        return next((int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:")), 0)
    return 0


def ranks(bench: Bench) -> Result:
    """Two processes on the one device, in fp64, through the optimizer's sharing: their weights are one process's."""
    bench.free()
    result, context = Result(), multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = context.SimpleQueue()
    processes = [context.Process(target=_rank, args=(rank, port, str(bench.device), answers)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    result.check(
        all(process.exitcode == 0 for process in processes), f"ranks ended with {[p.exitcode for p in processes]}"
    )
    while not answers.empty():
        rank, differ, moved = answers.get()
        result.facts[f"rank {rank}: largest difference of a weight from one process's"] = f"{differ:.1e}"
        result.facts[f"rank {rank}: bytes in collectives"] = moved
        result.check(differ < 1e-9 and moved > 0, f"rank {rank} is off by {differ:.1e}")
    return result


def _rank(rank: int, port: int, device: str, answers) -> None:
    from conftest import adapt

    adapt()
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    alone, _ = _train(torch.device(device), None, 0, 1)
    _through_the_host()
    weights, moved = _train(torch.device(device), dist.group.WORLD, rank, 2)
    answers.put((rank, max((weights[name] - right).abs().max().item() for name, right in alone.items()), moved))
    dist.destroy_process_group()


def _train(
    device: torch.device, group: dist.ProcessGroup | None, rank: int, world: int
) -> tuple[dict[str, Tensor], int]:
    """The same rows whatever the number of ranks: the weights at the end, and the bytes of the collectives' buffers."""
    with device:
        model = GPT(RANKED)
    model.init_weights(0)
    model.double()
    with torch.no_grad():  # while no block adds anything, some gradients are rounding noise, which Adam would amplify
        for number, parameter in enumerate(model.parameters()):
            if not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    tokens = RANKED_ROWS * RANKED.seq_len
    specs = derive(RANKED, RULES["head"], ratio=None, steps=RANKED_STEPS, batch_tokens=tokens).specs
    optimizer = Optimizer(model.groups(), specs, group, polar_dtype=torch.float64)
    schedule = Schedule.for_generation(RANKED_STEPS, "head")
    for step in range(RANKED_STEPS):
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(0, RANKED.vocab_size, (RANKED_ROWS, RANKED.seq_len + 1), generator=generator)
        mine = rows.chunk(world)[rank].to(device)
        optimizer.begin_overlap()
        model.loss(mine[:, :-1], mine[:, 1:]).backward()
        optimizer.step(schedule.at(step))
    return {name: p.detach().cpu() for name, p in model.named_parameters()}, sum(optimizer.traffic.bytes.values())


class _Done:
    """A collective that has already happened."""

    def wait(self) -> None: ...


def _through_the_host() -> None:
    """gloo's collectives on host copies: it takes no GPU's tensors in every one of them. NCCL wants a GPU for each
    rank."""
    real_reduce, real_broadcast = dist.all_reduce, dist.broadcast

    def mean(full: Tensor) -> Tensor:
        host = full.detach().cpu().clone()
        real_reduce(host)
        return host / dist.get_world_size()

    def reduce_scatter(output: Tensor, full: Tensor, op=None, group=None, async_op=False) -> _Done:
        output.copy_(mean(full).chunk(dist.get_world_size())[dist.get_rank()])
        return _Done()

    def all_gather(full: Tensor, part: Tensor, group=None, async_op=False) -> _Done:
        host = part.detach().cpu()
        parts = [torch.empty_like(host) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, host)
        full.copy_(torch.cat(parts))
        return _Done()

    def all_reduce(full: Tensor, op=None, group=None, async_op=False) -> _Done:
        full.copy_(mean(full))
        return _Done()

    def broadcast(full: Tensor, group=None, group_src=None) -> None:
        host = full.cpu()
        real_broadcast(host, src=0)
        full.copy_(host)

    dist.reduce_scatter_single, dist.all_gather_single = reduce_scatter, all_gather
    dist.all_reduce, dist.broadcast = all_reduce, broadcast
