"""What everything that acts on a running host has in common: logits, and answers token by token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from jaxtyping import Float, Integer
from torch import Tensor

from clt.lm import Decoding, HostInputs, ModelAdapter, OnText
from clt.replacement.intervention import Intervention, Interventions
from clt.replacement.passes import check_reach
from clt.types import Sample


class Steerable(ABC):
    """A host with something put in place while it runs, and interventions on that."""

    adapter: ModelAdapter
    layers: Sequence[int]
    """Those whose MLP outputs may differ from the host's."""

    def __repr__(self) -> str:
        replaced = f"{len(self.layers)} of {self.adapter.n_layers} MLPs"
        return f"{type(self).__name__}({replaced} of {self.adapter!r})"

    @abstractmethod
    def active(
        self, inputs: HostInputs | None = None, *, interventions: Interventions | None = None, cached: bool = True
    ) -> AbstractContextManager[None]:
        """Put it in place while the block runs; whatever runs the host there runs this.

        Args:
            inputs: the rows that will run, in one pass or token by token; needed for interventions at positions.
            interventions: what to change.
            cached: whether passes go on where the one before ended; without a KV cache each starts anew.
        """

    def logits(
        self, inputs: HostInputs, *, interventions: Interventions | None = None, **how: Any
    ) -> Float[Tensor, "row position vocabulary"]:
        """What is predicted after each position.

        Args:
            how: whatever else `active` takes.
        """
        _check_all_reach(interventions, inputs)
        with self.active(inputs, interventions=interventions, **how):
            return self.adapter.logits(inputs)

    def generate_ids(
        self,
        samples: Sequence[Sample],
        *,
        interventions: Interventions | None = None,
        batch_size: int = 16,
        streaming: OnText | None = None,
        **how: Any,
    ) -> list[Integer[Tensor, " _position"]]:
        """Answers as token ids on the CPU, up to and including the first end-of-answer token.

        Args:
            interventions: recomputed at every generated token.
            streaming: called with (sample id, new text) as answers grow.
            how: `max_new_tokens` and whatever else `Decoding` has: temperature, top_p, seed, use_cache.
        """
        decoding = Decoding(**how)
        answers = []
        for inputs in self.adapter.prompt_batches(samples, batch_size):
            _check_all_reach(interventions, inputs, decoding.max_new_tokens)
            with self.active(inputs, interventions=interventions, cached=decoding.use_cache):
                answers += self.adapter.generate_from(inputs, decoding, streaming)
        return answers

    def generate(self, samples: Sequence[Sample], **options: Any) -> list[str]:
        """Answers as text, without special tokens; options as `generate_ids`."""
        return self.adapter.decode(self.generate_ids(samples, **options))


def _check_all_reach(interventions: Interventions | None, inputs: HostInputs, n_new: int = 0) -> None:
    """See that every intervention has somewhere to act."""
    each = interventions if isinstance(interventions, Sequence) else (interventions,)
    for one in each:
        if isinstance(one, Intervention):
            check_reach(one.name, one.positions, inputs, n_new)
