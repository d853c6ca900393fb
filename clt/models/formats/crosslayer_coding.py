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
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from clt.config import CLTConfig
from clt.errors import CheckpointError
from clt.models.clt import CrossLayerTranscoder
from clt.models.formats.files import TensorFile
from clt.models.formats.portable import Named, Portable, build
from clt.models.standardise import ActivationStatistics, fit_scaling

NAME = "crosslayer-coding"
_PREFIX = re.compile(r"^(_orig_mod\.|encoder_module\.|decoder_module\.|theta_manager\.)+")
_ENCODER = re.compile(r"encoders\.\d+\.weight")
_FILES = ("model.safetensors", "clt.pt", "clt_checkpoint_latest.safetensors", "final/clt.pt")


def is_crosslayer_coding(names: Iterable[str]) -> bool:
    """Whether tensors have crosslayer-coding's names."""
    return any(_short(name).startswith(("encoders.", "decoders.")) for name in names)


def detect(folder: Path) -> bool:
    """Whether a folder is one of its runs."""
    file = _file(folder)
    return file is not None and is_crosslayer_coding(TensorFile(file).names)


def read(folder: Path, *, norm_stats: Path | None = None) -> Portable:
    """The transcoder of a run folder.

    Args:
        norm_stats: statistics of its training data; None: `norm_stats.json` in the folder, if there.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape, or the statistics are missing.
    """
    file = _file(folder)
    assert file is not None
    beside = folder / "norm_stats.json"
    config = CLTConfig.from_json(file.parent / "cfg.json")
    return portable(TensorFile(file), config, norm_stats or (beside if beside.exists() else None))


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
    return build(portable(TensorFile.of(tensors, "The state dict"), config, norm_stats), device)


def portable(weights: TensorFile, config: CLTConfig, norm_stats: Path | None) -> Portable:
    """The same, one tensor at a time."""
    config = config.replace(ranking="value", post_encoder="target", clt_dtype=_dtype(weights, config))
    if config.normalization_method == "mean_std" and norm_stats is None:
        raise CheckpointError(
            "This transcoder was trained on standardised activations (normalization_method = 'mean_std'), and "
            "crosslayer-coding keeps their mean and spread with the data, not with the weights. Give the "
            "norm_stats.json of its activation dataset (`clt convert --norm-stats`); without it, all "
            "outputs would be wrong."
        )
    reader = _Reader(weights, config)
    statistics = None if norm_stats is None else read_norm_stats(norm_stats, config)
    return Portable(NAME, config, lambda: reader.tensors(statistics))


def _dtype(weights: TensorFile, config: CLTConfig) -> Any:
    """The type the weights are in: where the configuration is silent it takes theirs, else it must name it."""
    name = next((each for each in sorted(weights.names) if each.endswith("weight")), None)
    if name is None:
        return config.clt_dtype  # what is missing is said where tensors are read
    found = str(weights.tensor(name).dtype).removeprefix("torch.")
    if config.clt_dtype not in (None, found):
        raise CheckpointError(
            f"{weights.path}: {name} is {found}, cfg.json says clt_dtype = {config.clt_dtype!r}. Put the type that the "
            "weights are in there, or cast them to it."
        )
    return found


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


