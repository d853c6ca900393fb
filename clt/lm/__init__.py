"""The host model: found by structure, read, replaced. The one place that imports transformers."""

from clt.lm.adapter import ModelAdapter
from clt.lm.hooks import Captured, Predict
from clt.lm.inputs import HostInputs

__all__ = ["Captured", "HostInputs", "ModelAdapter", "Predict"]
