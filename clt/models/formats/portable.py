"""Another project's transcoder as ours, one tensor at a time.

A reader gives the configuration it amounts to here and an iterator over tensors under the names of our parameters
(`W_enc.3`, `b_dec`, `input_scale`, ...). From these a transcoder is built in memory (`build`) or a folder of ours is
written without ever holding more than one tensor (`write`), so that 40 GB of weights need memory for one layer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clt import __version__
from clt.config import CLTConfig
from clt.errors import CheckpointError
from clt.models.checkpoint import CONFIG, WEIGHTS
from clt.models.clt import CrossLayerTranscoder
from clt.types import SAFETENSORS_NAMES

Named = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True)
class Portable:
    """What a reader found.

    `tensors()` yields each parameter once; buffers that are not given (scaling of a transcoder without any) keep
    their neutral value. `notes` say what could not be carried over, for the user to read.
    """

    format: str
    config: CLTConfig
    tensors: Callable[[], Named]
    notes: tuple[str, ...] = ()


def build(portable: Portable, device: torch.device | str | None = None) -> CrossLayerTranscoder:
    """The transcoder in memory.

    Raises:
        CheckpointError: a tensor is missing, not expected, given twice or of another shape.
    """
    model = CrossLayerTranscoder(portable.config, device="meta").to_empty(device=device or "cpu")
    book = _Book(portable)
    with torch.no_grad():
        places = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, neutral in _neutral(model):
            places[name].fill_(neutral)
        for name, value in portable.tensors():
            book.enter(name, value)
            places[name].copy_(value)
    book.close()
    return model


def write(portable: Portable, folder: Path) -> None:
    """`cfg.json` and `clt.safetensors`, tensor by tensor; a transcoder that is already there is replaced at the end.

    Raises:
        CheckpointError: as `build`, or the disk is full; nothing half-written is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{WEIGHTS}.tmp"
    book = _Book(portable)
    shapes = book.expected
    header, size = _header(shapes)
    try:
        with open(temporary, "wb") as file:
            file.write(header)
            file.truncate(len(header) + size)
            starts = _starts(shapes)
            for name, value in portable.tensors():
                book.enter(name, value)
                _put(file, len(header) + starts[name], value.to(shapes[name].dtype))
            for name, neutral in book.not_given():
                _put(file, len(header) + starts[name], torch.full_like(shapes[name], neutral, device="cpu"))
            file.flush()
            os.fsync(file.fileno())
        book.close()
        portable.config.to_json(folder / CONFIG)
        temporary.replace(folder / WEIGHTS)
    except OSError as error:
        raise CheckpointError(f"{folder / WEIGHTS} could not be written ({size / 1e6:,.1f} MB): {error}.") from None
    finally:
        temporary.unlink(missing_ok=True)


class _Book:
    """Which tensors a configuration asks for, and which have come."""

    def __init__(self, portable: Portable) -> None:
        model = CrossLayerTranscoder(portable.config, device="meta")
        self.expected: dict[str, Tensor] = dict(model.state_dict())
        self._format = portable.format
        self._neutral = dict(_neutral(model))
        self._open = set(self.expected) - self._neutral.keys()
        self._seen: set[str] = set()

    def enter(self, name: str, value: Tensor) -> None:
        """One tensor has come."""
        expected = self.expected.get(name)
        if expected is None or name in self._seen:
            why = "is given twice" if name in self._seen else "belongs to no transcoder of this configuration"
            raise CheckpointError(f"{self._format}: {name} {why}.")
        if expected.shape != value.shape:
            raise CheckpointError(
                f"{self._format}: {name} has the shape {tuple(value.shape)}; the configuration asks for "
                f"{tuple(expected.shape)}. Configuration and weights are probably of different runs."
            )
        if torch.promote_types(value.dtype, expected.dtype) not in (expected.dtype, torch.float64):
            raise CheckpointError(
                f"{self._format}: {name} is {value.dtype}, which {expected.dtype} cannot hold; the weights mix types."
            )
        self._seen.add(name)
        self._open.discard(name)

    def not_given(self) -> list[tuple[str, float]]:
        """Buffers that did not come, with the value that changes nothing."""
        return [(name, value) for name, value in self._neutral.items() if name not in self._seen]

    def close(self) -> None:
        """No more will come."""
        if self._open:
            raise CheckpointError(
                f"{self._format}: the weights lack {', '.join(sorted(self._open)[:6])}. They are probably the part of "
                "one rank or one layer, or of another run than their configuration."
            )


def _neutral(model: CrossLayerTranscoder) -> list[tuple[str, float]]:
    """Buffers, with the value that changes nothing."""
    ones = ("input_scale", "target_scale", "target_variance")
    return [(name, 1.0 if name in ones else 0.0) for name, _ in model.named_buffers()]


def _starts(shapes: dict[str, Tensor]) -> dict[str, int]:
    """Where each tensor begins after the header."""
    starts, place = {}, 0
    for name, tensor in shapes.items():
        starts[name] = place
        place += tensor.numel() * tensor.element_size()
    return starts


def _header(shapes: dict[str, Tensor]) -> tuple[bytes, int]:
    """The safetensors header, padded to 8 bytes, and the size of what follows."""
    starts = _starts(shapes)
    entries: dict[str, object] = {"__metadata__": {"crosslayer": __version__}}
    end = 0
    for name, tensor in shapes.items():
        end = starts[name] + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [starts[name], end],
        }  # fmt: skip
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end


def _put(file, place: int, value: Tensor) -> None:
    """Write the bytes of a tensor at a place."""
    file.seek(place)
    file.write(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def no_batch_choice(config: CLTConfig, name: str, as_topk: bool) -> CLTConfig:
    """Batch top-k without its threshold: refused, or taken as a choice per token.

    Raises:
        CheckpointError: the choice depends on the batch, and the files hold no threshold that would replace it.
    """
    if config.activation_fn != "batchtopk":
        return config
    if not as_topk:
        raise CheckpointError(
            f"{name} keeps, at inference too, the largest activations of whatever batch a token is in, and its files "
            "hold no threshold. Import it with --batchtopk-as-topk (the same k for every token), then `clt convert` "
            "finds thresholds on activations."
        )
    return config.replace(
        activation_fn="topk", topk_k=config.batchtopk_k, topk_mode=config.batchtopk_mode, batchtopk_k=None
    )