class _Reader:
    """Its tensors under our names."""

    def __init__(self, weights: TensorFile, config: CLTConfig) -> None:
        self._weights, self._config = weights, config
        self._stored = {_short(name): name for name in weights.names}
        self._check_names()

    def tensors(self, statistics: ActivationStatistics | None) -> Named:
        """One layer after the other."""
        config = self._config
        for layer in range(config.num_layers):
            yield f"W_enc.{layer}", self._read(f"encoders.{layer}.weight", config.num_features, config.d_model)
            yield f"b_enc.{layer}", self._read(f"encoders.{layer}.bias_param", config.num_features)
            yield f"W_dec.{layer}", self._decoder(layer)
            for part in ("offset", "scale"):
                if getattr(config, f"enable_feature_{part}"):
                    yield f"feature_{part}.{layer}", self._read(f"feature_{part}.{layer}", config.num_features)
            if config.skip_connection != "none":
                yield f"W_skip.{layer}", self._skip(layer)
        if config.activation_fn == "jumprelu":
            logs = self._read("log_threshold", None, None).expand(config.num_layers, -1)
            yield from ((f"log_threshold.{layer}", log) for layer, log in enumerate(logs))
        yield "b_dec", self._bias()
        yield from self._scaling(statistics)

    def _decoder(self, source: int) -> Tensor:
        shape = (self._config.d_model, self._config.num_features)
        if self._config.decoder_tying != "none":
            return self._read(f"decoders.{source}.weight", *shape).T
        pairs = [self._read(f"decoders.{source}->{t}.weight", *shape).T for t in self._config.targets_of(source)]
        return torch.stack(pairs, 1)

    def _skip(self, source: int) -> Tensor:
        names = [f"{source}->{t}" for t in self._config.targets_of(source)] if self._untied else [str(source)]
        width = self._config.d_model
        return torch.stack([self._read(f"skip_weights.{name}", width, width).T for name in names])

    def _bias(self) -> Tensor:
        """One bias per target: theirs come once per decoder."""
        config, bias = self._config, torch.zeros(self._config.num_layers, self._config.d_model)
        for source in range(config.num_layers):
            for target in config.targets_of(source) if config.decoder_tying != "per_target" else [source]:
                name = f"{source}->{target}" if self._untied else str(source)
                bias[target] += self._read(f"decoders.{name}.bias_param", config.d_model)
        return bias

    def _scaling(self, statistics: ActivationStatistics | None) -> Named:
        config = self._config
        if statistics is None:
            if config.normalization_method != "sqrt_d_model":
                return
            statistics = ActivationStatistics(*torch.ones(4, config.num_layers, config.d_model))
        for side, mean, std in (
            ("input", statistics.input_mean, statistics.input_std),
            ("target", statistics.target_mean, statistics.target_std),
        ):
            shift, scale = fit_scaling(mean, std, config.normalization_method)
            yield f"{side}_shift", shift
            yield f"{side}_scale", scale
        yield "target_variance", (statistics.target_std * scale).square().sum(1)

    @property
    def _untied(self) -> bool:
        return self._config.decoder_tying == "none"

    def _read(self, name: str, *shape: int | None) -> Tensor:
        return self._weights.tensor(self._stored.get(name, name), *shape)

    def _check_names(self) -> None:
        config, found = self._config, sum(bool(_ENCODER.fullmatch(name)) for name in self._stored)
        if found != config.num_layers:
            raise CheckpointError(
                f"{self._weights.path} has encoders of {found} layers, cfg.json says num_layers = "
                f"{config.num_layers:,}. Is this its cfg.json?"
            )
        expected = self._expected()
        unknown = sorted(self._stored.keys() - expected)
        if unknown:
            raise CheckpointError(
                f"{unknown[0]} is no tensor of a crosslayer-coding transcoder with decoder_tying = "
                f"{config.decoder_tying!r}, activation_fn = {config.activation_fn!r}, skip_connection = "
                f"{config.skip_connection!r} and {config.num_layers} layers. Is this its cfg.json?"
            )
        missing = sorted(expected - self._stored.keys())
        if missing:
            raise CheckpointError(
                f"The weights lack {', '.join(missing[:6])}, which cfg.json asks for. The two files are "
                "probably of different runs, or the checkpoint is the part of one rank."
            )

    def _expected(self) -> set[str]:
        """The names that the configuration implies."""
        config = self._config
        layers = range(config.num_layers)
        pairs = [f"{s}->{t}" for s in layers for t in config.targets_of(s)]
        decoders = pairs if self._untied else [str(layer) for layer in layers]
        names = {f"encoders.{layer}.{part}" for layer in layers for part in ("weight", "bias_param")}
        names |= {f"decoders.{each}.{part}" for each in decoders for part in ("weight", "bias_param")}
        if config.enable_feature_offset:
            names |= {f"feature_offset.{layer}" for layer in layers}
        if config.enable_feature_scale:
            names |= {f"feature_scale.{layer}" for layer in layers}
        if config.skip_connection != "none":
            names |= {f"skip_weights.{each}" for each in decoders}
        return names | ({"log_threshold"} if config.activation_fn == "jumprelu" else set())


def _file(folder: Path) -> Path | None:
    """Its weights, if they are where it writes them, beside a cfg.json."""
    found = [folder / name for name in _FILES if (folder / name).exists()]
    return next((file for file in found if (file.parent / "cfg.json").exists()), None)


def _short(name: str) -> str:
    """A name without the prefixes of modules and of torch.compile."""
    return _PREFIX.sub("", name)
