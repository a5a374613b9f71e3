"""The recipe: what was asked, and where each value came from.

Values come from, each overriding the one before: the defaults below, a TOML preset (`job/recipe/presets/NAME.toml`,
which may name another as its `base`), the command line's own flags, and `-o section.key=value`. An unknown key or a
value of the wrong type is a UsageError that names the key and the nearest right one. What follows from a recipe
(widths, learning rates, steps) is not configuration: `job.recipe.derive` computes it and says why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

from job.addresses import keep_whole
from job.errors import DataError, UsageError
from job.recipe.names import did_you_mean, right_key
from model.config import LEVERS

PRESETS = Path(__file__).parent / "presets"
SCHEMA = 1


def _key(default: Any, help: str, rule: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """A key with its default, its help and the rule that `_check` holds its values to."""
    return dataclasses.field(default=default, metadata={"help": help, **rule})


def _one_of(*choices: str) -> dict[str, Any]:
    return {"choices": choices, "give": f"one of {', '.join(choices)}"}


def _from_to(low: int, high: int, what: str = "a number") -> dict[str, Any]:
    return {"min": low, "max": high, "give": f"{what} from {low} to {high}"}


def _positive(of: str) -> dict[str, Any]:
    return {"min": 1, "give": f"a positive number of {of}"}


def _or_zero(of: str, zero: str) -> dict[str, Any]:
    return {"min": 0, "give": f"a positive number of {of}, or 0 {zero}"}


def _or_published(high: float) -> dict[str, Any]:
    return {"min": 0, "max": high, "also": -1, "give": f"a number from 0 to {high}, or -1 for the published one"}


def _ratio(example: str) -> dict[str, Any]:
    return {"above": 0, "give": f"a positive number, e.g. {example}"}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network: everything else follows from depth (width 64 x depth, heads of 128)."""

    depth: int = _key(24, "number of transformer blocks", _from_to(1, 100, "a number of blocks"))
    seq_len: int = _key(2048, "tokens per row, T", _from_to(16, 65536, "a sequence length") | {"multiple_of": 16})
    window_pattern: str = _key("SSSL", "windows of the layers, S short and L long, repeated; the last one is L")
    generation: str = _key(
        "head",
        'architecture generation: "feb" (runs 1-4 of the leaderboard) or "head" (run 6)',
        {"choices": ("feb", "head"), "give": '"feb" or "head"'},
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text, its tokenizer and its split."""

    source: str = _key(
        "embedded",
        '"embedded" (text that every Python installation carries), "local" (the files of `paths`), "climbmix" or'
        ' "fineweb-edu" (the datasets of the published runs)',
        _one_of("embedded", "local", "climbmix", "fineweb-edu"),
    )
    paths: tuple[str, ...] = _key(
        (), 'for "local": folders (their own files only) or files: parquet with a `text` column, jsonl, txt'
    )
    vocab_size: int = _key(
        32768,
        "tokens in the vocabulary, nine specials included",
        {"min": 266, "max": 65536, "give": "a size from 266 (bytes, specials and a merge) to 65536 (uint16)"},
    )
    tokenizer_chars: int = _key(
        2_000_000_000, "characters of training text that the tokenizer is trained on", _positive("characters")
    )
    document_chars: int = _key(
        10_000, "longest piece of a document that the tokenizer is trained on, characters", _positive("characters")
    )
    val_fraction: float = _key(
        0.01,
        "share of documents held out for validation, chosen by document hash",
        {"above": 0, "below": 1, "give": "a share between 0 and 1, e.g. 0.01"},
    )
    split_long: bool = _key(False, "give a cropped document's remainder back with a BOS of its own: nothing is dropped")
    max_chars: int = _key(
        0, "characters of the source that are used, in order; 0 = all", _or_zero("characters", "for all")
    )
    seed: int = _key(42, "seed of the row permutation")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, in which batches, in which precision."""

    param_data_ratio: float = _key(
        12.0, "training tokens per scaling parameter (transformer matrices and head), if `steps` is 0", _ratio("8")
    )
    steps: int = _key(
        0, "optimizer steps; 0 = from param_data_ratio", _or_zero("steps", "to follow train.param_data_ratio")
    )
    total_batch_size: int = _key(
        0, "tokens per optimizer step, B; 0 = the published rule by depth", _or_zero("tokens", "for the published rule")
    )
    device_batch_size: int = _key(16, "rows per micro-step and rank", _positive("rows"))
    lr_scale: float = _key(1.0, "factor on every learning rate of the published rules", _ratio("1.0"))
    matrix_lr: float = _key(-1.0, "base learning rate of Muon's matrices; -1 = published", _or_published(100))
    embedding_lr: float = _key(-1.0, "that of all embeddings, in proportion; -1 = published", _or_published(100))
    unembedding_lr: float = _key(-1.0, "that of the head; -1 = published", _or_published(100))
    scalar_lr: float = _key(-1.0, "that of the residual's factors, in proportion; -1 = published", _or_published(100))
    warmup_steps: int = _key(-1, "steps of linear warm-up; -1 = published", _or_published(1_000_000))
    warmdown_ratio: float = _key(-1.0, "last share of the steps, rates going down; -1 = published", _or_published(1))
    final_lr_frac: float = _key(-1.0, "factor of the rates at the end; -1 = published", _or_published(1))
    dtype: str = _key(
        "auto",
        '"bf16", "fp32", or "auto": bf16 where the processor has bf16 matrix instructions',
        {"choices": ("auto", "bf16", "fp32"), "give": '"auto", "bf16" or "fp32"'},
    )
    fp8: bool = _key(False, "matrix products of the large layers in fp8, as published from run 2 on")
    levers: tuple[str, ...] = _key(
        (), f"passes over memory that fp8 blocks leave out, of {', '.join(LEVERS)}", _one_of(*LEVERS)
    )
    attention: str = _key(
        "fastest",
        'attention kernel on a GPU: "fa2", "fa3", "fa4" (FlashAttention), or "fastest": the best that the GPU can do',
        _one_of("fastest", "fa2", "fa3", "fa4"),
    )
    threads: int = _key(
        0, "CPU threads per rank; 0 = all cores, divided among the ranks", _or_zero("threads", "for all cores")
    )
    seed: int = _key(42, "seed of the initial weights")
    checkpoint_every: int = _key(
        0, "steps between checkpoints, beside those by the clock; 0 = none", _or_zero("steps", "for the end only")
    )
    checkpoint_minutes: float = _key(
        10.0, "minutes between checkpoints, beside those by steps; 0 = none", _or_zero("minutes", "for none")
    )
    upload_minutes: float = _key(
        0.0,
        "minutes between checkpoints that go to the bucket while training goes on, beside that of a stop and the"
        " weights at the end; 0 = each",
        _or_zero("minutes", "for each"),
    )
    keep_optimizer: str = _key("auto", "optimizer in the last checkpoint; auto: on a CPU", _one_of("auto", "yes", "no"))
    val_every: int = _key(0, "steps between validations; 0 = at the end only", _or_zero("steps", "for the end only"))
    val_tokens: int = _key(41_943_040, "validation tokens; fewer when the held-out text has fewer", _positive("tokens"))
    silence_seconds: float = _key(
        300.0,
        "seconds without a word from any rank after which a run ends with 75; three times as many while compiling",
        _ratio("300"),
    )
    compile_cache: bool = _key(
        True, "on a GPU: keep compiled code, also in the bucket, and load it when the run goes on (it will be executed)"
    )


@dataclasses.dataclass(frozen=True)
class CommConfig:
    """How ranks exchange gradients and weights; belongs to no checkpoint, so a run may go on with other values."""

    overlap: bool = _key(True, "send each gradient during the backward pass; false: after it, the same bits")
    high_priority: bool = _key(
        False, "on GPUs: NCCL's kernels on a stream of high priority, before waiting ones of the backward pass"
    )
    sm_carveout: int = _key(
        0,
        "on GPUs: multiprocessors that cuBLAS is to leave free, and the most that NCCL takes; 0 = both as they like",
        _from_to(0, 64),  # about half of an H100's 132
    )
    bf16: bool = _key(False, "send fp32 gradients and weights as bf16, half the bytes; a weight's owner keeps it exact")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What the finished model is asked."""

    core_bundle: str = _key(
        "",
        "the CORE bundle: folder, .zip, .tar.zst or the address of one; empty = a small bundle made from held-out text"
        " (its score is the smoke score)",
    )
    packed_val: bool = _key(
        False, "score the packer's first validation rows too, which the published runs validate on, beside the sample"
    )
    cap: int = _key(0, "items per task; 0 = all", _or_zero("items per task", "for all"))
    samples: int = _key(3, "continuations of held-out text that the report shows", _from_to(0, 100))
    sample_tokens: int = _key(48, "tokens per sample", _from_to(1, 4096))


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
FREE = frozenset(
    {f"comm.{field.name}" for field in dataclasses.fields(CommConfig)}
    | {f"train.{name}" for name in ("attention", "threads", "device_batch_size", "compile_cache", "silence_seconds")}
    | {f"train.{name}" for name in ("checkpoint_every", "checkpoint_minutes", "upload_minutes", "keep_optimizer")}
    | {"eval.packed_val"}
)
"""keys of the machine, its kernels and its caches, and of what is scored besides: a run may go on with other values"""


def known_keys() -> list[str]:
    return [f"{section}.{field.name}" for section, cls in SECTIONS.items() for field in dataclasses.fields(cls)]


def preset_names() -> list[str]:
    return sorted(p.stem for p in PRESETS.glob("*.toml"))


def _coerce(key: str, value: Any) -> Any:
    """`value` as the type of `key`; a string from the command line is parsed, a TOML value is checked."""
    if key not in known_keys():
        raise UsageError(f"unknown key {key!r}; {right_key(key, known_keys())}")
    section, _, name = key.partition(".")
    wanted = get_type_hints(SECTIONS[section])[name]
    is_number = isinstance(value, (int, float, str)) and not isinstance(value, bool)
    with contextlib.suppress(ValueError):
        if wanted is bool and str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        if wanted is str and isinstance(value, str):
            return value
        if wanted is float and is_number:
            return float(value)
        if wanted is int and is_number and not isinstance(value, float):
            return int(value)
        if wanted == tuple[str, ...]:
            values = [v for v in value.split(",") if v] if isinstance(value, str) else value
            if isinstance(values, Sequence) and all(isinstance(v, str) for v in values):
                return tuple(values)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    raise UsageError(f"{key}={value} cannot be used: give {words.get(wanted, 'a list of texts')}")


MOST = 1e100
"""what no number of a recipe reaches: products of them stay finite"""


def _check(section: str, config: Any) -> None:
    """UsageError for the first value of `config` that breaks the rule in its field's metadata."""
    for field in dataclasses.fields(config):
        rule, value, remedy = field.metadata, getattr(config, field.name), field.metadata.get("give")
        given = value if isinstance(value, tuple) else (value,)
        kept = set(given) <= set(rule.get("choices", given))
        if isinstance(value, (int, float)):
            within = rule.get("min", value) <= value <= rule.get("max", value) or value == rule.get("also")
            kept = within and rule.get("above", -math.inf) < value < rule.get("below", math.inf)
            if abs(value) >= MOST:
                kept, remedy = False, f"a number below {MOST:.0e}"
        step = rule.get("multiple_of")
        if kept and step and value % step:
            kept, remedy = False, f"a multiple of {step}, e.g. {max(step, round(value / step) * step)}"
        if not kept:
            raise UsageError(f"{section}.{field.name}={value} cannot be used: give {remedy}")


@dataclasses.dataclass(frozen=True)
class PresetHeader:
    """What a preset says of itself, beside its values."""

    purpose: str
    """what it is for, in a sentence"""
    machine: str
    """what it is made for: cpu, or a number and a GPU, e.g. 8xh100"""
    notes: tuple[str, ...]
    """what was assumed in it, one sentence each"""


def preset_header(name: str) -> PresetHeader:
    """The header of the preset called `name`; UsageError where there is none."""
    table = _read_preset(name)
    return PresetHeader(table["purpose"], table["machine"], tuple(table.get("notes", ())))


def _read_preset(name: str) -> dict[str, Any]:
    if name not in preset_names():
        near = did_you_mean(name, preset_names())
        raise UsageError(f"no preset {name!r}{near} (presets: {', '.join(preset_names())})")
    return tomllib.loads((PRESETS / f"{name}.toml").read_text(encoding="utf-8"))


def load_preset(name: str) -> tuple[dict[str, Any], dict[str, str], str]:
    """Values by `section.key`, where each came from, and the preset's evidence; follows `base`."""
    table = _read_preset(name)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if base := table.pop("base", None):
        values, sources, _ = load_preset(base)
    evidence = table.pop("evidence")
    for word in ("purpose", "machine", "notes"):
        table.pop(word, None)
    for section, entries in table.items():
        if section not in SECTIONS:
            raise UsageError(f"preset {name}: unknown section {section!r}{did_you_mean(section, SECTIONS)}")
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
        key, separator, value = (part.strip() for part in override.partition("="))
        if not separator:
            raise UsageError(f"-o {override} cannot be used: write -o section.key=value, e.g. -o train.steps=100")
        values[key], sources[key] = _coerce(key, value), "-o"
    if "eval.core_bundle" in values:
        values["eval.core_bundle"] = keep_whole(values["eval.core_bundle"])
    sections = {}
    for section, cls in SECTIONS.items():
        own = {k.partition(".")[2]: v for k, v in values.items() if k.partition(".")[0] == section}
        sections[section] = cls(**own)
        _check(section, sections[section])
    if sections["data"].source == "local" and not sections["data"].paths:
        raise UsageError("data.paths=() cannot be used: name the text with --data FOLDER or --data FILE")
    all_sources = {key: sources.get(key, "default") for key in known_keys()}
    return Recipe(preset=preset, evidence=evidence, sources=all_sources, **sections)


def from_document(document: Mapping[str, Any]) -> Recipe:
    """The recipe that a run's `recipe.json` holds; a key that is younger than the run has its default.

    DataError for one of a newer version.
    """
    names = {f"{section}.{name}" for section, entries in document["recipe"].items() for name in entries}
    if document.get("schema", SCHEMA) != SCHEMA or not names <= set(known_keys()):
        unknown = ", ".join(sorted(names - set(known_keys()))) or f"schema {document.get('schema')}"
        raise DataError(f"this recipe is of a newer version ({unknown} is unknown here); use that version for its run")
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
    """`section.key: old -> new` for every value in which two `recipe` documents differ.

    Among the keys that a run is begun with, or those that are `free` to change.
    """
    old, new = _completed(a), _completed(b)
    return [
        f"{section}.{key}: {json.dumps(old[section].get(key))} -> {json.dumps(value)}"
        for section, entries in new.items()
        for key, value in entries.items()
        if (f"{section}.{key}" in FREE) == free and old[section].get(key) != value
    ]
