"""The result as crosslayer-coding names it: `final/clt.pt` (a plain state dict) and `final/cfg.json`."""

import os
from pathlib import Path

import torch

from clt.models import CrossLayerTranscoder

FINAL = "final"


def write_final_folder(model: CrossLayerTranscoder, run: Path) -> None:
    """Write both files, weights last and in one step; `CrossLayerTranscoder(config).load_state_dict` takes them."""
    folder = run / FINAL
    model.config.to_json(folder / "cfg.json")
    save_state_dict(model, folder / "clt.pt")


def save_state_dict(model: torch.nn.Module, path: Path) -> None:
    """`torch.save` of a state dict on the CPU, in one step; `torch.load(..., weights_only=True)` reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        torch.save({name: value.detach().cpu() for name, value in model.state_dict().items()}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
