"""The replacement model: a host whose MLPs are a cross-layer transcoder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from clt.errors import ConfigError, HostModelError
from clt.lm import HostInputs, ModelAdapter
from clt.lm.structure import normalised_template
from clt.models import BaseTranscoder
from clt.replacement.running import Intervene, RunningPrediction
from clt.types import Sample


class ReplacementModel:
    """Runs and generates like the host, with every MLP output computed from the features of all layers so far.

    replacement = ReplacementModel(adapter, transcoder)
    replacement.generate(samples, max_new_tokens=32)
    with replacement.active():
        ...                                     # whatever runs the host here runs the replacement
    """

    def __init__(self, adapter: ModelAdapter, transcoder: BaseTranscoder, *, first_n_layers: int | None = None) -> None:
        """Check that the two belong together; nothing is put in place yet.

        Args:
            first_n_layers: replace only the first so many MLPs; None: all.

        Raises:
            HostModelError: layers, width or hookpoints of host and transcoder differ.
            ConfigError: the transcoder cannot run layer by layer, or `first_n_layers` is out of range.
        """
        _check_fit(adapter, transcoder)
        if first_n_layers is not None and not 0 < first_n_layers <= adapter.n_layers:
            raise ConfigError(
                f"first_n_layers = {first_n_layers} must be between 1 and the host's {adapter.n_layers} layers."
            )
        self.adapter = adapter
        self.transcoder = transcoder
        self.n_layers = adapter.n_layers if first_n_layers is None else first_n_layers

    def active(
        self,
        *,
        errors: Float[Tensor, "layer row position d_model"] | None = None,
        intervene: Intervene | None = None,
    ) -> AbstractContextManager[None]:
        """Put the transcoder in place while the block runs.

        Args:
            errors: what to add to the predictions, for the same rows and from their first position on; with those
                of `errors(inputs)` the host is reproduced. A block then covers one text, in one pass or with a
                KV cache token by token.
            intervene: changes the feature activations of a layer, `[row, position, feature]`, before they are used.
        """
        running = RunningPrediction(self.transcoder, self.n_layers, errors, intervene)
        return self.adapter.replacing(running.predict, range(self.n_layers))

    def logits(
        self,
        inputs: HostInputs,
        *,
        errors: Float[Tensor, "layer row position d_model"] | None = None,
        intervene: Intervene | None = None,
        gradient: bool = False,
    ) -> Float[Tensor, "row position vocabulary"]:
        """What the replacement model predicts after each position; with `gradient`, for the transcoder to learn."""
        with self.active(errors=errors, intervene=intervene):
            return self.adapter.logits(inputs, gradient=gradient)

    @torch.no_grad()
    def errors(self, inputs: HostInputs) -> Float[Tensor, "layer row position d_model"]:
        """What the transcoder misses on the host's own forward pass: true MLP output minus prediction."""
        keep = torch.ones_like(inputs.is_token)
        running = RunningPrediction(self.transcoder, self.n_layers, None, None)
        with self.adapter.capturing(keep) as captured:
            self.adapter.logits(inputs)
        shape = (*keep.shape, self.adapter.d_model)
        pairs = zip(captured.inputs[: self.n_layers], captured.targets)
        return torch.stack([y - running.predict(layer, x).to(y) for layer, (x, y) in enumerate(pairs)]).view(-1, *shape)

    def generate_ids(
        self,
        samples: Sequence[Sample],
        *,
        max_new_tokens: int,
        batch_size: int = 16,
        use_cache: bool = True,
        intervene: Intervene | None = None,
    ) -> list[Integer[Tensor, " _position"]]:
        """Greedy answers as token ids on the CPU, up to and including the first end-of-answer token."""
        with self.active(intervene=intervene):
            return self.adapter.generate_ids(
                samples, max_new_tokens=max_new_tokens, batch_size=batch_size, use_cache=use_cache
            )

    def generate(
        self,
        samples: Sequence[Sample],
        *,
        max_new_tokens: int,
        batch_size: int = 16,
        use_cache: bool = True,
        intervene: Intervene | None = None,
    ) -> list[str]:
        """Greedy answers as text, without special tokens."""
        with self.active(intervene=intervene):
            return self.adapter.generate(
                samples, max_new_tokens=max_new_tokens, batch_size=batch_size, use_cache=use_cache
            )


def _check_fit(adapter: ModelAdapter, transcoder: BaseTranscoder) -> None:
    """Refuse a transcoder of another host, or one whose layers cannot be computed one after the other."""
    config = transcoder.config
    for name, ours, theirs in (
        ("layers", adapter.n_layers, config.num_layers),
        ("d_model", adapter.d_model, config.d_model),
    ):
        if ours != theirs:
            raise HostModelError(
                f"The host {adapter.name} has {name} = {ours}, the transcoder {theirs}. It was trained on "
                f"{config.model_name or 'another host'}; open that one, or train a transcoder on this one."
            )
    for side, ours, theirs in (
        ("input", adapter.input_template, config.mlp_input_template),
        ("output", adapter.output_template, config.mlp_output_template),
    ):
        if theirs is not None and normalised_template(theirs, side) != ours:
            raise HostModelError(
                f"The transcoder was trained on {theirs}, but the host's MLP {side} is taken at {ours}. Open the host "
                f"with {side}_template={theirs!r}."
            )
    if config.activation_fn == "topk" and config.topk_mode == "global":
        raise ConfigError(
            "A transcoder with topk_mode = 'global' chooses a layer's features by looking at later layers, which in a "
            "replacement model do not exist yet. Convert it to JumpReLU first, or train with topk_mode = 'per_layer'."
        )
