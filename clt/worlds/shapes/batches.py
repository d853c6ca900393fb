"""Training batches: many questions packed behind one image, so that each picture is paid for once.

A packed row is a prefix with the image tokens, then segments (request and answer). A segment sees the prefix and
itself, never its neighbours, and its positions go on from the prefix: it cannot tell that it was packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor
from transformers import LlavaProcessor

from clt.worlds.shapes import text
from clt.worlds.shapes.draw import pixels
from clt.worlds.shapes.scene import COLOURS, KINDS, N_CELLS, Scene, scene
from clt.worlds.tokens import EOS_ID, IMAGE_ID, PAD_ID

IGNORED = -100
"""Label of a place nothing is to be learned from (torch's own convention)."""


class PackedBatch(NamedTuple):
    """Rows of token ids with who sees whom; `labels[p]` is the token to predict at p."""

    ids: Int64[Tensor, "row position"]
    positions: Int64[Tensor, "row position"]
    visible: Bool[Tensor, "row 1 position position"]
    labels: Int64[Tensor, "row position"]


class Images(NamedTuple):
    """Pictures and, for each cell, which kind and colour stands there (the number of kinds or colours: nothing)."""

    pixel_values: Float[Tensor, "row channel height width"]
    kind: Int64[Tensor, "row cell"]
    colour: Int64[Tensor, "row cell"]


def scenes(first: int, n: int, seed: int) -> list[Scene]:
    """Scenes of the training split, numbered on."""
    return [scene("train", index, seed) for index in range(first, first + n)]


def images(batch: Sequence[Scene]) -> Images:
    """Pictures as the processor gives them (test: identical), without its detour over single images."""
    stacked = torch.from_numpy(np.stack([pixels(now) for now in batch])).permute(0, 3, 1, 2)
    kind = torch.full((len(batch), N_CELLS), len(KINDS))
    colour = torch.full((len(batch), N_CELLS), len(COLOURS))
    for row, now in enumerate(batch):
        for thing in now.things:
            kind[row, thing.cell] = KINDS.index(thing.kind)
            colour[row, thing.cell] = list(COLOURS).index(thing.colour)
    return Images((stacked / 255 - 0.5) / 0.25, kind, colour)


class Packer:
    """Turns scenes into packed rows; remembers the tokens of texts it has seen."""

    def __init__(self, processor: LlavaProcessor, questions: int, caption_share: float) -> None:
        self.tokenizer = processor.tokenizer
        self.questions = questions
        self.caption_share = caption_share
        plain = self.tokenizer(text.PREFIX).input_ids
        place = plain.index(IMAGE_ID)
        self.prefix = [*plain[:place], *[IMAGE_ID] * N_CELLS, *plain[place + 1 :]]
        self._tokens: dict[str, list[int]] = {}

    def pack(self, batch: Sequence[Scene], random: np.random.Generator) -> PackedBatch:
        """One row per scene: some questions, and for part of the scenes a description."""
        rows = [self._row(now, random) for now in batch]
        length = max(len(row) for row in rows)
        filled = np.zeros((len(rows), length, 4), dtype=np.int64)
        filled[..., 0] = PAD_ID
        filled[..., 2:] = (-1, IGNORED)
        for place, row in enumerate(rows):
            filled[place, : len(row)] = row
        ids, positions, segments, labels = torch.from_numpy(filled).unbind(-1)
        return PackedBatch(ids.contiguous(), positions, _visible(segments), labels)

    def _row(self, now: Scene, random: np.random.Generator) -> Int[np.ndarray, "position 4"]:
        """Token, position, segment and label of each place."""
        texts = [
            (text.asking_for(kind), text.annotated_answer(now, kind))
            for kind in text.training_kinds(now, self.questions, random)
        ]
        if random.random() < self.caption_share:
            texts.append((text.DESCRIBE, text.annotated_caption(now)))
        start = len(self.prefix)
        row = [(token, place, 0, IGNORED) for place, token in enumerate(self.prefix)]
        for segment, (request, answer) in enumerate(texts, start=1):
            asked = self._encode(request + text.SUFFIX)
            tokens = [*asked, *self._encode(answer), EOS_ID]
            for place, token in enumerate(tokens[:-1]):
                label = tokens[place + 1] if place + 1 >= len(asked) else IGNORED
                row.append((token, start + place, segment, label))
        return np.array(row, dtype=np.int64)

    def _encode(self, words: str) -> list[int]:
        if words not in self._tokens:
            self._tokens[words] = self.tokenizer(words, add_special_tokens=False).input_ids
        return self._tokens[words]


def _visible(segments: Int64[Tensor, "row position"]) -> Bool[Tensor, "row 1 position position"]:
    """Each place sees, of what came before, the prefix (segment 0) and its own segment; padding only itself."""
    length = segments.shape[1]
    seen, sees = segments[:, None, :], segments[:, :, None]
    earlier = torch.ones(length, length, dtype=torch.bool).tril()
    own = torch.eye(length, dtype=torch.bool)
    return (earlier & ((seen == 0) | (seen == sees)) & (seen >= 0) | own)[:, None]
