"""Children that are Python import what is ours and Python's, whatever lies in the folder where they are started."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from job.run import preflight, wandb_client
from job.run.processes import PACKAGES, LocalRank, environment_for, python_environment, start_ranks


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder whose modules are named like ours and Python's, and an environment that leaves an empty entry in
    the path."""
    folder = tmp_path / "here"
    folder.mkdir()
    for name in ("job", "model", "random", "secrets", "queue", "pathlib"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name} of the working folder')")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}{tmp_path}{os.pathsep}")
    return folder


def test_a_rank(trap: Path, tmp_path: Path) -> None:
    rank = LocalRank("rank 0", [], os.environ, tmp_path / "log", program=("-m", "job.machine.health"))
    os.close(rank.pipe)
    assert rank.ended() is not None or rank.process.wait(60) == 0
    assert (rank.process.returncode, rank.tail()) == (0, "")


def test_the_wandb_process(trap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is started in the run's folder."""
    (tmp_path / "job.py").write_text("raise SystemExit('job of the working folder')")
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(wandb_client, "COMMAND", ["-m", "job.machine.health"])
    assert wandb_client.WandbClient(tmp_path, 1, None).finish(0, 60) is None
    assert (tmp_path / "logs" / "1.wandb.log").read_text() == ""


def test_the_question_for_the_gpus(trap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here, and the child has nothing to complain of")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(preflight.PreflightError) as refused:
        preflight.this_machine()
    assert "of the working folder" not in str(refused.value)


def test_the_path_that_the_user_gives_stays(tmp_path: Path) -> None:
    given = python_environment({"A": "1", "PYTHONPATH": f"/x{os.pathsep}/y"})
    assert given == {"A": "1", "PYTHONPATH": os.pathsep.join([PACKAGES, "/x", "/y"]), "PYTHONSAFEPATH": "1"}
    assert python_environment({"PYTHONPATH": os.pathsep})["PYTHONPATH"] == PACKAGES


def test_the_image_asks_for_its_health_from_any_folder() -> None:
    dockerfile = (Path(PACKAGES) / "Dockerfile").read_text(encoding="utf-8")
    assert 'CMD ["/opt/speedrun/bin/python", "-P", "-m", "job.machine.health"]' in dockerfile


ALL = {
    "AWS_ACCESS_KEY_ID": "store",
    "AWS_SECRET_ACCESS_KEY": "store",
    "AWS_SESSION_TOKEN": "store",
    "AWS_ENDPOINT_URL": "store",
    "HF_TOKEN": "hub",
    "HUGGING_FACE_HUB_TOKEN": "hub",
    "SPEEDRUN_CORE_ADDRESS": "core",
    "WANDB_API_KEY": "wandb",
    "SPEEDRUN_NODES_SECRET": "",
    "SKYPILOT_TASK_ID": "",
    "GITHUB_TOKEN": "",
    "MY_PASSWORD": "",
    "OPENAI_API_KEY": "",
    "PATH": "all",
    "HF_HOME": "all",
    "WANDB_MODE": "all",
    "SPEEDRUN_BUCKET": "all",
    "KEYBOARD": "all",
    "CUDA_VISIBLE_DEVICES": "all",
}


@pytest.mark.parametrize(
    ("child", "needs"),
    [
        ("prepare", {"store", "hub", "core"}),
        ("background", {"store", "hub", "core"}),
        ("pretrain", set()),
        ("evaluate", {"core"}),
        ("evaluate_hf", {"core"}),
        ("uploader", {"store"}),
        ("wandb", {"wandb"}),
        ("probe", set()),
    ],
)
def test_a_child_is_given_no_secret_but_those_that_it_works_with(child: str, needs: set[str]) -> None:
    expected = {name for name, kind in ALL.items() if kind in needs | {"all"}}
    assert environment_for(child, ALL).keys() == expected


@pytest.mark.parametrize("stage", ["prepare", "pretrain", "evaluate"])
def test_ranks_are_started_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    given: list[dict[str, str]] = []
    monkeypatch.setattr(
        "job.run.processes.LocalRank", lambda name, arguments, environment, log: given.append(environment)
    )
    for name in ALL:
        monkeypatch.setenv(name, "x")
    start_ranks([stage], world_size=1, threads=1, logs=tmp_path, label="t")
    assert ("AWS_SECRET_ACCESS_KEY" in given[0]) == (stage == "prepare")
    assert not {"WANDB_API_KEY", "GITHUB_TOKEN", "SPEEDRUN_NODES_SECRET"} & given[0].keys()
