"""One module per command: a dataclass `Options` and `main(options)`."""
