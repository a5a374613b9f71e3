"""Whether this machine can be trusted with a run: every probe, every check, a line each.

`speedrun doctor` and, on GPUs, the first thing of every run. What can only fail is refused; what would be slow, where
slowness is not accepted. Without torch but for the speed probe's processes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

from job.data.hub import DATASETS
from job.errors import PreflightError, SpeedrunError, UsageError
from job.machine.finding import Finding, Verdict
from job.machine.gpu_checks import GpuFacts, GpusWanted, gpu_findings
from job.machine.host import Machine, gpu_count
from job.machine.node_checks import NodeFacts, NodeWanted, node_findings
from job.plan.memory import checkpoint_bytes, step_memory
from job.plan.quote import make_plan, text_needed
from job.recipe.config import Recipe, preset_header
from job.recipe.derive import derive
from job.run.probes import HERE, gpu_facts, node_facts
from job.run.speed_probe import speeds
from job.store.checkpoint_folder import KEEP
from job.store.stores import Store
from job.train.kernels import price_of

ROW_BYTES = 2
"""of a token"""
PARQUET = 0.5
"""bytes on disk of a byte of text (estimated)"""


def examine(
    recipe: Recipe,
    out: Path,
    store: Store | None,
    *,
    ranks: int = 0,
    price: float | None = None,
    bucket_refused: str = "",
) -> list[Finding]:
    """All findings; `ranks` that are asked for on this machine (0: whatever there is), `price` in dollars an hour of
    the node where the user gives one."""
    there = gpu_count()

    def node() -> list[Finding]:
        facts = node_facts(recipe, out, store, bucket_refused=bucket_refused, on_gpus=there > 0)
        return node_findings(facts, _wanted_of_node(recipe, ranks or there or 1, facts))

    looks = [lambda: _gpus(recipe, ranks, there, price)] if there else []
    return [finding for look in (*looks, node) for finding in _found(look)]


def _found(look: Callable[[], list[Finding]]) -> list[Finding]:
    """What `look` finds. A bug of ours in it, or a tool that answers as no document says, must not cost a paid node."""
    try:
        return look()
    except SpeedrunError:
        raise
    except Exception as error:
        return [Finding("doctor", Verdict.UNKNOWN, f"it could not look ({error!r})", "report this line, it is a bug")]


def _gpus(recipe: Recipe, ranks: int, there: int, price: float | None) -> list[Finding]:
    """Speeds are probed where nothing else is refused; then nvidia-smi is asked again whether heat slows the GPUs."""
    count = ranks or there
    facts = gpu_facts() or GpuFacts(gpus=())
    name = facts.gpus[0].name if facts.gpus else ""
    made_for = re.fullmatch(r"(\d+)x(.+)", preset_header(recipe.preset).machine)
    train = recipe.train
    wanted = GpusWanted(
        count=ranks,
        made_for=(int(made_for[1]), made_for[2]) if made_for else None,
        memory=step_memory(derive(recipe).config, train.device_batch_size, count, train.fp8, train.levers).total,
        cost=lambda share: price_of(share, recipe, Machine(there, name), count, price),
    )
    if any(finding.verdict == Verdict.REFUSED for finding in gpu_findings(facts, wanted)):
        return gpu_findings(facts, wanted)
    try:
        probed = speeds(count)
    except PreflightError as error:
        return gpu_findings(dataclasses.replace(facts, probe_failed=str(error)), wanted)
    warm = {gpu.index: gpu.slowdowns for gpu in (gpu_facts() or facts).gpus}
    gpus = tuple(dataclasses.replace(gpu, slowdowns=warm.get(gpu.index)) for gpu in facts.gpus)
    matmul, all_reduce = (tuple(probed[rate]) for rate in ("matmul", "all_reduce"))
    return gpu_findings(dataclasses.replace(facts, gpus=gpus, matmul=matmul, all_reduce=all_reduce), wanted)


def _wanted_of_node(recipe: Recipe, ranks: int, facts: NodeFacts) -> NodeWanted:
    """The most that the run may still take."""
    derived, seq_len = derive(recipe), recipe.model.seq_len
    checkpoint = checkpoint_bytes(derived.config, 1)
    disk = (KEEP + 2.0) * checkpoint  # those that are kept, the last one, and one that is being written
    text = text_needed(recipe.data, derived.rows, seq_len, recipe.train.val_tokens)
    if facts.prepared != HERE:
        disk += (text.rows + text.val_rows) * (seq_len + 1) * ROW_BYTES
    if text.shards and not facts.prepared:
        disk += text.shards * DATASETS[recipe.data.source].text_bytes * PARQUET
    try:
        on_node = make_plan(recipe, gpus=ranks if facts.on_gpus else None).on_node
    except UsageError:
        on_node = None
    seconds = 60 * on_node.minutes[1] if on_node else None
    return NodeWanted(disk=disk, checkpoint=checkpoint, ranks=ranks, seconds=seconds)
