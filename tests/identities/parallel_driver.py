"""Trains the same cases on groups of forked processes: `python parallel_driver.py train DATA OUT tp1dp2 ...`.

Torch is imported once, and only children compute, so forking is safe. Every group leaves, per case, the numbers of
all steps (`numbers.json`) beside the run's files.
"""

import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import torch

from clt.config import CLTConfig, ParallelConfig, TrainingConfig
from clt.errors import ParallelError
from clt.parallel.communication import step_bytes
from clt.parallel.mesh import open_mesh
from clt.training.trainer import CLTTrainer
from tests.tiny_data import store_of

DEAD = {"dead_feature_window": 100, "aux_loss_factor": 0.5, "preactivation_coef": 1e-2}
TOPK = {"activation_fn": "topk", "topk_k": 4}
BATCH = {"activation_fn": "batchtopk", "batchtopk_k": 10}
# Of each case: the transcoder, the training, the ranks.
CASES = {
    "relu": ({"activation_fn": "relu", "decoder_tying": "per_target"}, {"preactivation_form": "negative"}, {}),
    "jumprelu": ({"activation_fn": "jumprelu", "jumprelu_reach": "all"}, {"preactivation_coef": 0.01}, {}),
    "jumprelu span, steered": (
        {"activation_fn": "jumprelu", "decoder_tying": "per_source", "enable_feature_scale": True},
        {"sparsity_span_penalty": 0.5, "sparsity_target_l0": 1.5, "sparsity_target_tokens": 300, "ema_decay": 0.9}
        | {"async_save": True},
        {"shard_optimizer": True},
    ),
    "jumprelu low rank": ({"activation_fn": "jumprelu", "decoder_rank": 3}, {"sparsity_lambda": 0.1}, {}),
    "topk": (TOPK, {**DEAD, "async_save": True}, {"one_reader": True}),
    "topk global": ({**TOPK, "topk_mode": "global"}, {**DEAD, "k_anneal_steps": 6, "k_anneal_start": 3.0}, {}),
    "topk per_source": (
        {**TOPK, "decoder_tying": "per_source", "enable_feature_offset": True, "post_encoder": "pair"},
        {"skip_connection": True},
        {},
    ),
    "batchtopk": (BATCH, {**DEAD, "offload_optimizer": True}, {"shard_optimizer": True}),
    "batchtopk per_layer": (
        {**BATCH, "batchtopk_mode": "per_layer", "decoder_tying": "per_target", "ranking": "value"},
        {"micro_batch_tokens": 24},
        {},
    ),
    "batchtopk skip, priced": (
        {**BATCH, "skip_connection": "all", "decoder_rank": 2},
        {"apply_sparsity_penalty_to_batchtopk": True, "sparsity_reduction": "sum_tokens"},
        {"one_reader": True},
    ),
}
# Those with everything that a checkpoint holds: dead features, moments in parts, mean weights, a steered penalty.
RESUMED = ("jumprelu span, steered", "topk", "batchtopk", "batchtopk skip, priced")


class Numbers:
    """A tracker that keeps everything, in full."""

    def __init__(self, path):
        self.path, self.lines = path, []

    def log(self, step, values):
        kept = {name: value for name, value in values.items() if name not in ("data_share", "tokens_per_second")}
        self.lines.append({"step": step, **kept})

    def close(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.lines))


