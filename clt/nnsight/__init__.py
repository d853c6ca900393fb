"""crosslayer-coding's name for reading a host; `clt generate` and `ActivationGenerator` are the ways to do it now."""

from clt.nnsight.extractor import ActivationExtractorCLT

__all__ = ["ActivationExtractorCLT"]
