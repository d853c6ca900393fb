"""Every option of the library, as frozen dataclasses. Imports no torch."""

from clt.config.activation_config import ActivationConfig
from clt.config.base import Config
from clt.config.clt_config import CLTConfig
from clt.config.eleuther import eleuther_config
from clt.config.inference_config import InferenceConfig
from clt.config.parallel_config import ParallelConfig
from clt.config.training_config import TrainingConfig

__all__ = [
    "ActivationConfig",
    "CLTConfig",
    "Config",
    "InferenceConfig",
    "ParallelConfig",
    "TrainingConfig",
    "eleuther_config",
]
