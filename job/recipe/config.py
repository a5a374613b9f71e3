"""The recipe: what was asked, and where each value came from.

A recipe is five small frozen dataclasses. Its values come from, each overriding the one before: the defaults below, a TOML preset
(`job/recipe/presets/NAME.toml`, which may name another as its `base`), the command line's own flags, and `-o section.key=value`. An
unknown key or a value of the wrong type is a UsageError that names the key and the nearest right one. What follows from a recipe
(widths, learning rates, steps) is not configuration: `model.scaling.derive` computes it and says why.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from job.errors import UsageError

PRESETS = Path(__file__).parent / "presets"
SCHEMA = 1
SOURCES = ("embedded", "local", "climbmix", "fineweb-edu")


def _check(ok: bool, key: str, value: Any, remedy: str) -> None:
    if not ok:
        raise UsageError(f"{key}={value} cannot be used: {remedy}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network: everything else follows from depth (facts of the leaderboard: width 64 x depth, heads of 128)."""

    depth: int = 24
    """number of transformer blocks"""
    seq_len: int = 2048
    """tokens per row, T"""
    generation: str = "head"
    """architecture generation: "feb" (runs 1-4 of the leaderboard) or "head" (run 6)"""

    def check(self) -> None:
        _check(1 <= self.depth <= 100, "model.depth", self.depth, "give a number of blocks from 1 to 100")
        _check(16 <= self.seq_len <= 65536, "model.seq_len", self.seq_len, "give a sequence length from 16 to 65536")
        _check(
            self.seq_len % 16 == 0,
            "model.seq_len",
            self.seq_len,
            f"give a multiple of 16, e.g. {_multiple(self.seq_len, 16)}",
        )
        _check(self.generation in ("feb", "head"), "model.generation", self.generation, 'give "feb" or "head"')


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text, its tokenizer and its split."""

    source: str = "embedded"
    """"embedded" (text that every Python installation carries), "local" (the files of `paths`), "climbmix" or "fineweb-edu"
    (the datasets of the published runs)"""
    paths: tuple[str, ...] = ()
    """for "local": folders (their own files only) or files: parquet with a `text` column, jsonl, txt"""
    vocab_size: int = 32768
    """tokens in the vocabulary, nine specials included"""
    tokenizer_chars: int = 2_000_000_000
    """characters of training text that the tokenizer is trained on"""
    document_chars: int = 10_000
    """longest piece of a document that the tokenizer is trained on, characters"""
    val_fraction: float = 0.01
    """share of documents held out for validation, chosen by document hash"""
    split_long: bool = False
    """give a cropped document's remainder back with a BOS of its own instead of dropping it"""
    max_chars: int = 0
    """characters of the source that are used, in order; 0 = all"""
    seed: int = 42
    """seed of the row permutation"""

    def check(self) -> None:
        _check(self.source in SOURCES, "data.source", self.source, f"give one of {', '.join(SOURCES)}")
        _check(
            self.source != "local" or bool(self.paths),
            "data.paths",
            "()",
            "name the text with --data FOLDER or --data FILE",
        )
        _check(
            265 < self.vocab_size <= 65536,
            "data.vocab_size",
            self.vocab_size,
            "give a size from 266 (bytes, specials and a merge) to 65536 (uint16)",
        )
        _check(
            self.tokenizer_chars > 0,
            "data.tokenizer_chars",
            self.tokenizer_chars,
            "give a positive number of characters",
        )
        _check(
            self.document_chars > 0, "data.document_chars", self.document_chars, "give a positive number of characters"
        )
        _check(
            0 < self.val_fraction < 1, "data.val_fraction", self.val_fraction, "give a share between 0 and 1, e.g. 0.01"
        )
        _check(
            self.max_chars >= 0, "data.max_chars", self.max_chars, "give a positive number of characters, or 0 for all"
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, in which batches, in which precision."""

    param_data_ratio: float = 12.0
    """training tokens per scaling parameter (transformer matrices and head), when `steps` is 0"""
    steps: int = 0
    """optimizer steps; 0 = from param_data_ratio"""
    total_batch_size: int = 0
    """tokens per optimizer step, B; 0 = the published rule by depth"""
    device_batch_size: int = 16
    """rows per micro-step and rank"""
    lr_scale: float = 1.0
    """factor on every learning rate of the published rules"""
    dtype: str = "auto"
    """"bf16", "fp32", or "auto": bf16 where the processor has bf16 matrix instructions"""
    fp8: bool = False
    """matrix products of the large layers in fp8, as published from run 2 on"""
    attention: str = "fastest"
    """attention kernel on a GPU: "fa2", "fa3", "fa4" (FlashAttention), or "fastest": the best that the GPU can do"""
    threads: int = 0
    """CPU threads per rank; 0 = all cores, divided among the ranks"""
    seed: int = 42
    """seed of the initial weights"""
    checkpoint_every: int = 0
    """steps between checkpoints, beside those by the clock; 0 = none by steps"""
    checkpoint_minutes: float = 10.0
    """minutes between checkpoints, beside those of checkpoint_every; 0 = none by the clock"""
    val_every: int = 0
    """steps between validations; 0 = at the end only"""
    val_tokens: int = 41_943_040
    """validation tokens; fewer when the held-out text has fewer"""
    compile_cache: bool = True
    """on a GPU: keep what was compiled, also in the bucket, and load it when the run goes on (it is code that will be executed)"""

    def check(self) -> None:
        finite = math.isfinite(self.param_data_ratio)
        _check(
            finite and self.param_data_ratio > 0,
            "train.param_data_ratio",
            self.param_data_ratio,
            "give a positive number, e.g. 8",
        )
        _check(
            self.steps >= 0,
            "train.steps",
            self.steps,
            "give a positive number of steps, or 0 to follow train.param_data_ratio",
        )
        _check(
            self.total_batch_size >= 0,
            "train.total_batch_size",
            self.total_batch_size,
            "give a positive number of tokens, or 0 for the published rule",
        )
        _check(
            self.device_batch_size > 0,
            "train.device_batch_size",
            self.device_batch_size,
            "give a positive number of rows",
        )
        _check(
            math.isfinite(self.lr_scale) and self.lr_scale > 0,
            "train.lr_scale",
            self.lr_scale,
            "give a positive number, e.g. 1.0",
        )
        _check(self.dtype in ("auto", "bf16", "fp32"), "train.dtype", self.dtype, 'give "auto", "bf16" or "fp32"')
        kernels = ("fastest", "fa2", "fa3", "fa4")
        _check(self.attention in kernels, "train.attention", self.attention, f"give one of {', '.join(kernels)}")
        _check(
            self.threads >= 0, "train.threads", self.threads, "give a positive number of threads, or 0 for all cores"
        )
        minutes = self.checkpoint_minutes
        _check(
            math.isfinite(minutes) and minutes >= 0,
            "train.checkpoint_minutes",
            minutes,
            "give a positive number of minutes, or 0 for none",
        )
        for key in ("checkpoint_every", "val_every"):
            _check(
                getattr(self, key) >= 0,
                f"train.{key}",
                getattr(self, key),
                "give a positive number of steps, or 0 for the end only",
            )
        _check(self.val_tokens > 0, "train.val_tokens", self.val_tokens, "give a positive number of tokens")


@dataclasses.dataclass(frozen=True)
class CommConfig:
    """How ranks exchange gradients and weights. A run may go on with other values: they belong to no checkpoint (`FREE`)."""

    overlap: bool = True
    """send each gradient while the backward pass goes on; false: all of them after it, the same bits later"""
    high_priority: bool = False
    """on GPUs: NCCL's kernels on a stream of high priority, so that they are placed before waiting ones of the backward pass"""
    sm_carveout: int = 0
    """on GPUs: multiprocessors that cuBLAS is asked to leave free, and the most that NCCL takes; 0 = both as they like"""
    bf16: bool = False
    """send fp32 gradients and weights as bf16, half the bytes; a weight's owner keeps it exact (model/optimizer.py says what follows)"""

    def check(self) -> None:
        most = 64  # about half of an H100's 132
        _check(0 <= self.sm_carveout <= most, "comm.sm_carveout", self.sm_carveout, f"give a number from 0 to {most}")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What the finished model is asked."""

    core_bundle: str = ""
    """the CORE bundle: folder, .zip, .tar.zst or the address of one; empty = a small bundle made from held-out text (its score is the smoke score)"""
    cap: int = 0
    """items per task; 0 = all"""
    samples: int = 3
    """continuations of held-out text that the report shows"""
    sample_tokens: int = 48
    """tokens per sample"""

    def check(self) -> None:
        _check(self.cap >= 0, "eval.cap", self.cap, "give a positive number of items per task, or 0 for all")
        _check(0 <= self.samples <= 100, "eval.samples", self.samples, "give a number from 0 to 100")
        _check(
            1 <= self.sample_tokens <= 4096, "eval.sample_tokens", self.sample_tokens, "give a number from 1 to 4096"
        )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What was asked. `sources` says of each `section.key` where its value came from."""

    preset: str
    evidence: str
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    eval: EvalConfig
    comm: CommConfig
    sources: Mapping[str, str] = dataclasses.field(compare=False)

    def values(self) -> dict[str, dict[str, Any]]:
        """The recipe as plain sections of plain values."""
        return {name: json.loads(json.dumps(dataclasses.asdict(getattr(self, name)))) for name in SECTIONS}


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "comm": CommConfig,
}
FREE = frozenset({f"comm.{field.name}" for field in dataclasses.fields(CommConfig)} | {"train.compile_cache"})
"""keys that belong to no checkpoint: a run may go on with other values"""


