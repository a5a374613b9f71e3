"""The GPUs against what a run wants of them: pure functions from what nvidia-smi and the probes said to findings."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from job.machine.finding import Finding, Verdict
from job.machine.gpus import CUDA_NAMES, GPUS
from job.machine.nvidia_smi import Gpu

WARNED_BELOW, REFUSED_BELOW = 0.08, 0.25
"""share by which something is slower than it should be"""
HELD = 2 << 30
"""bytes of a GPU's memory from which on somebody is at it (assumed; an idle H100 says less than 1 GiB)"""
PLANNED_TOO_HIGH = 1.15
"""times what a step was seen to take (LOG.md)"""
ANOTHER = "take another node"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuFacts:
    gpus: tuple[Gpu, ...]
    on_bus: int = 0
    """GPUs that the driver has found; 0 is unknown"""
    driver: str | None = None
    driver_cuda: str | None = None
    """the newest CUDA that the driver can do"""
    torch_cuda: str | None = None
    matmul: tuple[float, ...] | None = None
    """FLOP/s of a bf16 product by rank; None: not tried"""
    all_reduce: tuple[float, ...] | None = None
    """bytes/s that an all-reduce moves by rank, as nccl-tests' bus bandwidth counts"""
    probe_failed: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpusWanted:
    """What a run wants of the GPUs."""

    count: int
    """0: whatever there is"""
    made_for: tuple[int, str] | None = None
    """count and name of the recipe's own machine (GPUS)"""
    memory: float = 0.0
    """bytes that a step takes of each"""
    cost: Callable[[float], str] = lambda share: ""
    """minutes and dollars of a run that takes longer by that share; empty where nobody knows"""


def gpu_findings(facts: GpuFacts, wanted: GpusWanted) -> list[Finding]:
    if not facts.gpus:
        remedy = "give the container NVIDIA's utilities"
        return [Finding("GPUs", Verdict.UNKNOWN, "nvidia-smi cannot be asked", remedy), *_speeds(facts, wanted)]
    checks = (_count, _kind, _memory, _driver, _ecc, _mig, _processes, _slowdowns, _clocks, _power, _pcie)
    found = [finding for check in checks for finding in check(facts, wanted)]
    if len(facts.gpus) > 1:
        found += [*_fabric(facts, wanted), *_nvlink(facts, wanted)]
    return [*found, *_speeds(facts, wanted)]


def slower(share: float) -> Verdict:
    """The verdict on something that is slower than it should be by `share` (of its speed)."""
    if share < WARNED_BELOW:
        return Verdict.OK
    return Verdict.SLOW if share >= REFUSED_BELOW else Verdict.WARNED


def _named(indices: Sequence[int]) -> str:
    return f"GPU{'s' * (len(indices) > 1)} {', '.join(map(str, indices))}"


def _has(verb: str, indices: Sequence[int]) -> str:
    singular = {"has": "have", "is": "are"}
    return verb if len(indices) == 1 else singular[verb]


def _count(facts: GpuFacts, wanted: GpusWanted) -> Iterator[Finding]:
    found, expected = len(facts.gpus), max(wanted.count, facts.on_bus)
    if found < expected:
        remedy = f"{ANOTHER} (`dmesg | grep Xid` says what became of the other{'s' * (expected - found > 1)})"
        verdict = Verdict.REFUSED if found < wanted.count else Verdict.SLOW
        yield Finding("GPUs", verdict, f"{found} of {expected} answer", remedy)
        return
    made_for = wanted.made_for[0] if wanted.made_for else 0
    if not wanted.count and found < made_for:
        longer = f"the recipe is made for {made_for}, on {found} it takes longer by that factor"
        yield Finding("GPUs", Verdict.WARNED, f"{found} answer; {longer}", f"take a node with {made_for}")
        return
    yield Finding("GPUs", Verdict.OK, f"{found} answer")


