"""Live steering for the graph page: one feature changed, the next token and the answer before and after."""

from __future__ import annotations

import io
import threading
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from clt.attribution.view import GraphView
from clt.errors import GraphError
from clt.lm import Decoding, HostInputs, ModelAdapter
from clt.models import BaseTranscoder
from clt.replacement import Intervention, SteeredHost
from clt.serve.dose import Dose
from clt.types import Sample

TOP_TOKENS = 6


class LiveSteering:
    """A host and its transcoder, kept ready; one request at a time.

    The host itself answers, with what the change makes of the transcoder's outputs added (`SteeredHost`): with no
    change it is the plain host, whatever the transcoder misses.
    """

    def __init__(self, adapter: ModelAdapter, transcoder: BaseTranscoder, max_new_tokens: int = 24) -> None:
        """Check that the two belong together.

        Args:
            max_new_tokens: length of the answers shown.
        """
        self._adapter = adapter
        self._steered = SteeredHost(adapter, transcoder)
        self._decoding = Decoding(max_new_tokens=max_new_tokens)
        self._lock = threading.Lock()
        self._plain: tuple[GraphView, Tensor, str] | None = None

    def steer(self, view: GraphView, dose: Dose) -> dict[str, Any]:
        """Most likely next tokens and the greedy answer, `before` and `after`.

        Raises:
            GraphError: the host does not see the prompt as the graph does, or it has no such position.
            ConfigError: there is no such feature.
        """
        if dose.position is not None and not 0 <= dose.position < len(view.tokens):
            raise GraphError(f"Position {dose.position} is not among the prompt's {len(view.tokens)}.")
        with self._lock:
            inputs = self._inputs(view)
            if self._plain is None or self._plain[0] is not view:
                self._plain = (view, *self._run(inputs, None))
            _, before, text_before = self._plain
            after, text_after = self._run(inputs, _intervention(dose))
        tokens = list(dict.fromkeys([*_top(after), *_top(before)]))
        tokens.sort(key=lambda token: -max(float(after[token]), float(before[token])))
        return {
            "before": {"top": self._shares(before, tokens), "text": text_before},
            "after": {"top": self._shares(after, tokens), "text": text_after},
        }

    def _run(self, inputs: HostInputs, change: Intervention | None) -> tuple[Float[Tensor, " token"], str]:
        with torch.no_grad():
            logits = self._steered.logits(inputs, interventions=change)[0, -1]
            with self._steered.active(inputs, interventions=change):
                answer = self._adapter.generate_from(inputs, self._decoding)
        return logits.float().softmax(0).cpu(), self._adapter.decode(answer)[0]

    def _inputs(self, view: GraphView) -> HostInputs:
        if view.token_ids and not view.images:
            return self._adapter.prepare_tokens(torch.tensor([list(view.token_ids)]))
        images = tuple(Image.open(io.BytesIO(image.data)).convert("RGB") for image in view.images)
        inputs = self._adapter.prepare([Sample(id=view.slug, prompt=view.prompt, images=images)])
        n_positions = inputs.input_ids.shape[1]
        if n_positions != len(view.tokens):
            raise GraphError(
                f"The graph has {len(view.tokens)} positions, but this host makes {n_positions} of its prompt. Start "
                "the server with the model the graph was made with."
            )
        return inputs

    def _shares(self, probabilities: Tensor, tokens: list[int]) -> list[dict[str, Any]]:
        texts = [self._adapter.decode([torch.tensor([token])])[0] for token in tokens]
        return [
            {"token": text or f"#{token}", "probability": float(probabilities[token])}
            for text, token in zip(texts, tokens, strict=True)
        ]


def _intervention(dose: Dose) -> Intervention:
    positions = "all" if dose.position is None else (dose.position,)
    return Intervention(dose.layer, dose.feature, dose.mode, dose.value, positions=positions)


def _top(probabilities: Tensor) -> list[int]:
    return probabilities.topk(min(TOP_TOKENS, len(probabilities))).indices.tolist()
