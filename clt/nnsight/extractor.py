"""crosslayer-coding's extractor: its arguments and its dictionaries of layers, on this project's generator."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from clt.activation_generation import ActivationGenerator
from clt.config import ActivationConfig

Layers = dict[int, Float[Tensor, "token d_model"]]


class ActivationExtractorCLT:
    """Streams what a host's MLPs read and wrote, batch by batch.

    Args:
        model_name: Hugging Face id or local folder.
        mlp_input_module_path_template: module path of what is read, with {} for the layer; None: found by structure.
        mlp_output_module_path_template: the same for the MLP output.
        device: None: a GPU if there is one.
        model_dtype: None: as saved.
        context_size: tokens per row.
        inference_batch_size: rows per forward pass.
        exclude_special_tokens: leave out BOS, EOS and other special tokens.
        prepend_bos: start each row with BOS.
        nnsight_tracer_kwargs: passed on to nnsight's `trace`.
        nnsight_invoker_args: passed on to nnsight's `invoke`.
        backend: nnsight, as the name says, or plain hooks, which are faster and give the same values.

    Raises:
        ConfigError: nnsight is asked for and not installed.
    """

    def __init__(
        self,
        model_name: str,
        mlp_input_module_path_template: str | None = None,
        mlp_output_module_path_template: str | None = None,
        device: str | None = None,
        model_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        context_size: int = 128,
        inference_batch_size: int = 512,
        exclude_special_tokens: bool = True,
        prepend_bos: bool = False,
        nnsight_tracer_kwargs: dict[str, Any] | None = None,
        nnsight_invoker_args: dict[str, Any] | None = None,
        *,
        backend: Literal["hooks", "nnsight"] = "nnsight",
    ) -> None:
        self.config = ActivationConfig(
            model_name=model_name,
            dataset_path="",
            mlp_input_module_path_template=mlp_input_module_path_template,
            mlp_output_module_path_template=mlp_output_module_path_template,
            device=str(device) if device is not None else None,
            model_dtype=model_dtype,
            context_size=context_size,
            inference_batch_size=inference_batch_size,
            exclude_special_tokens=exclude_special_tokens,
            prepend_bos=prepend_bos,
            nnsight_tracer_kwargs_json=json.dumps(nnsight_tracer_kwargs or {}),
            nnsight_invoker_args_json=json.dumps(nnsight_invoker_args or {}),
            held_out_fraction=0.0,
            backend=backend,
        )
        self._generator = ActivationGenerator(self.config)

    def stream_activations(
        self,
        dataset_path: str,
        dataset_split: str = "train",
        dataset_text_column: str = "text",
        streaming: bool = True,
        max_samples: int | None = None,
        cache_path: str | None = None,
    ) -> Iterator[tuple[Layers, Layers]]:
        """One pass over a corpus: layer -> what its MLP read, and layer -> what it wrote, for a batch of tokens.

        Args:
            dataset_path: local text, JSONL or parquet, or a Hugging Face data set id.
            dataset_split: of a Hugging Face data set.
            dataset_text_column: column that holds the text.
            streaming: do not download a Hugging Face data set first.
            max_samples: stop after this many texts.
            cache_path: cache folder of the Hugging Face data set.
        """
        config = self.config.replace(
            dataset_path=dataset_path,
            dataset_split=dataset_split,
            dataset_text_column=dataset_text_column,
            streaming=streaming,
            max_samples=max_samples,
            cache_path=cache_path,
        )
        for batch in ActivationGenerator(config, self._generator.host()).batches():
            yield dict(enumerate(batch.inputs)), dict(enumerate(batch.targets))