def trainer_of(data, folder, case, mesh, trackers=(), steps=12, **more):
    clt, training, parallel = CASES[case]
    clt = {**clt, **{name: training[name] for name in ("skip_connection",) if name in training}}
    training = {name: value for name, value in training.items() if name != "skip_connection"}
    config = CLTConfig(num_features=26, num_layers=3, d_model=8, clt_dtype="float64", **clt)
    options = TrainingConfig(
        **{
            "training_steps": steps,
            "train_batch_size_tokens": 64,
            "activation_path": str(data),
            "learning_rate": 1e-2,
            "log_interval": 1,
            "eval_interval": 6,
            "checkpoint_interval": 5 if case in RESUMED else 1000,
            "write_final_folder": case == "topk",
            "gradient_clip_val": 0.5,
            **training,
            **more,
        }
    )
    trainer = CLTTrainer(
        config,
        options,
        folder,
        "cpu",
        held_out=store_of(data).one_pass,
        trackers=[Numbers(folder / "numbers.json"), *trackers],
        shows_progress=False,
        mesh=mesh,
        parallel=ParallelConfig(**parallel),
    )
    if case.startswith("jumprelu") and trainer.step == 0:
        # Biases were set from 8,192 tokens, here 600 that come again and again, so that a quantile of h is one of its
        # values: for some tokens h equals the threshold to the last bit, and the order of a sum decides whether a
        # feature jumps.
        with torch.no_grad():
            for log_threshold in trainer.model.log_threshold:
                log_threshold += 0.01
    return trainer


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def group(tp, dp, work, timeout=100.0):
    """Fork tp x dp processes that each call work(mesh); how they ended, by rank."""
    port, children = free_port(), []
    for rank in range(tp * dp):
        child = os.fork()
        if child == 0:
            signal.alarm(500)
            torch.set_num_threads(1)
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": tp * dp, "LOCAL_WORLD_SIZE": tp * dp}
            os.environ.update({name: str(value) for name, value in names.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            code = 1
            try:
                with open_mesh(tp, dp, "cpu", timeout_seconds=timeout) as mesh:
                    work(mesh)
                code = 0
            finally:
                if code:
                    sys.excepthook(*sys.exc_info())
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def shape_of(name):
    tp, dp = name.removeprefix("tp").split("dp")
    return int(tp), int(dp)


def train(data, out, *meshes):
    """Every case on every table of ranks, to the end; what was sent in a step beside its formula."""
    for name in meshes:

        def work(mesh, name=name):
            traffic = {}
            for case in CASES:
                trainer = trainer_of(data, Path(out) / name / case, case, mesh)
                trainer.train()
                if not mesh.is_alone:
                    traffic[case] = told(trainer)
            if mesh.is_main:
                (Path(out) / name / "traffic.json").write_text(json.dumps(traffic))

        run(name, work)


def told(trainer):
    """Bytes of one more step by purpose, counted and on paper."""
    mesh, config = trainer.mesh, trainer.config
    batch = next(trainer.store)
    while mesh.dp.total(batch.n_tokens, "test") != config.train_batch_size_tokens:
        batch = next(trainer.store)
    has_dead = mesh.tp.any(bool(trainer.dead.dead.any()), "test")
    mesh.traffic.reset()
    trainer.update(batch)
    mesh.world.largest(0, "signals")
    counted = {name: n for name, n in mesh.traffic.bytes.items() if n}
    n_parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    formula = step_bytes(
        *(trainer.clt_config, config, mesh.tp.size, mesh.dp.size, n_parameters),
        n_features=trainer.model.config.num_features,
        n_updated=sum(
            n.numel() for name, n in trainer.engine.owned.parameters.items() if name in trainer.engine.owned.rows
        ),
        has_dead=has_dead,
        by_hand=trainer.engine.routes is not None,
    )
    return counted, {name: n for name, n in formula.items() if n}


def resume(data, out, first, *others):
    """Begin on one table of ranks, stop after step 5, go on with copies of the run on others."""
    begun = Path(out) / "begun"

    def begin(mesh):
        for case in RESUMED:
            trainer = trainer_of(data, begun / case, case, mesh)
            for step in trainer.steps():
                if step == 5:
                    trainer.checkpoints.finish()
                    break

    run(first, begin)
    for name in others:
        shutil.copytree(begun, Path(out) / name)
        run(name, lambda mesh, name=name: [trainer_of(data, Path(out) / name / c, c, mesh).train() for c in RESUMED])
    shutil.rmtree(begun)


def stop(data, out, how):
    """Two parts are stopped after step 7 in some way, leave what they say, and are started again.

    signal: rank 1 gets SIGTERM. silence: rank 1 does nothing for 15 seconds, longer than the others wait. death: rank 1
    kills itself.
    """
    folder, case = Path(out), "topk"

    def begin(mesh):
        trainer = trainer_of(data, folder, case, mesh)
        try:
            for step in trainer.steps():
                if mesh.rank == 1 and step == 7:
                    {"signal": interrupt, "silence": lambda: time.sleep(15), "death": die}[how]()
        except (ParallelError, KeyboardInterrupt) as error:
            said = {"type": type(error).__name__, "text": str(error), "step": trainer.step}
            (folder / f"said_{mesh.rank}.json").write_text(json.dumps(said))

    group(2, 1, begin, timeout=8.0 if how == "silence" else 100.0)
    run("tp2dp1", lambda mesh: trainer_of(data, folder, case, mesh).train())


def interrupt():
    os.kill(os.getpid(), signal.SIGTERM)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def run(name, work):
    """On a table such as `tp1dp2`."""
    begin = time.monotonic()
    codes = group(*shape_of(name), work)
    assert codes == [0] * len(codes), (name, codes)
    sys.stdout.write(f"{name}: {time.monotonic() - begin:.1f} s\n")
    sys.stdout.flush()


if __name__ == "__main__":
    {"train": train, "resume": resume, "stop": stop}[sys.argv[1]](*sys.argv[2:])
