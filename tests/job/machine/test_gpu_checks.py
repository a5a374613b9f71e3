"""What doctor says of GPUs, by tables: each sound but for one thing, with the line that this must give.

The tables are constructed, not recorded: after the documented output of nvidia-smi (`-q -x` by nvsmi_device_v12.dtd,
`nvlink --status`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import pytest

from helpers import judged
from job.machine import nvidia_smi
from job.machine.finding import Finding, Verdict
from job.machine.gpu_checks import GpuFacts, GpusWanted, gpu_findings
from job.machine.host import Machine
from job.recipe.config import resolve
from job.train.kernels import price_of

H100 = "NVIDIA H100 80GB HBM3"
GPU = f"""<gpu id="00000000:1B:00.0">
 <product_name>{H100}</product_name>
 <mig_mode><current_mig>Disabled</current_mig><pending_mig>Disabled</pending_mig></mig_mode>
 <pci><pci_gpu_link_info><link_widths><max_link_width>16x</max_link_width>
  <current_link_width>16x</current_link_width></link_widths></pci_gpu_link_info></pci>
 <clocks_event_reasons>
  <clocks_event_reason_gpu_idle>Active</clocks_event_reason_gpu_idle>
  <clocks_event_reason_sw_power_cap>Active</clocks_event_reason_sw_power_cap>
  <clocks_event_reason_hw_slowdown>Not Active</clocks_event_reason_hw_slowdown>
  <clocks_event_reason_hw_thermal_slowdown>Not Active</clocks_event_reason_hw_thermal_slowdown>
  <clocks_event_reason_hw_power_brake_slowdown>Not Active</clocks_event_reason_hw_power_brake_slowdown>
  <clocks_event_reason_sw_thermal_slowdown>Not Active</clocks_event_reason_sw_thermal_slowdown>
 </clocks_event_reasons>
 <fb_memory_usage><total>81559 MiB</total><reserved>550 MiB</reserved><used>4 MiB</used></fb_memory_usage>
 <ecc_mode><current_ecc>Enabled</current_ecc><pending_ecc>Enabled</pending_ecc></ecc_mode>
 <ecc_errors><volatile><sram_correctable>0</sram_correctable>
  <sram_uncorrectable_parity>0</sram_uncorrectable_parity><sram_uncorrectable_secded>0</sram_uncorrectable_secded>
  <dram_correctable>7</dram_correctable><dram_uncorrectable>0</dram_uncorrectable></volatile></ecc_errors>
 <remapped_rows><remapped_row_corr>0</remapped_row_corr><remapped_row_unc>0</remapped_row_unc>
  <remapped_row_pending>No</remapped_row_pending><remapped_row_failure>No</remapped_row_failure></remapped_rows>
 <gpu_power_readings><power_draw>71.20 W</power_draw><current_power_limit>700.00 W</current_power_limit>
  <default_power_limit>700.00 W</default_power_limit></gpu_power_readings>
 <applications_clocks><graphics_clock>1980 MHz</graphics_clock></applications_clocks>
 <default_applications_clocks><graphics_clock>1980 MHz</graphics_clock></default_applications_clocks>
 <fabric><state>Completed</state><status>Success</status></fabric>
 <processes></processes>
