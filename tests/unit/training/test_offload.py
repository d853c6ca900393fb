"""An optimiser in the host's memory takes the steps of one on the device, whatever is saved and gone on with."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clt.config import CLTConfig, TrainingConfig
from clt.errors import CheckpointError, ConfigError
from clt.training import block_adam, host_blocks
from clt.training.host_blocks import HostBlocks
from clt.training.memory import host_memory, n_parameters, step_memory
from clt.training.optim import build_optimizer, optimizer_tensors, restore_optimizer
from clt.training.plan import plan_run
from clt.training.trainer import CLTTrainer
from tests.tiny_data import store_of, write_data

KINDS = {
    "adam": {"optimizer": "adam"},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1},
    "adam, bf16": {"optimizer": "adam", "optimizer_state": "bf16"},
    "adamw, bf16": {"optimizer": "adamw", "optimizer_state": "bf16", "weight_decay": 0.1},
}


@pytest.fixture
def small_blocks(monkeypatch):
    """So that a small transcoder takes many; torch's kernel takes so many numbers at a time."""
    monkeypatch.setattr(block_adam, "block_numbers", lambda is_gpu: 64)


@given(sizes=st.lists(st.integers(1, 9), min_size=0, max_size=12), kinds=st.integers(1, 3))
def test_every_block_is_there_once_and_comes_back_changed(sizes, kinds):
    host = [
        [torch.full((size,), float(10 * index + kind)) for kind in range(kinds)] for index, size in enumerate(sizes)
    ]
    seen = []
    for index, blocks in HostBlocks(torch.device("cpu")).through(enumerate(host)):
        seen.append(index)
        for kind, block in enumerate(blocks):
            assert block.data_ptr() != host[index][kind].data_ptr(), "a copy, as on a GPU"
            assert torch.equal(block, host[index][kind])
            block += 0.5
    assert seen == list(range(len(sizes)))
    for index, blocks in enumerate(host):
        for kind, block in enumerate(blocks):
            assert torch.equal(block, torch.full((sizes[index],), 10 * index + kind + 0.5))


class _Stream:
    """Stands in for a CUDA stream: notes what each waits for and does. `current` is the one work goes to."""

    current = None

    def __init__(self, device=None):
        self.waits_for = set()

    def wait_stream(self, other):
        self.waits_for.add(other)

    def wait_event(self, event):
        self.waits_for.add(event)

    def record_event(self):
        return ("event", self)

    def synchronize(self):
        pass

    def __enter__(self):
        self._before, _Stream.current = _Stream.current, self

    def __exit__(self, *_):
        _Stream.current = self._before


def test_on_a_gpu_copies_wait_for_the_work_and_the_work_for_copies(monkeypatch):
    """What runs where, without a GPU: the copy back must wait for the stream that worked, not for itself."""
    main = _Stream.current = _Stream()
    cuda = SimpleNamespace(Stream=_Stream, stream=lambda s: s, current_stream=lambda device=None: _Stream.current)
    monkeypatch.setattr(host_blocks.torch, "cuda", cuda)
    blocks = HostBlocks(torch.device("cpu"))
    blocks._inward, blocks._outward = _Stream(), _Stream()
    for _, (block,) in blocks.through((index, [torch.zeros(3)]) for index in range(5)):
        assert _Stream.current is main
        block += 1
    assert main in blocks._inward.waits_for
    assert ("event", blocks._inward) in main.waits_for
    assert blocks._outward.waits_for == {main}
    assert ("event", blocks._outward) in blocks._inward.waits_for, "a place is free when its block is back"


def optimizer_of(parameters, kind, **options):
    return build_optimizer(parameters, TrainingConfig(learning_rate=1e-2, **KINDS[kind], **options), 24)


def take_steps(parameters, optimizer, steps):
    """Steps with gradients that depend on the step alone; one parameter has none in every second step."""
    for step in steps:
        rng = torch.Generator().manual_seed(step)
        for name, parameter in parameters.items():
            grad = torch.randn(parameter.shape, generator=rng).to(parameter.dtype)
            parameter.grad = None if name == "b_dec" and step % 2 else grad
        optimizer.step()


def parameters_of(dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    shapes = {"W_enc.0": (37, 21), "W_dec.0": (700_001,), "b_dec": (3, 5)}
    return {name: torch.nn.Parameter(torch.randn(shape, generator=rng).to(dtype)) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "threads"), [*((kind, 1) for kind in KINDS), ("adam", 2), ("adamw", 2)])
def test_weights_and_moments_are_those_on_the_device_to_the_bit(kind, threads, dtype):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ends = []
        for offloads in (False, True):
            parameters = parameters_of(dtype)
            optimizer = optimizer_of(parameters, kind, offload_optimizer=offloads)
            take_steps(parameters, optimizer, range(5))
            ends.append((parameters, optimizer_tensors(optimizer, parameters)))
    finally:
        torch.set_num_threads(before)
    for there, here in zip(*ends, strict=True):
        assert there.keys() == here.keys()
        for name, value in there.items():
            assert torch.equal(value, here[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True)])
def test_moments_may_move_between_device_and_host(kind, first, second):
    whole = parameters_of()
    take_steps(whole, optimizer_of(whole, kind), range(6))
    parameters = parameters_of()
    optimizer = optimizer_of(parameters, kind, offload_optimizer=first)
    take_steps(parameters, optimizer, range(3))
    saved = {name: value.clone() for name, value in optimizer_tensors(optimizer, parameters).items()}
    other = optimizer_of(parameters, kind, offload_optimizer=second)
    restore_optimizer(other, parameters, saved)
    take_steps(parameters, other, range(3, 6))
    for name, value in whole.items():
        assert torch.equal(value, parameters[name]), name


