"""crosslayer-coding's state dicts, of both its versions, as a transcoder of ours.

    theirs                                             ours
    encoder_module.encoders.{l}.weight | .bias_param   W_enc.{l}, b_enc.{l}
    decoder_module.decoders.{s}->{t}.weight            W_dec.{s}[:, t - s], transposed
    decoder_module.decoders.{s}->{t}.bias_param        b_dec[t], summed over s
    decoder_module.decoders.{i}.weight | .bias_param   W_dec.{i}; b_dec[i], or summed over i <= t if tied per source
    decoder_module.feature_offset.{t} | feature_scale  the same
    decoder_module.skip_weights.{t} | {s}->{t}         W_skip, transposed
    theta_manager.log_threshold                        log_threshold.{l}

The first version had no `encoder_module.`, `decoder_module.` and `theta_manager.`; torch.compile adds `_orig_mod.`.
There the data loader normalised, so mean_std needs the data set's norm_stats.json, which becomes part of the
transcoder. There topk and batchtopk ranked by z-scores over the batch at hand, so that a token's features depended on
the tokens beside it; here they are ranked by their pre-activation (`ranking = "value"`). Converted to JumpReLU, as
that project means them to be used, transcoders compute the same function here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clt.config import CLTConfig
from clt.errors import CheckpointError
from clt.models.clt import CrossLayerTranscoder
from clt.models.standardise import ActivationStatistics

_PREFIX = re.compile(r"^(_orig_mod\.|encoder_module\.|decoder_module\.|theta_manager\.)+")
_KEY = re.compile(
    r"(?P<kind>encoders|decoders|skip_weights|feature_offset|feature_scale)\.(?P<first>\d+)(->(?P<second>\d+))?"
    r"(\.(?P<part>weight|bias_param))?"
)


def is_crosslayer_coding(names: Mapping[str, Any]) -> bool:
    """Whether tensors have crosslayer-coding's names."""
    return any(_short(name).startswith(("encoders.", "decoders.")) for name in names)


def read_crosslayer_coding(
    tensors: Mapping[str, Tensor],
    config: CLTConfig,
    norm_stats: Path | None = None,
    device: torch.device | str | None = None,
) -> CrossLayerTranscoder:
    """The transcoder that a state dict of crosslayer-coding describes.

    Args:
        tensors: its state dict.
        config: its cfg.json, as `CLTConfig.from_json` reads it.
        norm_stats: the norm_stats.json of its training data; needed for mean_std, taken for the variances otherwise.
        device: where to build it.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape, or the statistics are missing.
    """
    config = config.replace(ranking="value", post_encoder="target", clt_dtype=_dtype(tensors, config))
    if config.normalization_method == "mean_std" and norm_stats is None:
        raise CheckpointError(
            "This transcoder was trained on standardised activations (normalization_method = 'mean_std'), and "
            "crosslayer-coding keeps their mean and spread with the data, not with the weights. Give the "
            "norm_stats.json of its activation dataset (`clt convert --norm-stats`); without it, all "
            "outputs would be wrong."
        )
    model = CrossLayerTranscoder(config, device=device)
    with torch.no_grad():
        if norm_stats is not None:
            model.fit_standardisation(read_norm_stats(norm_stats, config))
        elif config.normalization_method == "sqrt_d_model":
            model.fit_standardisation(ActivationStatistics(*torch.ones(4, config.num_layers, config.d_model)))
        _Filling(model, tensors).fill()
    return model


def _dtype(tensors: Mapping[str, Tensor], config: CLTConfig) -> Any:
    """The type the weights are in: where the configuration is silent it takes theirs, else it must name it."""
    found = {str(value.dtype).removeprefix("torch.") for name, value in tensors.items() if name.endswith("weight")}
    wanted = found if config.clt_dtype is None else {config.clt_dtype}
    if len(found) != 1 or found != wanted:
        raise CheckpointError(
            f"The weights are {' and '.join(sorted(found))}, cfg.json says clt_dtype = {config.clt_dtype!r}. Put the "
            "type the weights are in there, or cast them all to it."
        )
    return found.pop()


