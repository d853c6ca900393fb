"""What a run would take of some devices, on paper: memory of each, and the time of a step.

Memory is `clt.training.memory`'s formula for the part of the dictionary and the tokens that one rank has. Time is
arithmetic from operations, bytes and published speeds, of which a stated share is assumed to be reached; see
docs/many-machines.md. Nothing here loads torch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from clt.config import CLTConfig, TrainingConfig
from clt.errors import ConfigError
from clt.training.devices import Cluster, parse_cluster
from clt.training.memory import (
    HostMemory,
    StepMemory,
    evaluation_bytes,
    host_memory,
    kept_here,
    n_parameters,
    setup_bytes,
    state_bytes,
    step_memory,
    weight_bytes,
)
from clt.training.route_options import BREAK_EVEN, BREAK_EVEN_CUDA, chooses_k, first_route, why_plain

# What CUDA, torch and its kernels take of a GPU, and NCCL's buffers where there are several.
_GPU_BASE, _NCCL = 10**9, 10**9
# What Python and torch take of a machine's memory.
_CPU_BASE = 300 * 2**20
# Share of the memory that allocators leave in pieces too small to use.
_PIECES = 0.08


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Speeds and shares of them that a plan counts on."""

    efficiency: float = 0.4
    """Share of the peak operations per second that matrix products reach."""
    link_efficiency: float = 0.7
    """Share of a link's bandwidth that collectives reach."""
    network_gbits: float = 400.0
    """Network between machines, gigabits per second and device."""
    data_gbytes: float = 5.0
    """What each machine reads activations with, 10^9 bytes per second: a fast local disk."""
    host_gbytes: float = 25.0
    """Between a GPU and its machine's memory, 10^9 bytes per second and direction: PCIe 4.0 with 16 lanes."""

    def __post_init__(self) -> None:
        for name in Assumptions.__dataclass_fields__:
            value = getattr(self, name)
            if value <= 0 or (name.endswith("efficiency") and value > 1):
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be above 0, and a share at most 1.")


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by what takes them."""

    compute: float
    optimiser: float
    communication: float
    data: float
    """Reading the batch, beside the rest."""

    @property
    def total(self) -> float:
        """Batches are read while the last step is computed; communication waits for both sides."""
        return max(self.compute + self.optimiser + self.communication, self.data)

    @property
    def limit(self) -> str:
        """What takes longest."""
        return max(asdict(self).items(), key=lambda item: item[1])[0]


@dataclass(frozen=True)
class Plan:
    """A run on paper."""

    clt: CLTConfig
    training: TrainingConfig
    cluster: Cluster
    assumptions: Assumptions
    tp: int
    """Parts of the dictionary, each on another device."""
    dp: int
    """Copies of it, each with other tokens."""

    @property
    def is_alone(self) -> bool:
        """Whether there is one device."""
        return self.tp * self.dp == 1

    @property
    def refused(self) -> str | None:
        """What `clt train` does not do on several devices; None: nothing of this."""
        training = self.training
        odd = {
            "route": training.route in ("dense", "sparse") and why_plain(self.clt, training, self.tp) is not None,
            "precision": training.precision == "fp16",
            "optimizer": training.optimizer == "adamw8bit",
            "optimizer_in_backward": training.optimizer_in_backward,
            "torch_compile": training.torch_compile,
        }
        names = [] if self.is_alone else [name for name, is_odd in odd.items() if is_odd]
        return ", ".join(f"{name} = {getattr(training, name)!r}" for name in names) or None

    @property
    def route(self) -> str:
        """How the first steps are computed, when they need most memory."""
        if self.training.route == "plain" or why_plain(self.clt, self.training, self.tp) is not None:
            return "plain"
        half = "bf16" if self.training.precision == "bf16" else "fp32"
        low = BREAK_EVEN_CUDA if self.cluster.device.is_gpu else BREAK_EVEN["compiled"][half]
        return first_route(self.clt, self.training, low)

    @property
    def tokens(self) -> int:
        """Of a step, per rank."""
        return math.ceil(self.training.train_batch_size_tokens / self.dp)

    @property
    def memory(self) -> StepMemory:
        """Of each device, at the peak of a step."""
        tokens = min(self.tokens, self.training.micro_batch_tokens or self.tokens)
        return step_memory(self.clt, self.training, tokens, self.route, self.tp, self.cluster.device.is_gpu)

    @property
    def host(self) -> HostMemory:
        """Of the machine's memory, for each device; a part of `memory` where that is the device's."""
        return host_memory(self.clt, self.training, self.tp)

    @property
    def peak(self) -> int:
        """Bytes on each device, at the one of `moments` that takes most."""
        return max(self.moments.values())

    @property
    def moments(self) -> dict[str, int]:
        """Bytes on each device in the three parts of a run that take most, of which only one is at a time."""
        return {
            "step": self.memory.total,
            "setup": setup_bytes(self.clt, self.tp),
            "evaluation": evaluation_bytes(self.clt, self.training, self.tokens, self.tp, self.cluster.device.is_gpu),
        }

    @property
    def usable(self) -> int:
        """Bytes of a device that are free for it."""
        device = self.cluster.device
        base = _GPU_BASE + (0 if self.is_alone else _NCCL) if device.is_gpu else _CPU_BASE
        return round(device.memory * (1 - _PIECES)) - base

    @property
    def fits(self) -> bool:
        """Whether it does, and `clt train` would do it."""
        return self.refused is None and self.peak <= self.usable

    @property
    def flops(self) -> float:
        """Operations of one rank per step that matrix products or gathers do."""
        layers, width = self.clt.num_layers, self.clt.d_model
        pairs = sum(len(self.clt.targets_of(source)) for source in range(layers))
        features = self.clt.num_features / self.tp
        encoder, decoder = layers * features * width, pairs * features * width
        if not self._gathers:
            extra = encoder if self.training.recompute_encoder and self.route != "plain" else 0
            return 2 * self.tokens * (2 * encoder + 3 * decoder + extra)
        share = kept_here(self.clt) / self.clt.num_features
        return 2 * self.tokens * (encoder + share * (encoder + 3 * decoder))

    @property
    def gathered(self) -> float:
        """Bytes of decoder and encoder rows that one rank reads or writes one by one."""
        if not self._gathers:
            return 0.0
        pairs = sum(len(self.clt.targets_of(source)) for source in range(self.clt.num_layers))
        kept = self.tokens * kept_here(self.clt) / self.tp
        return kept * self.clt.d_model * (3 * pairs + self.clt.num_layers) * weight_bytes(self.clt)

    @property
    def _gathers(self) -> bool:
        return self.route == "sparse" or (self.route == "plain" and chooses_k(self.clt))

    @property
    def sent(self) -> dict[str, float]:
        """Bytes one rank sends per step: the reconstruction among the parts, the gradients among the copies (rings)."""
        reconstruction = self.tokens * self.clt.num_layers * self.clt.d_model * 4
        gradients = n_parameters(self.clt, self.tp) * weight_bytes(self.clt)
        return {"tp": 2 * (self.tp - 1) / self.tp * reconstruction, "dp": 2 * (self.dp - 1) / self.dp * gradients}

    @property
    def read(self) -> int:
        """Bytes of activations a machine reads per step: bf16, inputs and targets."""
        copies = min(self.dp, math.ceil(self.dp / self.cluster.nodes))
        return self.tokens * copies * self.clt.num_layers * self.clt.d_model * 2 * 2

    @property
    def time(self) -> StepTime:
        """Of one step."""
        device, how = self.cluster.device, self.assumptions
        peak = (
            device.full_flops
            if self.training.precision == "fp32" and weight_bytes(self.clt) == 4
            else device.half_flops
        )
        compute = max(self.flops / (peak * how.efficiency), self.gathered / device.memory_bandwidth)
        # Weight and moments are read and written; gradients read for norm, clipping and update, decoders for norms.
        touched = 3 * weight_bytes(self.clt) + 2 * state_bytes(self.clt, self.training) + 3 * weight_bytes(self.clt)
        optimiser = n_parameters(self.clt, self.tp) * touched / device.memory_bandwidth
        if device.is_gpu:  # states come while others go
            optimiser = max(optimiser, self.host.states / (how.host_gbytes * 1e9))
        network = how.network_gbits * 1e9 / 8
        crosses = {"tp": self.tp > self.cluster.per_node, "dp": self.tp * self.dp > self.cluster.per_node}
        speed = {axis: network if crosses[axis] else device.link_bandwidth for axis in crosses}
        communication = sum(bytes_ / (speed[axis] * how.link_efficiency) for axis, bytes_ in self.sent.items())
        return StepTime(compute, optimiser, communication, self.read / (how.data_gbytes * 1e9))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: bytes and seconds."""
        time, memory = self.time, self.memory
        return {
            "gpus": str(self.cluster),
            "tp": self.tp,
            "dp": self.dp,
            "route": self.route,
            "n_parameters": n_parameters(self.clt),
            "tokens_per_step": self.training.train_batch_size_tokens,
            "tokens_per_step_and_device": self.tokens,
            "memory_bytes": asdict(memory),
            "moments_bytes": self.moments,
            "host_bytes": asdict(self.host),
            "peak_bytes": self.peak,
            "usable_bytes": self.usable,
            "device_bytes": self.cluster.device.memory,
            "fits": self.fits,
            "refused": self.refused,
            "seconds": {**asdict(time), "step": time.total},
            "limited_by": time.limit,
            "flops": self.flops,
            "gathered_bytes": self.gathered,
            "sent_bytes": self.sent,
            "read_bytes": self.read,
            "tokens_per_second": self.training.train_batch_size_tokens / time.total,
            "hours": self.training.training_steps * time.total / 3600,
            "assumptions": asdict(self.assumptions),
        }


