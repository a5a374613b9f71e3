"""How much memory a training step takes on one GPU, before there is one.

Exact, from the shapes and from how `model.optimizer` shares its state out:

    parameters      fp32 matrices, head and scalars; bf16 embedding tables
    gradients       one for each parameter, in its dtype
    states          Muon: momentum and a second moment a row or column, for the whole matrices that a rank owns;
                    AdamW: two moments in the parameter's dtype, for the rows that a rank owns. The fullest rank counts.
    weight copies   what the matrix products read: 1 byte a weight in fp8, 2 in bf16; where blocks keep them
                    (`train.levers`), their transposes too
    temporaries     of the optimizer step: the gathered matrices and the owner's reduced and fresh ones. They come when
                    the activations are gone, so that only the larger of the two counts.

Modelled, with three constants (bytes), calibrated on what is published:

    activations     ACTIVATION x width, a token and layer: what the backward pass needs again; levers change it by
                    KEPT_BY_LEVER, which is counted
    loss            in chunks (`model.loss`): CHUNK_LOGIT x the logits of one chunk, and the two gradients kept;
                    plain: PLAIN_LOGIT x all logits of the device batch

**The host's** (`HostMemory`), exact too, of all ranks of a machine together: pinned buffers for each slice that a rank
saves (`job/train/checkpoint.py`), each rounded up to a power of two as CUDA's host allocator does, and the copy of
weights and state that the warm-up puts back afterwards (`Optimizer.preserve_state`), both at once. What the processes
take beside these is not counted.

Known to hold: a d24 with the plain loss fits at 16 rows and not at 32, a d26 not at 32, a d22 with a chunked loss fits
at 32; a d12 in bf16 at 32 rows took 34e9 bytes (36.6e9 here).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterator

from model.config import LOSS_CHUNK_ELEMENTS, GPTConfig
from model.partition import Shard, parameter_groups, partition

ACTIVATION = {"fp8": 29, "bf16": 36}
KEPT_BY_LEVER = {"kept_weights": 0.6, "norm_output": -4.0, "kept_columns": 2.5, "relu_root": -4.0}
"""counted (`python tests/model/hopper_levers.py`), the mean of blocks with and without a value embedding; others: 0"""
PLAIN_LOGIT = 6
CHUNK_LOGIT = 4
"""compiled, as on a GPU: the logits, and their gradient or its two copies in fp8"""
RESERVE = 0.06
"""share of the card that is left alone: CUDA's context, the collectives' buffers, fragmentation (assumed)"""

FP32, BF16 = 4, 2


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank at one device batch."""

    rows: int
    parameters: int
    gradients: int
    states: int
    weight_copies: int
    activations: int
    loss: int
    temporaries: int

    @property
    def static(self) -> int:
        return self.parameters + self.gradients + self.states + self.weight_copies

    @property
    def total(self) -> int:
        """The peak: temporaries and activations do not meet."""
        return self.static + max(self.activations + self.loss, self.temporaries)

    def fits(self, card: float) -> bool:
        return self.total <= card * (1 - RESERVE)


@functools.cache
def shards(config: GPTConfig) -> list[Shard]:
    """As the optimizer divides the parameters; a parameter's dtype is here its bytes an element."""
    groups = parameter_groups(config, compute_dtype=BF16, master_dtype=FP32)
    return partition(groups, {group: "muon" if group == "matrices" else "adamw" for group in groups})


def muon_stacks(config: GPTConfig) -> list[Shard]:
    return [shard for shard in shards(config) if shard.kind == "matrices"]


def parameter_bytes(config: GPTConfig) -> int:
    return sum(p.size * p.dtype for shard in shards(config) for p in shard.parameters)


