"""What SkyPilot itself does not check in sky/*.yaml, and that every `run:` is a command line of ours that hands its
exit code on.

The scripts are run by bash, as a node runs them, with a stand-in for `speedrun` that writes down its arguments.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from job.cli.commands import main
from job.errors import ExitCode
from job.machine.host import Machine
from job.plan import money
from job.plan.cap import Quote
from job.plan.prices import OFFERS
from job.recipe.config import resolve

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "sky").glob("*.yaml"))
TASKS = {path.stem: yaml.safe_load(path.read_text()) for path in FILES}
GPU = [name for name, task in TASKS.items() if "accelerators" in task["resources"]]
RECOVERY = {"strategy", "max_restarts_on_errors", "recover_on_exit_codes"}
"""the keys that SkyPilot 0.14.1 knows below job_recovery; it takes any other without a word"""
GIVEN = {"BUCKET": "s3://mine/prefix", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}

STAND_IN = """#!{python}
import json, os, signal, sys, time
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1] == "doctor":
    sys.exit(int(os.environ["DOCTOR"]))
first, *rest = json.loads(os.environ["CODES"])
if os.path.exists(os.environ["CALLS"] + ".first"):
    sys.exit(rest[0])
open(os.environ["CALLS"] + ".first", "w").close()
if rest:  # until it is stopped, as a training that has just sealed a checkpoint
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(first))
    out = sys.argv[sys.argv.index("--out") + 1]
    events = os.path.join(out, "runs", sys.argv[sys.argv.index("--run-id") + 1], "events")
    os.makedirs(events)
    with open(os.path.join(events, "1.jsonl"), "w") as file:
        file.write('{{"kind": "checkpoint.sealed"}}\\n')
    time.sleep(60)
