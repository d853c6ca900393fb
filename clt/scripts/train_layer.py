"""vlm-clt-training's per-layer transcoder, from `L{layer}/batch_*_x.pt` files, with its flags.

    python scripts/train_llava_transcoder_layer.py --config config/transcoder_llava15_7b.yaml --layer 10 --steps 5000

A joint transcoder (`clt train`) is the better choice: there every layer's features share the work of reconstructing
each MLP output, which replacement and attribution need. These are for users of the seed's files.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from clt.config.base import write_text_atomically
from clt.data.layer_files import LayerFiles
from clt.errors import ConfigError
from clt.training.layer_transcoder import LayerResult, LayerTrainer, LayerTraining
from clt.types import choose_device


@dataclass(frozen=True, kw_only=True)
class Options:
    """The seed's flags."""

    config: str
    """YAML file: outputs.activations_dir, outputs.transcoders_dir, outputs.logs_dir, feature_dim, seq_len."""
    layer: int
    """Which layer; its files are in L<layer>/."""
    steps: int = 2000
    """Optimiser steps."""
    lr: float = 3e-4
    """Learning rate."""
    feature_dim: int | None = None
    """Features; None: the config's, else 8192."""
    cross_layer_depth: int = 1
    """No effect: the files say how many targets there are."""
    clt_mode: bool = False
    """No effect: the files say how many targets there are."""
    use_topk: bool = False
    """Keep only the largest share of features per token."""
    topk_pct: float = 0.12
    """That share."""
    batch_samples: int = 8
    """Sequences per step."""
    reuse_steps: int = 1
    """Steps on each batch."""
    cache_batches: int = 50
    """Files kept in memory."""
    dtype: Literal["bf16", "fp16", "fp32", "auto"] = "auto"
    """Type of the computation; auto: bf16 on a GPU. Weights and optimiser are fp32."""
    no_amp: bool = False
    """Compute in fp32 whatever --dtype says."""
    compile: bool = False
    """Use torch.compile."""
    val_interval: int = 200
    """Steps between validations."""
    val_samples: int = 10
    """Sequences per validation."""
    seed: int = 0
    """Of weights, order and validation split."""
    device: str | None = None
    """Torch device; None: a GPU if there is one."""


def read_config(path: str) -> dict[str, Any]:
    """The YAML file; the environment variable ACTIVATIONS_DIR wins over it.

    Raises:
        ConfigError: it is missing, no YAML, or names no folders.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    outputs = (values or {}).get("outputs", {})
    if "ACTIVATIONS_DIR" in os.environ:
        outputs["activations_dir"] = os.environ["ACTIVATIONS_DIR"]
    missing = [name for name in ("activations_dir", "transcoders_dir") if name not in outputs]
    if missing:
        raise ConfigError(f"{path} lacks outputs.{' and outputs.'.join(missing)}.")
    return {"feature_dim": 8192, "seq_len": 512, **values, "outputs": {"logs_dir": "logs", **outputs}}


def precision(options: Options, device: str) -> torch.dtype | None:
    """What --dtype and --no-amp ask for."""
    if options.no_amp or options.dtype == "fp32" or (options.dtype == "auto" and not device.startswith("cuda")):
        return None
    return torch.float16 if options.dtype == "fp16" else torch.bfloat16


def save(result: LayerResult, options: Options, transcoders: Path, logs: Path) -> list[Path]:
    """The seed's files: transcoder_L, mapping_L, metrics_L, progress_L; with n_targets, which it left out."""
    model, layer = result.model, options.layer
    shape = {
        "layer": layer,
        "hidden_dim": result.mapping.shape[0],
        "feature_dim": result.mapping.shape[1],
        "n_targets": model.n_targets,
    }
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    metadata = {"steps": options.steps, **result.summary}
    transcoders.mkdir(parents=True, exist_ok=True)
    paths = [transcoders / f"transcoder_L{layer}.pt", transcoders / f"mapping_L{layer}.pt"]
    mapping = {"mlp_to_clt_mapping": result.mapping}
    _save({**shape, "state_dict": state, "training_metadata": metadata, **mapping}, paths[0])
    description = (
        "mlp_to_clt_mapping[h, f]: mean |next layer's MLP output at dimension h| over the tokens on which feature f is "
        "on; decoder_weights: dec.weight, [hidden_dim * n_targets, feature_dim]"
    )
    _save({**shape, **mapping, "decoder_weights": state["dec.weight"], "description": description}, paths[1])
    metrics = {"layer": layer, "n_targets": model.n_targets, "metrics": result.metrics, "summary": result.summary}
    paths.append(logs / f"metrics_L{layer}.json")
    write_text_atomically(paths[-1], json.dumps(metrics, indent=2) + "\n")
    write_text_atomically(logs / f"progress_L{layer}.txt", f"layer {layer}: {options.steps} steps done\n")
    return paths


def _save(values: dict[str, Any], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    torch.save(values, temporary)
    temporary.replace(path)


def main(options: Options) -> None:
    """Train one layer and write the seed's files."""
    if options.clt_mode or options.cross_layer_depth != 1:
        sys.stderr.write("note: --clt-mode and --cross-layer-depth have no effect: the files say how many targets.\n")
    config = read_config(options.config)
    outputs = config["outputs"]
    device = str(choose_device(options.device))
    files = LayerFiles(Path(outputs["activations_dir"]) / f"L{options.layer}", options.cache_batches)
    training = LayerTraining(
        steps=options.steps,
        lr=options.lr,
        feature_dim=options.feature_dim or int(config["feature_dim"]),
        seq_len=int(config["seq_len"]),
        batch_samples=options.batch_samples,
        reuse_steps=options.reuse_steps,
        topk_share=options.topk_pct if options.use_topk else None,
        val_interval=options.val_interval,
        val_samples=options.val_samples,
        precision=precision(options, device),
        compile=options.compile,
        seed=options.seed,
    )
    result = LayerTrainer(files, training, device).run()
    for path in save(result, options, Path(outputs["transcoders_dir"]), Path(outputs["logs_dir"])):
        print(path)
    last = {name: f"{value:.4g}" for name, value in result.metrics[-1].items()}
    print(f"layer {options.layer}: {last}, dead {result.summary['dead_pct']:.1f} %")
