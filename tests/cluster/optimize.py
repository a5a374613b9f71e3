# usage: .sky-env/bin/python tests/cluster/optimize.py '[["sky/speedrun.yaml", ["aws", "nebius"], {}], ...]'
"""SkyPilot's own opinion of a YAML: parsed by its schema, validated, changed as its command line's options would, and
given to its optimizer with these clouds enabled.

No network, no server, no account: the catalog is tests/cluster/catalog, and the questions that would be put to a
cloud are answered here. Prints a JSON list: what would be rented, or the error.

The catalog is rows of SkyPilot's own (skypilot-catalog, catalogs/v8): aws at commit 00148f2, gcp 006059e, lambda
0f40703, nebius 0082b04, read in November 2026 from copies without a date. All zones of H100:8, and of H100:1 on AWS;
of CPUs and of Lambda's machines some, GpuInfo left empty. RunPod and Azure have none.
"""

import json
import os
import pathlib
import shutil
import sys
import tempfile
from unittest import mock

HOME = pathlib.Path(tempfile.mkdtemp(prefix="speedrun-sky-"))
os.environ |= {"HOME": str(HOME), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
PLAIN = "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,Price,Region,GpuInfo,SpotPrice"
CATALOG = {
    "common/accelerators.csv": ["AcceleratorName,Clouds", "H100,\"['AWS', 'GCP', 'Lambda', 'Nebius']\""],
    "common/metadata.csv": ["GPU,MemoryGB,Manufacturer", "H100,80,NVIDIA"],
    "aws/images.csv": [
        "Tag,Region,OS,OSVersion,ImageId,CreationDate,BaseImageId",
        "skypilot:gpu-ubuntu-2204,us-east-2,ubuntu,22.04,ami-0,20250101,ami-1",
    ],
    "aws/instance_quota_mapping.csv": ["InstanceType,SpotInstanceCode,OnDemandInstanceCode"],
    "gcp/accelerator_quota_mapping.csv": ["Accelerator,SpotInstanceCode,OnDemandInstanceCode"],
    "gcp/images.csv": ["Tag,Region,OS,OSVersion,ImageId,CreationDate"],
    "runpod/vms.csv": [PLAIN + ",AvailabilityZone"],
    "azure/vms.csv": [PLAIN],
    "azure/images.csv": ["Tag,Region,OS,OSVersion,ImageId,CreationDate"],
}
V8 = HOME / ".sky" / "catalogs" / "v8"
shutil.copytree(pathlib.Path(__file__).with_name("catalog"), V8)
for name, lines in CATALOG.items():
    (V8 / name).parent.mkdir(exist_ok=True)
    (V8 / name).write_text("\n".join(lines) + "\n")

import pandas  # noqa: E402 - SkyPilot reads HOME when it is imported
from sky.client.cli import command  # noqa: E402
from sky.utils import registry, yaml_utils  # noqa: E402

import sky  # noqa: E402
from sky import optimizer  # noqa: E402

ROWS = pandas.read_csv(V8 / "aws/vms.csv")["AvailabilityZone"].unique()
ZONES = pandas.DataFrame({"AvailabilityZone": ROWS, "AvailabilityZoneName": ROWS})


def opinion(path: str, enabled: list[str], options: dict) -> dict:
    """What SkyPilot would rent for the task at `path`; {"error": what it says} where it refuses."""
    clouds = [registry.CLOUD_REGISTRY.from_str(cloud) for cloud in enabled]
    said: list[str] = []
    try:
        with (
            mock.patch("sky.check.get_cached_enabled_clouds_or_refresh", lambda *a, **k: clouds),
            mock.patch.object(optimizer.logger, "info", said.append),
        ):
            config = yaml_utils.safe_load(pathlib.Path(path).read_text())
            task = sky.Task.from_yaml_config(config, env_overrides=[("BUCKET", "s3://mine/prefix")])
            if options:
                task.set_resources_override(command._parse_override_params(**options))
            task.validate()
            with sky.Dag() as dag:
                dag.add(task)
            optimizer.Optimizer.optimize(dag, quiet=True)
    except Exception as error:  # whatever it raises is its opinion
        return {"error": f"{type(error).__name__}: {error} {' '.join(map(str, said))}"}
    best = task.best_resources
    return {
        "cloud": str(best.cloud).lower(),
        "region": best.region,
        "instance": best.instance_type,
        "spot": best.use_spot,
        "dollars_an_hour": best.get_cost(3600),
        "image": best.extract_docker_image(),
        "autostop": [best.autostop_config.idle_minutes, best.autostop_config.down],
        "secrets": sorted(task.secrets),
    }


def main() -> None:
    patches = [
        mock.patch("sky.check.check_capability", lambda *a, **k: None),
        mock.patch("sky.catalog.aws_catalog._get_az_mappings", lambda *a, **k: ZONES),
    ]
    for cloud in ("aws", "azure", "gcp", "lambda", "nebius", "runpod"):
        found = type(registry.CLOUD_REGISTRY.from_str(cloud))
        patches.append(mock.patch.object(found, "check_quota_available", classmethod(lambda *a, **k: True)))
    for patch in patches:
        patch.start()
    print(json.dumps([opinion(*asked) for asked in json.loads(sys.argv[1])]))


main()