def _kind(facts: GpuFacts, wanted: GpusWanted) -> Iterator[Finding]:
    names = Counter(gpu.name for gpu in facts.gpus)
    listed = ", ".join(f"{count} x {name}" for name, count in names.most_common())
    if len(names) > 1:
        yield Finding("GPU kind", Verdict.SLOW, f"{listed}: all are as fast as the slowest", f"{ANOTHER} with one kind")
        return
    kind = wanted.made_for[1] if wanted.made_for else None
    if kind and CUDA_NAMES.get(facts.gpus[0].name) != kind:
        remedy = f"`speedrun plan --gpu NAME` says what it costs there, or take a node with the {GPUS[kind].title}"
        yield Finding("GPU kind", Verdict.WARNED, f"{listed}; the recipe is made for {GPUS[kind].title}", remedy)
        return
    yield Finding("GPU kind", Verdict.OK, listed)


def _memory(facts: GpuFacts, wanted: GpusWanted) -> Iterator[Finding]:
    known = {gpu.index: gpu.memory for gpu in facts.gpus if gpu.memory is not None}
    if not known:
        yield Finding("GPU memory", Verdict.UNKNOWN, "nvidia-smi does not say how much there is")
        return
    least, most = min(known.values()), max(known.values())
    sizes = f"{least / 1e9:.1f} GB each" if least == most else f"{least / 1e9:.1f} to {most / 1e9:.1f} GB"
    said = f"{sizes}; a step takes {wanted.memory / 1e9:.1f} (planned)"
    if least >= wanted.memory:
        yield Finding("GPU memory", Verdict.OK, said)
    else:
        verdict = Verdict.REFUSED if least * PLANNED_TOO_HIGH < wanted.memory else Verdict.WARNED
        yield Finding("GPU memory", verdict, said, "lower train.device_batch_size, or take larger GPUs")


def _driver(facts: GpuFacts, wanted: GpusWanted) -> Iterator[Finding]:
    if not facts.driver_cuda or not facts.torch_cuda:
        yield Finding("driver", Verdict.UNKNOWN, f"{facts.driver or 'no version'}; nobody says which CUDA it can do")
        return
    said = f"{facts.driver} can do CUDA {facts.driver_cuda}, torch is built for {facts.torch_cuda}"
    if int(facts.driver_cuda.partition(".")[0]) < int(facts.torch_cuda.partition(".")[0]):
        remedy = "take a host with a newer driver, or an image built with COMPAT=DIR or CUDA=cu126 (docs/cloud.md)"
        yield Finding("driver", Verdict.REFUSED, said, remedy)
    else:
        yield Finding("driver", Verdict.OK, said)


def _flagged(
    facts: GpuFacts, check: str, value: Callable[[Gpu], bool | None], good: str, bad: Callable[[list[int]], Finding]
) -> Iterator[Finding]:
    """One finding for a property that each GPU has, has not, or does not tell of."""
    wrong = [gpu.index for gpu in facts.gpus if value(gpu)]
    if wrong:
        yield bad(wrong)
    elif all(value(gpu) is None for gpu in facts.gpus):
        yield Finding(check, Verdict.UNKNOWN, "nvidia-smi does not say")
    else:
        yield Finding(check, Verdict.OK, good)


def _ecc(facts: GpuFacts, wanted: GpusWanted) -> Iterator[Finding]:
    def judged(wrong: list[int]) -> Finding:
        count = sum(gpu.uncorrected or 0 for gpu in facts.gpus)
        said = f"{_named(wrong)} {_has('has', wrong)} {count} uncorrected memory errors, or rows that need replacing"
        return Finding("ECC", Verdict.REFUSED, said, f"{ANOTHER} (a reset, `nvidia-smi -r`, may heal it)")

    def damaged(gpu: Gpu) -> bool | None:
        said = [gpu.remap_failed, None if gpu.uncorrected is None else gpu.uncorrected > 0]
        known = [each for each in said if each is not None]
        return any(known) if known else None

    off = [gpu.index for gpu in facts.gpus if gpu.ecc is False]
    found = next(_flagged(facts, "ECC", damaged, "on, no uncorrected error", judged))
    if off and found.verdict != Verdict.REFUSED:
        said = f"off on {_named(off)}: a flipped bit would go unnoticed"
        found = Finding("ECC", Verdict.WARNED, said, "`nvidia-smi -e 1` and a reset")
    pending = [gpu.index for gpu in facts.gpus if gpu.remap_pending]
    if pending and found.verdict != Verdict.REFUSED:
        said = f"{_named(pending)} {_has('has', pending)} rows that are replaced at the next reset"
        found = Finding("ECC", Verdict.WARNED, said, "nothing now; `nvidia-smi -r` where nobody computes")
    yield found


