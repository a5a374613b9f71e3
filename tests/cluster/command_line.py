# usage: .sky-env/bin/python tests/cluster/command_line.py '[["launch", "-c", "smoke", "sky/smoke.yaml"], ...]'
"""What SkyPilot's own command line makes of these words, up to where it would ask a cloud: a JSON list, for each a
task where it launches one. A command that SkyPilot hides, since another replaced it, is an error."""

import json
import os
import sys
import tempfile

os.environ |= {"HOME": tempfile.mkdtemp(prefix="speedrun-sky-"), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}

from sky.client.cli import command

TASK_OPTIONS = ["entrypoint", "name", "image_id", "env", "secret", "num_nodes", "use_spot", "instance_type"]
TASK_OPTIONS += ["disk_tier", "network_tier"]


def task_of(words: list[str]) -> dict | None:
    group, rest = command.cli, list(words)
    while hasattr(group, "commands"):
        group = group.commands[rest.pop(0)]
    assert not group.hidden, f"sky {words} is deprecated"
    with group.make_context(words[0], rest) as context:
        if group.name != "launch":
            return None
        place = command._handle_infra_cloud_region_zone_options(context.params["infra"], None, None, None)
        task = command._make_task_or_dag_from_entrypoint_with_overrides(
            **{key: context.params[key] for key in TASK_OPTIONS},
            **dict(zip(("cloud", "region", "zone"), place, strict=True)),
        )
    return {
        "images": sorted({resources.extract_docker_image() for resources in task.resources}),
        "rows": sorted({f"{resources.infra.to_str()} {resources.use_spot}" for resources in task.resources}),
        "nodes": task.num_nodes,
        "envs": task.envs,
        "secrets": {name: value.get_secret_value() for name, value in task.secrets.items()},
    }


print(json.dumps([task_of(words) for words in json.loads(sys.argv[1])]))
