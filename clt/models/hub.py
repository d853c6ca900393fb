"""Transcoders on the Hugging Face Hub: downloaded with a pinned revision, uploaded with a card that says what they are.

The conventions are those of huggingface_hub's model mixins (`from_pretrained`, `save_pretrained`, `push_to_hub`);
token and address come from the environment (HF_TOKEN, HF_ENDPOINT), as its own tools do it. The size of
each download is checked by the client, the sha256 of large files here.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

from httpx import HTTPError
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from clt.config import CLTConfig, TrainingConfig
from clt.config.base import write_text_atomically
from clt.config.flags import flags_of
from clt.config.training_config import BOOKKEEPING
from clt.errors import CheckpointError, ConfigError
from clt.models.checkpoint import CONFIG, WEIGHTS

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
# What transcoders consist of; other files of a repository are not downloaded.
_WANTED = ("*.safetensors", "*.json", "*.yaml", "*.npz", "*.pt")
_CARD = "README.md"
# Fields of the transcoder that a training takes from its activations.
_DECIDED_BY_DATA = frozenset(
    {"num_layers", "d_model", "model_name", "expected_input_dtype", "mlp_input_template", "mlp_output_template"}
)


def local_folder(path_or_repo: str | Path, revision: str | None = None) -> Path:
    """A folder as it is, or the download of a repository.

    Args:
        path_or_repo: a folder, or OWNER/NAME.
        revision: commit, branch or tag; None: main.

    Raises:
        CheckpointError: neither a folder nor a repository that can be reached.
    """
    folder = Path(path_or_repo)
    name = str(path_or_repo)
    if folder.exists() or not _REPOSITORY.fullmatch(name):
        if revision is not None:
            raise ConfigError(f"revision = {revision!r} belongs to repositories of the Hub; {name} is a local folder.")
        return folder
    try:
        downloaded = Path(snapshot_download(name, revision=revision, allow_patterns=list(_WANTED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, HTTPError) as error:
        raise CheckpointError(
            f"{name} is no folder here, and on the Hub it could not be read"
            f"{'' if revision is None else f' at revision {revision}'}: {str(error).splitlines()[0]}"
        ) from None
    _verify(downloaded)
    return downloaded


def _verify(folder: Path) -> None:
    """Compare large files with the sha256 that the Hub names them by, which the client's cache keeps as file name."""
    for path in sorted(folder.rglob("*")):
        expected = path.resolve().name
        if not path.is_file() or not re.fullmatch("[0-9a-f]{64}", expected):
            continue
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            path.resolve().unlink()
            raise CheckpointError(
                f"{path.name} was downloaded with the sha256 {found}, the Hub says {expected}. The copy was "
                "deleted; run again to fetch it anew."
            )


def push_folder(folder: Path, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Put a transcoder's folder on the Hub, repository made if need be; returns its address.

    A folder without README.md gets a generated card first.

    Raises:
        CheckpointError: the folder holds no transcoder, or the Hub refuses.
    """
    if not (folder / WEIGHTS).exists():
        raise CheckpointError(f"{folder} holds no {WEIGHTS}, so there is no transcoder to upload.")
    if not (folder / _CARD).exists():
        write_text_atomically(folder / _CARD, model_card(folder, repo_id))
    api = HfApi(token=token)
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=[CONFIG, WEIGHTS, _CARD, "run.json", "evaluation.json"],
            commit_message="Upload a cross-layer transcoder",
        )  # fmt: skip
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, HTTPError) as error:
        raise CheckpointError(f"{repo_id} could not be written: {str(error).splitlines()[0]}") from None
    return str(address)


def model_card(folder: Path, name: str, license: str | None = None) -> str:
    """README.md of a transcoder: what it is, how it was made, what was measured; only what its files say.

    Args:
        license: of the weights; None: left out, for the uploader to decide.
    """
    config = CLTConfig.from_json(folder / CONFIG)
    run = _json(folder / "run.json")
    header = ["---", "library_name: crosslayer", "tags:", "- cross-layer-transcoder", "- interpretability"]
    header += [f"base_model: {config.model_name}"] if config.model_name and "/" in config.model_name else []
    header += [f"license: {license}"] if license else []
    start = "its own" if config.first_target == 0 else "the next"
    rows = {
        "Host": config.model_name or "not recorded",
        "Reads, writes": f"{config.mlp_input_template or '?'}, {config.mlp_output_template or '?'}",
        "Layers, features per layer": f"{config.num_layers}, {config.num_features:,}",
        "Activation": config.activation_fn,
        "A feature writes to": f"{config.span} MLP outputs, from {start} layer on",
        "Data": _data(run),
        "Made with": ", ".join(f"{key} {value}" for key, value in run.get("versions", {}).items()) or "not recorded",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    use = f'from clt.models import CrossLayerTranscoder\n\ntranscoder = CrossLayerTranscoder.from_pretrained("{name}")'
    parts = ["\n".join([*header, "---"]), f"# {name}", "A cross-layer transcoder.", f"| | |\n|---|---|\n{table}"]
    parts += [_measured(folder), f"```python\n{use}\n```", _made_again(run)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _data(run: dict[str, Any]) -> str:
    """Where the activations were, and what identifies them."""
    training = run.get("options", {}).get("training", {})
    places = [training.get(name) for name in ("activation_path", "server_url", "dataset_id")]
    fingerprint = run.get("data", {}).get("fingerprint")
    found = [str(place) for place in places if place] + ([f"fingerprint {fingerprint}"] if fingerprint else [])
    return ", ".join(found) or "not recorded"


def training_command(run: dict[str, Any]) -> list[str] | None:
    """The words of the command that trains the same weights again; None if a run.json is not of a training.

    Only options that decide the result and differ from the defaults of this version are named.
    """
    options = run.get("options", {})
    if "clt" not in options or "training" not in options:
        return None
    clt, training = CLTConfig.from_dict(options["clt"]), TrainingConfig.from_dict(options["training"])
    places = {
        "--data": training.activation_path,
        "--server-url": training.server_url,
        "--dataset-id": training.dataset_id,
        "--held-out": options.get("held_out"),
    }
    words = ["clt", "train", "--output-dir", "runs/again"]
    words += [word for flag, place in places.items() if place for word in (flag, place)]
    words += flags_of(clt, _DECIDED_BY_DATA)
    return words + flags_of(training, BOOKKEEPING | {"normalization_method"})  # the latter is in `clt`, too


def _made_again(run: dict[str, Any]) -> str:
    """How to train it again."""
    command, typed = training_command(run), run.get("command", [])
    if command is not None:
        shown = " ".join(f"\\\n  {each}" if each.startswith("--") else each for each in map(shlex.quote, command))
        ways = f"```sh\n{shown}\n```\n\nor, with every option written out, `clt train --config run.json`."
        return f"The same weights, with the data at hand, are trained by\n\n{ways}"
    if typed and Path(typed[0]).name in ("clt", "__main__.py"):
        return f"It was made by\n\n```sh\n{shlex.join(['clt', *typed[1:]])}\n```"
    return "How it was made is not recorded beside the weights."


def _measured(folder: Path) -> str:
    """The held-out figures, if they were measured."""
    found = _json(folder / "evaluation.json")
    names = [name for name in ("nmse", "explained_variance", "l0", "dead_share", "n_tokens") if name in found]
    if not names:
        return "No held-out evaluation lies beside the weights (`clt evaluate`)."
    rows = "\n".join(f"| {name} | {found[name]:{',' if name == 'n_tokens' else '.4g'}} |" for name in names)
    return f"Held-out tokens:\n\n| | |\n|---|---|\n{rows}"


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
