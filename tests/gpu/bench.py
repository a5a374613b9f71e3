"""What the steps share: sizes, the model that trains, text, timing."""

from __future__ import annotations

import gc
import re
import statistics
import sysconfig
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import model.attention
import model.kernels
from model import fp8
from model.config import GPTConfig
from model.gpt import GPT
from model.optimizer import Optimizer
from model.scaling import RULES, derive
from model.schedule import Schedule

USED = "kernel used from here on"
"""the fact by which later processes know what to put behind the model"""


@dataclass(frozen=True)
class Sizes:
    """How large everything is. The defaults are run 6's; DRY's are for seconds on a CPU."""

    depth: int = 24
    vocab: int = 32_768
    seq_len: int = 2048
    rows: int = 16
    shape: dict[str, int] = field(default_factory=dict)
    """overrides of the model's shape"""
    repeats: int = 15
    """timings of one thing"""
    steps: int = 20
    curve_steps: int = 100
    forks: int = 60
    longest_prefix: int = 1536

    @property
    def config(self) -> GPTConfig:
        return GPTConfig.for_depth(self.depth, self.vocab, self.seq_len, **self.shape)

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len


DRY = Sizes(
    2,
    500,
    64,
    2,
    {"width": 128, "head_dim": 64, "window_tile": 16},
    repeats=1,
    steps=2,
    curve_steps=10,
    forks=4,
    longest_prefix=40,
)


@dataclass
class Result:
    """What a step found: `facts` (name -> number or words), tables of (columns, rows), and whether what it checks
    holds."""

    facts: dict[str, Any] = field(default_factory=dict)
    tables: list[tuple[list[str], list[list[Any]]]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """what does not hold, a sentence each"""

    def check(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.wrong.append(otherwise)


class Trainee:
    """A model with its optimizer, stepped as `job/train/loop.py` steps: one micro-step, the update, nothing waited
    for."""

    def __init__(self, sizes: Sizes, device: torch.device, *, in_fp8: bool) -> None:
        with device:
            self.model = GPT(sizes.config, compute_dtype=torch.bfloat16)
        self.model.init_weights(42)
        if in_fp8:
            fp8.apply(self.model, sizes.tokens)
        self.model.compile_blocks()
        specs = derive(
            sizes.config, RULES["head"], ratio=None, steps=sizes.curve_steps, batch_tokens=sizes.tokens
        ).specs
        polar = torch.bfloat16 if device.type == "cuda" else torch.float32  # which a CPU may have no instructions for
        self.optimizer = Optimizer(self.model.groups(), specs, polar_dtype=polar, compile=True)
        self.schedule = Schedule.for_generation(sizes.curve_steps, "head")

    def gradients(self, rows: Tensor) -> Tensor:
        """The loss of rows (B, T + 1), whose gradients are left in the parameters."""
        self.optimizer.begin_overlap()
        loss = self.model.loss(rows[:, :-1], rows[:, 1:])
        loss.backward()
        return loss.detach()

    def step(self, rows: Tensor, number: int) -> Tensor:
        loss = self.gradients(rows)
        self.optimizer.step(self.schedule.at(number))
        return loss


class Bench:
    """A device, the sizes, and the model that several steps train (made when it is first asked for, kept until
    `free`)."""

    def __init__(self, device: torch.device, sizes: Sizes, out: Path) -> None:
        self.device, self.sizes, self.out = device, sizes, out
        self._trainee: Trainee | None = None
        self._corpus: Tensor | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def trainee(self) -> Trainee:
        if self._trainee is None:
            self.free()  # what earlier steps left to the garbage collector
            self._trainee = Trainee(self.sizes, self.device, in_fp8=True)
            for number in range(2):  # with the step that warms up: nothing later compiles
                self._trainee.step(self.batch(number), number)
        return self._trainee

    def keep(self, trainee: Trainee) -> None:
        self._trainee = trainee

    def free(self) -> None:
        """Forget the model: the next step needs its memory."""
        self._trainee = None
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def batch(self, number: int) -> Tensor:
        """Rows (B, T + 1) of the text, int64 on the device; each number has its own."""
        size = self.sizes.rows * (self.sizes.seq_len + 1)
        if self._corpus is None:
            self._corpus = text(self.sizes.vocab, min(4_000_000, (self.sizes.curve_steps + 1) * size))
        start = number * size % max(1, len(self._corpus) - size)
        block = self._corpus[start : start + size].view(self.sizes.rows, -1)
        return (block.pin_memory() if self.on_gpu else block).to(self.device, non_blocking=True)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def moment(self) -> torch.cuda.Event | float:
        """Now, in the device's queue or on the clock."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, began: torch.cuda.Event | float, ended: torch.cuda.Event | float) -> float:
        """Milliseconds; waits for `ended`."""
        if isinstance(ended, float):
            return 1000 * (ended - began)
        ended.synchronize()
        return began.elapsed_time(ended)

    def ms(self, function: Callable[[], Any]) -> float:
        """Milliseconds of one call."""
        began = self.moment()
        function()
        return self.between(began, self.moment())

    def medians(self, functions: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """The median of each one's milliseconds; they take turns, after two calls that do not count.

        All are queued before any is waited for: a GPU that waits for the host would count the host's time as the
        kernel's.
        """
        marks: dict[str, list[tuple]] = {name: [] for name in functions}
        for _ in range(self.sizes.repeats + 2):
            for name, function in functions.items():
                began = self.moment()
                function()
                marks[name].append((began, self.moment()))
        return {name: statistics.median(self.between(*pair) for pair in pairs[2:]) for name, pairs in marks.items()}


def text(vocab: int, length: int) -> Tensor:
    """`length` tokens (int64) of what Python carries with it: its reference, then its library's source; words by
    their hash."""
    from pydoc_data.topics import topics

    pieces, library = list(topics.values()), sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    words: list[int] = []
    while len(words) < length and pieces:
        words += [zlib.crc32(word.encode()) % vocab for word in re.findall(r"\w+|\s+|[^\w\s]", pieces.pop(0))]
        if not pieces and library:
            pieces.append(library.pop(0).read_text(encoding="utf-8", errors="replace"))
    rounds = -(-length // len(words))
    return torch.tensor((words * rounds)[:length], dtype=torch.int64)


def relative(got: Tensor, right: Tensor) -> float:
    """|got - right| / |right| of the whole, infinite where `got` is no number."""
    return ((got.float() - right.float()).norm() / right.float().norm()).nan_to_num(nan=torch.inf).item()


def use_kernel(name: str) -> None:
    """Put an attention kernel behind the model, as `job/train/kernels.py` does."""
    model.kernels.activate(model.kernels.Backend(name, name))
