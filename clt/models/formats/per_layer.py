"""Transcoders that were made layer by layer: SAELens folders, circuit-tracer sets, Gemma Scope archives.

    SAELens         a folder per layer: cfg.json, sae_weights.safetensors; W_enc [d_model, feature]
    circuit-tracer  config.yaml, layer_{i}.safetensors; W_enc [feature, d_model]
    Gemma Scope     .../layer_{i}/.../params.npz; W_enc [d_model, feature]

Each writes only to its own layer: a CLT with the window (0, 1). W_dec is [feature, d_model] everywhere; a skip
connection adds x W_skip^T.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clt.config import CLTConfig
from clt.errors import CheckpointError
from clt.models.formats.files import TensorFile, inside, log_of_threshold, natural_order, read_json, stored_as
from clt.models.formats.portable import Named, Portable


@dataclass(frozen=True)
class Layer:
    """One layer's weights, as ours lie: `W_enc`, `W_dec` [feature, d_model]; `W_skip` multiplies from the right."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None = None
    W_skip: Tensor | None = None


def join(name: str, count: int, read: Callable[[int], Layer], notes: tuple[str, ...] = (), **options: Any) -> Portable:
    """All layers as one transcoder; each is read when it is needed.

    Args:
        options: further fields of its configuration.
    """
    first = read(0)
    features, width = first.W_enc.shape
    family = "relu" if first.threshold is None else "jumprelu"
    config = CLTConfig(**{
        "num_features": features, "num_layers": count, "d_model": width, "n_targets": 1, "activation_fn": family,
        "normalization_method": "none", "skip_connection": "none" if first.W_skip is None else "own",
        "clt_dtype": stored_as(first.W_enc, first.b_enc, first.W_dec, first.b_dec), **options,
    })  # fmt: skip

    def tensors() -> Named:
        biases = []
        for index in range(count):
            layer = read(index)
            yield f"W_enc.{index}", layer.W_enc
            yield f"b_enc.{index}", layer.b_enc
            yield f"W_dec.{index}", layer.W_dec[:, None]
            if layer.threshold is not None:
                yield f"log_threshold.{index}", log_of_threshold(layer.threshold, f"Layer {index}")
            if layer.W_skip is not None:
                yield f"W_skip.{index}", layer.W_skip[None]
            biases.append(layer.b_dec.clone())  # a view would keep the whole file in memory
        yield "b_dec", torch.stack(biases)

    return Portable(name, config, tensors, notes)


class SAELens:
    """Folders of SAELens transcoders."""

    NAME = "saelens"
    _SKIP = ("skip_transcoder", "jumprelu_skip_transcoder")
    _KNOWN = ("transcoder", "jumprelu_transcoder", *_SKIP)

    @classmethod
    def detect(cls, folder: Path) -> bool:
        """Whether a folder is one transcoder of SAELens or holds one per layer."""
        return bool(cls._folders(folder))

    @classmethod
    def read(cls, folder: Path) -> Portable:
        """All layers of a folder.

        Raises:
            CheckpointError: a layer is missing, no transcoder, or normalises its inputs.
        """
        by_layer = {cls._layer(each): each for each in cls._folders(folder)}
        _require_all_layers(folder, by_layer)
        configs = {layer: cls._config(path) for layer, path in by_layer.items()}
        metadata = configs[0].get("metadata", {})
        return join(
            cls.NAME, len(by_layer), lambda layer: cls._one(by_layer[layer], configs[layer]),
            model_name=metadata.get("model_name"), mlp_input_template=_hook(metadata.get("hook_name")),
            mlp_output_template=_hook(metadata.get("hook_name_out")),
        )  # fmt: skip

    @staticmethod
    def _folders(folder: Path) -> list[Path]:
        found = [path.parent for pattern in ("", "*/") for path in folder.glob(f"{pattern}sae_weights.safetensors")]
        return [each for each in found if (each / "cfg.json").exists()]

    @staticmethod
    def _layer(folder: Path) -> int:
        """From the hook's name, else from the folder's."""
        values = read_json(folder / "cfg.json")
        hook = str(values.get("metadata", {}).get("hook_name") or values.get("hook_name") or folder.name)
        found = re.search(r"\d+", hook)
        if found is None:
            raise CheckpointError(f"{folder}: neither its cfg.json (hook_name) nor its name tells the layer.")
        return int(found[0])

    @classmethod
    def _config(cls, folder: Path) -> dict[str, Any]:
        values = read_json(folder / "cfg.json")
        for field, allowed in (
            ("architecture", cls._KNOWN), ("normalize_activations", ("none", None)),
            ("apply_b_dec_to_input", (False, None)), ("reshape_activations", ("none", None)),
        ):  # fmt: skip
            if values.get(field) not in allowed:
                raise CheckpointError(
                    f"{folder / 'cfg.json'}: {field} = {values.get(field)!r} has no counterpart here. Importable are "
                    f"transcoders ({', '.join(cls._KNOWN)}) without normalisation of their inputs."
                )
        return values

    @classmethod
    def _one(cls, folder: Path, values: dict[str, Any]) -> Layer:
        file = TensorFile(folder / "sae_weights.safetensors")
        width, features = values["d_in"], values["d_sae"]
        jumps = values["architecture"].startswith("jumprelu")
        return Layer(
            file.tensor("W_enc", width, features).T, file.tensor("b_enc", features),
            file.tensor("W_dec", features, width), file.tensor("b_dec", width),
            file.tensor("threshold", features) if jumps else None,
            file.tensor("W_skip", width, width).T if values["architecture"] in cls._SKIP else None,
        )  # fmt: skip


