"""From a corpus and a host to a data set of activations."""

from clt.activation_generation.generator import ActivationGenerator

__all__ = ["ActivationGenerator"]
