"""What nvidia-smi says of this machine's GPUs: `-q -x` for all of them at once, `nvlink --status` for their links.

XML and not `--query-gpu`, which refuses a whole question for one field that a driver does not know. Names that changed
are looked for under both (clocks_throttle_reasons until driver 535, power_readings until 530). What is not there, or is
"N/A" or "[Not Supported]", is None: unknown, which no check refuses.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from xml.etree import ElementTree

from job.machine.host import printed

QUERY = ("nvidia-smi", "-q", "-x")
NVLINK = ("nvidia-smi", "nvlink", "--status")
DEPRECATED = "Requested functionality has been deprecated"
NEVER_SAID = ("", "N/A", "[N/A]", "[Not Supported]", "Unknown Error", "[Unknown Error]", DEPRECATED)
SLOWDOWNS = ("hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")
"""reasons for lower clocks that a healthy GPU never has: under load it has sw_power_cap, and NVML's documentation says
that hw_slowdown may come with any change of clocks"""

Run = Callable[[Sequence[str]], str | None]


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU; None is unknown. Bytes, MHz, watts, bytes/s."""

    index: int
    name: str
    memory: float | None = None
    used: float | None = None
    processes: tuple[str, ...] = ()
    """"pid name" of each that computes there; a container does not see those of others"""
    mig: bool | None = None
    ecc: bool | None = None
    uncorrected: int | None = None
    """ECC errors since the driver was loaded that could not be corrected"""
    remap_failed: bool | None = None
    remap_pending: bool | None = None
    slowdowns: tuple[str, ...] | None = None
    clock: float | None = None
    """what its applications' clock is set to"""
    default_clock: float | None = None
    power_limit: float | None = None
    default_power_limit: float | None = None
    pcie_width: float | None = None
    max_pcie_width: float | None = None
    fabric: str | None = None
    """the state that Fabric Manager has brought it to, and the status where that is no success"""
    links: tuple[float, ...] | None = None
    """each NVLink; 0 for one that is inactive, () where all are"""


@dataclasses.dataclass(frozen=True)
class Listing:
    """All GPUs, the driver, and the newest CUDA that it can do ("13.0"); None is unknown."""

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    cuda: str | None = None


def ask(run: Run = printed) -> Listing | None:
    """None where nvidia-smi cannot be asked or gives no answer that can be read."""
    text = run(QUERY)
    try:
        root = ElementTree.fromstring(text) if text else None
    except ElementTree.ParseError:
        root = None
    if root is None:
        return None
    links = _links(run(NVLINK))
    gpus = tuple(_gpu(index, found, links.get(index)) for index, found in enumerate(root.findall("gpu")))
    return Listing(gpus, _text(root, "driver_version"), _text(root, "cuda_version"))


def _gpu(index: int, found: ElementTree.Element, links: tuple[float, ...] | None) -> Gpu:
    power = "gpu_power_readings" if found.find("gpu_power_readings") is not None else "power_readings"
    return Gpu(
        index,
        _text(found, "product_name") or "a GPU without a name",
        memory=_number(found, "fb_memory_usage/total"),
        used=_number(found, "fb_memory_usage/used"),
        processes=tuple(
            f"{_text(each, 'pid')} {_text(each, 'process_name') or ''}".strip()
            for each in found.findall("processes/process_info")
            if "C" in (_text(each, "type") or "")
        ),
        mig=_flag(found, "mig_mode/current_mig", "Enabled"),
        ecc=_flag(found, "ecc_mode/current_ecc", "Enabled"),
        uncorrected=_uncorrected(found),
        remap_failed=_flag(found, "remapped_rows/remapped_row_failure", "Yes"),
        remap_pending=_flag(found, "remapped_rows/remapped_row_pending", "Yes"),
        slowdowns=_slowdowns(found),
        clock=_number(found, "applications_clocks/graphics_clock"),
        default_clock=_number(found, "default_applications_clocks/graphics_clock"),
        power_limit=_number(found, f"{power}/current_power_limit") or _number(found, f"{power}/power_limit"),
        default_power_limit=_number(found, f"{power}/default_power_limit"),
        pcie_width=_number(found, "pci/pci_gpu_link_info/link_widths/current_link_width"),
        max_pcie_width=_number(found, "pci/pci_gpu_link_info/link_widths/max_link_width"),
        fabric=_fabric(found),
        links=links,
    )


def _uncorrected(found: ElementTree.Element) -> int | None:
    volatile = found.find("ecc_errors/volatile")
    names = [each.tag for each in volatile if "uncorrectable" in each.tag] if volatile is not None else []
    counts = [count for name in names if (count := _number(found, f"ecc_errors/volatile/{name}")) is not None]
    return int(sum(counts)) if counts else None


def _slowdowns(found: ElementTree.Element) -> tuple[str, ...] | None:
    said: dict[str, bool] = {}
    for family in ("clocks_event_reason", "clocks_throttle_reason"):
        for name in SLOWDOWNS:
            active = _flag(found, f"{family}s/{family}_{name}", "Active")
            if active is not None:
                said[name] = active
    return tuple(name for name, active in said.items() if active) if said else None


def _fabric(found: ElementTree.Element) -> str | None:
    state, status = _text(found, "fabric/state"), _text(found, "fabric/status")
    return f"{state}, {status}" if state and status and status != "Success" else state


def _links(text: str | None) -> dict[int, tuple[float, ...]]:
    """By GPU, from lines like "GPU 0: NVIDIA H100 ... (UUID: ...)", "Link 0: 26.562 GB/s", "Link 1: <inactive>"."""
    found: dict[int, tuple[float, ...]] = {}
    gpu = -1
    for line in (text or "").splitlines():
        if head := re.match(r"GPU (\d+):", line):
            gpu = int(head[1])
        elif "all links are inActive" in line:
            found[gpu] = ()
        elif link := re.match(r"\s+Link \d+: (?:([\d.]+) GB/s|<inactive>)", line):
            found[gpu] = (*found.get(gpu, ()), float(link[1] or 0) * 1e9)
    return found


def _text(found: ElementTree.Element, path: str) -> str | None:
    text = (found.findtext(path) or "").strip()
    return None if text in NEVER_SAID else text


def _flag(found: ElementTree.Element, path: str, yes: str) -> bool | None:
    text = _text(found, path)
    return None if text is None else text == yes


UNITS = {"MiB": 1 << 20, "GiB": 1 << 30}


def _number(found: ElementTree.Element, path: str) -> float | None:
    """In bytes where the unit is one of memory."""
    said = re.match(r"([\d.]+)\s*(\w*)", _text(found, path) or "")
    return float(said[1]) * UNITS.get(said[2], 1) if said else None
