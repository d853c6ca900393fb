"""EleutherAI's clt-training: a folder per hookpoint, each with `cfg.json` and `sae.safetensors`.

    theirs                                            ours
    encoder.weight | bias                             W_enc, b_enc
    W_decs.{i} (or W_dec)                             W_dec.{s}[:, i]     coalesce_topk "none": target s + i
    W_dec, blocks of num_latents rows                 W_dec.{s}[:, t - s]  "per-layer": kept with the target t
    W_dec                                             W_dec.{t} per target ("concat") or W_dec.{s} (per_source_tied)
    b_decs.{i}, W_skips.{i} (or b_dec, W_skip)        b_dec[s + i] summed over sources; W_skip, transposed
    post_encs.{i}, post_enc_scales.{i}                feature_offset.{s}[i], feature_scale.{s}[i]
    in_norm, out_norm                                 input_scale, target_scale = sqrt(d_model) / norm

An active feature reaches target i as (a + post_enc_i) * post_enc_scale_i. A source writes to its own layer and the
following n_targets - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clt.config import CLTConfig
from clt.config.eleuther import eleuther_config
from clt.errors import CheckpointError
from clt.models.formats.files import TensorFile, natural_order, read_json, require_finite
from clt.models.formats.portable import Named, Portable, no_batch_choice

NAME = "eleuther"
_WEIGHTS = "sae.safetensors"


def detect(folder: Path) -> bool:
    """Whether a folder holds SparseCoder folders."""
    return bool(_hookpoints(folder))


def read(folder: Path, *, batchtopk_as_topk: bool = False) -> Portable:
    """The transcoder of a run, one folder per layer in natural order of their names.

    Raises:
        CheckpointError: the folders do not belong together, or a tensor is missing or of another shape.
        ConfigError: an option without counterpart here.
    """
    names = _hookpoints(folder)
    configs = [read_json(folder / name / "cfg.json") for name in names]
    files = [TensorFile(folder / name / _WEIGHTS) for name in names]
    config = no_batch_choice(_config(folder, configs, files), NAME, batchtopk_as_topk)
    reader = _Reader(config, configs, files)
    return Portable(NAME, config, reader.tensors)


def _hookpoints(folder: Path) -> list[str]:
    return natural_order(each.parent.name for each in folder.glob(f"*/{_WEIGHTS}"))


def _config(folder: Path, configs: Sequence[dict[str, Any]], files: Sequence[TensorFile]) -> CLTConfig:
    """What the folders agree on; only the number of targets and sources differs by layer."""
    first, drop = dict(configs[0]), ("n_targets", "n_sources")
    for name, other in zip(_hookpoints(folder), configs, strict=True):
        for key in (first.keys() | other.keys()) - set(drop):
            if first.get(key) != other.get(key):
                raise CheckpointError(
                    f"{folder}: {name}/cfg.json says {key} = {other.get(key)!r}, the first layer's {first.get(key)!r}. "
                    "The folders are of different runs."
                )
    layers = len(configs)
    window = max(int(each.get("n_targets", 0)) for each in configs) or 1
    written = [max(1, int(each.get("n_targets", 0))) for each in configs]
    expected = [min(window, layers - layer) for layer in range(layers)]
    if written != expected:
        raise CheckpointError(
            f"{folder} has {layers} hookpoints that write to {written} targets; consecutive layers would write to "
            f"{expected}. Some layers are missing (a run over every other layer has no counterpart here)."
        )
    options = {name: value for name, value in first.items() if name not in drop}
    config = eleuther_config({**options, "cross_layer": window, "num_layers": layers})
    has = {part: any(_has(file, part) for file in files) for part in ("post_enc", "post_enc_scale")}
    return config.replace(
        enable_feature_offset=has["post_enc"], enable_feature_scale=has["post_enc_scale"],
    )  # fmt: skip


def _has(file: TensorFile, part: str) -> bool:
    """Whether a file has a tensor, in its singular or plural form."""
    return part in file or f"{part}s.0" in file


class _Reader:
    def __init__(self, config: CLTConfig, configs: Sequence[dict[str, Any]], files: Sequence[TensorFile]) -> None:
        self._config, self._files = config, files
        self._per_layer = configs[0].get("coalesce_topk") == "per-layer"

    def tensors(self) -> Named:
        """One layer after the other."""
        config = self._config
        for layer, file in enumerate(self._files):
            yield f"W_enc.{layer}", file.tensor("encoder.weight", config.num_features, config.d_model)
            yield f"b_enc.{layer}", file.tensor("encoder.bias", config.num_features)
            yield f"W_dec.{layer}", self._decoder(layer)
            count = len(config.targets_of(layer))
            for theirs, ours in (("post_enc", "feature_offset"), ("post_enc_scale", "feature_scale")):
                if getattr(config, f"enable_{ours}"):
                    shape = (config.num_features,)
                    yield f"{ours}.{layer}", torch.stack([self._part(layer, theirs, i, *shape) for i in range(count)])
            if config.skip_connection != "none":
                count = len(config.skip_targets_of(layer))
                width = (config.d_model, config.d_model)
                yield f"W_skip.{layer}", torch.stack([self._part(layer, "W_skip", i, *width).T for i in range(count)])
        yield "b_dec", self._bias()
        if config.normalization_method == "rms":
            yield from self._scaling()

    def _decoder(self, layer: int) -> Tensor:
        config, shape = self._config, (self._config.num_features, self._config.d_model)
        if config.decoder_tying != "none":
            return self._part(layer, "W_dec", 0, *shape)
        if self._per_layer:
            return torch.stack([self._block(layer, target) for target in config.targets_of(layer)], 1)
        return torch.stack([self._part(layer, "W_dec", i, *shape) for i in range(len(config.targets_of(layer)))], 1)

    def _block(self, source: int, target: int) -> Tensor:
        """A source's rows of the target's decoder, in which the active sources lie oldest first."""
        place = list(self._config.sources_of(target)).index(source) * self._config.num_features
        stacked = self._files[target].tensor("W_dec", None, self._config.d_model)
        if len(stacked) < place + self._config.num_features:
            raise CheckpointError(
                f"{self._files[target].path}: W_dec has {len(stacked)} rows, too few for "
                f"{len(self._config.sources_of(target))} sources of {self._config.num_features} features."
            )
        return stacked[place : place + self._config.num_features]

    def _bias(self) -> Tensor:
        config, bias = self._config, torch.zeros(self._config.num_layers, self._config.d_model)
        by_target = self._per_layer or config.decoder_tying == "per_target"
        for layer in range(config.num_layers):
            for i in range(1 if by_target else len(config.targets_of(layer))):
                bias[layer + i] += self._part(layer, "b_dec", i, config.d_model).float()
        return bias

    def _scaling(self) -> Named:
        for side, name in (("input", "in_norm"), ("target", "out_norm")):
            norms = torch.stack([file.tensor(name).float().reshape(()) for file in self._files])
            scale = self._config.d_model**0.5 / require_finite(norms, name)
            yield f"{side}_scale", scale[:, None].expand(-1, self._config.d_model)

    def _part(self, layer: int, name: str, index: int, *shape: int) -> Tensor:
        """Tensor `index` of a list, which is stored without number where there is only one."""
        file = self._files[layer]
        plural = f"{name}s.{index}"
        return file.tensor(name if plural not in file and index == 0 else plural, *shape)