class GemmaScope:
    """Gemma Scope's archives, one chosen per layer."""

    NAME = "gemma-scope"

    @classmethod
    def detect(cls, folder: Path) -> bool:
        """Whether there is an archive anywhere in a folder."""
        return next(folder.rglob("params.npz"), None) is not None

    @classmethod
    def read(cls, folder: Path) -> Portable:
        """All layers of a folder.

        Raises:
            CheckpointError: a layer is missing or there several times.
        """
        by_layer: dict[int, Path] = {}
        for path in sorted(folder.rglob("params.npz")):
            found = re.search(r"layer_(\d+)", str(path.relative_to(folder)))
            if found is None:
                raise CheckpointError(f"{path}: no part of its path is layer_NUMBER, so its layer is unknown.")
            if int(found[1]) in by_layer:
                raise CheckpointError(
                    f"{folder} holds {by_layer[int(found[1])].relative_to(folder)} and {path.relative_to(folder)} for "
                    f"layer {found[1]}. Keep one per layer (the width and L0 you want)."
                )
            by_layer[int(found[1])] = path
        _require_all_layers(folder, by_layer)
        return join(cls.NAME, len(by_layer), lambda layer: cls._one(TensorFile(by_layer[layer])))

    @staticmethod
    def _one(file: TensorFile) -> Layer:
        width, features = file.shape("W_enc")
        return Layer(
            file.tensor("W_enc").T, file.tensor("b_enc", features), file.tensor("W_dec", features, width),
            file.tensor("b_dec", width), file.tensor("threshold", features),
        )  # fmt: skip


class CircuitTracerSet:
    """circuit-tracer's `transcoder_set` with its files in the folder."""

    NAME = "circuit-tracer"

    @staticmethod
    def files(folder: Path) -> list[Path]:
        """`layer_0.safetensors` and on."""
        return [folder / name for name in natural_order(path.name for path in folder.glob("layer_*.safetensors"))]

    @classmethod
    def read(cls, folder: Path, listed: object = None, **options: Any) -> Portable:
        """All layers of a folder.

        Args:
            listed: `transcoders` of its configuration, a file per layer; None: `layer_{i}.safetensors`.
            options: further fields of the configuration.
        """
        files = {int(re.findall(r"\d+", path.name)[0]): path for path in cls.files(folder)}
        if listed is not None:
            files = dict(enumerate(cls._listed(folder, listed)))
        _require_all_layers(folder, files)
        return join(cls.NAME, len(files), lambda layer: cls._one(TensorFile(files[layer])), **options)

    @staticmethod
    def _listed(folder: Path, listed: object) -> list[Path]:
        """The files that a configuration names, if they are in its folder."""
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise CheckpointError(f"{folder}: transcoders in config.yaml is no list of files but {listed!r}.")
        elsewhere = [name for name in listed if "://" in name]
        if elsewhere:
            raise CheckpointError(
                f"{folder}: config.yaml names {elsewhere[0]} and {len(elsewhere) - 1} other files elsewhere. Download "
                "them beside it as layer_0.safetensors and on, and take `transcoders` out of it."
            )
        return [inside(folder, name) for name in listed]

    @staticmethod
    def _one(file: TensorFile) -> Layer:
        features, width = file.shape("W_enc")
        theta = "activation_function.threshold"
        return Layer(
            file.tensor("W_enc"), file.tensor("b_enc", features), file.tensor("W_dec", features, width),
            file.tensor("b_dec", width), file.tensor(theta).expand(features) if theta in file else None,
            file.tensor("W_skip", width, width).T if "W_skip" in file else None,
        )  # fmt: skip


def _require_all_layers(folder: Path, by_layer: dict[int, Path]) -> None:
    missing = sorted(set(range(max(by_layer, default=-1) + 1)) - by_layer.keys())
    if missing or not by_layer:
        raise CheckpointError(
            f"{folder} holds layers {sorted(by_layer)}; {missing or 'all'} are missing. A replacement needs all layers "
            "of the host from 0 on, and what is not there is never filled with zeros. Add the missing folders."
        )


def _hook(name: str | None) -> str | None:
    """A hook's name with {} for the layer."""
    return None if name is None else re.sub(r"\d+", "{}", name, count=1)