@pytest.mark.parametrize("kind", ["adam", "adamw, bf16"])
def test_half_precision_weights_are_rounded_masters(kind):
    """Masters take the steps that fp32 weights take with the same gradients."""
    half = parameters_of(torch.bfloat16)
    full = {name: torch.nn.Parameter(value.detach().float()) for name, value in half.items()}
    optimizers = [optimizer_of(each, kind, offload_optimizer=True) for each in (half, full)]
    for step in range(5):
        rng = torch.Generator().manual_seed(step)
        for name, parameter in half.items():
            parameter.grad = torch.randn(parameter.shape, generator=rng).bfloat16()
            full[name].grad = parameter.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    kept = optimizer_tensors(optimizers[0], half)
    for name, value in full.items():
        assert kept[f"{name}/master"].dtype == torch.float32
        assert torch.equal(kept[f"{name}/master"], value)
        assert torch.equal(half[name], value.bfloat16())


def test_masters_are_not_dropped_in_silence():
    parameters = parameters_of(torch.bfloat16)
    optimizer = optimizer_of(parameters, "adam", offload_optimizer=True)
    take_steps(parameters, optimizer, range(1))
    saved = optimizer_tensors(optimizer, parameters)
    with pytest.raises(CheckpointError, match=r"fp32 master weights of W_enc\.0.*--offload-optimizer"):
        restore_optimizer(optimizer_of(parameters, "adam"), parameters, saved)


def test_masters_begin_with_the_weights_of_a_checkpoint_that_has_none():
    parameters = parameters_of(torch.bfloat16)
    optimizer = optimizer_of(parameters, "adam")
    take_steps(parameters, optimizer, range(1))
    other = optimizer_of(parameters, "adam", offload_optimizer=True)
    restore_optimizer(other, parameters, optimizer_tensors(optimizer, parameters))
    for name, value in optimizer_tensors(other, parameters).items():
        parameter, key = name.rsplit("/", 1)
        expected = parameters[parameter] if key == "master" else optimizer.state[parameters[parameter]][key]
        assert torch.equal(value, expected.float()), name


def trainer_of(data, folder, **changes):
    options = {"training_steps": 9, "train_batch_size_tokens": 64, "checkpoint_interval": 3, "learning_rate": 1e-2}
    training = TrainingConfig(
        **{**options, **changes}, activation_path=str(data), log_interval=1, gradient_clip_val=None
    )
    config = CLTConfig(num_features=24, num_layers=3, d_model=8, activation_fn="topk", topk_k=4)
    return CLTTrainer(config, training, folder, "cpu", store=store_of(data), shows_progress=False)


@pytest.mark.parametrize(
    "options",
    [{"optimizer": "adamw"}, {"optimizer_state": "bf16"}, {"optimizer_in_backward": True}, {"async_save": True}],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_run_may_change_between_device_and_host(small_blocks, tmp_path, options, first):
    data = write_data(tmp_path / "data")
    trainer_of(data, tmp_path / "whole", **options).train()
    for step in trainer_of(data, tmp_path / "run", offload_optimizer=first, **options).steps():
        if step == 5:
            break
    again = trainer_of(data, tmp_path / "run", offload_optimizer=not first, **options)
    assert again.step == 3
    again.train()
    files = [tmp_path / name / "clt.safetensors" for name in ("whole", "run")]
    assert files[0].read_bytes() == files[1].read_bytes()
    for step in (3, 6):
        place = f"checkpoints/step_{step:08d}/trainer.safetensors"
        found = [(tmp_path / name / place) for name in ("whole", "run")]
        if all(path.exists() for path in found):
            assert found[0].read_bytes() == found[1].read_bytes()


def test_eight_bit_moments_are_refused():
    with pytest.raises(ConfigError, match="offload_optimizer does not go with optimizer = 'adamw8bit'"):
        TrainingConfig(optimizer="adamw8bit", offload_optimizer=True)


@pytest.mark.parametrize(
    ("clt", "training", "states"),
    [({}, {}, 8), ({}, {"optimizer_state": "bf16"}, 4), ({"clt_dtype": "bfloat16"}, {}, 12)],
)
def test_the_plan_moves_states_from_device_to_host(clt, training, states):
    config = CLTConfig(num_features=8192, num_layers=24, d_model=2048, **clt)
    before, after = (
        plan_run(config, TrainingConfig(offload_optimizer=offloads, **training), "1xH100") for offloads in (False, True)
    )
    assert (before.host.states, after.host.states) == (0, states * n_parameters(config))
    there = {"parameters", "gradients", "activations", "batch", "host"}
    assert all(getattr(before.memory, name) == getattr(after.memory, name) for name in there)
    assert after.memory.states == 3 * 2**24 * states
    assert after.peak < before.peak
    assert after.time.optimiser > before.time.optimiser


def test_on_a_cpu_states_and_snapshots_are_the_devices():
    config, plain = CLTConfig(num_features=1000, num_layers=2, d_model=64), TrainingConfig()
    asked = plain.replace(offload_optimizer=True, async_save=True, ema_decay=0.9)
    host, count = host_memory(config, asked), n_parameters(config)
    assert (host.states, host.snapshot) == (8 * count, (4 + 4 + 8) * count)
    on_cpu, on_gpu = (step_memory(config, asked, 64, "dense", is_gpu=is_gpu) for is_gpu in (False, True))
    assert (on_cpu.host, on_gpu.host) == (host.total, 0)
