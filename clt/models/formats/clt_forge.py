"""CLT-Forge: `clt_cfg.json` and `clt_weights.safetensors`, or one `rank{r}_clt_weights.safetensors` per feature shard.

theirs                                    ours
W_enc [layer, d_model, feature]           W_enc.{l}, transposed
W_dec [pair, feature, d_model]            W_dec.{s}; pairs source-major: 0->0, 0->1, ..., 1->1, ...
b_dec [pair, d_model]                     b_dec[t], summed over s
log_threshold [layer, feature]            log_threshold.{l}
estimated_norm_scaling_factor_in | _out   input_scale, target_scale
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from clt.config import CLTConfig
from clt.errors import CheckpointError
from clt.models.formats.files import TensorFile, natural_order, read_json, require_finite, stored_as
from clt.models.formats.portable import Named, Portable

NAME = "clt-forge"
_CONFIG, _WEIGHTS = "clt_cfg.json", "clt_weights.safetensors"
_SCALES = (("input", "estimated_norm_scaling_factor_in"), ("target", "estimated_norm_scaling_factor_out"))


def detect(folder: Path) -> bool:
    """Whether a folder is one of its runs."""
    return (folder / _CONFIG).exists()


def read(folder: Path) -> Portable:
    """The transcoder of a run, whole or in shards.

    Raises:
        CheckpointError: a shard or tensor is missing, or the configuration does not fit the weights.
    """
    values = read_json(folder / _CONFIG)
    files = _files(folder)
    absent = [name for name in ("d_in", "d_latent", "n_layers") if name not in values]
    if absent:
        raise CheckpointError(f"{folder / _CONFIG} lacks {', '.join(absent)}: not a configuration of CLT-Forge.")
    layers = files[0].shape("W_enc")[0]
    if layers != values["n_layers"]:
        raise CheckpointError(f"{folder}: the weights are of {layers} layers, n_layers = {values['n_layers']!r}.")
    found = sum(file.shape("b_enc")[1] for file in files)
    if found != values["d_latent"]:
        raise CheckpointError(
            f"{folder}: the {len(files)} weight files hold {found} features of {values['d_latent']} (d_latent). "
            "A shard is missing."
        )
    config = CLTConfig(
        num_features=values["d_latent"], num_layers=values["n_layers"], d_model=values["d_in"],
        n_targets=None if values.get("cross_layer_decoders", True) else 1, model_name=values.get("model_name"),
        jumprelu_bandwidth=values.get("jumprelu_bandwidth") or 2.0, activation_fn="jumprelu",
        mlp_input_template="blocks.{}.ln2.hook_normalized", mlp_output_template="blocks.{}.hook_mlp_out",
        normalization_method="rms" if _SCALES[0][1] in files[0] else "none",
        clt_dtype=stored_as(files[0].tensor("b_enc"), files[0].tensor("b_dec"), files[0].rows("W_enc", 0)),
    )  # fmt: skip
    note = (
        "It reads what enters the MLP after the norm, before the norm's learned scale (ln2.hook_normalized); opened "
        "with its host, it takes that scale over."
    )
    return Portable(NAME, config, lambda: _tensors(config, files), (note,))


def _tensors(config: CLTConfig, files: Sequence[TensorFile]) -> Named:
    windows = [config.targets_of(layer) for layer in range(config.num_layers)]
    pair, bias = 0, torch.zeros(config.num_layers, config.d_model)
    stored = files[0].tensor("b_dec", sum(map(len, windows)), config.d_model).float()
    for layer, window in enumerate(windows):
        yield f"W_enc.{layer}", torch.cat([file.rows("W_enc", layer, config.d_model, None) for file in files], 1).T
        for name in ("b_enc", "log_threshold"):
            yield f"{name}.{layer}", require_finite(torch.cat([file.rows(name, layer) for file in files]), name)
        yield f"W_dec.{layer}", torch.stack([_slab(files, pair + i) for i in range(len(window))], 1)
        bias[window.start : window.stop] += stored[pair : pair + len(window)]
        pair += len(window)
    yield "b_dec", bias
    if config.normalization_method != "none":
        for side, name in _SCALES:
            scale = require_finite(files[0].tensor(name, config.num_layers).float(), name)
            yield f"{side}_scale", scale[:, None].expand(-1, config.d_model)


def _slab(files: Sequence[TensorFile], pair: int) -> Tensor:
    return torch.cat([file.rows("W_dec", pair) for file in files])


def _files(folder: Path) -> list[TensorFile]:
    if (folder / _WEIGHTS).exists():
        return [TensorFile(folder / _WEIGHTS)]
    names = natural_order(path.name for path in folder.glob(f"rank*_{_WEIGHTS}"))
    if names != [f"rank{rank}_{_WEIGHTS}" for rank in range(len(names))] or not names:
        raise CheckpointError(f"{folder} has neither {_WEIGHTS} nor all of rank0_, rank1_, ... {_WEIGHTS}: {names}.")
    return [TensorFile(folder / name) for name in names]
