"""Opening hosts from disk or the Hub, quietly, with errors that say what to do."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import logging

from clt.errors import HostModelError
from clt.types import choose_device


class LoadedHost(NamedTuple):
    """What `ModelAdapter` is made of."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    processor: ProcessorMixin | None


def load_host(
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype | None,
    device: torch.device | str | None,
    revision: str | None,
    **model_options: Any,
) -> LoadedHost:
    """Model, tokenizer and (if it sees images) processor, in evaluation mode, without gradients for the weights.

    Raises:
        HostModelError: not found, not readable, of a kind that neither completes text nor answers about images.
    """
    name = str(name_or_path)
    with quietly():
        config = host_config(name, revision=revision)
        is_multimodal = sees_images(config)
        processor = None
        if is_multimodal:
            processor = opened(name, "processor", AutoProcessor.from_pretrained, revision=revision)
            if not isinstance(processor, ProcessorMixin):
                raise HostModelError(f"Cannot open the processor of host {name!r}: {_remedy(name, 'processor')}")
            tokenizer = processor.tokenizer  # pyright: ignore[reportAttributeAccessIssue]
        else:
            tokenizer = opened(name, "tokenizer", AutoTokenizer.from_pretrained, revision=revision)
        loader = AutoModelForImageTextToText if is_multimodal else AutoModelForCausalLM
        model, report = opened(
            name,
            "weights",
            loader.from_pretrained,
            revision=revision,
            dtype="auto" if dtype is None else dtype,
            output_loading_info=True,
            **model_options,
        )
    _check_complete(name, report)
    if "device_map" not in model_options:
        model = model.to(choose_device(device))
    return LoadedHost(model.eval().requires_grad_(False), tokenizer, processor)


def host_config(name: str, *, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of a model that can be a host.

    Raises:
        HostModelError: not found, not readable, or of a kind that neither completes text nor answers about images.
    """
    config = opened(name, "configuration", AutoConfig.from_pretrained, revision=revision)
    if not sees_images(config) and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise HostModelError(
            f"{name} is a {config.model_type!r} model, which neither completes text nor answers about images. "
            "A host is a causal language model or an image-text-to-text model."
        )
    return config


def sees_images(config: PreTrainedConfig) -> bool:
    """Whether a host takes images; some configurations serve both kinds and say so by a vision part."""
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return False
    return type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "vision_config", None) is not None


@contextmanager
def quietly() -> Iterator[None]:
    """No progress bars, log lines or warnings from the Hugging Face libraries meanwhile."""
    level, hub_level = logging.get_verbosity(), hub_logging.get_verbosity()
    had_bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if had_bars:
            logging.enable_progress_bar()


def opened(name: str, part: str, open_: Any, **options: Any) -> Any:
    """Call a `from_pretrained`, turning its many exceptions into one with a way out."""
    try:
        return open_(name, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip() or type(error).__name__
        raise HostModelError(f"Cannot open the {part} of host {name!r}: {_remedy(name, part)}\n({reason})") from error


def _remedy(name: str, part: str) -> str:
    """The likely cause and what to do about it."""
    path = Path(name)
    if path.is_dir():
        present = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
        return (
            f"the folder is there, but it holds no readable {part}. It has: {present}. A host's folder is what "
            "`save_pretrained` of model and tokenizer (or processor) writes."
        )
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        return "there is no such folder. Check the path, or give the id of a model on the Hugging Face Hub."
    return (
        "it is no folder here, and the Hugging Face Hub cannot give it: no connection and not in the local cache, no "
        "such id, or a gated model. Check the spelling; online, `hf download "
        f"{name}` fetches it (after `hf auth login` if it is gated); offline, give the path of a local folder."
    )


def _check_complete(name: str, report: dict[str, Any]) -> None:
    """A host with random weights in it would look like a host."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise HostModelError(
            f"Host {name!r} lacks {len(missing)} of its weights, among them {', '.join(missing[:3])}. They would be "
            "random. The files were probably cut off or are of another model; download or save them again."
        )
