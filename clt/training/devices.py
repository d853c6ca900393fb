"""Devices a run may be planned for: their makers' published figures, and this machine's own as its system says."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from clt.errors import ConfigError

_GB, _TERA = 10**9, 10**12
# Bytes per second and direction of PCI Express with 16 lanes, generations 3 to 5, as specified.
_PCIE3, _PCIE4, _PCIE5 = 16 * _GB, 32 * _GB, 64 * _GB
# Operations per cycle and core in fp32: two fused multiply-adds on vectors of 16, 8 or 4 numbers.
_CYCLE = {"avx512f": 64, "avx2": 32}
_CYCLE_OTHER, _HERTZ_OTHER = 16, 3e9
# Bytes per second a core reads from memory: a guess in the middle of today's servers and laptops.
_CORE_BANDWIDTH = 10 * _GB


@dataclass(frozen=True)
class Device:
    """One accelerator, or one machine without."""

    name: str
    memory: int
    """Bytes."""
    half_flops: float
    """Dense bf16 (V100: fp16) operations per second."""
    full_flops: float
    """fp32 operations per second, without TF32, which training does not switch on."""
    memory_bandwidth: float
    """Bytes per second."""
    link_bandwidth: float
    """Bytes per second and direction to a neighbour in the same machine."""
    is_gpu: bool = True


def _gpu(name: str, gigabytes: float, half: float, full: float, bandwidth: float, link: float) -> Device:
    return Device(name, round(gigabytes * _GB), half * _TERA, full * _TERA, bandwidth * _GB, link)


GPUS: dict[str, Device] = {
    device.name.lower(): device
    for device in (
        _gpu("B200", 180, 2250, 75, 7700, 900 * _GB),
        _gpu("H200", 141, 989, 67, 4800, 450 * _GB),
        _gpu("H100", 80, 989, 67, 3350, 450 * _GB),
        _gpu("H100-PCIe", 80, 756, 51, 2000, _PCIE5),
        _gpu("A100", 80, 312, 19.5, 2039, 300 * _GB),
        _gpu("A100-40GB", 40, 312, 19.5, 1555, 300 * _GB),
        _gpu("A6000", 48, 155, 38.7, 768, _PCIE4),
        _gpu("A10", 24, 125, 31.2, 600, _PCIE4),
        _gpu("L40S", 48, 362, 91.6, 864, _PCIE4),
        _gpu("L4", 24, 121, 30.3, 300, _PCIE4),
        _gpu("V100", 32, 125, 15.7, 900, 150 * _GB),
        _gpu("T4", 16, 65, 8.1, 320, _PCIE3),
        _gpu("RTX4090", 24, 165, 82.6, 1008, _PCIE4),
        _gpu("RTX3090", 24, 71, 35.6, 936, _PCIE4),
        _gpu("MI300X", 192, 1307, 163.4, 5300, 448 * _GB),
    )
}
"""By name in lower case. Memory, dense bf16, fp32 and bandwidths from the makers' data sheets (SXM forms where there
are several)."""


@dataclass(frozen=True)
class Cluster:
    """Equal devices in equal machines."""

    device: Device
    nodes: int
    per_node: int

    @property
    def size(self) -> int:
        """Devices in all."""
        return self.nodes * self.per_node

    def __str__(self) -> str:
        nodes = f"{self.nodes}x" if self.nodes > 1 else ""
        return f"{nodes}{self.per_node}x{self.device.name}"


def parse_cluster(text: str) -> Cluster:
    """`H100`, `8xH100`, `4x8xH100` (machines, devices in each), `1xcpu` (processes on this machine).

    Raises:
        ConfigError: another form, or a device that is not in the table.
    """
    found = re.fullmatch(r"(?:(\d+)x)?(?:(\d+)x)?([A-Za-z][\w-]*)", text.strip())
    counts = [int(count) for count in found.groups()[:2] if count is not None] if found else [0]
    name = found.group(3).lower() if found else ""
    if 0 in counts or (name != "cpu" and name not in GPUS):
        known = ", ".join(device.name for device in GPUS.values())
        meant = [device.name for key, device in GPUS.items() if (text.lower().rpartition("x")[2] or "-") in key]
        hint = f" Did you mean {' or '.join(meant)}?" if 0 < len(meant) <= 3 else ""
        raise ConfigError(
            f"--gpus {text!r} is not [MACHINES x] COUNT x DEVICE, such as 8xH100, 4x8xH100 or 1xcpu. Devices: {known}; "
            f"cpu is this machine.{hint}"
        )
    nodes, per_node = (1, *counts)[-2:] if counts else (1, 1)
    return Cluster(this_machine(per_node) if name == "cpu" else GPUS[name], nodes, per_node)


def this_machine(processes: int = 1) -> Device:
    """A share of this machine: memory and cores as the system states them, speed from clock and instruction set."""
    text = _read("/proc/cpuinfo")
    flags = set(re.findall(r"[\w.]+", text.partition("\nflags")[2].partition("\n")[0]))
    hertz = [float(value) * 1e6 for value in re.findall(r"cpu MHz\s*:\s*([\d.]+)", text)]
    per_cycle = next((value for flag, value in _CYCLE.items() if flag in flags), _CYCLE_OTHER)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    full = cores * per_cycle * (max(hertz) if hertz else _HERTZ_OTHER)
    half = 8 if "amx_bf16" in flags else 2 if "avx512_bf16" in flags else 1
    bandwidth = cores * _CORE_BANDWIDTH
    return Device(
        name="cpu",
        memory=_memory() // processes,
        half_flops=half * full / processes,
        full_flops=full / processes,
        memory_bandwidth=bandwidth / processes,
        link_bandwidth=bandwidth / processes,
        is_gpu=False,
    )


def _memory() -> int:
    """Of this machine, or less where its container is given less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return min(total, int(limit)) if limit.isdigit() else total


def _read(path: str) -> str:
    """A file of the system; empty where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
