"""How a trained transcoder is evaluated."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from clt.config.base import Config, require_positive


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

    def __post_init__(self) -> None:
        require_positive(
            "InferenceConfig",
            eval_batch_size_tokens=self.eval_batch_size_tokens,
            max_eval_batches=self.max_eval_batches,
        )
