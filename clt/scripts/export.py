"""Write a transcoder in another project's format; what a format cannot hold is refused with the way out.

clt export --clt runs/gpt2 --format circuit-tracer --output exports/gpt2
clt export --clt runs/plt --format saelens --output exports/plt --input-hook hook_resid_mid --output-hook hook_mlp_out
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from clt.models import CrossLayerTranscoder
from clt.models.formats.export import Target, export
from clt.models.formats.hooks import Hooks


@dataclass(frozen=True, kw_only=True)
class Options:
    """A transcoder, a format, a folder."""

    clt: str
    """Folder of a transcoder, of ours or of another project, or a repository of the Hub."""
    format: Literal["circuit-tracer", "saelens", "crosslayer-coding", "eleuther", "clt-forge", "ours"]
    """Whose files to write."""
    output: str
    """A new folder."""
    input_hook: str | None = None
    """What the transcoder reads: TransformerLens' name or a module path with {}; None: from its configuration."""
    output_hook: str | None = None
    """What it writes."""
    model_name: str | None = None
    """The host, for the files; None: from its configuration."""
    own_layer_only: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """saelens: encoders with their own layer's decoder, leaving out what features write to later layers."""


def main(options: Options) -> None:
    """Load, fold, write."""
    model = CrossLayerTranscoder.from_pretrained(options.clt, "cpu")
    config = model.config
    hooks = Hooks(
        input=options.input_hook or config.mlp_input_template,
        output=options.output_hook or config.mlp_output_template,
        model_name=options.model_name or config.model_name,
    )
    target = Target(folder=Path(options.output), hooks=hooks, own_layer_only=options.own_layer_only)
    notes = export(model, options.format, target)
    print(f"{options.clt} as {options.format} in {options.output}.")
    for note in notes:
        print(f"Note: {note}")
