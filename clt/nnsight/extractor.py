"""crosslayer-coding's extractor: its arguments and its dictionaries of layers, on this project's generator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from clt.activation_generation import ActivationGenerator
from clt.config import ActivationConfig

Layers = dict[int, Float[Tensor, "token d_model"]]

_SEED_DEFAULTS = {"inference_batch_size": 512, "prepend_bos": False, "held_out_fraction": 0.0}


class ActivationExtractorCLT:
    """Streams what a host's MLPs read and wrote, batch by batch.

    Args:
        model_name: Hugging Face id or local folder.
        mlp_input_module_path_template: module path of what is read, with {} for the layer; None: found by structure.
        mlp_output_module_path_template: the same for the MLP output.
        backend: nnsight, as the name says, or plain hooks, which are faster and give the same values.
        options: of `ActivationConfig`, with crosslayer-coding's defaults where they differ (512 rows per forward pass,
            no BOS in front); `nnsight_tracer_kwargs` and `nnsight_invoker_args` as dictionaries.

    Raises:
        ConfigError: an unknown option, or nnsight is asked for and not installed.
    """

    def __init__(
        self,
        model_name: str,
        mlp_input_module_path_template: str | None = None,
        mlp_output_module_path_template: str | None = None,
        *,
        backend: Literal["hooks", "nnsight"] = "nnsight",
        **options: Any,
    ) -> None:
        values = {**_SEED_DEFAULTS, **options}
        if values.get("device") is not None:
            values["device"] = str(values["device"])
        self.config = ActivationConfig.from_dict(
            {
                **values,
                "model_name": model_name,
                "dataset_path": "",
                "mlp_input_module_path_template": mlp_input_module_path_template,
                "mlp_output_module_path_template": mlp_output_module_path_template,
                "backend": backend,
            }
        )
        self._generator = ActivationGenerator(self.config)

    def stream_activations(self, dataset_path: str, **corpus: Any) -> Iterator[tuple[Layers, Layers]]:
        """One pass over a corpus: layer -> what its MLP read, and layer -> what it wrote, for a batch of tokens.

        Args:
            dataset_path: local text, JSONL or parquet, or a Hugging Face data set id.
            corpus: `dataset_split`, `dataset_text_column`, `streaming`, `max_samples`, `cache_path`; see
                `ActivationConfig`.
        """
        config = self.config.replace(dataset_path=dataset_path, **corpus)
        for batch in ActivationGenerator(config, self._generator.host()).batches():
            yield dict(enumerate(batch.inputs)), dict(enumerate(batch.targets))