sys.exit(first)
"""


def run_script(task: dict[str, Any], folder: Path, *codes: int, doctor: int = 0) -> tuple[int, list[list[str]]]:
    """The exit code of `run:` and the arguments of each `speedrun` in it, which end with `codes`; with two, the first
    waits for a signal."""
    (folder / "bin").mkdir(parents=True)
    stand_in = folder / "bin" / "speedrun"
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)
    variables = {name: value or "" for name, value in {**task["envs"], **task["secrets"]}.items()}
    environment = (
        variables
        | GIVEN
        | {"HOME": str(folder), "CALLS": str(folder / "calls"), "CODES": json.dumps(codes)}
        | {"DOCTOR": str(doctor)}
    )
    environment["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
    ended = subprocess.run(["bash", "-c", task["run"]], env=environment, timeout=60, check=False)
    return ended.returncode, [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def interrupted(name: str) -> bool:
    return name == "try"


def test_the_folder_holds_yaml_and_nothing_else() -> None:
    assert [path for path in (ROOT / "sky").rglob("*") if path.suffix != ".yaml"] == []
    assert set(TASKS) == {"speedrun", "d20", "prepare", "try", "try8", "smoke"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_one_task_with_a_header(path: Path) -> None:
    text = path.read_text()
    assert len(list(yaml.safe_load_all(text))) == 1, "`sky launch` refuses a file of two documents"
    header = re.match(r"(?:#.*\n)+", text)[0].splitlines()
    assert 9 <= len(header) <= 12
    assert any(
        re.match(rf"#   sky (?:jobs )?launch .*sky/{path.name} .*--image-id docker:\$IMAGE", line) for line in header
    )
    assert any("What lands in the bucket" in line for line in header) or "lands in the bucket" in " ".join(header)
    words = " ".join(line.lstrip("# ") for line in header)
    assert re.search(r"\$\d.*\((?:estimated|published)", words)
    dated = "prices: SkyPilot's catalog, November 2026" in words
    assert path.stem not in GPU or dated, "a price without a date is worth nothing"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_readme_has_every_file(path: Path) -> None:
    assert f"sky/{path.name}" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", TASKS)
def test_recovery_is_from_code_75_and_no_other_error(name: str) -> None:
    recovery = TASKS[name]["resources"]["job_recovery"]
    assert recovery.keys() <= RECOVERY
    assert recovery["max_restarts_on_errors"] == 0
    codes = recovery.get("recover_on_exit_codes", [])
    assert codes == ([] if name.startswith("try") else [int(ExitCode.RESUME)])
    assert all("job_recovery" not in choice for choice in TASKS[name]["resources"].get("any_of", []))


@pytest.mark.parametrize("name", TASKS)
def test_secrets_are_secrets_and_have_no_null(name: str) -> None:
    envs, secrets = TASKS[name]["envs"], TASKS[name]["secrets"]
    assert envs.keys().isdisjoint(secrets)
    assert set(secrets.values()) == {""}, (
        "null would mean a secret of somebody's vault; a value would be one in the repository"
    )
    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= secrets.keys()
    assert [env for env in envs if re.search("KEY|SECRET|TOKEN|PASSWORD", env)] == []
    assert [env for env, value in envs.items() if value is None] == ["BUCKET"], (
        "SkyPilot asks for what is null, and for nothing else"
    )


@pytest.mark.parametrize("name", TASKS)
def test_the_machine_goes_away_and_has_a_price_cap(name: str) -> None:
    resources = TASKS[name]["resources"]
    assert resources["autostop"] == {"idle_minutes": 2, "down": True, "wait_for": "jobs"}
    assert (
        resources["max_hourly_cost"]
        <= {"speedrun": 33, "d20": 5, "try8": 32, "try": 8, "prepare": 1.5, "smoke": 0.5}[name]
    )
    assert resources["image_id"] == "docker:ghcr.io/YOUR-NAME/gpt2-speedrun:latest"
    assert [mount for mount in ("file_mounts", "workdir", "setup") if mount in TASKS[name]] == [], (
        "everything is in the image"
    )


@pytest.mark.parametrize("name", GPU)
def test_shared_memory_is_given_where_nccl_is(name: str) -> None:
    assert "--shm-size=16g" in TASKS[name]["config"]["docker"]["run_options"]


def prices(row: dict[str, Any], number: int) -> list[float]:
    """Dollars an hour of every zone where SkyPilot may rent `row` with so many H100s, by the stored catalog."""
    cloud, _, region = row["infra"].partition("/")
    column = "SpotPrice" if row["use_spot"] else "Price"
    with open(Path(__file__).with_name("catalog") / cloud / "vms.csv", newline="") as file:
        zones = [zone for zone in csv.DictReader(file) if region in ("", zone["Region"]) and zone[column]]
    hosts = {zone["AvailabilityZone"]: float(zone[column]) for zone in zones if zone["InstanceType"].startswith("a3-")}
    return [
        float(zone[column]) + (hosts[zone["AvailabilityZone"]] if hosts else 0)
        for zone in zones
        if zone["AcceleratorName"] == "H100" and float(zone["AcceleratorCount"]) == number
        if row.get("instance_type", zone["InstanceType"]) == zone["InstanceType"]
        if not hosts or zone["AvailabilityZone"] in hosts
    ]


@pytest.mark.parametrize("name", GPU)
def test_no_zone_of_a_row_costs_more_than_its_cap(name: str) -> None:
    resources = TASKS[name]["resources"]
    number = int(resources["accelerators"].removeprefix("H100:"))
    for choice in resources["any_of"]:
        row = resources | choice
        assert (
            row["max_hourly_cost"] <= {"speedrun": 16 if row["use_spot"] else 33, "d20": 5, "try8": 32, "try": 8}[name]
        )
        found = prices(row, number)
        assert found and max(found) <= row["max_hourly_cost"], f"{choice}: {sorted(found)}"
        assert min(found) >= row["max_hourly_cost"] / 4, f"the cap of {name} bounds nothing: {choice}: {min(found)}"


CAPPED = {"speedrun": "run6", "d20": "d20", "try": "try", "try8": "try", "smoke": "smoke"}
"""the files with a cap, and the preset whose quote it is compared with"""


@pytest.mark.parametrize("name", CAPPED)
def test_a_cap_is_above_the_quote_at_every_price_that_the_file_allows(name: str, tmp_path: Path) -> None:
    resources, envs = TASKS[name]["resources"], TASKS[name]["envs"]
    gpus = int(resources["accelerators"].removeprefix("H100:")) if name in GPU else 0
    machine = Machine(gpus, "NVIDIA H100 80GB HBM3", (9, 0)) if gpus else Machine()
    low, high = money.total(Quote.of(resolve(CAPPED[name]), machine, 1).stages)
    if name == "try8":  # whose own bound is `timeout`, and which boots and idles as the others do
        low, high = (bound + sum(money.BOOT_MINUTES) / 2 + sum(money.IDLE_MINUTES) / 2 for bound in (6, 9))
    for row in resources.get("any_of", [{}]):
        most = (resources | row)["max_hourly_cost"]
        assert float(envs["MAX_USD"]) >= 1.15 * (low + high) / 2 / 60 * most, f"{row}"
        assert name not in GPU or float(envs["MAX_USD"]) <= 4 * (low + high) / 2 / 60 * resources["max_hourly_cost"], (
            "it bounds nothing"
        )
    for words in commands(name, tmp_path):
        if words[0] != "doctor":
            given = dict(itertools.pairwise(words))
            assert given["--max-usd"] == envs["MAX_USD"]
            assert float(given["--price-at-most"]) == resources["max_hourly_cost"]


@pytest.mark.parametrize("name", TASKS)
def test_every_command_of_a_script_has_a_bound_of_the_clock_outside_of_ours(name: str) -> None:
    script = re.sub(r"\\\n\s*", "", TASKS[name]["run"])
    lines = [line for line in script.splitlines() if re.search(r"\bspeedrun \w", line) and not line.startswith("#")]
    assert lines and all(re.search(r"timeout --foreground --preserve-status .*\bspeedrun ", line) for line in lines)


def test_the_offers_of_the_plan_are_the_rows_of_the_files() -> None:
    for name, gpus in (("speedrun", 8), ("try", 1)):
        resources = TASKS[name]["resources"]
        rows = [resources | row for row in resources["any_of"]]
        for offer in (offer for offer in OFFERS if offer.gpus == gpus):
            found = [r for r in rows if r["infra"].split("/")[0] == offer.cloud and r["use_spot"] is offer.spot]
            if not found:  # docs/cloud.md's, on demand
                assert f"${offer.hour:.2f}/h" in (ROOT / "docs/cloud.md").read_text()
                continue
            assert offer.most in {row["max_hourly_cost"] for row in found}
            same = [row for row in found if offer.region in row["infra"]]
            assert offer.hour in {round(price, 2) for row in same for price in prices(row, gpus)}


def test_on_demand_on_the_dear_clouds_the_cap_of_the_documents_suffices() -> None:
    low, high = money.total(Quote.of(resolve("run6"), Machine(8, "NVIDIA H100 80GB HBM3", (9, 0)), 1).stages)
    lines = [line for line in (ROOT / "docs/cloud.md").read_text().splitlines() if "--no-use-spot" in line]
    assert lines
    for line in lines:
        cap, hour = float(re.search(r"MAX_USD=(\d+)", line)[1]), float(re.search(r"\$([\d.]+)/h", line)[1])
        assert cap >= 1.15 * (low + high) / 2 / 60 * hour


def test_without_its_region_a_row_would_cost_more() -> None:
    for row in TASKS["speedrun"]["resources"]["any_of"]:
        if "/" in row["infra"]:
            assert max(prices(row | {"infra": row["infra"].split("/")[0]}, 8)) > row["max_hourly_cost"]


@pytest.mark.parametrize("name", GPU)
def test_the_disk_is_fast_and_not_the_dearest(name: str) -> None:
    """`best` is io2 with 20,000 IOPS on AWS; Lambda takes no other word."""
    for choice in TASKS[name]["resources"]["any_of"]:
        tier = (TASKS[name]["resources"] | choice)["disk_tier"]
        assert tier == ("best" if choice["infra"] == "lambda" else "high")


@pytest.mark.parametrize("name", TASKS)
def test_no_row_is_azure_whose_driver_is_too_old_for_cuda_13(name: str) -> None:
    assert not [row for row in TASKS[name]["resources"].get("any_of", []) if row.get("infra", "").startswith("azure")]


def test_spot_is_tried_on_several_clouds_and_has_a_fallback() -> None:
    choices = TASKS["speedrun"]["resources"]["any_of"]
    spot, on_demand = ({choice["infra"] for choice in choices if choice["use_spot"] is kind} for kind in (True, False))
    assert {infra.split("/")[0] for infra in spot} == {"nebius", "aws", "gcp"}
    assert on_demand == {"nebius", "lambda"}


@pytest.mark.parametrize(
    "name", [name for name, task in TASKS.items() if "sky jobs launch" in (ROOT / f"sky/{name}.yaml").read_text()]
)
def test_a_managed_job_comes_with_the_command_that_ends_it(name: str) -> None:
    assert "sky jobs cancel" in (ROOT / f"sky/{name}.yaml").read_text()


def commands(name: str, folder: Path) -> list[list[str]]:
    return run_script(TASKS[name], folder, *([75, 0] if interrupted(name) else [0]))[1]


@pytest.mark.parametrize("name", TASKS)
def test_every_line_is_a_command_of_ours(name: str, tmp_path: Path) -> None:
    lines = commands(name, tmp_path)
    assert len(lines) == (3 if interrupted(name) else 1)
    for words in lines:
        context = main.make_context("speedrun", list(words))
        word, command, rest = main.resolve_command(context, words)
        with command.make_context(word, list(rest), parent=context) as parsed:
            assert parsed.params["url"] == GIVEN["BUCKET"]
            assert parsed.params["out"] == tmp_path / "out"
            resolve(parsed.params["preset"], {}, parsed.params["overrides"])
            assert parsed.params.get("strict", False) is (name in GPU), "a paid GPU refuses what is slow"


@pytest.mark.parametrize("name", TASKS)
def test_a_wrong_line_would_be_found(name: str, tmp_path: Path) -> None:
    words = [*commands(name, tmp_path)[0], "--no-such-flag"]
    context = main.make_context("speedrun", list(words))
    word, command, rest = main.resolve_command(context, words)
    with pytest.raises(click.NoSuchOption):
        command.make_context(word, list(rest), parent=context)


@pytest.mark.parametrize("name", TASKS)
def test_a_script_ends_with_our_exit_code(name: str, tmp_path: Path) -> None:
    for code in map(int, ExitCode):
        codes = [75, code] if interrupted(name) else [code]
        assert run_script(TASKS[name], tmp_path / str(code), *codes)[0] == code


def test_a_try_that_fails_is_not_begun_again(tmp_path: Path) -> None:
    assert [run_script(TASKS["try"], tmp_path / str(code), code)[0] for code in (0, 10, 14)] == [0, 10, 14]
    assert len((tmp_path / "10" / "calls").read_text().splitlines()) == 2


def test_on_a_gpu_that_computes_wrongly_nothing_is_tried(tmp_path: Path) -> None:
    code, calls = run_script(TASKS["try"], tmp_path, 75, 0, doctor=10)
    assert code == 10 and [words[0] for words in calls] == ["doctor"]


def test_options_reach_the_command_line(tmp_path: Path) -> None:
    for name, task in TASKS.items():
        if "OPTIONS" in task["envs"]:
            changed = task | {"envs": task["envs"] | {"OPTIONS": "-o data.max_chars=100 -q"}}
            assert run_script(changed, tmp_path / name, 0)[1][0][-3:] == ["-o", "data.max_chars=100", "-q"]


def test_scripts_of_this_folder_can_be_run() -> None:
    assert all(os.stat(Path(__file__).with_name(name)).st_mode & stat.S_IXUSR for name in ("slurm-up", "slurm-down"))
