"""A training run that ends where a kill between two steps would end it."""

from collections.abc import Mapping


class InterruptAt:
    """A tracker that stops the run at a step, before that step's checkpoint is written."""

    def __init__(self, step: int) -> None:
        self.at = step

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step == self.at:
            raise InterruptedError

    def close(self) -> None:
        pass
