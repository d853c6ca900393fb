"""Phase 1: answers of the replacement model, and the features that were computed while it gave them.

A sample is finished when its activation file is whole and its line stands in `model_responses.jsonl`, in this order;
so after a kill both agree on what is finished, and the same call goes on with the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clt.config.base import write_text_atomically
from clt.discovery.features_file import LayerFeatures, save_features
from clt.discovery.layout import Layout
from clt.discovery.responses import Response, read_finished, runs_of, write_captured
from clt.errors import DiscoveryError
from clt.replacement.model import ReplacementModel
from clt.replacement.recording import SampleFeatures
from clt.types import Sample, TokenKind


def capture(
    model: ReplacementModel,
    samples: Sequence[Sample],
    layout: Layout,
    *,
    max_new_tokens: int,
    batch_size: int = 1,
    dense: bool = False,
    made_with: Mapping[str, Any],
    on_batch: Callable[[int], None] = lambda n: None,
) -> list[Response]:
    """Answer every sample that has not been answered yet.

    Args:
        model: with `capture_activations`.
        samples: prompts as the host takes them.
        dense: write `{layer: tensor [position, feature]}` instead of packed features.
        made_with: what the answers depend on; kept beside them, and compared when a capture goes on.
        on_batch: called with the number of samples finished, those found on disk first.

    Raises:
        DiscoveryError: there are answers that were made with something else, or two samples share an id.
    """
    numbers = numbered([sample.id for sample in samples])
    _check_same_run(layout, made_with)
    finished = _finished(layout, numbers)
    on_batch(len(finished))
    # Prompts of about the same length together: less padding, and often answers of about the same length.
    left = sorted((s for s in samples if s.id not in finished), key=lambda sample: len(sample.prompt))
    layout.responses.parent.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(left), batch_size):
        batch = left[start : start + batch_size]
        found: list[Response] = []
        for response, features in _answer(model, batch, numbers, max_new_tokens):
            save_features(layout.sample_file(response.number), features, dense=dense)
            found.append(response)
        _append(layout.responses, found)
        finished |= {response.id: response for response in found}
        on_batch(len(batch))
    rows = [finished[sample.id] for sample in samples]
    write_captured(layout.responses, rows)
    return rows


def numbered(ids: Sequence[str]) -> dict[str, int]:
    """The number in each sample's file name: its id where all ids are numbers, else its place.

    Raises:
        DiscoveryError: an id occurs twice.
    """
    if len(set(ids)) < len(ids):
        twice = next(id for id in ids if ids.count(id) > 1)
        raise DiscoveryError(f"The id {twice!r} occurs more than once. Every sample needs its own.")
    if all(id.isdecimal() for id in ids) and len({int(id) for id in ids}) == len(ids):
        return {id: int(id) for id in ids}
    return {id: place for place, id in enumerate(ids)}


def image_key(sample: Sample) -> str:
    """What tells a sample's picture from others: its file's name, or a hash of its pixels; the id without one."""
    if not sample.images:
        return sample.id
    names = []
    for image in sample.images:
        if isinstance(image, Image.Image):
            names.append(hashlib.sha256(image.tobytes()).hexdigest()[:16])
        else:
            names.append(Path(image).name)
    return "+".join(names)


def _answer(
    model: ReplacementModel, batch: Sequence[Sample], numbers: Mapping[str, int], max_new_tokens: int
) -> list[tuple[Response, dict[int, LayerFeatures]]]:
    model.captured.clear()
    answers = model.generate_ids(batch, max_new_tokens=max_new_tokens, batch_size=len(batch))
    texts = model.adapter.decode(answers)
    found = []
    for sample, answer, text, features in zip(batch, answers, texts, model.captured, strict=True):
        n_prompt = int((~features.is_generated).sum())
        # Rows that end early are filled up while the batch goes on; the last token of an answer is never read.
        n_positions = n_prompt + len(answer) - 1
        response = Response(
            id=sample.id,
            response=text.strip(),
            image=image_key(sample),
            number=numbers[sample.id],
            answer_ids=tuple(answer.tolist()),
            kinds=_kinds(features, n_positions),
            n_prompt=n_prompt,
        )
        found.append((response, by_layer(features, n_positions)))
    return found


def _kinds(features: SampleFeatures, n_positions: int) -> tuple[tuple[str, int], ...]:
    """Runs of text, image and special tokens over the prompt, then the answer."""
    names = [TokenKind(kind).name.lower() for kind in features.kind.tolist()]
    named = ("answer" if new else name for name, new in zip(names, features.is_generated.tolist()))
    return runs_of(islice(named, n_positions))


def by_layer(features: SampleFeatures, n_positions: int) -> dict[int, LayerFeatures]:
    """A sample's features over its first positions, each layer's sorted by feature, then position."""
    keep = (features.position < n_positions) & (features.value > 0)
    columns = (features.layer, features.position, features.feature, features.value.float())
    layer, position, feature, value = (each[keep].numpy() for each in columns)
    order = np.lexsort((position, feature, layer))
    bounds = np.searchsorted(layer[order], np.arange(features.n_layers + 1))
    return {
        number: LayerFeatures(
            feature[here].astype(np.int64),
            position[here].astype(np.int64),
            value[here],
            n_positions,
            features.n_features,
        )
        for number, here in ((n, order[bounds[n] : bounds[n + 1]]) for n in range(features.n_layers))
    }


def _finished(layout: Layout, numbers: Mapping[str, int]) -> dict[str, Response]:
    """Answers whose line and file are both there; the file of responses is cut back to them.

    Raises:
        DiscoveryError: answers to questions that are not asked now.
    """
    rows = read_finished(layout.responses)
    strangers = [row.id for row in rows if numbers.get(row.id) != row.number]
    if strangers:
        raise DiscoveryError(
            f"{layout.responses} answers {len(strangers)} samples that are not asked now, among them "
            f"{', '.join(strangers[:3])}. It belongs to other data; choose another --root, or delete "
            f"{layout.results} and {layout.activations}."
        )
    finished = {row.id: row for row in rows if layout.sample_file(row.number).is_file()}
    if layout.responses.exists():
        write_captured(layout.responses, list(finished.values()))
    return finished


def _append(path: Path, responses: Sequence[Response]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(f"{response.to_json()}\n" for response in responses)
        file.flush()
        os.fsync(file.fileno())


def _check_same_run(layout: Layout, made_with: Mapping[str, Any]) -> None:
    """Keep the record of what answers are made with, and refuse to mix two; a run that left no answers binds nobody."""
    now = json.loads(json.dumps(dict(made_with), default=str))
    if layout.run.exists() and layout.responses.exists():
        before = json.loads(layout.run.read_text(encoding="utf-8"))
        changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        if changed:
            name = changed[0]
            raise DiscoveryError(
                f"{layout.run}: the answers there were made with {name} = {before.get(name)!r}, now it is "
                f"{now.get(name)!r}. Choose another --root, or delete {layout.results} and {layout.activations}."
            )
    write_text_atomically(layout.run, json.dumps(now, indent=2) + "\n")