</gpu>"""
LINKS = "".join(f"\t Link {link}: 26.562 GB/s\n" for link in range(18))
NINE = "".join(f"\t Link {link}: {'26.562 GB/s' if link < 9 else '<inactive>'}\n" for link in range(18))
NONE = "NVML: Unable to retrieve NVLink information as all links are inActive\n"

Edit = dict[str, str]


def answers(gpus: Sequence[str], links: Sequence[str], driver: str = "580.95.05", cuda: str = "13.0") -> nvidia_smi.Run:
    """An nvidia-smi that lists these `gpus` and the `links` of each."""
    versions = f"<driver_version>{driver}</driver_version><cuda_version>{cuda}</cuda_version>"
    listed = f'<?xml version="1.0" ?><nvidia_smi_log>{versions}{"".join(gpus)}</nvidia_smi_log>'
    named = "".join(f"GPU {index}: {H100} (UUID: GPU-{index})\n{each}" for index, each in enumerate(links))
    return {nvidia_smi.QUERY: listed, nvidia_smi.NVLINK: named}.get  # type: ignore[return-value]


def cost(share: float) -> str:
    return price_of(share, resolve("run6"), Machine(8, H100, (9, 0)), 8, 36.0)


WANTED = GpusWanted(count=8, made_for=(8, "h100"), memory=50.5e9, cost=cost)


def gpu_table(
    number: int = 8,
    edits: dict[int, Edit] | None = None,
    links: dict[int, str] | None = None,
    versions: dict[str, str] | None = None,
    facts: dict[str, Any] | None = None,
    wanted: dict[str, Any] | None = None,
) -> list[Finding]:
    """Findings of `number` H100 but for `edits` of a GPU's XML, its `links`, the `versions` and what probes found."""
    gpus = [GPU] * number
    for index, edit in (edits or {}).items():
        for old, new in edit.items():
            assert old in gpus[index]
            gpus[index] = gpus[index].replace(old, new)
    found = nvidia_smi.ask(
        answers(gpus, [(links or {}).get(index, LINKS) for index in range(number)], **versions or {})
    )
    assert found
    sound = {"torch_cuda": "13.0", "matmul": (702e12,) * number, "all_reduce": (412e9,) * number}
    return gpu_findings(
        GpuFacts(gpus=found.gpus, driver=found.driver, driver_cuda=found.cuda, **sound | (facts or {})),
        dataclasses.replace(WANTED, **wanted or {}),
    )


def active(reason: str) -> Edit:
    return {f"{reason}>Not Active": f"{reason}>Active"}


def all_eight(each: Any) -> dict[int, Any]:
    return {index: each for index in range(8)}


