"""The host model: found by structure, read, replaced. The one place that imports transformers."""

from clt.lm.adapter import ModelAdapter
from clt.lm.forms import PromptForm
from clt.lm.generation import Decoding, OnText
from clt.lm.hooks import Captured, Predict
from clt.lm.inputs import HostInputs

__all__ = ["Captured", "Decoding", "HostInputs", "ModelAdapter", "OnText", "Predict", "PromptForm"]
