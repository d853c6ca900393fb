"""Weights of other projects as ours."""

from clt.models.formats.crosslayer_coding import is_crosslayer_coding, read_crosslayer_coding

__all__ = ["is_crosslayer_coding", "read_crosslayer_coding"]
