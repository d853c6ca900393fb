"""Scale neurons of a plain host as a patch says, and save it: steering without any transcoder at run time.

clt apply-neurons --model world:shapes --patch analysis/shapes_neuron_patch.json --output patched

The factors are folded into the columns of each MLP's last matrix, so the saved model runs at the host's own speed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clt.config.base import Config
from clt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Options(Config):
    """Which host, which patch, where to."""

    model: str
    """Host that the patch was made for: an id on the Hub, a folder, or world:NAME."""
    patch: Path
    """JSON file of `clt phase steer`."""
    output: Path
    """New folder for the patched host."""
    dtype: str | None = None
    """float32, bfloat16, float16; None: as saved."""
    device: str | None = None
    """Torch device; None: a GPU if there is one."""


def main(options: Options) -> None:
    """Patch, save, and say what was scaled."""
    from clt.activation_generation.corpus import open_model
    from clt.discovery.neurons import NeuronPatch, apply_patch

    if options.output.exists() and any(options.output.iterdir()):
        raise ConfigError(f"{options.output} is not empty. Choose a new folder; the host there may be in use.")
    patch = NeuronPatch.load(options.patch)
    adapter = open_model(options.model, dtype=options.dtype, device=options.device)
    n_scaled = apply_patch(adapter, patch)
    adapter.model.save_pretrained(options.output)
    saver = adapter.processor or adapter.tokenizer
    assert saver is not None
    saver.save_pretrained(options.output)
    print(f"{options.output}: {n_scaled} neurons of {options.model} scaled; load it like any other host.")
