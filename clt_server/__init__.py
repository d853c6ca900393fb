"""The activation server under the name crosslayer-coding's users know."""
