"""Write another project's transcoder as ours: `cfg.json` and `clt.safetensors`.

Known: circuit-tracer (CLTs and per-layer sets), crosslayer-coding, EleutherAI, CLT-Forge, OpenMOSS,
crosslayer-transcoder, vlm-clt-training (transcoder_L*.pt), SAELens and Gemma Scope transcoders. Whose it is, is found
out from the files. Tensors are written one after the other, so a folder of 40 GB needs memory for one layer.

clt import downloads/clt-gemma runs/gemma
clt import someone/clt-on-the-hub runs/clt --revision v1
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from clt.errors import ConfigError
from clt.models.checkpoint import CONFIG, WEIGHTS
from clt.models.formats import read, write
from clt.models.hub import local_folder


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where from and where to."""

    source: tyro.conf.Positional[str]
    """Folder of another project's transcoder, or a repository of the Hub (OWNER/NAME)."""
    output: tyro.conf.Positional[str]
    """Folder for ours."""
    format: str | None = None
    """Whose it is; None: found out from its files."""
    revision: str | None = None
    """Commit, branch or tag on the Hub; None: main."""
    norm_stats: str | None = None
    """crosslayer-coding: norm_stats.json of the data it was trained on; None: beside the weights."""
    host_layers: int | None = None
    """vlm-clt-training: how many layers the host has; None: one more than there are files."""
    batchtopk_as_topk: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Batch top-k without a stored threshold: keep the same k for every token."""


def main(options: Options) -> None:
    """Read, write, say what it is."""
    folder = Path(options.output)
    if (folder / WEIGHTS).exists():
        raise ConfigError(f"{folder} holds a transcoder already ({WEIGHTS}). Choose a new folder.")
    given = {
        "norm_stats": options.norm_stats and Path(options.norm_stats),
        "host_layers": options.host_layers,
        "batchtopk_as_topk": options.batchtopk_as_topk,
    }
    source = local_folder(options.source, options.revision)
    portable = read(source, options.format, **{name: value for name, value in given.items() if value})
    write(portable, folder)
    config = portable.config
    print(
        f"{portable.format}: {config.num_layers} layers of {config.num_features:,} features, d_model {config.d_model}, "
        f"{config.activation_fn}, {config.span} target{'s' * (config.span > 1)} per feature "
        f"-> {folder} ({CONFIG}, {WEIGHTS})."
    )
    for note in portable.notes:
        print(f"Note: {note}")
