# usage: .sky-env/bin/python tests/cluster/optimize.py '[["sky/speedrun.yaml", ["aws", "nebius"]], ...]'
"""SkyPilot's own opinion of a YAML: parsed by its schema, validated, and given to its optimizer with these clouds
enabled.

No network, no server, no account: the catalog is a small one with rows of 1 and 8 H100s and of CPUs, and the
questions that would be put to a cloud are answered here. On-demand prices of GPUs, and those of eight as spot, are
SkyPilot's catalog's of November 2026; regions and the rest are placeholders. Prints a JSON list: what would be
rented, or the error.
"""

import json
import os
import pathlib
import sys
import tempfile
from unittest import mock

HOME = pathlib.Path(tempfile.mkdtemp(prefix="speedrun-sky-"))
os.environ |= {"HOME": str(HOME), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
CLOUDS = ("aws", "lambda", "nebius")


def gpus(count: int) -> str:
    memory = {"SizeInMiB": 81920}
    info = {
        "Gpus": [{"Name": "H100", "Manufacturer": "NVIDIA", "Count": count, "MemoryInfo": memory}],
        "TotalGpuMemoryInMiB": count * 81920,
    }
    return f'"{info}"'


PLAIN = "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,Price,Region,GpuInfo,SpotPrice"
AWS = (
    "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,AvailabilityZone,Arch,"
    "LocalDiskType,NVMeSupported,LocalDiskSize,LocalDiskCount,MaximumEfaInterfaces"
)
CATALOG = {
    "common/accelerators.csv": ["AcceleratorName,Clouds", "H100,\"['AWS', 'Lambda', 'Nebius']\""],
    "common/metadata.csv": ["GPU,MemoryGB,Manufacturer", "H100,80,NVIDIA"],
    "nebius/vms.csv": [
        PLAIN,
        "cpu-d3_4vcpu-16gb,,0,4,16,0.0992,eu-north1,,",
        "cpu-d3_16vcpu-64gb,,0,16,64,0.3968,eu-north1,,",
        f"gpu-h100-sxm_8gpu-128vcpu-1600gb,H100,8,128,1600,23.60,eu-north1,{gpus(8)},10.00",
        f"gpu-h100-sxm_1gpu-16vcpu-200gb,H100,1,16,200,2.95,eu-north1,{gpus(1)},1.25",
    ],
    "lambda/vms.csv": [
        PLAIN,
        "cpu_4x_general,,,4,16,0.2,us-east-1,,",
        "cpu_16x_general,,,16,64,0.8,us-east-1,,",
        f"gpu_8x_h100_sxm5,H100,8,208,1800,31.92,us-west-3,{gpus(8)},",
        f"gpu_1x_h100_sxm5,H100,1,26,225,4.29,us-west-3,{gpus(1)},",
        f"gpu_1x_h100_pcie,H100,1,26,200,3.29,us-west-3,{gpus(1)},",
    ],
    "aws/vms.csv": [
        AWS,
        "m6i.xlarge,,,4,16,,0.192,0.08,us-east-2,us-east-2a,x86_64,,,,,",
        "m6i.4xlarge,,,16,64,,0.768,0.3,us-east-2,us-east-2a,x86_64,,,,,",
        f"p5.48xlarge,H100,8,192,2048,{gpus(8)},55.04,10.2,us-east-2,us-east-2a,x86_64,ssd,required,3800,8,32",
        f"p5.4xlarge,H100,1,16,256,{gpus(1)},6.88,2.5,us-east-2,us-east-2a,x86_64,ssd,required,3800,1,1",
    ],
    "aws/images.csv": [
        "Tag,Region,OS,OSVersion,ImageId,CreationDate,BaseImageId",
        "skypilot:gpu-ubuntu-2204,us-east-2,ubuntu,22.04,ami-0,20250101,ami-1",
    ],
    "aws/instance_quota_mapping.csv": ["InstanceType,SpotInstanceCode,OnDemandInstanceCode"],
}
for name, lines in CATALOG.items():
    path = HOME / ".sky" / "catalogs" / "v8" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")

import pandas  # noqa: E402 - SkyPilot reads HOME when it is imported
from sky.utils import registry, yaml_utils  # noqa: E402

import sky  # noqa: E402
from sky import optimizer  # noqa: E402

ZONES = pandas.DataFrame([("us-east-2a", "us-east-2a")], columns=["AvailabilityZone", "AvailabilityZoneName"])


def opinion(path: str, enabled: list[str]) -> dict:
    """What SkyPilot would rent for the task at `path`; {"error": its first line} where it refuses."""
    clouds = [registry.CLOUD_REGISTRY.from_str(cloud) for cloud in enabled]
    try:
        with mock.patch("sky.check.get_cached_enabled_clouds_or_refresh", lambda *a, **k: clouds):
            config = yaml_utils.safe_load(pathlib.Path(path).read_text())
            task = sky.Task.from_yaml_config(config, env_overrides=[("BUCKET", "s3://mine/prefix")])
            task.validate()
            with sky.Dag() as dag:
                dag.add(task)
            optimizer.Optimizer.optimize(dag, quiet=True)
    except Exception as error:  # whatever it raises is its opinion
        return {"error": f"{type(error).__name__}: {error}"}
    best = task.best_resources
    return {
        "cloud": str(best.cloud).lower(),
        "instance": best.instance_type,
        "spot": best.use_spot,
        "dollars_an_hour": task.num_nodes * best.get_cost(3600),
        "nodes": task.num_nodes,
        "image": best.extract_docker_image(),
        "autostop": [best.autostop_config.idle_minutes, best.autostop_config.down],
        "secrets": sorted(task.secrets),
    }


def main() -> None:
    patches = [
        mock.patch("sky.check.check_capability", lambda *a, **k: None),
        mock.patch("sky.catalog.aws_catalog._get_az_mappings", lambda *a, **k: ZONES),
    ]
    for cloud in CLOUDS:
        found = type(registry.CLOUD_REGISTRY.from_str(cloud))
        patches.append(mock.patch.object(found, "check_quota_available", classmethod(lambda *a, **k: True)))
    for patch in patches:
        patch.start()
    print(json.dumps([opinion(path, enabled) for path, enabled in json.loads(sys.argv[1])]))


main()