def read_norm_stats(path: Path, config: CLTConfig) -> ActivationStatistics:
    """crosslayer-coding's `norm_stats.json`: {layer: {inputs | targets: {mean, std}}}.

    Raises:
        CheckpointError: a layer is missing, or has another width.
    """
    shape = (config.num_layers, config.d_model)
    try:
        values = json.loads(path.read_text())
        parts = [
            torch.tensor([values[str(layer)][side][part] for layer in range(config.num_layers)])
            for side in ("inputs", "targets")
            for part in ("mean", "std")
        ]
    except (FileNotFoundError, json.JSONDecodeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} holds no statistics of {shape[0]} layers: {error!r}.") from None
    if any(part.shape != shape for part in parts):
        raise CheckpointError(f"{path}: [layer, dimension] is {tuple(parts[0].shape)}, the transcoder needs {shape}.")
    return ActivationStatistics(*parts)


class _Filling:
    """Puts tensors where they belong and keeps book of what has been filled."""

    def __init__(self, model: CrossLayerTranscoder, tensors: Mapping[str, Tensor]) -> None:
        self._model, self._config = model, model.config
        self._tensors = {_short(name): value for name, value in tensors.items()}
        self._missing = self._expected()

    def fill(self) -> None:
        """Fill every parameter of the model.

        Raises:
            CheckpointError: a tensor is missing, unknown or of another shape.
        """
        self._model.b_dec.zero_()
        for name, value in self._tensors.items():
            for place, part in self._places(name, value):
                if place.shape != part.shape:
                    raise CheckpointError(
                        f"{name} has the shape {tuple(value.shape)}; cfg.json asks for {tuple(place.shape)} (as stored "
                        "here). The two files are probably of different runs."
                    )
                place.add_(part) if name.endswith("bias_param") else place.copy_(part)
            self._missing.discard(name)
        if self._missing:
            raise CheckpointError(
                f"The weights lack {', '.join(sorted(self._missing)[:6])}, which cfg.json asks for. The two files are "
                "probably of different runs, or the checkpoint is the part of one rank."
            )

    def _places(self, name: str, value: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Where a tensor goes, and what of it goes there."""
        config, model = self._config, self._model
        if name not in self._missing:
            raise CheckpointError(
                f"{name} is no tensor of a crosslayer-coding transcoder with decoder_tying = "
                f"{config.decoder_tying!r}, activation_fn = {config.activation_fn!r}, skip_connection = "
                f"{config.skip_connection!r} and {config.num_layers} layers. Is this its cfg.json?"
            )
        if name == "log_threshold":
            return list(zip(model.log_threshold, value.expand(config.num_layers, -1)))
        found = _KEY.fullmatch(name)
        assert found is not None
        first, second = int(found["first"]), None if found["second"] is None else int(found["second"])
        match found["kind"], found["part"]:
            case "encoders", "weight":
                return [(model.W_enc[first], value)]
            case "encoders", _:
                return [(model.b_enc[first].zero_(), value)]
            case "decoders", "weight":
                place = model.W_dec[first] if second is None else model.W_dec[first][:, second - first]
                return [(place, value.T)]
            case "decoders", _:
                return [(model.b_dec[target], value) for target in self._biased(first, second)]
            case "skip_weights", _:
                return [(model.W_skip[first][(second or first) - first], value.T)]
            case kind, _:
                return [(getattr(model, kind)[first], value)]

    def _biased(self, first: int, second: int | None) -> range:
        """The targets to which a decoder's bias is added."""
        if second is not None:
            return range(second, second + 1)
        if self._config.decoder_tying == "per_source":
            return self._config.targets_of(first)
        return range(first, first + 1)

    def _expected(self) -> set[str]:
        """The names that the configuration implies."""
        config = self._config
        layers = range(config.num_layers)
        pairs = [f"{s}->{t}" for s in layers for t in config.targets_of(s)]
        decoders = pairs if config.decoder_tying == "none" else [str(layer) for layer in layers]
        names = {f"encoders.{layer}.{part}" for layer in layers for part in ("weight", "bias_param")}
        names |= {f"decoders.{each}.{part}" for each in decoders for part in ("weight", "bias_param")}
        if config.enable_feature_offset:
            names |= {f"feature_offset.{layer}" for layer in layers}
        if config.enable_feature_scale:
            names |= {f"feature_scale.{layer}" for layer in layers}
        if config.skip_connection != "none":
            names |= {f"skip_weights.{each}" for each in decoders}
        return names | ({"log_threshold"} if config.activation_fn == "jumprelu" else set())


def _short(name: str) -> str:
    """A name without the prefixes of modules and of torch.compile."""
    return _PREFIX.sub("", name)