MIG = {"<current_mig>Disabled": "<current_mig>Enabled"}
ANOTHER = "take another node"
GPU_TABLES: dict[str, tuple[dict[str, Any], str]] = {
    "7 of 8 GPUs": (
        {"number": 7},
        "refused  GPUs: 7 of 8 answer; take another node (`dmesg | grep Xid` says what became of the other)",
    ),
    "one fell off the bus": (
        {"number": 7, "facts": {"on_bus": 8}, "wanted": {"count": 0}},
        "slow     GPUs: 7 of 8 answer; take another node (`dmesg | grep Xid` says what became of the other)",
    ),
    "fewer than the recipe is made for": (
        {"number": 4, "wanted": {"count": 0}},
        "warned   GPUs: 4 answer; the recipe is made for 8, on 4 it takes longer by that factor; take a node with 8",
    ),
    "two kinds": (
        {"edits": {5: {H100: "NVIDIA H100 PCIe"}}},
        f"slow     GPU kind: 7 x {H100}, 1 x NVIDIA H100 PCIe: all are as fast as the slowest; {ANOTHER} with one kind",
    ),
    "another kind": (
        {"edits": all_eight({H100: "NVIDIA H100 PCIe"})},
        "warned   GPU kind: 8 x NVIDIA H100 PCIe; the recipe is made for H100 SXM 80 GB; `speedrun plan --gpu NAME`"
        " says what it costs there, or take a node with the H100 SXM 80 GB",
    ),
    "small memory": (
        {"edits": {2: {"81559 MiB": "40960 MiB"}}},
        "refused  GPU memory: 42.9 to 85.5 GB; a step takes 50.5 (planned); lower train.device_batch_size, or take"
        " larger GPUs",
    ),
    "memory that may just do": (
        {"edits": {2: {"81559 MiB": "46068 MiB"}}},
        "warned   GPU memory: 48.3 to 85.5 GB; a step takes 50.5 (planned); lower train.device_batch_size, or take"
        " larger GPUs",
    ),
    "old driver": (
        {"versions": {"driver": "535.104.05", "cuda": "12.2"}},
        "refused  driver: 535.104.05 can do CUDA 12.2, torch is built for 13.0; take a host with a newer driver, or an"
        " image built with COMPAT=DIR or CUDA=cu126 (docs/cloud.md)",
    ),
    "ECC errors": (
        {"edits": {6: {"<dram_uncorrectable>0": "<dram_uncorrectable>2"}}},
        "refused  ECC: GPU 6 has 2 uncorrected memory errors, or rows that need replacing; take another node (a reset,"
        " `nvidia-smi -r`, may heal it)",
    ),
    "a row that could not be replaced": (
        {"edits": {1: {"failure>No": "failure>Yes"}}},
        "refused  ECC: GPU 1 has 0 uncorrected memory errors, or rows that need replacing; take another node (a reset,"
        " `nvidia-smi -r`, may heal it)",
    ),
    "a row that waits for a reset": (
        {"edits": {1: {"pending>No": "pending>Yes"}}},
        "warned   ECC: GPU 1 has rows that are replaced at the next reset; nothing now; `nvidia-smi -r` where nobody"
        " computes",
    ),
    "ECC off": (
        {"edits": {0: {"<current_ecc>Enabled": "<current_ecc>Disabled"}}},
        "warned   ECC: off on GPU 0: a flipped bit would go unnoticed; `nvidia-smi -e 1` and a reset",
    ),
    "MIG on": (
        {"edits": {0: MIG, 1: MIG}},
        "slow     MIG: GPUs 0, 1 are cut into instances, of which a process sees one; `nvidia-smi -mig 0` as root on"
        " the host, or take another node",
    ),
    "another's process": (
        {"edits": {4: {"<processes></processes>": "<processes><process_info><pid>4242</pid><type>C</type>"
                       "<process_name>python3</process_name></process_info></processes>", "4 MiB": "31000 MiB"}}},
        "slow     GPU processes: GPU 4 is used by 4242 python3 (up to 32.5 GB); end it (nvidia-smi lists the pid), or"
        " take another node",
    ),
    "a process of another container": (
        {"edits": {4: {"<used>4 MiB": "<used>31000 MiB"}}},
        "slow     GPU processes: GPU 4 is used by a process that is not seen from here (up to 32.5 GB); end it"
        " (nvidia-smi lists the pid), or take another node",
    ),
    "thermal slowdown": (
        {"edits": {3: active("hw_slowdown") | active("hw_thermal_slowdown")}},
        "slow     throttling: GPU 3 is slowed down (hw_thermal_slowdown), and all wait for the slowest;"
        " take another node: this one's cooling or power does not suffice",
    ),
    "power brake": (
        {"edits": all_eight(active("hw_power_brake_slowdown"))},
        "slow     throttling: GPUs 0, 1, 2, 3, 4, 5, 6, 7 are slowed down (hw_power_brake_slowdown), and all wait for"
        " the slowest; take another node: this one's cooling or power does not suffice",
    ),
    "lowered clocks": (
        {"edits": {7: {"<applications_clocks><graphics_clock>1980": "<applications_clocks><graphics_clock>1200"}}},
        "slow     clocks: GPU 7 is set to 1200 MHz instead of 1980; `nvidia-smi -rac` as root, or take another node",
    ),
    "power cap": (
        {"edits": all_eight({"<current_power_limit>700": "<current_power_limit>600"})},
        "warned   power limit: GPU 0 is set to 600 W instead of 700; `nvidia-smi -pl WATTS` as root gives it back, or"
        " take another node",
    ),
    "half the PCIe width": (
        {"edits": {2: {"<current_link_width>16x": "<current_link_width>8x"}}},
        "warned   PCIe: GPU 2 is on x8 of x16: checkpoints leave it more slowly; take another node: a card or riser"
        " has bad contact",
    ),
    "a quarter of a narrow slot's width": (
        {"edits": {2: {"<max_link_width>16": "<max_link_width>8", "<current_link_width>16": "<current_link_width>2"}}},
        "warned   PCIe: GPU 2 is on x2 of x8: checkpoints leave it more slowly; take another node: a card or riser"
        " has bad contact",
    ),
    "Fabric Manager down": (
        {"edits": all_eight({"Completed</state><status>Success": "In Progress</state><status>N/A"})},
        "refused  Fabric Manager: GPUs 0, 1, 2, 3, 4, 5, 6, 7 are at In Progress, and CUDA starts when it says"
        " Completed; on the host `systemctl restart nvidia-fabricmanager` (of the driver's version), or take another"
        " node",
    ),
    "no NVLink": (
        {"links": all_eight(NONE)},
        "slow     NVLink: no link is active: gradients would go over PCIe or the host's memory; take another node,"
        " with SXM boards",
    ),
    "one at half bandwidth": (
        {"links": {3: NINE}},
        "slow     NVLink: GPU 3 has 239 GB/s of links up, 478 are usual; take another node; the all-reduce line says"
        " what it costs",
    ),
    "one throttled": (
        {"facts": {"matmul": (702e12,) * 4 + (421e12,) + (698e12,) * 3}},
        "slow     matmul: rank 4 421 TFLOP/s of the others' 702, 40% below; at most 66.0 minutes or $39.61 of this"
        " run at $36 an hour (were all of a step such work); take another node",
    ),
    "one a little slower": (
        {"facts": {"matmul": (702e12,) * 7 + (631e12,)}},
        "warned   matmul: rank 7 631 TFLOP/s of the others' 702, 10% below; at most 11.1 minutes or $6.68 of this run"
        " at $36 an hour (were all of a step such work); take another node",
    ),
    "all slower than published": (
        {"facts": {"matmul": (480e12,) * 8}},
        "slow     matmul: rank 0 480 TFLOP/s of the published 650, 26% below; at most 35.0 minutes or $21.02 of this"
        " run at $36 an hour (were all of a step such work); take another node",
    ),
    "the bus at half speed": (
        {"facts": {"all_reduce": (185e9,) * 8}},
        "slow     all-reduce: rank 0 185 GB/s of the published 370, 50% below; at most 98.9 minutes or $59.34 of this"
        " run at $36 an hour (were all of a step such work); take another node",
    ),
    "a probe that fails": (
        {"facts": {"probe_failed": "rank 2: RuntimeError: CUDA error: an illegal memory access was encountered"}},
        "refused  matmul: the probe ended with: rank 2: RuntimeError: CUDA error: an illegal memory access was"
        " encountered; take another node: training would fail the same way",
    ),
}  # fmt: skip


