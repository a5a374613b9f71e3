"""A tiny random GPT-2 with a tokenizer, as a local folder; the plain reference scores it through transformers alone."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from job.errors import DataError, UsageError
from job.evaluation import hf, score
from job.evaluation.bundle import open_bundle
from job.evaluation.ledger import newest, read_answers
from job.reporter import Reporter
from job.run import hf_launch

IS_HERE = importlib.util.find_spec("transformers") is not None
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not IS_HERE, reason="transformers is not installed: make hf")]

POSITIONS = 59


def write_gpt2(folder, positions):
    """A folder as save_pretrained makes it."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["some words to merge, the and of which"] * 9,
        trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
        ),
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=300, n_positions=positions, n_embd=32, n_layer=2, n_head=2, initializer_range=0.6
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Of 59 positions: prompts with shots are cropped, and the widths of the grid step over it."""
    return write_gpt2(tmp_path_factory.mktemp("models") / "tiny-gpt2", POSITIONS)


@pytest.fixture(scope="module")
def loaded(gpt2):
    return hf.load(gpt2, "cpu")


def test_special_tokens_in_text_stay_text_and_bos_is_the_tokenizers(loaded):
    _, tokenizer = loaded
    plain, special = tokenizer.encode_batch(["the words", "the <|endoftext|> words"])
    assert tokenizer.bos_id == 0 and 0 not in plain and 0 not in special and len(special) > len(plain)


def test_every_answer_equals_the_references(make_bundle, tmp_path, gpt2, loaded, reference):
    from transformers import AutoModelForCausalLM

    model, tokenizer = loaded
    assert model.max_positions == POSITIONS
    bundle = open_bundle(make_bundle())
    from_ = {"weights": "w", "tokenizer": "t", "dtype": model.dtype, "backend": "cpu"}
    options = {
        "cap": None,
        "reporter": Reporter(),
        "made_from": from_,
        "max_tokens": model.max_positions,
        "token_budget": 500,
    }
    score.evaluate(score.Forward(model, share_prefix=False), tokenizer, bundle, tmp_path / "eval", **options)
    whole = AutoModelForCausalLM.from_pretrained(gpt2)
    cropped = 0
    for task in bundle.tasks:
        answers = read_answers(newest(tmp_path / "eval") / task.label / "answers.csv")
        pool = reference.pool_of(list(task.examples), None)
        for i, answer in enumerate(answers):
            encode = lambda text: tokenizer.encode_batch([text])[0]  # noqa: E731
            rows, starts = reference.rows_of(task.kind, pool, i, task.shots, task.delimiter, encode, tokenizer.bos_id)
            cuts = [max(0, len(row) - POSITIONS) for row in rows]
            cropped += sum(map(bool, cuts))
            rows, starts = (
                [row[cut:] for row, cut in zip(rows, cuts, strict=True)],
                [s - c for s, c in zip(starts, cuts, strict=True)],
            )
            right, chosen, margin = reference.answer(
                lambda ids: whole(ids).logits, task.kind, rows, starts, pool[i].get("gold")
            )
            assert (answer.right, answer.chosen) == (right, chosen) or margin < 1e-5
    assert cropped


def test_a_model_that_does_more_to_its_logits_is_run_whole(loaded):
    class Capped(torch.nn.Module):
        """A causal LM whose logits are halved after the head."""

        def __init__(self, inner):
            super().__init__()
            self.inner, self.config, self.device, self.dtype = inner, inner.config, inner.device, inner.dtype
            self.base_model, self.get_output_embeddings = inner.base_model, inner.get_output_embeddings

        def forward(self, **arguments):
            result = self.inner(**arguments)
            result.logits = result.logits / 2
            return result

    inner = loaded[0]._model
    ids, targets = torch.arange(24).view(2, 12), torch.arange(1, 25).view(2, 12)
    everywhere = torch.arange(24), targets.flatten()
    halved = score.Forward(hf.CausalLM(Capped(inner)), share_prefix=False)(ids, *everywhere)[0]
    expected = torch.nn.functional.cross_entropy(
        inner(ids).logits.flatten(0, 1) / 2, targets.flatten(), reduction="none"
    )
    torch.testing.assert_close(halved, expected.detach())
    direct = score.Forward(loaded[0], share_prefix=False)(ids, *everywhere)[0]
    expected = torch.nn.functional.cross_entropy(inner(ids).logits.flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(direct, expected.detach())


def test_what_is_no_model_is_refused(tmp_path, gpt2):
    with pytest.raises(DataError, match=r"holds no Hugging Face model \(no config\.json\)"):
        hf_launch.check(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be loaded as a causal language model"):
        hf.load(tmp_path, "cpu")
    with pytest.raises(DataError, match=r"has none of tokenizer\*"):
        hf.identity(tmp_path, hf.TOKENIZER_FILES)
    with pytest.raises(UsageError, match=r"train\.steps=3 cannot be used with --hf"):
        hf_launch.options(None, ["train.steps=3"])
    assert hf_launch.options(None, ["eval.cap=7"]).cap == 7


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        ([], 2, "say what is scored: --run-id ID for a run's model, or --hf DIR for another"),
        (["--run-id", "t", "--hf", "."], 2, "say what is scored"),
        (["--hf", "nowhere"], 11, "nowhere holds no Hugging Face model (no config.json)"),
        (["--hf", ".", "-o", "eval.samples=2"], 2, "-o eval.samples=2 cannot be used with --hf"),
    ],
)
def test_the_command_refuses_what_it_cannot_score(words, code, sentence, tmp_path, monkeypatch):
    from click.testing import CliRunner

    from job.cli.commands import main

    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(main, ["evaluate", *words])
    assert ended.exit_code == code and sentence in ended.stderr and list(tmp_path.iterdir()) == []


def test_a_dry_run_says_what_would_be_asked(gpt2, tmp_path):
    from click.testing import CliRunner

    from job.cli.commands import main

    words = ["evaluate", "--hf", str(gpt2), "-o", "eval.cap=1000", "--out", str(tmp_path / "out"), "--dry-run"]
    said = CliRunner().invoke(main, words).stdout
    assert "at most 1,000 items a task of https://karpathy-public.s3" in said
    planned = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
    assert (planned["model"], planned["cap"]) == (str(gpt2), 1000) and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_scores_a_folder_and_two_ranks_give_the_same_ledger(core_archive, tmp_path, speedrun):
    gpt2 = write_gpt2(tmp_path / "gpt2", 1024)

    def scored(out, *more):
        words = speedrun.command(
            "evaluate", "--hf", str(gpt2), "--core-bundle", str(core_archive), "-o", "eval.cap=11", "--out", str(out)
        )
        return speedrun([*words, *more]).stdout

    one, two = (
        json.loads(scored(tmp_path / "one", "--json")),
        json.loads(scored(tmp_path / "two", "--json", "--ranks", "2")),
    )
    assert one["name"] == "core" and one["made_from"]["max_tokens"] == 1024 and len(one["tasks"]) == 22
    for ledger in (one, two):
        for task in ledger["tasks"]:
            del task["seconds"]
    assert one == two
    *table, page = scored(tmp_path / "one").splitlines()
    report = tmp_path / "one" / "hf" / "gpt2" / "report"
    assert page == f"page  {report / 'report.html'}"
    result = json.loads((report / "result.json").read_text())
    assert result["core"]["metric"] == one["metric"] and result["core"]["cap"] == 11 and result["model"] == "gpt2"
    html = (report / "report.html").read_text()
    assert all(word in html for word in ("<h1>gpt2</h1>", "hellaswag", result["evaluations"][0]["weights"]))
    assert table[-1].startswith(f"CORE {one['metric']:.4f} ± {one['se']:.4f} (at most 11 items a task; float32, cpu)")
    assert len(table) == 24


def copied(gpt2, tmp_path):
    return Path(shutil.copytree(gpt2, tmp_path / "copy"))


def test_weights_that_are_missing_or_of_another_model_are_refused(gpt2, tmp_path):
    from safetensors.torch import load_file, save_file

    file = copied(gpt2, tmp_path) / "model.safetensors"
    whole = load_file(file)
    lost = {name: tensor for name, tensor in whole.items() if "h.1.mlp.c_fc.weight" not in name}
    name = next(name for name in whole if "h.1.mlp.c_fc.weight" in name)
    for weights, said in (
        (lost, "1 missing weights"),
        (whole | {"transformer.h.2.extra": torch.ones(2)}, "1 unexpected weights"),
        (whole | {name: torch.ones(3, 3)}, "cannot be loaded|mismatched"),
    ):
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(DataError, match=said):
            hf.load(file.parent, "cpu")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"[" * 100_000], ids=["empty", "zeros", "nested"])
def test_damaged_files_are_one_sentence(gpt2, tmp_path, name, content):
    folder = copied(gpt2, tmp_path)
    (folder / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        hf.load(folder, "cpu")
    assert "\n" not in str(caught.value)


def test_quantised_weights_and_a_tokenizer_beyond_the_embedding_are_refused(gpt2, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = copied(gpt2, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(DataError, match="holds quantised weights"):
        hf.load(folder, "cpu")
    GPT2LMHeadModel(GPT2Config(**config | {"vocab_size": 100})).save_pretrained(folder)
    with pytest.raises(DataError, match=r"its tokenizer has ids up to .*, its embedding 100 rows"):
        hf.load(folder, "cpu")


def test_logits_that_are_no_numbers_name_task_and_item(gpt2, make_bundle, tmp_path):
    from safetensors.torch import load_file, save_file

    file = copied(gpt2, tmp_path) / "model.safetensors"
    weights = load_file(file)
    next(tensor for name, tensor in weights.items() if name.endswith("h.0.mlp.c_fc.weight"))[0, 0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    model, tokenizer = hf.load(file.parent, "cpu")
    bundle = open_bundle(make_bundle())
    with pytest.raises(DataError, match=f"{bundle.tasks[0].label}"):
        score.evaluate(
            score.Forward(model, share_prefix=False),
            tokenizer,
            bundle,
            tmp_path / "eval",
            cap=None,
            reporter=Reporter(),
            made_from={"weights": "w", "tokenizer": "t", "dtype": model.dtype, "backend": "cpu"},
            max_tokens=model.max_positions,
        )
