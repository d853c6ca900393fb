"""Where features fire most in any corpus, read by the host as it is: no benchmark and no answers needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from clt.discovery.capture import image_key
from clt.discovery.examples import Shown, TopExamples, feature_json
from clt.discovery.features_file import LayerFeatures
from clt.errors import DatasetError
from clt.lm import ModelAdapter
from clt.models import BaseTranscoder
from clt.types import FeatureId, Sample, TokenKind

PRUNE_AT = 1024
"""Samples that no feature keeps are forgotten whenever so many more have been read."""


class CorpusExamples:
    """Reads samples, prompts with their answers, and keeps the strongest of each feature.

    Memory is what `TopExamples` keeps, and the tokens and images of the samples that are kept for some feature.
    """

    def __init__(
        self, adapter: ModelAdapter, transcoder: BaseTranscoder, features: Sequence[FeatureId] | None, per_feature: int
    ) -> None:
        """Nothing read yet.

        Args:
            features: those to keep examples of; None: all that fire.

        Raises:
            DatasetError: a feature that the transcoder does not have.
        """
        config = transcoder.config
        for layer, feature in features or ():
            if layer >= config.num_layers or feature >= config.num_features:
                raise DatasetError(
                    f"Feature {layer}:{feature} does not exist: the transcoder has {config.num_layers} layers of "
                    f"{config.num_features} features, both numbered from 0."
                )
        self._adapter, self._transcoder = adapter, transcoder
        self._top = TopExamples(features, per_feature)
        self._shown: dict[int, Shown] = {}
        self.pictures: dict[str, Image.Image] = {}
        """Images that lie in no file, by the name the examples call them by."""
        self._n_read = 0

    def read(self, samples: Iterable[Sample], batch_size: int, on_batch: Callable[[int], None] = lambda n: None) -> int:
        """Go through the samples; returns how many there were.

        Raises:
            HostModelError: a sample cannot be read; the message names it.
        """
        stream: Iterator[Sample] = iter(samples)
        while batch := list(islice(stream, batch_size)):
            self._read(batch)
            on_batch(len(batch))
        return self._n_read

    @torch.no_grad()
    def _read(self, batch: Sequence[Sample]) -> None:
        inputs = self._adapter.prepare(batch)
        captured = self._adapter.capture(inputs)
        features = self._transcoder.encode(captured.inputs)
        for row, sample in enumerate(batch):
            mine = captured.sample == row
            layers = {layer: LayerFeatures.from_dense(each[mine].cpu()) for layer, each in enumerate(features)}
            self._top.add(self._n_read, layers)
            ids = inputs.input_ids[row][inputs.is_token[row]].tolist()
            patches = (captured.kind[mine] == TokenKind.IMAGE).nonzero().flatten().tolist()
            self._shown[self._n_read] = self._described(sample, ids, patches)
            self._n_read += 1
            if self._n_read % PRUNE_AT == 0:
                self._forget()

    def _described(self, sample: Sample, ids: Sequence[int], patches: Sequence[int]) -> Shown:
        tokenizer = self._adapter.tokenizer
        assert tokenizer is not None
        tokens = [str(tokenizer.decode([token])) for token in ids]
        image = image_key(sample) if sample.images else ""
        if sample.images and isinstance(sample.images[0], Image.Image):
            image = f"{image}.png"
            self.pictures[image] = sample.images[0]
        return Shown(sample.id, tokens, patches, image, sample.answer or "")

    def _forget(self) -> None:
        kept = self._top.samples()
        self._shown = {number: shown for number, shown in self._shown.items() if number in kept}
        names = {shown.image for shown in self._shown.values()}
        self.pictures = {name: picture for name, picture in self.pictures.items() if name in names}

    def records(self, transcoder_id: str, context: int | None) -> Iterator[dict[str, Any]]:
        """Each feature's examples in the public format."""
        for feature in self._top.features():
            yield feature_json(
                feature, self._top, self._shown.__getitem__, transcoder_id=transcoder_id, context=context
            )

    def save_pictures(self, folder: Path) -> int:
        """Write the images that lie in no file beside the examples; returns how many."""
        self._forget()
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in self.pictures.items():
            picture.save(folder / name)
        return len(self.pictures)


def parse_features(texts: Sequence[str]) -> list[FeatureId]:
    """`LAYER:FEATURE` texts as ids.

    Raises:
        DatasetError: one is not of this form.
    """
    found = []
    for text in texts:
        layer, _, feature = text.partition(":")
        if not (layer.isdecimal() and feature.isdecimal()):
            raise DatasetError(f"{text!r} names no feature. Write LAYER:FEATURE, such as 3:117.")
        found.append(FeatureId(int(layer), int(feature)))
    return found
