"""Shape and switches of one model, of both published generations. Free of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

SMEAR_CHANNELS = 24
VOCAB_LIMIT = 1 << 16  # prepared rows are uint16
SAME_NUMBERS = ("shared_input", "kept_weights", "norm_output", "kept_columns")
LEVERS = (*SAME_NUMBERS, "joint_qkv", "relu_root", "wide_gradients", "bounded_scales")
"""what fp8 blocks may leave out (`model/fp8_passes.py`); SAME_NUMBERS change none by more than a rounding to bf16"""
LOSS_CHUNK_ELEMENTS = 1 << 26  # logits per chunk of the loss on a GPU: 2048 rows at a vocabulary of 32,768


class ConfigError(ValueError):
    """A configuration that cannot be built: one sentence with the offending value and what to do."""


@dataclass(frozen=True)
class GPTConfig:
    """Shape and switches of one model. The defaults are the July generation's; `for_depth` fills in the width."""

    depth: int
    vocab_size: int
    seq_len: int  # T, the context trained on
    width: int
    head_dim: int = 128
    window_pattern: str = "SSSL"  # tiled over the layers; the last layer is always L
    window_divisor: int = 4  # a short window is seq_len / window_divisor ...
    window_tile: int = 128  # ... rounded up to a multiple of this
    rope_base: float = 100_000.0
    qk_scale: float = 1.2  # q and k are each multiplied by it after their norm
    softcap: float = 15.0
    ve_gate_channels: int = 12
    ve_gate_limit: float = 3.0  # the gate is limit * sigmoid(.)
    ve_gate_init: float = 0.02  # gate weights are drawn from U(0, this)
    resid_init: tuple[float, float] = (1.15, 1.05)  # lambda of the first and the last layer, linear in between
    x0_init: tuple[float, float] = (0.20, 0.05)  # mu likewise
    smear: bool = True
    backout: bool = True
    wte_std: float = 0.8
    mlp_in_scale: float = 0.4  # MLP-in is drawn from U(+-sqrt(3/d)) times this

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type == "int":
                _positive_int(field.name, getattr(self, field.name))
        if self.vocab_size > VOCAB_LIMIT:
            raise ConfigError(
                f"vocab_size is {self.vocab_size}: at most {VOCAB_LIMIT} is possible, prepared rows are 16 bits a token"
            )
        if self.width % self.head_dim or self.head_dim % 2:
            dims = ", ".join(str(d) for d in range(16, self.width + 1, 16) if self.width % d == 0) or str(self.width)
            raise ConfigError(
                f"head_dim {self.head_dim} must be even and divide the width {self.width}: choose one of {dims}"
            )
        if self.width < (read := max(self.ve_gate_channels, SMEAR_CHANNELS * self.smear)):
            raise ConfigError(f"width {self.width} has fewer channels than the gates read ({read}): make it wider")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise ConfigError(
                f"window_pattern is {self.window_pattern!r}: write it with S (short) and L (long), for example SSSL"
            )
        if not self.softcap > 0:
            raise ConfigError(f"softcap is {self.softcap}: it must be positive (the published runs use 15 or 20)")

    @classmethod
    def for_depth(
        cls, depth: int, vocab_size: int, seq_len: int, generation: str = "head", **overrides: Any
    ) -> GPTConfig:
        """The published shape of this depth with `generation`'s switches, then `overrides`."""
        _positive_int("depth", depth)
        if generation not in GENERATIONS:
            raise ConfigError(f"no such generation: {generation!r}; there are {', '.join(GENERATIONS)}")
        shape = {"depth": depth, "vocab_size": vocab_size, "seq_len": seq_len, "width": width_for_depth(depth)}
        return cls(**{**shape, **GENERATIONS[generation], **overrides})

    @property
    def heads(self) -> int:
        return self.width // self.head_dim

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding tables and the head: vocab_size rounded up to a multiple of 64."""
        return math.ceil(self.vocab_size / 64) * 64

    @property
    def windows(self) -> tuple[int, ...]:
        """Per layer, how many predecessors a token sees."""
        tile = self.window_tile
        short = min(self.seq_len, math.ceil(self.seq_len / (self.window_divisor * tile)) * tile)
        pattern = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.depth - 1)] + ["L"]
        return tuple(self.seq_len if kind == "L" else short for kind in pattern)

    @property
    def value_embed_layers(self) -> tuple[int, ...]:
        """Every second layer, so that the last one has a value embedding."""
        return tuple(i for i in range(self.depth) if i % 2 == (self.depth - 1) % 2)


# What February has otherwise. Its softcap was 15 until 2c062aa and 20 from aba30cb to 324e69c; in between the
# two generations (6ed7d1d) short windows were a third of the context: window_divisor=3.
GENERATIONS: dict[str, dict[str, Any]] = {
    "head": {},
    "feb": {
        "window_divisor": 2,
        "window_tile": 1,
        "rope_base": 10_000.0,
        "qk_scale": 1.0,
        "ve_gate_channels": 32,
        "ve_gate_limit": 2.0,
        "ve_gate_init": 0.0,
        "resid_init": (1.0, 1.0),
        "x0_init": (0.1, 0.1),
        "smear": False,
        "backout": False,
        "wte_std": 1.0,
        "mlp_in_scale": 1.0,
    },
}


def width_for_depth(depth: int) -> int:
    """64 channels a layer, rounded up to whole heads of 128."""
    return math.ceil(64 * depth / 128) * 128


def _positive_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} is {value!r}: it must be a whole number of at least 1")
