"""The names users of vlm-clt-training know; its two replacement models are one class here, for any host."""

from clt.data.vlm_datasets import MultimodalDataset, VLMActivationDataset
from clt.lm.vlm_hooks import get_vlm_hookpoints, register_activation_hooks
from clt.replacement import ReplacementModel

VLMReplacementModel = ReplacementModel
LLaVAReplacementModel = ReplacementModel

__all__ = [
    "LLaVAReplacementModel",
    "MultimodalDataset",
    "VLMActivationDataset",
    "VLMReplacementModel",
    "get_vlm_hookpoints",
    "register_activation_hooks",
]
