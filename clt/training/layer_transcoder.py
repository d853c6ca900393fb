"""vlm-clt-training's transcoder of one layer, and its training; `clt train` makes the better, joint one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clt.data.layer_files import LayerFiles, present_targets
from clt.errors import CheckpointError

_SPARSITY = 0.01
_ALIVE = 0.01


class LayerTranscoder(nn.Module):
    """LayerNorm, linear, ReLU (of the largest few, if asked), linear to the next `n_targets` MLP outputs."""

    def __init__(self, hidden_dim: int, feature_dim: int, n_targets: int, topk_share: float | None = None) -> None:
        super().__init__()
        self.n_targets = n_targets
        self.topk_share = topk_share
        self.enc = nn.Sequential(nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, feature_dim))
        self.dec = nn.Linear(feature_dim, hidden_dim * n_targets)

    def encode(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token feature"]:
        """Feature activations."""
        h = self.enc(x)
        if self.topk_share is not None:
            values, chosen = h.topk(max(1, int(h.shape[1] * self.topk_share)), dim=1)
            h = torch.zeros_like(h).scatter(1, chosen, values)
        return h.relu()

    def decode(self, z: Float[Tensor, "token feature"]) -> Float[Tensor, "token target d_model"]:
        """The next layers' MLP outputs."""
        return self.dec(z).unflatten(1, (self.n_targets, -1))


def load_layer_transcoder(path: Path) -> LayerTranscoder:
    """Read `transcoder_L{n}.pt`, ours or the seed's (which does not say n_targets and may be compiled).

    Raises:
        CheckpointError: the file is missing, damaged or something else.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        state = {name.removeprefix("_orig_mod."): value for name, value in saved["state_dict"].items()}
        features, hidden = state["enc.1.weight"].shape
        model = LayerTranscoder(hidden, features, len(state["dec.weight"]) // hidden)
        model.load_state_dict({name: value.float() for name, value in state.items()})
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is no transcoder_L*.pt: {error!r}.") from None
    return model


@dataclass(frozen=True, kw_only=True)
class LayerTraining:
    """The options of one layer's training."""

    steps: int = 2000
    lr: float = 3e-4
    feature_dim: int = 8192
    seq_len: int = 512
    batch_samples: int = 8
    reuse_steps: int = 1
    topk_share: float | None = None
    val_interval: int = 200
    val_samples: int = 10
    precision: torch.dtype | None = None
    """Type of the computation; None: fp32. Weights and optimiser are always fp32."""
    compile: bool = False
    seed: int = 0


@dataclass
class LayerResult:
    """A trained layer and its numbers."""

    model: LayerTranscoder
    metrics: list[dict[str, float]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    mapping: Tensor = field(default_factory=lambda: torch.zeros(0))
    """[d_model, feature]: mean |MLP output of the next layer| over the tokens on which a feature is on."""


class LayerTrainer:
    """Trains one layer's transcoder on its files; a tenth of them, by seed, is for validation."""

    def __init__(self, files: LayerFiles, options: LayerTraining, device: torch.device | str) -> None:
        self._files, self._options, self._device = files, options, torch.device(device)
        self._random = torch.Generator().manual_seed(options.seed)
        order = torch.randperm(len(files), generator=self._random).tolist()
        n_val = len(files) // 10 or (1 if len(files) > 1 else 0)
        self._val, self._train = order[:n_val], order[n_val:]
        x, y = files.read(order[0])
        torch.manual_seed(options.seed)
        self.model = LayerTranscoder(x.shape[-1], options.feature_dim, y.shape[2], options.topk_share).to(self._device)
        self._largest = torch.zeros(options.feature_dim, device=self._device)

    def run(self) -> LayerResult:
        """Train, validate now and then, and sum up."""
        options = self._options
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.lr)
        scaler = torch.amp.GradScaler(self._device.type, enabled=options.precision == torch.float16)
        if options.compile:
            self.model.compile()
        result = LayerResult(self.model)
        batches, loss, share = self._batches(), 0.0, 0.0
        for step in range(1, options.steps + 1):
            if (step - 1) % options.reuse_steps == 0:
                x, y = next(batches)
            error, z = self._forward(x, y)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(error + _SPARSITY * z.abs().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            self._largest = torch.maximum(self._largest, z.detach().float().amax(0))
            if step % options.val_interval == 0 or step == options.steps:
                loss, share = float(error.detach()), 100 * float((z > 0).float().mean())
                result.metrics.append({"step": step, "train_loss": loss, "train_l0": share, **self._validate()})
        dead = int((self._largest <= _ALIVE).sum())
        dead_pct = 100 * dead / options.feature_dim
        result.summary = {"dead_features": dead, "dead_pct": dead_pct, "final_l0_pct": share, "final_rec_loss": loss}
        result.mapping = self._map()
        return result

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless batches: files in a new order each epoch, their sequences a few at a time, cropped at random."""
        while True:
            for place in torch.randperm(len(self._train), generator=self._random).tolist():
                x, y = self._files.read(self._train[place])
                for rows in torch.randperm(len(x), generator=self._random).split(self._options.batch_samples):
                    yield self._crop(x[rows], y[rows])

    def _crop(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """At most seq_len positions, flattened to tokens."""
        length = min(x.shape[1], self._options.seq_len)
        start = int(torch.randint(x.shape[1] - length + 1, (), generator=self._random))
        parts = (part[:, start : start + length].flatten(0, 1).float().to(self._device) for part in (x, y))
        first, second = parts
        return first, second

    def _forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared error over the targets that exist, and the activations."""
        precision = self._options.precision
        with torch.autocast(self._device.type, precision or torch.bfloat16, enabled=precision is not None):
            z = self.model.encode(x)
            prediction = self.model.decode(z)
        there = present_targets(y)
        return (prediction.float() - y)[:, there].square().mean(), z

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Error, share of active features and NMSE on the first sequences of the validation files."""
        if not self._val:
            return {}
        found, xs, ys = 0, [], []
        for index in self._val:
            x, y = self._files.read(index)
            take = min(len(x), self._options.val_samples - found)
            length = min(x.shape[1], self._options.seq_len)
            xs.append(x[:take, :length].flatten(0, 1).float())
            ys.append(y[:take, :length].flatten(0, 1).float())
            found += take
            if found >= self._options.val_samples:
                break
        x, y = torch.cat(xs).to(self._device), torch.cat(ys).to(self._device)
        error, z = self._forward(x, y)
        variance = (y - y.mean(0))[:, present_targets(y)].square().mean()
        numbers = {"val_loss": error, "val_l0": 100 * (z > 0).float().mean(), "val_nmse": error / variance}
        return {name: float(value) for name, value in numbers.items()}

    @torch.no_grad()
    def _map(self) -> Tensor:
        """One pass over the training files."""
        total = torch.zeros(self.model.dec.out_features // self.model.n_targets, self._options.feature_dim)
        total, count = total.to(self._device), torch.zeros(self._options.feature_dim, device=self._device)
        for index in self._train:
            x, y = (part.flatten(0, 1).float().to(self._device) for part in self._files.read(index))
            on = (self.model.encode(x) > 0).float()
            total += y[:, 0].abs().T @ on
            count += on.sum(0)
        return (total / count.clamp_min(1)).cpu()
