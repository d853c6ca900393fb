"""Transcoders: tensors in, tensors out. They know no file, no rank and no host."""

from clt.models.activations import JumpReLU, jumprelu
from clt.models.base import BaseTranscoder
from clt.models.clt import CrossLayerTranscoder
from clt.models.standardise import ActivationStatistics

__all__ = ["ActivationStatistics", "BaseTranscoder", "CrossLayerTranscoder", "JumpReLU", "jumprelu"]