def _multiple(value: int, of: int) -> int:
    return max(of, round(value / of) * of)


def known_keys() -> list[str]:
    return [f"{section}.{field.name}" for section, cls in SECTIONS.items() for field in dataclasses.fields(cls)]


def preset_names() -> list[str]:
    return sorted(p.stem for p in PRESETS.glob("*.toml"))


def _nearest(word: str, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.0)
    return f"did you mean {match[0]}?" if match else f"known: {', '.join(known)}"


def _key_type(key: str) -> Any:
    section, _, name = key.partition(".")
    if key not in known_keys():
        raise UsageError(f"unknown key {key!r}; {_nearest(key, known_keys())}")
    return get_type_hints(SECTIONS[section])[name]


def _coerce(key: str, value: Any) -> Any:
    """`value` as the type of `key`; a string from the command line is parsed, a TOML value is checked."""
    wanted = _key_type(key)
    if get_origin(wanted) is tuple:
        values = value.split(",") if isinstance(value, str) else value
        if isinstance(values, Sequence) and all(isinstance(v, get_args(wanted)[0]) for v in values):
            return tuple(values)
    elif wanted is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
    elif wanted is str:
        if isinstance(value, str):
            return value
    elif not isinstance(value, bool):
        try:
            if wanted is float:
                return float(value)
            if isinstance(value, (int, str)):
                return int(value)
        except ValueError:
            pass
    name = getattr(wanted, "__name__", str(wanted)) if not isinstance(wanted, types.GenericAlias) else "list"
    words = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "str": "a text",
        "list": "a list of texts",
    }
    raise UsageError(f"{key}={value} cannot be used: give {words[name]}")