def _mig(facts: GpuFacts, wanted: GpusWanted) -> Iterator[Finding]:
    def cut(wrong: list[int]) -> Finding:
        said = f"{_named(wrong)} {_has('is', wrong)} cut into instances, of which a process sees one"
        return Finding("MIG", Verdict.SLOW, said, "`nvidia-smi -mig 0` as root on the host, or take another node")

    yield from _flagged(facts, "MIG", lambda gpu: gpu.mig, "off", cut)


def _processes(facts: GpuFacts, wanted: GpusWanted) -> Iterator[Finding]:
    def held(wrong: list[int]) -> Finding:
        names = sorted({name for gpu in facts.gpus for name in gpu.processes})
        who = ", ".join(names) or "a process that is not seen from here"
        used = max(gpu.used or 0 for gpu in facts.gpus if gpu.index in wrong)
        said = f"{_named(wrong)} {_has('is', wrong)} used by {who} (up to {used / 1e9:.1f} GB)"
        return Finding("GPU processes", Verdict.SLOW, said, "end it (nvidia-smi lists the pid), or take another node")

    def busy(gpu: Gpu) -> bool | None:
        return True if gpu.processes else None if gpu.used is None else gpu.used > HELD

    yield from _flagged(facts, "GPU processes", busy, "none", held)


def _slowdowns(facts: GpuFacts, wanted: GpusWanted) -> Iterator[Finding]:
    def slowed(wrong: list[int]) -> Finding:
        reasons = sorted({reason for gpu in facts.gpus for reason in gpu.slowdowns or ()})
        said = f"{_named(wrong)} {_has('is', wrong)} slowed down ({', '.join(reasons)}), and all wait for the slowest"
        return Finding("throttling", Verdict.SLOW, said, f"{ANOTHER}: this one's cooling or power does not suffice")

    yield from _flagged(facts, "throttling", lambda gpu: None if gpu.slowdowns is None else bool(gpu.slowdowns),
                        "no slowdown by heat or power brake", slowed)  # fmt: skip


def _lowered(
    facts: GpuFacts,
    check: str,
    values: Callable[[Gpu], tuple[float | None, float | None]],
    unit: str,
    remedy: str,
) -> Iterator[Finding]:
    """One finding for a setting of each GPU beside its default."""
    shares = {gpu.index: 1 - now / default for gpu in facts.gpus for now, default in [values(gpu)] if now and default}
    if not shares:
        yield Finding(check, Verdict.UNKNOWN, "nvidia-smi does not say")
        return
    worst = max(shares, key=lambda index: shares[index])
    now, default = values(next(gpu for gpu in facts.gpus if gpu.index == worst))
    verdict = slower(shares[worst])
    if verdict == Verdict.OK:
        yield Finding(check, verdict, f"{now:.0f} {unit}")
    else:
        yield Finding(check, verdict, f"GPU {worst} is set to {now:.0f} {unit} instead of {default:.0f}", remedy)


def _clocks(facts: GpuFacts, wanted: GpusWanted) -> Iterator[Finding]:
    remedy = "`nvidia-smi -rac` as root, or take another node"
    yield from _lowered(facts, "clocks", lambda gpu: (gpu.clock, gpu.default_clock), "MHz", remedy)


def _power(facts: GpuFacts, wanted: GpusWanted) -> Iterator[Finding]:
    remedy = "`nvidia-smi -pl WATTS` as root gives it back, or take another node"
    yield from _lowered(facts, "power limit", lambda gpu: (gpu.power_limit, gpu.default_power_limit), "W", remedy)


def _pcie(facts: GpuFacts, wanted: GpusWanted) -> Iterator[Finding]:
    def judged(wrong: list[int]) -> Finding:
        narrowed = [gpu for gpu in facts.gpus if gpu.index in wrong]
        widths = ", ".join(sorted({f"x{gpu.pcie_width:.0f} of x{gpu.max_pcie_width:.0f}" for gpu in narrowed}))
        said = f"{_named(wrong)} {_has('is', wrong)} on {widths}: checkpoints leave it more slowly"
        return Finding("PCIe", Verdict.WARNED, said, f"{ANOTHER}: a card or riser has bad contact")

    def narrow(gpu: Gpu) -> bool | None:
        return gpu.pcie_width < gpu.max_pcie_width if gpu.pcie_width and gpu.max_pcie_width else None

    yield from _flagged(facts, "PCIe", narrow, "full width", judged)


