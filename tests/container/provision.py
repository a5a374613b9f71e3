# usage: .sky-env/bin/python tests/container/provision.py IMAGE CONTAINER PORT KEY RUN_OPTION ...
"""SkyPilot's own code on an image, up to the first files of its own that arrive in the container: what
`image_id: docker:IMAGE` means.

On a rented machine SkyPilot starts the image, prepares it through `docker exec` as root, starts sshd in it, logs in
as the image's user and sends its files by rsync. `DockerInitializer`, `SSHCommandRunner` and `_internal_file_mounts`
are SkyPilot's; the machine is this one. HOME has .ssh/authorized_keys, and the path has `docker` and a `sudo`
(test_provision.py makes them). Left out:

- The ssh connection to the rented machine: commands for it are run by a shell here.
- `docker pull`, since no registry is reachable, and the restart of the engine for NVIDIA's runtime, since it is not
  ours to restart.
- --cap-add=SYS_RESOURCE and --ulimit=memlock=-1 where this machine lacks that right itself: no engine can hand on
  what it has not.
- After it: Ray and SkyPilot's own Python, which are installed in the container over the network, and are the same for
  every image.

Prints one JSON line of what a login sees. What goes wrong is SkyPilot's own exception.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

os.environ["SKYPILOT_DISABLE_USAGE_COLLECTION"] = "1"

from sky.provision import docker_utils, instance_setup
from sky.skylet import constants
from sky.utils import command_runner

SYS_RESOURCE = 24
NEED_SYS_RESOURCE = ("--cap-add=SYS_RESOURCE", "--ulimit=memlock=-1")
LOGIN = (
    'echo "HOME=$HOME"; echo "user=$(id -un)"; echo "speedrun=$(command -v speedrun)"; '
    'touch ~/.written && echo "writable=yes" || echo "writable=no"'
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


main(*sys.argv[1:])
