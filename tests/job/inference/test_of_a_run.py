"""A run exports itself beside its record, and any other machine samples and exports it from the bucket."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from job.evaluation import hf_stage
from job.inference.sources import Source, open_source
from job.reporter import Reporter
from job.run import hf_launch


@pytest.mark.slow
def test_a_run_in_a_bucket_is_exported_and_sampled_elsewhere(speedrun: Any, s3: Any, tmp_path: Path) -> None:
    there = dataclasses.replace(speedrun, variables=s3.variables())
    there(there.tiny("run", tmp_path / "first", "--export", "--bucket", s3.url))
    first = tmp_path / "first" / "runs" / "t"
    assert open_source(first / "export").facts["checked"]["greedy"] == 16
    card = (first / "export" / "README.md").read_text()
    assert "smoke score is" in card and "license: other" in card and "12 of 12" in card

    def sampled(model: str, out: str) -> str:
        words = [
            "sample",
            "--model",
            model,
            "--out",
            str(tmp_path / out),
            "--temperature",
            "0",
            "--max-tokens",
            "9",
            "a",
        ]
        return there.here(there.command(*words)).stdout

    text = sampled(str(first), "unused")
    assert text == sampled(f"{s3.url}/runs/t", "second") == sampled(f"{s3.url}/runs/t/export", "third")
    assert text == sampled(str(tmp_path / "third" / "runs" / "t" / "export"), "unused")
    words = ["export", "--run-id", "t", "--out", str(tmp_path / "fourth"), "--bucket", s3.url, "--license", "mit"]
    said = there.here(there.command(*words)).stdout
    again = tmp_path / "fourth" / "runs" / "t" / "export"
    assert "the same bits" in said
    assert (again / "model.safetensors").read_bytes() == (first / "export" / "model.safetensors").read_bytes()
    shutil.rmtree(next((tmp_path / "first" / "prepared").glob("*/tokenizer")))
    lacking = there.here(there.command("sample", "--model", str(first), "a"), code=11).stderr
    assert "has no tokenizer (" in lacking and lacking.endswith("restore it, or give --bucket\n")
    assert "license: mit" in (again / "README.md").read_text() and "smoke score is" in (again / "README.md").read_text()


def test_an_export_is_scored_by_our_own_code(exported: tuple[Source, Path]) -> None:
    source, folder = exported
    hf_launch.check(folder)
    forward, tokenizer, dtype, positions = hf_stage.load(folder, torch.device("cpu"), Reporter())
    ids = torch.arange(40).view(2, 20)
    everywhere = torch.arange(40), ids.flatten().roll(-1)
    losses = forward(ids, *everywhere)[0]
    wanted = torch.nn.functional.cross_entropy(
        source.model(dtype=getattr(torch, dtype)).logits(ids).flatten(0, 1), everywhere[1], reduction="none"
    )
    torch.testing.assert_close(losses.float(), wanted.detach(), atol=1e-4, rtol=1e-4)
    assert positions is None and tokenizer.bos_id == source.tokenizer.bos_id