def held_slices(config: GPTConfig, ranks: int, rank: int) -> Iterator[tuple[Shard, int, int, int]]:
    """The shard and the bytes of weight, first and second state of each slice that `rank` of `ranks` updates."""
    for shard in shards(config):
        for p, start, stop in shard.slices(ranks, rank):
            weight = p.dtype * (stop - start) * (p.size // p.rows)
            second = FP32 * max(p.shape) if shard.kind == "matrices" else weight
            if weight:
                yield shard, weight, weight, second


def state_bytes(config: GPTConfig, ranks: int, rank: int) -> int:
    """The optimizer state that `rank` of `ranks` holds."""
    return sum(first + second for _, _, first, second in held_slices(config, ranks, rank))


def saved_slices(config: GPTConfig, ranks: int, rank: int) -> list[int]:
    """Bytes of each slice that `rank` of `ranks` writes into a checkpoint; replicated ones are rank 0's."""
    held = held_slices(config, ranks, rank)
    return [size for shard, *sizes in held if rank == 0 or shard.kind != "replicated" for size in sizes]


def checkpoint_bytes(config: GPTConfig, ranks: int) -> int:
    """Weights and optimizer state of all ranks together, each row once."""
    return sum(sum(saved_slices(config, ranks, rank)) for rank in range(ranks))


@dataclasses.dataclass(frozen=True)
class HostMemory:
    """Bytes of the machine's own memory that its ranks take on GPUs, all together."""

    pinned: int
    rehearsal: int

    @property
    def total(self) -> int:
        return self.pinned + self.rehearsal


def host_memory(config: GPTConfig, ranks: int) -> HostMemory:
    """For checkpoints and the warm-up of `ranks` ranks on one machine."""
    pinned = sum(1 << (size - 1).bit_length() for rank in range(ranks) for size in saved_slices(config, ranks, rank))
    states = sum(state_bytes(config, ranks, rank) for rank in range(ranks))
    return HostMemory(pinned, ranks * parameter_bytes(config) + states)


def low_precision_weights(config: GPTConfig) -> int:
    """Weights of the large matrix products: all of a block's and the head's, not the gates'."""
    return 12 * config.width**2 * config.depth + config.padded_vocab * config.width


def step_memory(
    config: GPTConfig, rows: int, ranks: int, fp8: bool, levers: Collection[str] = (), *, plain_loss: bool = False
) -> Memory:
    """What one rank of `ranks` needs for micro-steps of `rows` rows. `plain_loss`: as the published program computes
    it."""
    levers = levers if fp8 else ()
    kept = ACTIVATION["fp8" if fp8 else "bf16"] + sum(KEPT_BY_LEVER.get(lever, 0.0) for lever in levers)
    transposes = 12 * config.width**2 * config.depth if "kept_weights" in levers else 0
    parameters = parameter_bytes(config)
    tokens = rows * config.seq_len
    owned = sum(FP32 * stack.slots(ranks) * stack.parameters[0].size for stack in muon_stacks(config))
    return Memory(
        rows=rows,
        parameters=parameters,
        gradients=parameters,
        states=max(state_bytes(config, ranks, rank) for rank in range(ranks)),
        weight_copies=low_precision_weights(config) * (1 if fp8 else BF16) + transposes,
        activations=round(kept * config.width * config.depth * tokens),
        loss=PLAIN_LOGIT * config.padded_vocab * tokens if plain_loss else _chunked_loss(config, tokens),
        temporaries=owned * (ranks + 2) if ranks > 1 else 2 * owned,
    )


def _chunked_loss(config: GPTConfig, tokens: int) -> int:
    chunk = CHUNK_LOGIT * min(LOSS_CHUNK_ELEMENTS, tokens * config.padded_vocab)
    return chunk + BF16 * tokens * config.width + FP32 * config.padded_vocab * config.width


def largest_batch(
    config: GPTConfig, batch_rows: int, ranks: int, fp8: bool, card: float, levers: Collection[str] = ()
) -> Memory | None:
    """The most rows that divide `batch_rows` over `ranks` and fit the card; None where not even one row does."""
    per_rank = batch_rows // ranks
    for rows in range(per_rank, 0, -1):
        if per_rank % rows == 0 and (memory := step_memory(config, rows, ranks, fp8, levers)).fits(card):
            return memory
    return None
