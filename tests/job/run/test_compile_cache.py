"""What is compiled is kept, fetched and checked: with files like the compilers', and once with Inductor itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import Kept
from job.console import Console
from job.machine import host
from job.recipe.config import FREE, Recipe, differing_keys, from_document, resolve
from job.run.compile_cache import ARCHIVE, Caches
from job.run.nodes import LaunchSpec, NodeContext, Nodes
from job.run.uploader import Mirror
from job.store.attempt import Attempt
from job.store.checkpoint_folder import identity
from job.store.documents import hashed
from job.store.sealed import MANIFEST, content_id
from job.store.stores import FolderStore

GPU = "NVIDIA H100 80GB HBM3, 9.0, 580.95.05"
GROUP = "triton/KEY/__grp__kernel.json"
TWO_RANKS = Nodes(2)


class Start:
    """One start of run r on a machine of its own, which has `gpu` and nothing else but the bucket."""

    def __init__(
        self, tmp_path: Path, name: str, recipe: Recipe | None = None, *, nodes: Nodes = TWO_RANKS, first: bool = True
    ) -> None:
        self.store, self.out = FolderStore(tmp_path / "bucket"), tmp_path / name
        self.run = self.out / "runs" / "r"
        self.run.mkdir(parents=True, exist_ok=True)
        self.attempt = Attempt.claim(self.run, self.store) if first else None
        self.reporter, number = Kept(), self.attempt.number if first else 0
        node = NodeContext(self.out, self.run, nodes, store=self.store)
        self.caches = Caches("pretrain", node, recipe or resolve("smoke"), Console(-1), self.reporter, number)
        self.environment = self.caches.node.environment

    @property
    def compiled(self) -> Path:
        return Path(self.environment["TORCHINDUCTOR_CACHE_DIR"]).parent

    def warm(self, *ranks: int) -> None:
        for rank in ranks or (0, 1):
            self.caches.emit("train.warm", rank=rank, seconds=1.0, compiled=1, loaded=0)

    def sealed(self) -> bool:
        """Whether the warm ranks' caches were sealed, once that is over."""
        if self.caches._thread:
            self.caches._thread.join()
        self.caches.emit("train.step")
        return bool(self.reporter.of("compile_cache.sealed"))

    def end(self, *, interrupted: bool = False) -> None:
        self.caches.end(interrupted=interrupted)

    def upload(self) -> None:
        mirror = Mirror(self.store, self.out, self.run, 80, self.reporter)
        while key := mirror.next():
            mirror.upload(key)

    def contents(self) -> dict[str, str]:
        files = (path for path in self.compiled.rglob("*") if path.is_file())
        return {path.relative_to(self.compiled).as_posix(): path.read_text() for path in files}


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "gpu_names", lambda: GPU)