def _fabric(facts: GpuFacts, wanted: GpusWanted) -> Iterator[Finding]:
    def missing(wrong: list[int]) -> Finding:
        states = sorted({gpu.fabric for gpu in facts.gpus if gpu.index in wrong and gpu.fabric})
        said = f"{_named(wrong)} {_has('is', wrong)} at {' / '.join(states)}, and CUDA starts when it says Completed"
        remedy = f"on the host `systemctl restart nvidia-fabricmanager` (of the driver's version), or {ANOTHER}"
        return Finding("Fabric Manager", Verdict.REFUSED, said, remedy)

    yield from _flagged(facts, "Fabric Manager", lambda gpu: None if gpu.fabric is None else gpu.fabric != "Completed",
                        "completed", missing)  # fmt: skip


def _nvlink(facts: GpuFacts, wanted: GpusWanted) -> Iterator[Finding]:
    speeds = {gpu.index: sum(gpu.links) for gpu in facts.gpus if gpu.links is not None}
    if not speeds:
        yield Finding("NVLink", Verdict.UNKNOWN, "nvidia-smi does not say")
        return
    card = GPUS.get(CUDA_NAMES.get(facts.gpus[0].name, ""))
    usual = card.nvlink if card else max(speeds.values())
    worst = min(speeds, key=lambda index: speeds[index])
    remedy = f"{ANOTHER}; the all-reduce line says what it costs"
    if not any(speeds.values()):
        said = "no link is active: gradients would go over PCIe or the host's memory"
        yield Finding("NVLink", Verdict.SLOW, said, f"{ANOTHER}, with SXM boards")
        return
    said = f"GPU {worst} has {speeds[worst] / 1e9:.0f} GB/s of links up, {usual / 1e9:.0f} are usual"
    verdict = slower(1 - speeds[worst] / usual)
    yield Finding("NVLink", verdict, said, "" if verdict == Verdict.OK else remedy)


def _speeds(facts: GpuFacts, wanted: GpusWanted) -> Iterator[Finding]:
    if facts.probe_failed:
        remedy = f"{ANOTHER}: training would fail the same way"
        yield Finding("matmul", Verdict.REFUSED, f"the probe ended with: {facts.probe_failed}", remedy)
        return
    card = GPUS.get(CUDA_NAMES.get(facts.gpus[0].name, "")) if facts.gpus else None
    if facts.matmul:
        yield speed_finding("matmul", facts.matmul, card.steady_bf16 if card else None, ("TFLOP/s", 1e12), wanted.cost)
    if facts.all_reduce:
        bus = card.bus if card and len(facts.all_reduce) == 8 else None
        yield speed_finding("all-reduce", facts.all_reduce, bus, ("GB/s", 1e9), wanted.cost)


def speed_finding(
    check: str, speeds: Sequence[float], reference: float | None, unit: tuple[str, float], cost: Callable[[float], str]
) -> Finding:
    """The slowest rank beside the median of the others and beside `reference`, where one is published."""
    rank = min(range(len(speeds)), key=lambda each: speeds[each])
    others = [speed for each, speed in enumerate(speeds) if each != rank]
    beside = [(statistics.median(others), "the others'")] if others else []
    if reference:
        beside.append((reference, "the published"))
    word, size = unit
    said = f"rank {rank} {speeds[rank] / size:.4g} {word}"
    if not beside:
        return Finding(check, Verdict.OK, f"{said}; nothing is published to compare it with")
    usual, whose = max(beside)
    verdict = slower(share := 1 - speeds[rank] / usual)
    said += f" of {whose} {usual / size:.4g}"
    if verdict == Verdict.OK:
        return Finding(check, verdict, said)
    price = cost(usual / speeds[rank] - 1)
    most = f"; at most {price} (were all of a step such work)" if price else ""
    return Finding(check, verdict, f"{said}, {share:.0%} below{most}", ANOTHER)
