"""A cross-layer transcoder trained the plain way: what `train_step.py` compares with; run alone, it prints its speed.

Dense encoder, one product per (source, target) pair, autograd, Adam as a loop over parameters. Same formulas, same
initial weights, so the same loss curve.
"""

from __future__ import annotations

import json
import time

import torch
from torch import Tensor, nn

from clt.config import TrainingConfig
from clt.models import CrossLayerTranscoder, jumprelu
from clt.models.activations import batch_threshold, count_kept
from clt.training.schedules import learning_rate_factor, sparsity_weight
from clt.types import ActivationBatch


class PlainTranscoder(nn.Module):
    """Encoders, and a decoder matrix of its own for every pair."""

    def __init__(self, model: CrossLayerTranscoder) -> None:
        """Copy the weights of a transcoder."""
        super().__init__()
        self.config, self.target_variance = model.config, model.target_variance
        layers = range(model.config.num_layers)
        self.pairs = [(s, t) for s in layers for t in model.config.targets_of(s)]
        copy = [nn.Parameter(model.decoders.pair(s, t).detach().clone()) for s, t in self.pairs]
        self.W_dec = nn.ParameterList(copy)
        self.W_enc = nn.ParameterList(nn.Parameter(weight.detach().clone()) for weight in model.W_enc)
        self.b_enc = nn.ParameterList(nn.Parameter(bias.detach().clone()) for bias in model.b_enc)
        self.b_dec = nn.Parameter(model.b_dec.detach().clone())
        if model.config.activation_fn == "jumprelu":
            self.log_threshold = nn.ParameterList(nn.Parameter(p.detach().clone()) for p in model.log_threshold)

    def norms(self) -> list[Tensor]:
        """Length of each feature's decoder over all its targets."""
        squares = [torch.zeros_like(bias) for bias in self.b_enc]
        for (source, _), weight in zip(self.pairs, self.W_dec, strict=True):
            squares[source] = squares[source] + weight.square().sum(1)
        return [square.sqrt() for square in squares]

    def activate(self, h: list[Tensor], norms: list[Tensor]) -> list[Tensor]:
        """The non-linearity, as matrices."""
        config, fn = self.config, self.config.activation_fn
        if fn == "relu":
            return [x.relu() for x in h]
        if fn == "jumprelu":
            return [jumprelu(x, self.log_threshold[s].exp().to(x.dtype)) for s, x in enumerate(h)]
        scores = [x.detach() * norm.detach().to(x.dtype) for x, norm in zip(h, norms, strict=True)]
        if fn == "topk":
            chosen = [score.topk(config.topk_count, dim=1).indices for score in scores]
            return [torch.zeros_like(x).scatter(1, c, x.gather(1, c).relu()) for x, c in zip(h, chosen, strict=True)]
        every = torch.stack(scores)
        cut = batch_threshold(every, count_kept(config.batchtopk_k or 0, every.shape[1], every.numel()))
        return [x.relu() * (score >= cut) for x, score in zip(h, scores, strict=True)]

    def loss(self, batch: ActivationBatch, config: TrainingConfig, step: int) -> Tensor:
        """Reconstruction, sparsity and pre-activation terms, as in clt/training/losses.py."""
        dtype = self.b_dec.dtype
        x, y, norms = batch.inputs.to(dtype), batch.targets.to(dtype), self.norms()
        h = [torch.addmm(bias, each, weight.T) for each, weight, bias in zip(x, self.W_enc, self.b_enc, strict=True)]
        features = self.activate(h, norms)
        predicted = [self.b_dec[t].expand_as(y[t]) for t in range(len(y))]
        for (source, target), weight in zip(self.pairs, self.W_dec, strict=True):
            predicted[target] = predicted[target] + features[source] @ weight
        error = torch.stack([(y[t] - predicted[t].to(dtype)).square().sum(1).mean() for t in range(len(y))])
        total = (error / self.target_variance).sum()
        if self.config.activation_fn in ("relu", "jumprelu"):
            price = [(config.sparsity_c * n * a).tanh().sum() for n, a in zip(norms, features, strict=True)]
            total = total + sparsity_weight(config, step) * torch.stack(price).sum() / batch.n_tokens
        if self.config.activation_fn == "jumprelu":
            gaps = [((self.log_threshold[s].exp() - x).relu() * norms[s]).sum() for s, x in enumerate(h)]
            total = total + config.preactivation_coef * torch.stack(gaps).sum() / batch.n_tokens
        return total


class PlainTrainer:
    """Steps of a PlainTranscoder."""

    def __init__(self, model: CrossLayerTranscoder, config: TrainingConfig) -> None:
        self.model, self.config = PlainTranscoder(model), config
        self.peak = config.learning_rate or 1e-3
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.peak, foreach=False, fused=False)

    def step(self, batch: ActivationBatch, step: int) -> float:
        """One step; its loss."""
        self.optimizer.zero_grad()
        with torch.autocast(batch.inputs.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            loss = self.model.loss(batch, self.config, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip_val or float("inf"))
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak * learning_rate_factor(self.config, step)
        self.optimizer.step()
        return loss.item()


def main() -> None:
    """Print the speed of a few plain steps at workload S."""
    from train_step import Options, Workbench  # pyright: ignore[reportMissingImports]  # beside this file

    bench = Workbench(Options())
    start = time.process_time()
    losses = [bench.plain.step(bench.batch(step), step) for step in range(3)]
    rate = 3 * bench.size.tokens / (time.process_time() - start)
    print(json.dumps({"benchmark": "plain_trainer", "tokens_per_cpu_second": rate, "loss": losses[-1]}))


if __name__ == "__main__":
    main()
