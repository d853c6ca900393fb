"""How a trained transcoder is evaluated."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from clt.config.base import Config, require_positive
from clt.errors import ConfigError

# Fields of crosslayer-coding's InferenceConfig, which nothing ever read there.
_UNUSED_THERE = (
    *("generation_config_path", "dataset_params_path", "remote_server_config_path", "normalization_method"),
    *("enable_wandb", "wandb_project", "wandb_entity", "wandb_run_name", "wandb_tags", "model_name_for_wandb"),
    "model_world_size_for_load",
)


@dataclass(frozen=True, kw_only=True)
class InferenceConfig(Config):
    """A trained transcoder and the held-out activations it is measured on."""

    clt_checkpoint_path: Annotated[str, tyro.conf.arg(aliases=("--clt",))]
    """Folder with `cfg.json` and `clt.safetensors`."""
    data_path: Annotated[str, tyro.conf.arg(aliases=("--data",))]
    """Folder of held-out activations that `clt generate` wrote."""
    eval_batch_size_tokens: int = 4096
    """Tokens per batch."""
    max_eval_batches: int | None = None
    """Stop after this many batches; None: every token once."""
    device: str | None = None
    """Torch device; None: a GPU if there is one."""
    activation_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type in which activations are read."""
    output_log_dir: str | None = None
    """Folder for `evaluation.json` and the figures; None: the transcoder's."""
    data_source_type: Annotated[Literal["local_manifest"], tyro.conf.Suppress] = "local_manifest"
    """Where activations come from."""

    def __post_init__(self) -> None:
        require_positive(
            "InferenceConfig",
            eval_batch_size_tokens=self.eval_batch_size_tokens,
            max_eval_batches=self.max_eval_batches,
        )

    @classmethod
    def migrate(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Read crosslayer-coding's files; of its sources only folders of activations exist.

        Raises:
            ConfigError: another source.
        """
        source = values.get("data_source_type", "local_manifest")
        if source != "local_manifest":
            raise ConfigError(
                f"InferenceConfig.data_source_type = {source!r}: only 'local_manifest' can be evaluated. Write the "
                "activations with `clt generate`, then give their folder as data_path."
            )
        return {name: value for name, value in values.items() if name not in _UNUSED_THERE}
