"""The replacement model: a transcoder in place of the host's MLPs, and how faithful that is."""

from clt.replacement.bootstrap import Measure
from clt.replacement.fidelity import FidelityReport, measure_fidelity
from clt.replacement.frozen import steered_logits
from clt.replacement.host import SteeredHost, SteeredNeurons
from clt.replacement.intervention import Gains, Intervene, Intervention, Interventions
from clt.replacement.model import ReplacementModel
from clt.replacement.probe import FidelityProbe
from clt.replacement.recording import SampleFeatures
from clt.replacement.statistics import feature_std

__all__ = [
    "FidelityProbe",
    "FidelityReport",
    "Gains",
    "Intervene",
    "Intervention",
    "Interventions",
    "Measure",
    "ReplacementModel",
    "SampleFeatures",
    "SteeredHost",
    "SteeredNeurons",
    "feature_std",
    "measure_fidelity",
    "steered_logits",
]
