"""The probes on this machine, a real S3 server and real ranks; and what a run does with what they find."""

from __future__ import annotations

import dataclasses
import http.server
import math
import os
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import fault_proxy as fault
from helpers import free_ports, judged
from job.data import hub
from job.data.identity import set_folder, set_inputs
from job.errors import PreflightError
from job.machine.finding import Verdict
from job.machine.gpu_checks import GpuFacts, speed_finding
from job.machine.nvidia_smi import Gpu
from job.recipe.config import Recipe, resolve
from job.run import examination, preflight, probes, speed_probe
from job.store import open_store
from job.store.sealed import sealing
from job.store.stores import push_sealed

SIZE = 1 << 16


def test_a_checkpoint_goes_to_the_bucket_and_back_and_leaves_nothing(
    tmp_path: Path, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.enter(monkeypatch)
    for store in (open_store(s3.url), open_store(str(tmp_path / "folder"))):
        speed, failed = probes.checkpoint_path(tmp_path, store, SIZE)
        assert failed == "" and speed and speed > 0
    assert s3.keys() == [] and [*tmp_path.rglob("*")] == [tmp_path / "folder"]


def test_a_bucket_that_takes_nothing_or_garbles_it_is_refused(
    tmp_path: Path, faults: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults.s3.enter(monkeypatch)
    faults.on("PutObject|UploadPart", fault.error(403, "AccessDenied"), times=math.inf)
    monkeypatch.setattr(probes, "CHECKPOINT_BYTES", {False: SIZE})
    facts = probes.node_facts(resolve("smoke"), tmp_path, open_store(faults.s3.url, patience=0.2), on_gpus=False)
    finding = next(found for found in examined(facts) if found.check == "checkpoint path")
    assert finding.verdict == Verdict.REFUSED and "AccessDenied" in finding.said
    assert finding.remedy.endswith("run the same command again")


def examined(facts: Any) -> list[Any]:
    return examination.node_findings(facts, examination._wanted_of_node(resolve("smoke"), 1, facts))


def test_the_doctor_of_a_read_only_bucket_ends_with_10(
    tmp_path: Path, faults: Any, speedrun: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults.s3.enter(monkeypatch)
    faults.on("PutObject.*", fault.error(403, "AccessDenied"), times=math.inf)
    words = ("doctor", "--preset", "smoke", "--bucket", faults.s3.url, "--out", str(tmp_path / "out"))
    ended = speedrun.here(speedrun.command(*words), code=10)
    (line,) = (line for line in ended.stdout.splitlines() if line.startswith("refused"))
    assert line.startswith(f"refused  bucket: --bucket {faults.s3.url} cannot be used: http://127.0.0.1:")
    assert line.endswith("refuses PutObject (AccessDenied); these credentials need s3:ListBucket, GetObject, PutObject,"
                         " DeleteObject, AbortMultipartUpload")  # fmt: skip


def test_the_buckets_clock_and_how_long_credentials_last(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.enter(monkeypatch)
    store = open_store(s3.url)
    assert abs(store.clock_ahead() or math.nan) < 5 and store.credentials_left() == math.inf
    monkeypatch.setenv("AWS_SESSION_TOKEN", "temporary")
    assert store.credentials_left() is None
    for end in (datetime.now(UTC) + timedelta(minutes=20), datetime.now().astimezone() + timedelta(minutes=20)):
        monkeypatch.setenv("AWS_CREDENTIAL_EXPIRATION", end.isoformat())
        assert 1190 < (store.credentials_left() or 0) < 1200


def test_a_clock_that_is_off_is_seen(faults: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    faults.s3.enter(monkeypatch)
    real = time.time
    store = open_store(faults.s3.url)
    monkeypatch.setattr("job.store.s3.time.time", lambda: real() + 100)
    assert 95 < (store.clock_ahead() or 0) < 105


def test_a_prepared_set_is_found_here_or_in_the_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, store, recipe = tmp_path / "out", open_store(str(tmp_path / "bucket")), resolve("run6")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert probes.about_text(recipe, out, store) == ("", "HF_HUB_OFFLINE is set")
    store.put("text/climbmix/commit.json", b'{"repo": "karpathy/climbmix-400b-shuffle", "commit": "c0ffee"}')
    text = hub.recorded_identity("climbmix", out / "text", store)
    assert text
    key = f"{set_folder(set_inputs(recipe.data, recipe.model.seq_len, text))}/set"
    with sealing(out / key, kind="prepared", made_from={}) as folder:
        folder.facts |= {"train_rows": 2_850_816, "files": []}
    assert probes.about_text(recipe, out, None)[0] == ""
    push_sealed(store, key, out / key)
    assert probes.about_text(recipe, tmp_path / "other", store) == ("in the bucket", None)
    assert probes.about_text(recipe, out, store) == ("on this disk", None)
    longer = resolve("run6", overrides=["train.param_data_ratio=9"])
    assert probes.about_text(longer, out, store)[0] == ""
    assert probes.about_text(resolve("smoke"), out, store) == ("", None)


def test_servers_that_do_and_do_not_answer(wandb_server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}"
    assert probes.unreachable(wandb_server.url) == "" and "refused" in probes.unreachable(nobody)
    assert probes.unreachable("http://")
    assert probes.about_wandb(os.environ) == {"wandb": "online", "wandb_failed": ""}
    monkeypatch.setenv("WANDB_BASE_URL", nobody)
    assert "refused" in probes.about_wandb(os.environ)["wandb_failed"]
    monkeypatch.delenv("WANDB_API_KEY")
    assert probes.about_wandb(os.environ) == {"wandb": "offline", "wandb_asked": True}
    monkeypatch.setenv("HF_ENDPOINT", nobody)
    assert "refused" in (probes.about_text(resolve("run6"), tmp_path, None)[1] or "")
    assert "refused" in probes.about_bundle(f"{nobody}/bundle.zip", tmp_path)
    assert probes.about_bundle(str(tmp_path), tmp_path) == probes.about_bundle("", tmp_path) == ""
    assert probes.about_bundle(str(tmp_path / "none.zip"), tmp_path) == "no such file or folder"


# --- GPUs


@pytest.mark.slow
def test_two_ranks_multiply_and_reduce(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_probe, "SECONDS", 200.0)
    found = speed_probe.speeds(2)
    assert all(len(found[rate]) == 2 and min(found[rate]) > 1e6 for rate in ("matmul", "all_reduce"))
    assert speed_finding("matmul", [1e9, 1e9], None, ("GFLOP/s", 1e9), lambda _: "").verdict == Verdict.OK


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_probe, "SECONDS", 200.0)
    monkeypatch.setattr(speed_probe, "environment_for", lambda *_: os.environ | {"GLOO_SOCKET_IFNAME": "none"})
    with pytest.raises(PreflightError, match=r"^rank [01]: \w+"):
        speed_probe.speeds(2)


H100 = "NVIDIA H100 80GB HBM3"
SOUND = tuple(Gpu(index, H100, memory=85.5e9, fabric="Completed", links=(26.562e9,) * 18) for index in range(8))


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A node with eight GPUs, as nvidia-smi and the probe tell of them."""
    there: dict[str, Any] = {"facts": GpuFacts(gpus=SOUND), "matmul": [700e12] * 8, "probed": 0}

    def probed(ranks: int) -> dict[str, list[float]]:
        there["probed"] += 1
        if isinstance(there["matmul"], Exception):
            raise there["matmul"]
        return {"matmul": there["matmul"], "all_reduce": [400e9] * ranks}

    for place in ("machine.host", "run.admission", "run.examination", "run.preflight"):
        monkeypatch.setattr(f"job.{place}.gpu_count", lambda: 8)
    monkeypatch.setattr(examination, "gpu_facts", lambda: there["facts"])
    monkeypatch.setattr(examination, "speeds", probed)
    monkeypatch.setattr(probes, "CHECKPOINT_BYTES", {True: SIZE})
    return there


LOCAL = ("data.source=embedded", "eval.core_bundle=", "model.depth=4")


def recipe() -> Recipe:
    return resolve("run6", overrides=LOCAL)


def test_speeds_are_probed_where_nothing_else_is_refused(eight: dict[str, Any], tmp_path: Path) -> None:
    def gpus(**options: Any) -> list[str]:
        return judged([f for f in examination.examine(recipe(), tmp_path, None, ranks=8, **options)
                       if f.check in ("Fabric Manager", "matmul") and f.verdict != Verdict.UNKNOWN])  # fmt: skip

    assert gpus() == [] and eight["probed"] == 1
    eight["matmul"] = [700e12] * 7 + [350e12]
    (line,) = gpus(price=48.0)
    assert line.startswith("slow     matmul: rank 7 350 TFLOP/s of the others' 700, 50% below; at most ")
    assert line.endswith(" at $48 an hour (were all of a step such work); take another node")
    eight["matmul"] = PreflightError("rank 3: RuntimeError: no")
    assert gpus()[0].startswith("refused  matmul: the probe ended with: rank 3: RuntimeError: no;")
    eight["facts"] = GpuFacts(gpus=tuple(dataclasses.replace(gpu, fabric="In Progress") for gpu in SOUND))
    assert gpus()[0].startswith("refused  Fabric Manager: ") and eight["probed"] == 3


def test_a_run_does_not_begin_on_a_machine_that_is_refused(
    eight: dict[str, Any], tmp_path: Path, speedrun: Any, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the machine is not refused, the run goes on to what stands for torch's own look at the GPUs here."""

    def next_of_all() -> None:
        raise PreflightError("the next thing")

    monkeypatch.setattr(preflight, "this_machine", next_of_all)
    s3.enter(monkeypatch)
    out = ("--out", str(tmp_path / "out"), "--bucket", s3.url)
    words = ("--preset", "run6", *out, "--ranks", "8", *(word for value in LOCAL for word in ("-o", value)))
    slow, fails = [700e12] * 7 + [350e12], PreflightError("rank 0: dead")
    for matmul, command, flags, sentence in (
        (slow, "run", ["--strict"], "matmul: rank 7 350 TFLOP/s"),
        (slow, "pretrain", ["--strict", "--accept-slow"], "the next thing"),
        (slow, "pretrain", [], "the next thing"),
        (fails, "pretrain", ["--strict", "--accept-slow"], "matmul: the probe ended with: rank 0: dead"),
    ):
        eight["matmul"] = matmul
        ended = speedrun.here(speedrun.command(command, *words, *flags), code=10)
        assert f"speedrun: {sentence}" in ended.stderr and " NVLink: " in ended.stderr
    assert not (tmp_path / "out").exists() and s3.keys() == []


def test_a_look_that_fails_by_a_bug_costs_no_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("a field that no document names")

    monkeypatch.setattr(examination, "node_facts", broken)
    (finding,) = examination.examine(resolve("smoke"), tmp_path, None)
    assert (finding.verdict, finding.check) == (Verdict.UNKNOWN, "doctor")
    assert finding.said == "it could not look (KeyError('a field that no document names'))"


def test_a_token_goes_to_the_server_that_was_asked_and_to_no_other() -> None:
    """urllib gives a redirect's target every header of the request, requests and curl do not."""
    asked: list[tuple[str, str | None]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["Authorization"]))
            self.send_response(200 if self.path == "/elsewhere" else 302)
            self.send_header("Location", f"http://localhost:{server.server_port}/elsewhere")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/asked"
        assert probes.unreachable(url, {"Authorization": "Bearer secret"}) == ""
        server.shutdown()
    assert asked == [("/asked", "Bearer secret"), ("/elsewhere", None)]
