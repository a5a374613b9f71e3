# usage: .sky-env/bin/python tests/cluster/command_line.py '[["launch", "-c", "smoke", "sky/smoke.yaml"], ...]'
"""What SkyPilot's own command line makes of these words, up to where it would ask a cloud: a JSON list, one task
each."""

import json
import os
import sys
import tempfile

os.environ |= {"HOME": tempfile.mkdtemp(prefix="speedrun-sky-"), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}

from sky.client.cli import command

TASK_OPTIONS = ("entrypoint", "name", "image_id", "env", "secret")


def task_of(words: list[str]) -> dict:
    group, rest = command.cli, list(words)
    while hasattr(group, "commands"):
        group = group.commands[rest.pop(0)]
    with group.make_context(words[0], rest) as context:
        task = command._make_task_or_dag_from_entrypoint_with_overrides(
            **{key: context.params[key] for key in TASK_OPTIONS}
        )
    return {
        "images": sorted({resources.extract_docker_image() for resources in task.resources}),
        "envs": task.envs,
        "secrets": {name: value.get_secret_value() for name, value in task.secrets.items()},
    }


print(json.dumps([task_of(words) for words in json.loads(sys.argv[1])]))
