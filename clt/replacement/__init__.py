"""The replacement model: a transcoder in place of the host's MLPs, and how faithful that is."""

from clt.replacement.bootstrap import Measure
from clt.replacement.fidelity import FidelityReport, measure_fidelity
from clt.replacement.model import ReplacementModel

__all__ = ["FidelityReport", "Measure", "ReplacementModel", "measure_fidelity"]
