"""The Boolean world: circuits of two levels of gates, built into a transformer by hand, so every step of them is known.

A prompt is one token that stands for four bits. Two gates of the first MLP each read two bits; the second MLP combines
the gates; the answer is its output. Bits are +1 and -1, each beside its negative, so norms see the same mean and size
on every input and only rescale. Attention does nothing. Each neuron of the MLPs is one condition: what a transcoder
should find, and where, is known exactly, and the MLPs themselves are a perfect per-layer transcoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

Gate = Literal["and", "or"]
Combination = Literal["xor", "and"]
_BITS, _LAYERS, _WIDTH, _NEURONS = 4, 2, 16, 2
_FIRST_GATE, _OUTPUT = 2 * _BITS, 2 * _BITS + 4
BOS, NO, YES = 16, 17, 18
"""Token ids; 0 to 15 are the inputs, bit i of the id being input i."""


@dataclass(frozen=True, kw_only=True)
class BooleanWorld:
    """y = first(x0, x1) combined with second(x2, x3)."""

    first: Gate = "and"
    second: Gate = "or"
    combination: Combination = "xor"

    @property
    def name(self) -> str:
        """The formula."""
        return f"(x0 {self.first} x1) {self.combination} (x2 {self.second} x3)"

    def prompts(self) -> Int64[Tensor, "input 2"]:
        """All sixteen inputs behind the first token."""
        return torch.tensor([[BOS, token] for token in range(2**_BITS)])

    def bits(self) -> Bool[Tensor, "input bit"]:
        """What each input stands for."""
        return (torch.arange(2**_BITS)[:, None] >> torch.arange(_BITS)) % 2 == 1

    def answers(self) -> Bool[Tensor, " input"]:
        """The formula's value on each input."""
        x = self.bits()
        gates = (
            (x[:, 0] & x[:, 1] if self.first == "and" else x[:, 0] | x[:, 1]),
            (x[:, 2] & x[:, 3] if self.second == "and" else x[:, 2] | x[:, 3]),
        )
        return gates[0] ^ gates[1] if self.combination == "xor" else gates[0] & gates[1]

    def neurons(self) -> Bool[Tensor, "layer input neuron"]:
        """On which inputs each neuron of the circuit is on."""
        x = self.bits()
        sides = []
        for gate, (a, b) in ((self.first, (x[:, 0], x[:, 1])), (self.second, (x[:, 2], x[:, 3]))):
            sides.append((a & b, a & b) if gate == "and" else (~a & ~b, a | b))
        (on_1, gate_1), (on_2, gate_2) = sides
        both, neither = gate_1 & gate_2, ~gate_1 & ~gate_2
        second = torch.stack([both, neither if self.combination == "xor" else torch.zeros_like(both)], 1)
        return torch.stack([torch.stack([on_1, on_2], 1), second])

    @torch.no_grad()
    def host(self) -> GPT2LMHeadModel:
        """A GPT-2 of two layers whose weights are the circuit."""
        config = GPT2Config(
            n_layer=_LAYERS,
            n_embd=_WIDTH,
            n_head=1,
            n_inner=_NEURONS,
            n_positions=8,
            vocab_size=YES + 1,
            activation_function="relu",
            tie_word_embeddings=False,
            bos_token_id=BOS,
            eos_token_id=BOS,
            layer_norm_epsilon=1e-12,
        )
        model = GPT2LMHeadModel(config).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0)
        model.transformer.wte.weight[: 2**_BITS, : 2 * _BITS] = _paired(self.bits().float() * 2 - 1)
        model.transformer.wte.weight[BOS, : 2 * _BITS] = _paired(torch.ones(1, _BITS))[0]
        self._first_layer(model.transformer.h[0].mlp)
        self._second_layer(model.transformer.h[1].mlp)
        answer = _paired(torch.ones(1, 1))[0]
        for token, sign in ((NO, -1.0), (YES, 1.0)):
            model.lm_head.weight[token, _OUTPUT : _OUTPUT + 2] = sign * 2 * answer
        return model

    def _first_layer(self, mlp: Any) -> None:
        """relu(a + b - 1) is on where both are; relu(-a - b - 1) where neither is."""
        size = (2 * _BITS / _WIDTH) ** 0.5
        for neuron, gate in enumerate((self.first, self.second)):
            sign = 1.0 if gate == "and" else -1.0
            for bit in (2 * neuron, 2 * neuron + 1):
                mlp.c_fc.weight[2 * bit, neuron] = sign * size
            mlp.c_fc.bias[neuron] = -1.0
            _write(mlp, neuron, _FIRST_GATE + 2 * neuron, 2 * sign, -sign)

    def _second_layer(self, mlp: Any) -> None:
        """One neuron for both gates on, one for both off."""
        size = ((2 * _BITS + 4) / _WIDTH) ** 0.5
        is_xor = self.combination == "xor"
        for neuron, sign in enumerate((1.0, -1.0)[: 2 if is_xor else 1]):
            for gate in (_FIRST_GATE, _FIRST_GATE + 2):
                mlp.c_fc.weight[gate, neuron] = sign * size
            mlp.c_fc.bias[neuron] = -1.0
            first = neuron == 0
            _write(mlp, neuron, _OUTPUT, -2.0 if is_xor else 2.0, (1.0 if is_xor else -1.0) if first else 0.0)


def _paired(bits: Float[Tensor, "row bit"]) -> Float[Tensor, "row pair"]:
    """Each value beside its negative."""
    return torch.stack([bits, -bits], 2).flatten(1)


def _write(mlp: Any, neuron: int, place: int, weight: float, bias: float) -> None:
    """What a neuron adds to a pair, and what is there without it."""
    for side, sign in ((0, 1.0), (1, -1.0)):
        mlp.c_proj.weight[neuron, place + side] = sign * weight
        mlp.c_proj.bias[place + side] += sign * bias
