"""Say on paper what a training run takes: memory of each device, time of a step, whether it fits, and what to change.

Takes the flags of `clt train` beside its own. Needs no GPU, no data and no network.

    clt plan --model llava-hf/llava-1.5-7b-hf --features 32768 --gpus 8xH100
    clt plan --n-layers 12 --d-model 768 --features 24576 --activation-fn batchtopk --batchtopk-k 384 --gpus 1xcpu
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import tyro

from clt.config import CLTConfig, TrainingConfig
from clt.errors import ConfigError
from clt.training.host_shapes import host_shape
from clt.training.memory import n_parameters
from clt.training.plan import Assumptions, Plan, plan_run
from clt.training.remedies import Remedy, remedies

# Stand for the host's sizes while flags are parsed; `main` puts the real ones in.
_UNKNOWN_LAYERS, _UNKNOWN_WIDTH = 1_000_000, 1_000_000


@dataclass(frozen=True, kw_only=True)
class Options(Assumptions):
    """Host, devices, transcoder, training."""

    model: str | None = None
    """The host: an id of the built-in table, or a local folder with its config.json."""
    n_layers: Annotated[int | None, tyro.conf.arg(aliases=("--num-layers",))] = None
    """Layers, for a host that is not known."""
    d_model: int | None = None
    """Its width."""
    gpus: str = "1xcpu"
    """COUNTxDEVICE or MACHINESxCOUNTxDEVICE, such as 8xH100 or 4x8xA100; cpu is this machine."""
    tp: int | None = None
    """Parts of the dictionary, each on its own device; None: the fastest split that fits."""
    dp: int | None = None
    """Copies of the dictionary, each with its own share of the tokens; None: what tp leaves."""
    clt: Annotated[CLTConfig, tyro.conf.arg(name="")] = CLTConfig(
        num_features=4096, num_layers=_UNKNOWN_LAYERS, d_model=_UNKNOWN_WIDTH
    )
    """What to train."""
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = TrainingConfig()
    """How to train it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = (self.n_layers, self.d_model)
        if (self.model is None and None in sizes) or (self.model is not None and sizes != (None, None)):
            raise ConfigError(
                f"clt plan needs --model, or else both --n-layers and --d-model (now: --model {self.model}, --n-layers "
                f"{self.n_layers}, --d-model {self.d_model})."
            )


def planned(options: Options) -> Plan:
    """The plan of some options."""
    if options.model is not None:
        layers, width = host_shape(options.model)
    else:
        layers, width = options.n_layers or 0, options.d_model or 0
    config = options.clt.replace(num_layers=layers, d_model=width)
    how = Assumptions(**{name: getattr(options, name) for name in Assumptions.__dataclass_fields__})
    return plan_run(config, options.training, options.gpus, options.tp, options.dp, how)


def main(options: Options) -> dict[str, Any]:
    """Plan and print; gives every number."""
    result = planned(options)
    changes = [] if result.fits else remedies(result)
    print(report(result))
    if result.peak > result.usable:
        print(advice(changes))
    return {**result.to_dict(), "remedies": [change.to_dict() for change in changes]}


def report(result: Plan) -> str:
    """Memory, time and verdict as text."""
    config, training, memory, time = result.clt, result.training, result.memory, result.time
    lines = [
        f"{config.num_layers} layers x {config.d_model}, {config.num_features:,} features each, {config.activation_fn}:"
        f" {n_parameters(config) / 1e9:,.2f}e9 parameters, {training.train_batch_size_tokens:,} tokens per step",
        f"{result.cluster}: --tp {result.tp} --dp {result.dp}; first steps computed by route {result.route}",
        "",
        f"Memory of each device ({result.cluster.device.memory / 1e9:,.1f} GB)",
    ]
    lines += [f"  {name:<15}{_gigabytes(value)}" for name, value in asdict(memory).items() if value or name != "host"]
    notes = {"step": "", "setup": "before the first step, instead", "evaluation": "between two steps, instead"}
    lines += [f"  {name:<15}{_gigabytes(value)}  {notes[name]}".rstrip() for name, value in result.moments.items()]
    if result.cluster.device.is_gpu and result.host.total:
        lines.append("Memory of its machine, for each device, beside Python and what is read")
        lines += [f"  {name:<15}{_gigabytes(value)}" for name, value in asdict(result.host).items()]
    verdict = "It fits" if result.peak <= result.usable else "It does not fit"
    lines.append(f"{verdict}: {result.peak / 1e9:,.2f} of {result.usable / 1e9:,.2f} GB usable.")
    if result.refused is not None:
        lines.append(f"But clt train does not know {result.refused} on several devices: leave it at its default.")
    lines += ["", f"Time of a step (assuming {result.assumptions.efficiency:.0%} of peak)"]
    details = {
        "compute": f"{result.flops / 1e12:,.2f} TFLOP per device",
        "communication": f"{sum(result.sent.values()) / 1e9:,.3f} GB sent by each device",
        "data": f"{result.read / 1e9:,.3f} GB read by each machine, beside the rest",
    }
    for name, value in asdict(time).items():
        lines.append(f"  {name:<15}{_seconds(value)}  {details.get(name, '')}".rstrip())
    rate = training.train_batch_size_tokens / time.total
    lines.append(
        f"  {'step':<15}{_seconds(time.total)}  {rate:,.0f} tokens/s, limited by {time.limit}; "
        f"{training.training_steps:,} steps in {training.training_steps * time.total / 3600:,.1f} h"
    )
    needed = result.read / max(time.compute + time.optimiser + time.communication, 1e-12)
    lines.append(f"  Data must arrive at {needed / 1e9:,.2f} GB/s per machine not to slow this down.")
    return "\n".join(lines)


def advice(changes: list[Remedy]) -> str:
    """What to change, one line each."""
    if not changes:
        return "\nNothing here makes it smaller: fewer --features, or other devices."
    lines = ["", "What to change (each alone)"]
    for change in changes:
        split = f"--tp {change.plan.tp} --dp {change.plan.dp}"
        mark = "fits " if change.plan.fits else "no   "
        lines.append(f"  {mark}{_gigabytes(change.plan.peak)}  {change.flags}  [{split}; {change.costs}]")
    if not any(change.plan.fits for change in changes):
        lines.append("None of these is enough: combine them, take fewer --features or another device.")
    return "\n".join(lines)


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:>10,.3f} GB"


def _seconds(value: float) -> str:
    return f"{value * 1e3:>10,.1f} ms"
