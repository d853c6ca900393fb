"""What to change in a run that does not fit its devices, tried out on paper."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from clt.training.devices import Cluster
from clt.training.plan import Plan, plan_run
from clt.training.route_options import chooses_k

_MOST_DEVICES = 4096
_OFFLOAD: dict[str, Any] = {"offload_optimizer": True}
_EIGHT_BITS: dict[str, Any] = {"optimizer": "adamw8bit", "optimizer_state": "fp32", "offload_optimizer": False}


@dataclass(frozen=True)
class Remedy:
    """A change, and the plan with it."""

    flags: str
    """As `clt train` takes them."""
    costs: str
    """What is paid for it."""
    plan: Plan

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        found = self.plan
        values = {"tp": found.tp, "dp": found.dp, "peak_bytes": found.peak, "fits": found.fits}
        return {"flags": self.flags, "costs": self.costs, **values, "step_seconds": found.time.total}


def remedies(base: Plan) -> list[Remedy]:
    """Changes that help, those that suffice first; if no single one does on these devices, several together too."""
    found = [each for each in _candidates(base) if each.plan.peak < base.peak and each.plan.refused is None]
    if not any(each.plan.fits for each in found if each.plan.cluster == base.cluster):
        found += [each for each in _together(base) if each.plan.refused is None]
    return sorted(found, key=lambda each: not each.plan.fits)


def _again(base: Plan, clt: dict[str, Any], training: dict[str, Any], cluster: Cluster | None = None) -> Plan:
    return plan_run(
        base.clt.replace(**clt),
        base.training.replace(**training),
        cluster or base.cluster,
        None,
        None,
        base.assumptions,
    )


def _candidates(base: Plan) -> Iterator[Remedy]:
    other = _again(base, {}, {})
    if (other.tp, other.dp) != (base.tp, base.dp):
        yield Remedy(f"--tp {other.tp} --dp {other.dp}", "nothing, if the links are fast", other)
    for flags, costs, training in _trainings(base):
        yield Remedy(flags, costs, _again(base, {}, training))
    by_autograd = {"optimizer_in_backward": False, "route": "auto"}
    if base.clt.clt_dtype in (None, "float32"):
        rounded, what = {"clt_dtype": "bfloat16"}, "weights and moments rounded to bf16 at each step"
        if base.training.offload_optimizer:
            what = "weights rounded to bf16 on the device, with fp32 masters in the machine's memory"
        costs = f"{what}; by autograd"
        yield Remedy("--clt-dtype bfloat16", costs, _again(base, rounded, by_autograd))
        costs = "weights rounded to bf16 at each step; by autograd; needs torchao"
        eight = _again(base, rounded, {**_EIGHT_BITS, **by_autograd})
        yield Remedy("--clt-dtype bfloat16 --optimizer adamw8bit", costs, eight)
    if base.clt.decoder_tying == "none" and base.clt.decoder_rank is None:
        yield from _fewer_targets(base)
        tied = _again(base, {"decoder_tying": "per_source"}, by_autograd)
        yield Remedy("--decoder-tying per_source", "a feature writes one direction to all targets; by autograd", tied)
    yield from _more_devices(base)


def _trainings(base: Plan) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Changes of how it is trained, not of what."""
    training, by_hand = base.training, base.route != "plain"
    if by_hand and not chooses_k(base.clt) and not training.recompute_encoder:
        yield "--recompute-encoder", "the encoder's products once more", {"recompute_encoder": True}
    if training.precision == "fp32":
        yield "--precision bf16", "products in bf16", {"precision": "bf16"}
    if not training.optimizer_in_backward:
        micro = max(base.tokens // 4, 1)
        costs = "smaller products" + (
            "; batchtopk chooses per micro-batch" if base.clt.activation_fn == "batchtopk" else ""
        )
        yield f"--micro-batch-tokens {micro}", costs, {"micro_batch_tokens": micro}
    if by_hand and base.is_alone and not training.optimizer_in_backward and training.skip_nonfinite_steps == 0:
        streams = {"optimizer_in_backward": True, "gradient_clip_val": None, "micro_batch_tokens": None}
        yield "--optimizer-in-backward --gradient-clip-val None", "no gradient clipping", streams
    if base.cluster.device.is_gpu and training.optimizer != "adamw8bit" and not training.offload_optimizer:
        taken = _again(base, {}, _OFFLOAD).host.states / 1e9
        costs = f"{taken:,.1f} GB of the machine's memory per device, read and written over its link at each step"
        yield "--offload-optimizer", costs, _OFFLOAD
    if base.is_alone and training.optimizer != "adamw8bit" and not training.offload_optimizer:
        yield "--optimizer adamw8bit", "moments in 8 bits; needs torchao", _EIGHT_BITS


def _fewer_targets(base: Plan) -> Iterator[Remedy]:
    """The widest window that fits, or else the per-layer transcoder."""

    def with_targets(n: int) -> Plan:
        return _again(base, {"n_targets": n}, {})

    best = _largest(lambda n: with_targets(n).fits, base.clt.span - 1)
    if base.clt.span > 1:
        n = best or 1
        yield Remedy(f"--n-targets {n}", f"features write to {n} MLPs at most", with_targets(n))


def _largest(holds: Callable[[int], bool], top: int) -> int:
    """The largest number from 1 to `top` for which it holds, given that it holds for all smaller ones; 0: none."""
    low, high = 0, top
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _more_devices(base: Plan) -> Iterator[Remedy]:
    """The smallest doubling of the number of machines that fits."""
    cluster = base.cluster
    if not cluster.device.is_gpu:
        return
    while cluster.size < min(_MOST_DEVICES, base.clt.num_features):
        grows = "per_node" if cluster.per_node < 8 and cluster.nodes == 1 else "nodes"
        cluster = replace(cluster, **{grows: 2 * getattr(cluster, grows)})
        larger = _again(base, {}, {}, cluster)
        if larger.fits:
            yield Remedy(f"--gpus {cluster}", f"{cluster.size} devices", larger)
            return


def _together(base: Plan) -> Iterator[Remedy]:
    """Everything of `_trainings` at once, and then with the widest window that fits as well."""
    flags, costs, training = [], [], dict[str, Any]()
    for each in _trainings(base):
        if "optimizer_in_backward" not in each[2] and not (each[2] is _EIGHT_BITS and "offload_optimizer" in training):
            flags, costs, training = [*flags, each[0]], [*costs, each[1]], {**training, **each[2]}
    whole = _again(base, {}, training)
    yield Remedy(" ".join(flags), "; ".join(costs), whole)
    if not whole.fits and base.clt.decoder_tying == "none" and base.clt.decoder_rank is None:
        for narrower in _fewer_targets(whole):
            yield Remedy(" ".join([*flags, narrower.flags]), "; ".join([*costs, narrower.costs]), narrower.plan)