def compile_something(start: Start, name: str = "ab/graph.py", text: str = "code") -> None:
    files = {
        f"inductor/{name}": text,
        GROUP: json.dumps({"child_paths": {"k": f"{start.compiled}/triton/KEY/k.cubin"}}),
    }
    unfinished = {"inductor/locks/graph.lock": "", "inductor/.1.2.tmp": "half", "triton/KEY/tmp.pid_1/k.cubin": "half"}
    for file, content in (files | unfinished).items():
        (start.compiled / file).parent.mkdir(parents=True, exist_ok=True)
        (start.compiled / file).write_text(content)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A bucket in which a first start has left what it compiled; where its folder is there."""
    first = Start(tmp_path, "first")
    compile_something(first)
    first.warm()
    assert first.sealed()
    first.upload()
    first.end()
    return first.store.root / first.caches.key


def test_another_machine_has_it_from_the_bucket_in_a_folder_of_its_own(tmp_path: Path, kept: Path) -> None:
    second = Start(tmp_path, "second")
    kernel = f"{second.compiled}/triton/KEY/k.cubin"
    assert second.contents() == {"inductor/ab/graph.py": "code", GROUP: json.dumps({"child_paths": {"k": kernel}})}
    assert [event["origin"] for event in second.reporter.of("compile_cache.loaded")] == [str(tmp_path / "bucket")]
    second.warm()
    assert not second.sealed(), "nothing was new"
    second.end()
    assert not second.compiled.exists()
    third = Start(tmp_path, "second")
    assert [event["origin"] for event in third.reporter.of("compile_cache.loaded")] == [
        str(tmp_path / "second" / third.caches.key)
    ]


def test_ranks_of_other_nodes_do_not_count(tmp_path: Path) -> None:
    start = Start(tmp_path, "out", nodes=Nodes(2, ("10.0.0.1", "10.0.0.2")))
    compile_something(start)
    start.warm(0, 2, 3)
    assert not start.sealed(), "rank 1 still compiles"
    start.warm(1)
    assert start.sealed()


def test_it_is_sealed_when_all_ranks_are_warm_and_they_are_given_the_folder(tmp_path: Path) -> None:
    start = Start(tmp_path, "out")
    compile_something(start)
    start.warm(0)
    assert not start.sealed()
    start.warm(1)
    assert start.sealed()
    names = ["TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"]
    assert len({start.environment[name] for name in names}) == 3
    assert start.environment["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] == "1"


def test_ranks_are_given_the_folder_whatever_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/somewhere/else")
    start = Start(tmp_path, "out", nodes=Nodes(1))
    (rank,) = start.caches.node.start(LaunchSpec("pretrain"))
    until, given = time.monotonic() + 30, ""
    while not given and time.monotonic() < until:  # empty for a moment while the process becomes another program
        given = Path(f"/proc/{rank.process.pid}/environ").read_text()
    rank.kill()
    os.close(rank.pipe)
    assert start.environment.items() <= dict(entry.partition("=")[::2] for entry in given.split("\0")).items()


def test_gpus_are_described_by_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert host.gpu_names() == ""
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\necho "{GPU}"\necho "{GPU}"\n')
    program.chmod(0o755)
    assert host.gpu_names() == GPU
    program.write_text("#!/bin/sh\necho no driver\nexit 9\n")
    assert host.gpu_names() == ""


def test_what_a_later_start_adds_is_sealed_with_the_rest(tmp_path: Path, kept: Path) -> None:
    second = Start(tmp_path, "second")
    compile_something(second, "cd/more.py")
    second.warm()
    assert second.sealed()
    second.upload()
    third = Start(tmp_path, "third")
    assert third.contents().keys() == {"inductor/ab/graph.py", "inductor/cd/more.py", GROUP}


def flip(kept: Path) -> None:
    data = bytearray((kept / ARCHIVE).read_bytes())
    data[len(data) // 2] ^= 1
    (kept / ARCHIVE).write_bytes(data)


def edited(**changed: Any) -> Callable[[Path], None]:
    def edit(kept: Path) -> None:
        manifest = json.loads((kept / MANIFEST).read_text()) | changed
        manifest["id"] = content_id(manifest["kind"], manifest["made_from"])
        (kept / MANIFEST).write_text(json.dumps(hashed(manifest)))

    return edit


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (flip, "is not the file that was sealed"),
        (lambda kept: (kept / ARCHIVE).unlink(), "is not there"),
        (edited(made_from={"gpu": "another"}), "for something else"),
        (edited(kind="checkpoint"), "holds a checkpoint"),
        (edited(files={ARCHIVE: {"size": 2 << 30, "sha256": ""}}), "more than 1.07 GB"),
        (edited(files={}), "for something else"),
    ],
)
def test_what_is_not_right_is_said_removed_and_compiled(
    tmp_path: Path, kept: Path, damage: Callable[[Path], None], why: str
) -> None:
    damage(kept)
    follower = Start(tmp_path, "follower", first=False)
    assert follower.contents() == {} and (kept / MANIFEST).exists(), "only the first node removes it"
    second = Start(tmp_path, "second")
    assert [why in event["why"] for event in second.reporter.of("compile_cache.refused")] == [True], (
        second.reporter.events
    )
    assert second.contents() == {} and not second.reporter.of("compile_cache.loaded") and not (kept / MANIFEST).exists()
    compile_something(second)
    second.warm()
    assert second.sealed()
    second.upload()
    assert Start(tmp_path, "third").reporter.of("compile_cache.loaded")


def test_a_damaged_one_on_this_disk_leaves_the_buckets(tmp_path: Path, kept: Path) -> None:
    flip(tmp_path / "first" / kept.relative_to(tmp_path / "bucket"))
    again = Start(tmp_path, "first")
    assert len(again.reporter.of("compile_cache.refused")) == 1
    assert [event["origin"] for event in again.reporter.of("compile_cache.loaded")] == [str(tmp_path / "bucket")]


@pytest.mark.parametrize("interrupted", [True, False])
def test_one_that_ranks_did_not_survive_is_not_tried_twice(tmp_path: Path, kept: Path, interrupted: bool) -> None:
    second = Start(tmp_path, "second")
    second.warm(0)
    second.end(interrupted=interrupted)
    third = Start(tmp_path, "second")
    assert bool(third.reporter.of("compile_cache.loaded")) == interrupted


def test_too_much_is_not_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.run.compile_cache.LIMIT", 3)
    start = Start(tmp_path, "out")
    compile_something(start)
    start.warm()
    assert not start.sealed() and len(start.reporter.of("compile_cache.not_sealed")) == 1
    assert not start.caches.folder.exists()


def test_without_a_gpu_or_switched_off_nothing_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: Path
) -> None:
    off = Start(tmp_path, "off", resolve("smoke", overrides=["train.compile_cache=false"]))
    monkeypatch.setattr(host, "gpu_names", lambda: "")
    none = Start(tmp_path, "none")
    for start in (off, none):
        start.warm()
        start.end()
        assert start.environment == {} and {event["kind"] for event in start.reporter.events} == {"train.warm"}


@pytest.mark.parametrize(
    ("override", "shared"),
    [("train.seed=7", True), ("train.steps=9", True), ("train.device_batch_size=8", False), ("model.depth=3", False)],
)
def test_runs_share_what_has_the_same_graphs(tmp_path: Path, kept: Path, override: str, shared: bool) -> None:
    assert (
        bool(Start(tmp_path, "other", resolve("smoke", overrides=[override])).reporter.of("compile_cache.loaded"))
        == shared
    )


@pytest.mark.parametrize("gpu", [GPU.replace("580", "590"), GPU.replace("H100", "H200")])
def test_another_gpu_or_driver_compiles_for_itself(
    tmp_path: Path, kept: Path, gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "gpu_names", lambda: gpu)
    assert not Start(tmp_path, "other").reporter.events


def test_a_recipe_from_before_the_key_goes_on_with_its_checkpoints() -> None:
    new = resolve("smoke", overrides=["train.compile_cache=false"])
    document = {"preset": "smoke", "evidence": new.evidence, "recipe": new.values(), "sources": dict(new.sources)}
    for key in FREE:
        section, _, name = key.partition(".")
        del document["recipe"][section][name], document["sources"][key]
    old = from_document(document)
    assert old.train.compile_cache and old.sources["train.compile_cache"] == "default"
    assert differing_keys(document["recipe"], new.values()) == []
    assert identity(old, "p") == identity(new, "p")


def made(start: Start) -> set[Path]:
    """What compilers have made; locks are made anew by everyone."""
    return {path for path in start.compiled.rglob("*") if path.is_file() and path.suffix != ".lock"}


@pytest.mark.slow
def test_a_resumed_warm_up_compiles_nothing(tmp_path: Path) -> None:
    """With Inductor, on a CPU: a first start, another machine, and one whose copy has a flipped byte."""
    starts = {}
    for name in ("first", "second", "third"):
        start = Start(tmp_path, name, nodes=Nodes(1))
        before = made(start)
        command = [sys.executable, str(Path(__file__).with_name("compiled_warm_up.py"))]
        root = str(Path(__file__).resolve().parents[3])
        environment = os.environ | start.environment | {"PYTHONPATH": root}
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        *events, results = [json.loads(line) for line in said.splitlines()]
        (warm,) = [event for event in events if event["kind"] == "train.warm"]
        start.caches.emit(**warm)
        new = made(start) - before
        starts[name] = (
            warm
            | results
            | {"new": len(new), "sealed": start.sealed(), "loads": start.reporter.of("compile_cache.loaded")}
        )
        start.upload()
        start.end()
        print(name, starts[name])
        if name == "second":
            flip(tmp_path / "bucket" / start.caches.key)
    first, second, third = starts.values()
    assert first["compiled"] > 5 and not first["loads"] and first["sealed"]
    assert second["compiled"] == 0 and second["loaded"] == first["compiled"] + first["loaded"] and second["loads"]
    assert second["new"] == 0 and not second["sealed"]
    assert third["compiled"] == first["compiled"] and not third["loads"] and third["sealed"]
    assert first["losses"] == second["losses"] == third["losses"]
