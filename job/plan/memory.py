"""How much memory a training step takes on one GPU, before there is one.

Exact, from the shapes and from how `model.optimizer` shares its state out:

    parameters      fp32 matrices, head and scalars; bf16 embedding tables
    gradients       one for each parameter, in its dtype
    states          Muon: momentum and a second moment a row or column, for the whole matrices that a rank owns;
                    AdamW: two moments in the parameter's dtype, for the rows that a rank owns. The fullest rank counts.
    weight copies   what the matrix products read: 1 byte a weight in fp8, 2 in bf16
    temporaries     of the optimizer step: the gathered matrices and the owner's reduced and fresh ones. They come when the
                    activations are gone, so that only the larger of the two counts.

Modelled, with three constants (bytes), calibrated on what is published:

    activations     ACTIVATION x width, a token and layer: what the backward pass needs again
    loss            in chunks (`model.loss`): CHUNK_LOGIT x the logits of one chunk, and the two gradients that are kept;
                    plain: PLAIN_LOGIT x all logits of the device batch

**The host's** (`HostMemory`), exact too, of all ranks of a machine together: pinned buffers for each slice that a rank saves
(`job/train/checkpoint.py`), each rounded up to a power of two as CUDA's host allocator does, and the copy of weights and state that the warm-up
puts back afterwards (`Optimizer.rehearsal`), both at once. What the processes take beside these is not counted.

Known to hold: a d24 with the plain loss fits at 16 rows and not at 32, a d26 not at 32, a d22 with a chunked loss fits at 32; a d12
in bf16 at 32 rows took 34e9 bytes (36.6e9 here).
"""

from __future__ import annotations

import dataclasses
import math

from model.config import LOSS_CHUNK_ELEMENTS, SMEAR_CHANNELS, GPTConfig

ACTIVATION = {"fp8": 29, "bf16": 36}
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


@dataclasses.dataclass(frozen=True)
class Stack:
    """Muon matrices of one shape, as `model.shards.MuonStack` holds them."""

    count: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        return self.rows * self.columns

    def slots(self, ranks: int) -> int:
        return math.ceil(self.count / ranks)


def muon_stacks(config: GPTConfig) -> tuple[Stack, ...]:
    """In the order in which the optimizer deals them out: MLP-out, MLP-in, gates, attention."""
    L, d, gated = config.depth, config.width, len(config.value_embed_layers)
    stacks = (
        Stack(L, d, 4 * d),
        Stack(L, 4 * d, d),
        Stack(gated, config.heads, config.ve_gate_channels),
        Stack(4 * L, d, d),
    )
    return tuple(stack for stack in stacks if stack.count)


def tables(config: GPTConfig) -> list[tuple[int, int]]:
    """(tensors, bytes an element) of the V x d AdamW tensors: embeddings in bf16, the head in fp32."""
    return [(1 + len(config.value_embed_layers), BF16), (1, FP32)]


def small_tensors(config: GPTConfig) -> list[int]:
    """Elements of each tensor below the size at which AdamW's are shared out: every rank holds all of them, in fp32."""
    return [
        config.depth,
        config.depth,
        *([SMEAR_CHANNELS, 1] if config.smear else []),
        *([1] if config.backout else []),
    ]


def scalars(config: GPTConfig) -> int:
    """Elements of all of these."""
    return sum(small_tensors(config))


def parameter_bytes(config: GPTConfig) -> int:
    table = config.padded_vocab * config.width
    matrices = sum(stack.count * stack.size for stack in muon_stacks(config))
    return FP32 * (matrices + scalars(config)) + sum(count * table * width for count, width in tables(config))


def state_bytes(config: GPTConfig, ranks: int, rank: int) -> int:
    """The optimizer state that `rank` of `ranks` holds."""
    total, turn = 2 * FP32 * scalars(config), 0
    for stack in muon_stacks(config):
        owned = len(range((rank - turn) % ranks, stack.count, ranks))
        total += owned * FP32 * (stack.size + max(stack.rows, stack.columns))
        turn += stack.count
    rows = table_rows(config, ranks, rank)
    return total + sum(2 * count * rows * config.width * width for count, width in tables(config))


def table_rows(config: GPTConfig, ranks: int, rank: int) -> int:
    """Rows of each table that `rank` owns."""
    share = math.ceil(config.padded_vocab / ranks)
    return max(0, min(share, config.padded_vocab - rank * share))


def checkpoint_bytes(config: GPTConfig, ranks: int) -> int:
    """Weights and optimizer state of all ranks together, each row once."""
    replicated = (ranks - 1) * 2 * FP32 * scalars(config)
    return parameter_bytes(config) + sum(state_bytes(config, ranks, rank) for rank in range(ranks)) - replicated


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


def saved_slices(config: GPTConfig, ranks: int, rank: int) -> list[int]:
    """Bytes of each slice on the GPU that `rank` of `ranks` writes into a checkpoint: weight and two moments of what it owns."""
    sizes, turn = [], 0
    for stack in muon_stacks(config):
        owned = len(range((rank - turn) % ranks, stack.count, ranks))
        sizes += owned * [FP32 * stack.size, FP32 * stack.size, FP32 * max(stack.rows, stack.columns)]
        turn += stack.count
    if rows := table_rows(config, ranks, rank):
        sizes += [rows * config.width * width for count, width in tables(config) for _ in range(3 * count)]
    return sizes + (3 * [FP32 * count for count in small_tensors(config)] if rank == 0 else [])


def low_precision_weights(config: GPTConfig) -> int:
    """Weights of the large matrix products: all of a block's and the head's, not the gates'."""
    return 12 * config.width**2 * config.depth + config.padded_vocab * config.width


def step_memory(config: GPTConfig, rows: int, ranks: int, fp8: bool, *, plain_loss: bool = False) -> Memory:
    """What one rank of `ranks` needs for micro-steps of `rows` rows. `plain_loss`: as the published program computes it."""
    parameters = parameter_bytes(config)
    tokens = rows * config.seq_len
    owned = sum(FP32 * stack.slots(ranks) * stack.size for stack in muon_stacks(config))
    return Memory(
        rows=rows,
        parameters=parameters,
        gradients=parameters,
        states=max(state_bytes(config, ranks, rank) for rank in range(ranks)),
        weight_copies=low_precision_weights(config) * (1 if fp8 else BF16),
        activations=ACTIVATION["fp8" if fp8 else "bf16"] * config.width * config.depth * tokens,
        loss=PLAIN_LOGIT * config.padded_vocab * tokens if plain_loss else _chunked_loss(config, tokens),
        temporaries=owned * (ranks + 2) if ranks > 1 else 2 * owned,
    )


def _chunked_loss(config: GPTConfig, tokens: int) -> int:
    chunk = CHUNK_LOGIT * min(LOSS_CHUNK_ELEMENTS, tokens * config.padded_vocab)
    return chunk + BF16 * tokens * config.width + FP32 * config.padded_vocab * config.width


def largest_batch(config: GPTConfig, batch_rows: int, ranks: int, fp8: bool, card: float) -> Memory | None:
    """The most rows that divide `batch_rows` over `ranks` and fit the card; None where not even one row does."""
    per_rank = batch_rows // ranks
    for rows in range(per_rank, 0, -1):
        if per_rank % rows == 0 and (memory := step_memory(config, rows, ranks, fp8)).fits(card):
            return memory
    return None
