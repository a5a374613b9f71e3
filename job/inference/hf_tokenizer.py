"""Our tokenizer in Hugging Face's format: the same ids for every text, and special tokens that text never becomes.

tiktoken joins any two neighbours whose bytes together are a token, the lowest id first; Hugging Face's BPE has a list
of pairs. So each token is listed with every pair that makes it, in order of id.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fastokens

from job.data.tokenizer import Tokenizer
from job.errors import DataError

PROBES = (
    "",
    " ",
    "Hello, world!",
    "a  b\n\n\tc",
    "don't DON'T 12345 ...",
    "naïve Ωμέγα 日本語 🙂👩‍👩‍👧",
    "<|bos|> <|user_start|>",
)


def write_tokenizer(folder: Path, tokenizer: Tokenizer, context: int) -> None:
    """tokenizer.json and tokenizer_config.json, and our own form below tokenizer/; DataError unless the first gives our
    ids."""
    document = tokenizer_document(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    bos, pad = tokenizer.specials[0], tokenizer.specials[-1]
    options = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": bos,
        "pad_token": pad,
        "padding_side": "left",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(options, indent=1) + "\n", encoding="utf-8")
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    read = fastokens.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in PROBES:
        if read.encode_ordinary(text).ids != tokenizer.encode(text):
            raise DataError(f"{folder / 'tokenizer.json'} gives other ids for {text!r} than the model was trained with")


def tokenizer_document(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json."""
    spelled, ids = _spelling(), tokenizer.ids
    names = [
        "".join(spelled[byte] for byte in token) if ids[token] == number else f"<|unused_{number}|>"
        for number, token in enumerate(tokenizer.ranks)
    ]
    merges = sorted(
        (number, ids[token[:cut]], ids[token[cut:]])
        for token, number in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    )
    bos, bos_id = tokenizer.specials[0], tokenizer.bos_id
    bos_first = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": name, **flags} for name, number in tokenizer.special_ids.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos_first, text],
            "pair": [bos_first, text, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {name: number for number, name in enumerate(names)} | tokenizer.special_ids,
            "merges": [[names[left], names[right]] for _, left, right in merges],
        },
    }


def _spelling() -> list[str]:
    """GPT-2's printable character of each byte."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