@pytest.mark.parametrize("table", GPU_TABLES)
def test_a_table_of_gpus_gives_its_line(table: str) -> None:
    changed, line = GPU_TABLES[table]
    assert judged(gpu_table(**changed)) == [line]


def test_sound_gpus() -> None:
    lines = [finding.line() for finding in gpu_table()]
    assert all(line.startswith("ok ") for line in lines)
    assert [line[9:].partition(":")[0] for line in lines] == [
        *("GPUs", "GPU kind", "GPU memory", "driver", "ECC", "MIG", "GPU processes", "throttling", "clocks"),
        *("power limit", "PCIe", "Fabric Manager", "NVLink", "matmul", "all-reduce"),
    ]
    alone = gpu_table(1, facts={"all_reduce": ()}, wanted={"count": 1, "made_for": (1, "h100")})
    assert judged(alone) == [] and not any(finding.check == "NVLink" for finding in alone)


@pytest.mark.parametrize("silence", ["N/A", "[N/A]", "[Not Supported]", ""])
def test_what_nvidia_smi_does_not_say_is_unknown_and_refuses_nothing(silence: str) -> None:
    said = re.sub(r">[^<>\n]+</", f">{silence}</", GPU).replace(f"name>{silence}</", "name>H</", 1)
    found = nvidia_smi.ask(answers([said] * 8, [""] * 8, silence, silence))
    assert found and {dataclasses.replace(gpu, index=0) for gpu in found.gpus} == {nvidia_smi.Gpu(0, "H")}
    findings = gpu_findings(GpuFacts(gpus=found.gpus, torch_cuda="13.0"), dataclasses.replace(WANTED, made_for=None))
    assert {finding.verdict for finding in findings} == {Verdict.OK, Verdict.UNKNOWN}
    assert sum(finding.verdict == Verdict.UNKNOWN for finding in findings) == 11
    (unknown,) = gpu_findings(GpuFacts(gpus=()), WANTED)
    assert unknown.verdict == Verdict.UNKNOWN


def test_older_drivers_call_things_otherwise() -> None:
    old = GPU.replace("clocks_event_reason", "clocks_throttle_reason").replace("gpu_power_readings", "power_readings")
    old = old.replace("current_power_limit", "power_limit").replace(
        "sw_thermal_slowdown>Not Active", "sw_thermal_slowdown>Active"
    )
    found = nvidia_smi.ask(answers([old], [LINKS]))
    assert found and found.gpus[0].slowdowns == ("sw_thermal_slowdown",) and found.gpus[0].power_limit == 700
    assert nvidia_smi.ask(lambda _: None) is None and nvidia_smi.ask(lambda _: "NVIDIA-SMI has failed") is None
