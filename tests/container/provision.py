# usage: .sky-env/bin/python tests/container/provision.py IMAGE CONTAINER PORT KEY RUN_OPTION ...
"""SkyPilot's own code on an image, from `image_id: docker:IMAGE` to a job's exit code.

On a rented machine SkyPilot starts the image, prepares it through `docker exec` as root, starts sshd in it, logs in
as the image's user, sends its files by rsync, sets itself up, and starts jobs: a script around the task's `run`, with
the log in ~/sky_logs, which `sky logs --sync-down` fetches. `DockerInitializer`, `SSHCommandRunner`,
`_internal_file_mounts`, the clouds' templates and the script's makers are SkyPilot's; the machine is this one. HOME
has .ssh/authorized_keys, and the path has `docker` and a `sudo` (test_provision.py makes them). Left out:

- The ssh connection to the rented machine: commands for it are run by a shell here.
- `docker pull`, since no registry is reachable, and the restart of the engine for NVIDIA's runtime, since it is not
  ours to restart.
- --cap-add=SYS_RESOURCE and --ulimit=memlock=-1 where this machine lacks that right itself: no engine can hand on
  what it has not.
- Of the templates' set-up: uv, Python 3.10, Ray and SkyPilot, which are fetched into an environment of their own in
  the container's home, the same for every image.
- With Ray: the process that starts the job's script. Here the login does, by the same words: `/bin/bash -i SCRIPT`.

Prints a JSON line of what a login sees, and one of exit codes: each cloud's set-up, each job. Into HOME come
sky_logs/JOB/run.log and the smoke's `report`. What goes wrong is SkyPilot's own exception.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

os.environ["SKYPILOT_DISABLE_USAGE_COLLECTION"] = "1"

import jinja2
import yaml
from sky.backends.task_codegen import TaskCodeGen
from sky.provision import docker_utils, instance_setup
from sky.skylet import constants, log_lib
from sky.task import get_plaintext_envs_and_secrets
from sky.utils import command_runner

import sky

SYS_RESOURCE = 24
NEED_SYS_RESOURCE = ("--cap-add=SYS_RESOURCE", "--ulimit=memlock=-1")
LOGIN = (
    'echo "HOME=$HOME"; echo "user=$(id -un)"; echo "speedrun=$(command -v speedrun)"; '
    'touch ~/.written && echo "writable=yes" || echo "writable=no"'
)
CLOUDS = ("nebius", "aws", "gcp", "lambda")
SMALL = (
    "-o data.max_chars=400000 -o data.vocab_size=512 -o train.steps=20 -o train.checkpoint_every=10 "
    "-o train.val_every=10 -o train.val_tokens=4096 -o eval.cap=12 -o eval.samples=1"
)


class ThisMachine:
    """The runner that SkyPilot has over ssh."""

    def run(self, cmd: str, *, log_path: str, **_) -> tuple[int, str, str]:
        if "/etc/docker/daemon.json" in cmd:
            return 0, "", ""
        rights = int(re.search(r"^CapBnd:\s*(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE)[1], 16)
        for option in () if rights >> SYS_RESOURCE & 1 else NEED_SYS_RESOURCE:
            cmd = cmd.replace(option, "")
        ended = subprocess.run(
            ["bash", "-c", cmd], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )
        with open(log_path, "a") as log:
            print(f"{ended.returncode} | {cmd}", ended.stdout, ended.stderr, sep="\n", file=log)
        return ended.returncode, ended.stdout, ended.stderr


def set_up(cloud: str) -> str:
    """What SkyPilot's template has a machine of `cloud` do before Ray starts, without what is fetched."""
    template = (Path(sky.__file__).parent / f"templates/{cloud}-ray.yml.j2").read_text()
    section = jinja2.Template(template[template.index("\nsetup_commands:") :]).render(
        docker_image="an image",
        ray_skypilot_installation_commands=constants.SETUP_SKY_DIRS_COMMANDS,
        ssh_max_sessions_config=constants.SET_SSH_MAX_SESSIONS_CONFIG_CMD,
    )
    (commands,) = yaml.safe_load(section)["setup_commands"]
    return commands + "\n" + instance_setup.RAISE_NOFILE_LIMIT_CMD + "; " + instance_setup.DUMP_RAY_PORTS


def job(ssh: command_runner.SSHCommandRunner, name: str, run: str, variables: dict[str, str]) -> int:
    """The exit code of a task's `run`, whose log comes here."""
    script = Path.home() / f"sky_app_{name}"
    words = TaskCodeGen.build_task_bash_script(run, "unset RAY_RAYLET_PID")
    script.write_text(log_lib.make_task_bash_script(words, env_vars=variables))
    ssh.rsync(str(script), f"/tmp/{script.name}", up=True, stream_logs=False)
    logs = f"{constants.SKY_LOGS_DIRECTORY}/{name}"
    start = f"mkdir -p {logs} && /bin/bash -i /tmp/{script.name} >{logs}/run.log 2>&1"
    code = ssh.run(start, source_bashrc=True, stream_logs=False)
    Path(logs).expanduser().mkdir(parents=True)
    ssh.rsync(f"{logs}/", logs, up=False, stream_logs=False)
    return code


def main(image: str, container: str, port: str, key: str, *run_options: str) -> None:
    # fixed names in SkyPilot; here each run has its own, since its engine may have neighbours
    constants.DEFAULT_DOCKER_CONTAINER_NAME, constants.DEFAULT_DOCKER_PORT = container, int(port)
    log = str(Path.home() / "provision.log")
    asked = {"image": image, "container_name": container, "pull_before_run": False, "run_options": list(run_options)}
    user = docker_utils.DockerInitializer(asked, ThisMachine(), log).initialize()
    ssh = command_runner.SSHCommandRunner(("127.0.0.1", int(port)), user, key, ssh_control_name=None)
    code, said, errors = ssh.run(LOGIN, require_outputs=True, separate_stderr=True, stream_logs=False)
    if code:
        sys.exit(f"the login ended with {code}: {said}{errors}")
    print(json.dumps(dict(line.split("=", 1) for line in said.splitlines() if "=" in line)), flush=True)
    instance_setup._MAX_RETRY = 1  # 6, with pauses, are for machines that still boot
    sent = Path.home() / "sent"
    sent.write_text("a file of SkyPilot's own\n")
    instance_setup._internal_file_mounts({"~/.sky/sent": str(sent)}, ssh, log)
    codes = {}
    for cloud in CLOUDS:
        codes[cloud] = ssh.run_setup(set_up(cloud), stream_logs=False, log_path=log, source_bashrc=True)
    file = Path(__file__).parents[2] / "sky/smoke.yaml"
    given = [("BUCKET", "/tmp/bucket"), ("OPTIONS", SMALL)]
    task = sky.Task.from_yaml_config(yaml.safe_load(file.read_text()), env_overrides=given)
    codes["nosuch"] = job(ssh, "nosuch", "speedrun pretrain --preset nosuch", {})
    codes["smoke"] = job(ssh, "smoke", task.run, get_plaintext_envs_and_secrets(task.envs_and_secrets))
    ssh.rsync("~/out/runs/smoke/report/", str(Path.home() / "report"), up=False, stream_logs=False)
    print(json.dumps(codes), flush=True)


main(*sys.argv[1:])
