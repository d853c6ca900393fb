"""crosslayer-coding's `convert_batchtopk_to_jumprelu.py` with its flags; see `clt convert` for ours.

Unlike there, thresholds are calibrated per layer unless --no-l0-layerwise-calibrate is given, the report is on tokens
not used before, and a transcoder that drifts too far is not written (--force writes it).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from clt.errors import ConfigError
from clt.models import CrossLayerTranscoder
from clt.models.checkpoint import save_tensors
from clt.scripts import convert
from clt.training.convert import Calibration
from clt.training.seed_output import save_state_dict


@dataclass(frozen=True, kw_only=True)
class Options:
    """The seed's flags, of both its versions."""

    batchtopk_checkpoint_path: str
    """Folder or file of the BatchTopK (or TopK) transcoder."""
    config_path: str
    """Its configuration."""
    activation_data_path: str
    """Folder of activations."""
    output_model_path: str
    """Where the converted state dict goes: .pt or .safetensors."""
    output_config_path: str
    """Where its configuration goes."""
    num_batches_for_theta_estimation: int = 100
    """Batches for the estimate."""
    estimation_batch_size_tokens: int = 1024
    """Tokens per batch."""
    scale_factor: float = 1.0
    """Multiplies every threshold."""
    default_theta_value: float = 1e6
    """Threshold of features that never fired."""
    device: str | None = None
    """Torch device."""
    activation_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type in which activations are read."""
    seed: int = 42
    """Seed of the order of the tokens."""
    num_tokens_for_l0_check_script: int = 1024
    """No effect: the report uses whole batches."""
    num_batches_for_l0_check: int = 20
    """Batches for the report."""
    l0_check_batch_size_tokens: int | None = None
    """No effect: all batches have --estimation-batch-size-tokens."""
    l0_layerwise_calibrate: bool = True
    """Scale each layer's thresholds until its L0 is the original's."""
    l0_calibration_batches: int = 8
    """Batches for that."""
    l0_calibration_batch_size_tokens: int | None = None
    """No effect: all batches have --estimation-batch-size-tokens."""
    l0_calibration_tolerance: float = 0.5
    """Accepted difference in L0."""
    l0_calibration_search_min_scale: float = 0.1
    """Smallest scale tried."""
    l0_calibration_search_max_scale: float = 10.0
    """Largest scale tried."""
    l0_calibration_max_iters: int = 15
    """Scales tried per layer."""
    l0_target_model_config_path: str | None = None
    """Not supported: the original is always the target."""
    l0_target_model_checkpoint_path: str | None = None
    """Not supported: the original is always the target."""
    norm_stats_path: str | None = None
    """norm_stats.json of the training data, for the seed's own weights; None: the one in the activation folder."""
    force: bool = False
    """Write the result even if it drifts."""


_DEAD = {
    "l0_check_batch_size_tokens": "all batches have --estimation-batch-size-tokens",
    "l0_calibration_batch_size_tokens": "all batches have --estimation-batch-size-tokens",
}


def convert_model_to_jumprelu(
    checkpoint_path: str, config_path: str, output_path: str, default_theta_value: float = 1e6
) -> CrossLayerTranscoder:
    """Convert without activations: BatchTopK's running threshold becomes each feature's own, which changes nothing.

    Args:
        checkpoint_path: folder or file of a BatchTopK transcoder.
        config_path: its configuration.
        output_path: where the state dict goes; its configuration goes beside it as `cfg_jumprelu.json`.
        default_theta_value: for features that never fired; with running thresholds there are none.
    """
    options = convert.Options(
        clt=checkpoint_path, config=config_path, output=output_path, default_theta_value=default_theta_value
    )
    converted, _ = convert.convert(options)
    _write(converted, Path(output_path), Path(output_path).with_name("cfg_jumprelu.json"))
    return converted


def _write(model: CrossLayerTranscoder, weights: Path, config: Path) -> None:
    if weights.suffix == ".safetensors":
        save_tensors(dict(model.state_dict()), weights)
    else:
        save_state_dict(model, weights)
    model.config.to_json(config)


def main(options: Options) -> None:
    """Convert as `clt convert --method estimate` does, and write under the seed's names."""
    for name, why in _DEAD.items():
        if getattr(options, name) is not None:
            sys.stderr.write(f"note: --{name.replace('_', '-')} has no effect: {why}.\n")
    if options.l0_target_model_config_path or options.l0_target_model_checkpoint_path:
        raise ConfigError("--l0-target-model-*: another model as the target is not supported. Leave the flags out.")
    converted, drift = convert.convert(
        convert.Options(
            clt=options.batchtopk_checkpoint_path,
            config=options.config_path,
            output=str(Path(options.output_model_path).parent),
            data=options.activation_data_path,
            method="estimate",
            norm_stats=options.norm_stats_path,
            calibrate=options.l0_layerwise_calibrate,
            calibration=Calibration(
                tolerance=options.l0_calibration_tolerance,
                min_scale=options.l0_calibration_search_min_scale,
                max_scale=options.l0_calibration_search_max_scale,
                max_iterations=options.l0_calibration_max_iters,
            ),
            estimation_batches=options.num_batches_for_theta_estimation,
            calibration_batches=options.l0_calibration_batches,
            report_batches=options.num_batches_for_l0_check,
            batch_size_tokens=options.estimation_batch_size_tokens,
            default_theta_value=options.default_theta_value,
            scale_factor=options.scale_factor,
            seed=options.seed,
            device=options.device,
            activation_dtype=options.activation_dtype,
            force=options.force,
        )
    )
    assert drift is not None
    _write(converted, Path(options.output_model_path), Path(options.output_config_path))
    print(f"JumpReLU transcoder in {options.output_model_path}, configuration in {options.output_config_path}.")
    print(convert.describe(drift))