def plan_run(
    clt: CLTConfig,
    training: TrainingConfig,
    gpus: str | Cluster,
    tp: int | None = None,
    dp: int | None = None,
    assumptions: Assumptions | None = None,
) -> Plan:
    """The run on these devices; where tp and dp are open, the fastest split that fits, else all parts.

    Args:
        clt: the transcoder.
        training: tokens per step, precision, optimiser and whatever else takes memory.
        gpus: such as 8xH100, see `parse_cluster`.
        tp: parts of the dictionary.
        dp: copies of it.
        assumptions: speeds.

    Raises:
        ConfigError: tp and dp do not multiply to the number of devices, or the form of `gpus` is not known.
    """
    cluster = parse_cluster(gpus) if isinstance(gpus, str) else gpus
    how = assumptions or Assumptions()
    plans = [Plan(clt, training, cluster, how, parts, copies) for parts, copies in _splits(cluster.size, tp, dp)]
    fitting = [each for each in plans if each.fits]
    return min(fitting, key=lambda each: (each.time.total, -each.tp)) if fitting else plans[0]


def _splits(size: int, tp: int | None, dp: int | None) -> list[tuple[int, int]]:
    """Every way to use all devices that the given numbers leave open, most parts first."""
    ways = [(parts, size // parts) for parts in range(size, 0, -1) if size % parts == 0]
    chosen = [way for way in ways if tp in (None, way[0]) and dp in (None, way[1])]
    if not chosen:
        raise ConfigError(
            f"--tp {tp} and --dp {dp} do not make use of {size} devices: parts times copies must be {size}. Ways: "
            f"{', '.join(f'--tp {a} --dp {b}' for a, b in ways)}."
        )
    return chosen
