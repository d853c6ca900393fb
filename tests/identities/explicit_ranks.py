"""The hand-written step on forked ranks: `explicit_ranks.py steps OUT TPxDP...` and `... runs DATA OUT TPxDP...`."""

import sys
from functools import cache
from pathlib import Path

import torch

from clt.config import CLTConfig, TrainingConfig
from clt.models import CrossLayerTranscoder
from clt.parallel.data_shard import micro_parts
from clt.parallel.feature_shard import Shards, shard_config
from clt.parallel.mesh import mesh_of_one
from clt.parallel.slices import features_of, stored_axis
from clt.training.step import Engine
from clt.training.trainer import CLTTrainer
from tests.explicit_steps import KINDS, OPTIONS, batch_of, engine_of, model_of, routes_of
from tests.identities.parallel_driver import group, told
from tests.tiny_data import store_of

FEATURES, TOKENS, STEPS = 9, 12, 3
CASES = [
    (kind, options, route)
    for kind in KINDS
    for options in OPTIONS
    for route in ["plain", *routes_of(kind, options)]
    if options != "recomputed" or "relu" in kind
]


@cache  # the one rank's steps are compared with several
def steps_of(kind, options, route, mesh=None):
    """Losses, densities, firing counts and weights after some steps on this rank's part of everything."""
    whole = model_of(kind, features=FEATURES, seed=3)
    mesh = mesh or mesh_of_one("cpu")
    model = part_of_model(whole, mesh)
    engine = engine_of(model, route, mesh, **OPTIONS[options], learning_rate=1e-2, gradient_clip_val=0.5)
    dead = torch.zeros(3, FEATURES, dtype=torch.bool)
    dead[:, :2] = True
    mine = features_of(FEATURES, mesh)
    seen = []
    for step in range(STEPS):
        batch = batch_of(whole, tokens=TOKENS, seed=step)
        parts = micro_parts(TOKENS, engine.config.micro_batch_tokens, mesh.dp.rank, mesh.dp.size)
        here = batch.select(torch.cat([torch.arange(part.start, part.stop) for part in parts]))
        result = engine.step(here, step, dead[:, mine.start : mine.stop])
        fired = model.peers.join(result.fired)
        losses = vars(result.losses).values()
        seen.append({"losses": torch.stack(list(losses)), "fired": fired, "norm": result.gradient_norm})
    route = "plain" if engine.routes is None else engine.routes.route
    return {"seen": seen, "state": whole_state(model, mesh), "touched": engine._touched, "route": route}


def part_of_model(whole, mesh):
    """A transcoder with this rank's features of another."""
    if mesh.is_alone:
        return whole
    config = CLTConfig(**whole.config.to_dict())
    here = shard_config(config, mesh.tp.rank, mesh.tp.size)
    model = CrossLayerTranscoder(here, peers=Shards(config, mesh)).double()
    rows = features_of(FEATURES, mesh)
    state = {}
    for name, value in whole.state_dict().items():
        axis = stored_axis(f"clt/{name}", value.dim())
        state[name] = value if axis is None else value.narrow(axis, rows.start, len(rows))
    model.load_state_dict(state)
    return model


def whole_state(model, mesh):
    """All ranks' parts side by side."""
    state = {}
    for name, value in model.state_dict().items():
        axis = stored_axis(f"clt/{name}", value.dim())
        parts = mesh.tp.collect(value, "test")
        state[name] = parts[0] if axis is None else torch.cat(parts, axis)
    return state


def refused(kind, mesh):
    """Whether a hand-written route of a kind is refused on these ranks, and what auto takes."""
    model = part_of_model(model_of(kind), mesh)
    return Engine(model, TrainingConfig(gradient_clip_val=None), mesh).routes is None


RUNS = {
    "jumprelu": {"activation_fn": "jumprelu", "jumprelu_bandwidth": 0.01},
    "topk": {"activation_fn": "topk", "topk_k": 4},
    "batchtopk": {"activation_fn": "batchtopk", "batchtopk_k": 10, "batchtopk_mode": "per_layer"},
}


def runs(data, out, *shapes):
    """Runs of the trainer in fp32, on its default route: every step's numbers and route, and one more step's bytes."""
    for shape in shapes:
        tp, dp = map(int, shape.split("x"))

        def work(mesh, shape=shape):
            for kind, clt in RUNS.items():
                folder, found = Path(out) / shape / kind, {"routes": []}
                trainer = open_run(data, folder, clt, mesh)
                for step in trainer.steps():
                    found["routes"].append(mesh.world.collect(route_of(trainer), "test"))
                    if step == 5:
                        break
                trainer = open_run(data, folder, clt, mesh)
                assert trainer.step == 4
                assert route_of(trainer) == found["routes"][3][0]
                trainer.train()
                found["traffic"] = None if mesh.is_alone else told(trainer)
                if mesh.is_main:
                    torch.save(found, folder / "found.pt")

        assert group(tp, dp, work) == [0] * tp * dp, shape


def open_run(data, folder, clt, mesh):
    config = CLTConfig(num_features=26, num_layers=3, d_model=8, **clt)
    training = TrainingConfig(
        training_steps=10, train_batch_size_tokens=64, learning_rate=1e-2, log_interval=1, checkpoint_interval=4,
        activation_path=str(data), dead_feature_window=200, write_final_folder=False
    )  # fmt: skip
    return CLTTrainer(config, training, folder, "cpu", store=store_of(data), shows_progress=False, mesh=mesh)


def route_of(trainer):
    return None if trainer.engine.routes is None else trainer.engine.routes.route


def steps(out, *shapes):
    """Every case of `CASES` on every table of ranks."""
    for shape in shapes:
        tp, dp = map(int, shape.split("x"))

        def work(mesh, shape=shape):
            found = {}
            for kind, options, route in CASES:
                if mesh.tp.size > 1 and "relu" not in kind:
                    assert refused(kind, mesh)
                else:
                    found[kind, options, route] = steps_of(kind, options, route, mesh)
            if mesh.is_main:
                torch.save(found, Path(out) / f"{shape}.pt")

        assert group(tp, dp, work) == [0] * tp * dp, shape


if __name__ == "__main__":
    {"steps": steps, "runs": runs}[sys.argv[1]](*sys.argv[2:])