@dataclasses.dataclass(frozen=True)
class PresetHeader:
    """What a preset says of itself, beside its values."""

    machine: str
    """what it is made for: cpu, or a number and a GPU, e.g. 8xh100"""
    notes: tuple[str, ...]
    """what was assumed in it, one sentence each"""


def preset_header(name: str) -> PresetHeader:
    """The header of the preset called `name`; UsageError where there is none."""
    table = _read_preset(name)
    return PresetHeader(table["machine"], tuple(table.get("notes", ())))


def _read_preset(name: str) -> dict[str, Any]:
    if name not in preset_names():
        raise UsageError(f"no preset {name!r}; {_nearest(name, preset_names())} (presets: {', '.join(preset_names())})")
    return tomllib.loads((PRESETS / f"{name}.toml").read_text(encoding="utf-8"))


def load_preset(name: str) -> tuple[dict[str, Any], dict[str, str], str]:
    """Values by `section.key`, where each came from, and the preset's evidence; follows `base`."""
    table = _read_preset(name)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if base := table.pop("base", None):
        values, sources, _ = load_preset(base)
    evidence = table.pop("evidence")
    table.pop("machine")
    table.pop("notes", None)
    for section, entries in table.items():
        if section not in SECTIONS:
            raise UsageError(f"preset {name}: unknown section {section!r}; {_nearest(section, list(SECTIONS))}")
        for key, value in entries.items():
            values[f"{section}.{key}"] = _coerce(f"{section}.{key}", value)
            sources[f"{section}.{key}"] = f"preset {name}"
    return values, sources, evidence


def resolve(preset: str, flags: Mapping[str, tuple[str, Any]] | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of `preset` with the command line's `flags` ({key: (flag's name, value)}) and `-o` overrides applied.

    Raises UsageError on an unknown preset or key, a wrong type, or a value out of range.
    """
    values, sources, evidence = load_preset(preset)
    for key, (flag, value) in (flags or {}).items():
        values[key], sources[key] = _coerce(key, value), flag
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise UsageError(f"-o {override} cannot be used: write -o section.key=value, e.g. -o train.steps=100")
        values[key.strip()], sources[key.strip()] = _coerce(key.strip(), value.strip()), "-o"
    sections = {}
    for section, cls in SECTIONS.items():
        own = {k.partition(".")[2]: v for k, v in values.items() if k.partition(".")[0] == section}
        sections[section] = cls(**own)
        sections[section].check()
    all_sources = {key: sources.get(key, "default") for key in known_keys()}
    return Recipe(preset=preset, evidence=evidence, sources=all_sources, **sections)


def from_document(document: Mapping[str, Any]) -> Recipe:
    """The recipe that a run's `recipe.json` holds. A key that is younger than the run has its default, which is how the run began."""
    values = _completed(document["recipe"])
    sections = {
        s: cls(**{f.name: _coerce(f"{s}.{f.name}", values[s][f.name]) for f in dataclasses.fields(cls)})
        for s, cls in SECTIONS.items()
    }
    sources = {key: document["sources"].get(key, "default") for key in known_keys()}
    return Recipe(preset=document["preset"], evidence=document["evidence"], sources=sources, **sections)


def _completed(recipe: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The sections of a `recipe` document, with defaults where it is silent."""
    defaults = {section: json.loads(json.dumps(dataclasses.asdict(cls()))) for section, cls in SECTIONS.items()}
    return {section: values | recipe.get(section, {}) for section, values in defaults.items()}


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any], *, free: bool = False) -> list[str]:
    """`section.key: old -> new` for every value in which two `recipe` documents differ, among the keys that a run is begun with, or
    those that are `free` to change."""
    old, new = _completed(a), _completed(b)
    return [
        f"{section}.{key}: {json.dumps(old[section].get(key))} -> {json.dumps(value)}"
        for section, entries in new.items()
        for key, value in entries.items()
        if (f"{section}.{key}" in FREE) == free and old[section].get(key) != value
    ]
