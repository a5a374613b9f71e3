"""For the cases of models from elsewhere: a tiny GPT-2 with a tokenizer of bytes, and what scoring it says. The command
itself takes CORE alone; these are a rank's own calls."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from job.errors import SpeedrunError
from job.evaluation import hf
from job.evaluation.bundle import open_bundle
from job.evaluation.score import Forward, evaluate
from job.reporter import Reporter

END = "<|endoftext|>"


def saved(folder: str, vocabulary: int = 257) -> GPT2LMHeadModel:
    """The model, and in `folder` what save_pretrained writes of it and of its 257 tokens."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_positions=256, n_embd=32, n_layer=2, n_head=2))
    model.save_pretrained(folder)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), END]
    inner = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=END, eos_token=END).save_pretrained(folder)
    return model


def questions(folder: str) -> None:
    """A bundle of one task."""
    root = Path(folder)
    (root / "eval_data").mkdir(parents=True)
    rows = [{"query": f"What is {n} plus one?", "choices": [str(n + 1), "red", str(n)], "gold": 0} for n in range(20)]
    (root / "eval_data" / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = "{label: sums, dataset_uri: sums.jsonl, num_fewshot: [1], icl_task_type: multiple_choice}"
    (root / "core.yaml").write_text(f"icl_tasks:\n- {task}\n")
    (root / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nsums,33.3\n")


def refused(folder: str) -> None:
    """End with 0 where scoring ends in one sentence, with 1 where there is a score."""
    questions("bundle")
    try:
        made_from = {"weights": hf.identity(Path(folder), hf.WEIGHT_FILES), "tokenizer": "t", "backend": "cpu"}
        model, tokenizer = hf.load(Path(folder), torch.device("cpu"))
        ledger = evaluate(
            Forward(model, share_prefix=False),
            tokenizer,
            open_bundle("bundle"),
            Path("scored"),
            cap=None,
            reporter=Reporter(),
            made_from=made_from | {"dtype": model.dtype},
            max_tokens=model.max_positions,
        )
    except SpeedrunError as error:
        print(f"exit {int(error.exit_code)}: {error}")
        sys.exit("\n" in str(error))
    print(f"it has a score: {ledger.metric:.3f}")
    sys.exit(1)
