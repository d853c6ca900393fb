"""Label a transcoder's features from their examples, and score the labels; graphs then show them.

clt explain --features features --base-url http://127.0.0.1:8000/v1 --model qwen2.5-7b-instruct --graph graphs/dallas
clt explain --features features --model ./a-local-chat-model --max-features 100

Writes labels.json into the folder of examples. Answers are kept in labels_answers.jsonl there: a second run asks
nothing twice, --replay asks nothing at all. The key of an endpoint is read from the environment (OPENAI_API_KEY).
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from clt.attribution.view import FEATURE
from clt.attribution.view_files import open_view
from clt.config.base import Config, require_positive
from clt.discovery.explain import ExplainSettings, Text, explain_feature, texts_of
from clt.discovery.feature_files import FeatureFiles
from clt.discovery.labels import LABELS_FILE, FeatureLabel, read_labels, write_labels
from clt.discovery.writers import CachedWriter, EndpointWriter, LocalWriter
from clt.errors import ConfigError, DiscoveryError
from clt.progress import watched
from clt.types import FeatureId

ANSWERS_FILE = "labels_answers.jsonl"
_MOST_OTHERS = 2000
_SAVE_EVERY = 20


@dataclass(frozen=True, kw_only=True)
class Options(Config):
    """Which features, who labels them, and how much is asked."""

    features: str
    """Folder of feature examples (circuit-tracer's binary layout, or one JSON file per feature)."""
    model: str
    """Name of the model at --base-url; without --base-url a local folder or Hugging Face id."""
    base_url: str | None = None
    """An OpenAI-compatible endpoint, up to the version: http://127.0.0.1:8000/v1."""
    api_key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the endpoint's key; need not be set for local servers."""
    graph: str | None = None
    """Label the features of this graph, the most influential first; None: all that have examples."""
    max_features: int = 200
    """Label at most so many."""
    shown: int = 12
    """Examples a label is written from."""
    tested: int = 8
    """Other examples it is scored on, with as many that are not the feature's."""
    again: bool = False
    """Also those that have a label already."""
    replay: bool = False
    """Only use answers that are in labels_answers.jsonl; ask nobody."""
    parallel: int = 4
    """Questions at a time to an endpoint; a local model gets one."""
    device: str | None = None
    """Where a local model runs; None: the GPU if there is one."""
    seed: int = 0
    """Of the choice of examples."""

    def __post_init__(self) -> None:
        names = ("max_features", "shown", "tested", "parallel")
        require_positive("explain", **{name: getattr(self, name) for name in names})


def main(options: Options) -> None:
    """Label, score, write."""
    files = FeatureFiles(Path(options.features))
    path = files.folder / LABELS_FILE
    labels = read_labels(path)
    known = files.features()
    wanted = [each for each in _wanted(options, known) if options.again or _key(each) not in labels]
    console = Console()
    if not wanted:
        console.print(f"Nothing to do: all {len(labels)} wanted features have labels in {path} (--again writes anew).")
        return
    writer = _open_writer(options, files.folder)
    settings = ExplainSettings(n_shown=options.shown, n_tested=options.tested, seed=options.seed)
    others = _other_texts(files, known, options.seed)
    new = _label_all(options, files, wanted[: options.max_features], others, writer, settings, labels, path)
    _report(console, new, len(wanted), writer.n_asked, path)


def _key(feature: FeatureId) -> str:
    return f"{feature.layer}/{feature.feature}"


def _wanted(options: Options, known: Sequence[FeatureId]) -> list[FeatureId]:
    if options.graph is None:
        return list(known)
    nodes = open_view(Path(options.graph)).nodes
    features = np.flatnonzero(nodes.kind == FEATURE)
    ranked = features[np.argsort(np.nan_to_num(nodes.cumulative[features], nan=2.0), kind="stable")]
    have = set(known)
    of_graph = dict.fromkeys(FeatureId(int(nodes.layer[node]), int(nodes.feature[node])) for node in ranked)
    wanted = [feature for feature in of_graph if feature in have]
    if not wanted:
        raise ConfigError(
            f"None of the {len(of_graph)} features of {options.graph} has examples in {options.features}. The examples "
            "are probably of another transcoder."
        )
    return wanted


def _open_writer(options: Options, folder: Path) -> CachedWriter:
    path = folder / ANSWERS_FILE
    if options.replay:
        return CachedWriter(path, None, options.model)
    if options.base_url is None:
        return CachedWriter(path, LocalWriter(options.model, options.device), options.model)
    key = os.environ.get(options.api_key_variable)
    return CachedWriter(path, EndpointWriter(options.base_url, options.model, key), options.model)


def _other_texts(files: FeatureFiles, known: Sequence[FeatureId], seed: int) -> list[tuple[FeatureId, Text]]:
    """Texts of many features, one each: what a label must be told from."""
    chosen = random.Random(seed).sample(list(known), min(len(known), _MOST_OTHERS))
    texts = []
    for feature in chosen:
        found = texts_of(files.read(*feature) or {})
        texts += [(feature, found[len(found) // 2])] if found else []
    return texts


def _label_all(
    options: Options,
    files: FeatureFiles,
    wanted: Sequence[FeatureId],
    others: Sequence[tuple[FeatureId, Text]],
    writer: CachedWriter,
    settings: ExplainSettings,
    labels: dict[str, FeatureLabel],
    path: Path,
) -> list[FeatureLabel | None]:
    """Labels in the order wanted; the file is brought up to date every few features and whatever happens."""

    def one(feature: FeatureId) -> FeatureLabel | None:
        strangers = [text for of, text in others if of != feature]
        return explain_feature(feature, files.read(*feature) or {}, strangers, writer, settings)

    n_workers = 1 if options.base_url is None else options.parallel
    found: list[FeatureLabel | None] = []
    with ThreadPoolExecutor(n_workers) as pool:
        try:
            answers = watched(pool.map(one, wanted), len(wanted), "labels", "features")
            for feature, label in zip(wanted, answers, strict=True):
                found.append(label)
                if label is not None:
                    labels[_key(feature)] = label
                if len(found) % _SAVE_EVERY == 0:
                    write_labels(path, labels)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            write_labels(path, labels)
    return found


def _report(console: Console, new: Sequence[FeatureLabel | None], n_wanted: int, n_asked: int, path: Path) -> None:
    made = [label for label in new if label is not None]
    if not made:
        raise DiscoveryError(f"None of the {len(new)} features has at least two different examples to label it from.")
    parts = [f"{len(made)} labels in {path}", f"{n_asked} questions asked"]
    for name in ("detection", "fuzzing"):
        scores = [score for label in made if (score := getattr(label, name)) is not None]
        if scores:
            parts.append(f"{name} {np.mean(scores):.2f} (mean of {len(scores)}; chance 0.50)")
    if len(made) < len(new):
        parts.append(f"{len(new) - len(made)} features have too few examples")
    if n_wanted > len(new):
        parts.append(f"{n_wanted - len(new)} more wait: raise --max-features")
    console.print("; ".join(parts) + ".", soft_wrap=True, markup=False, highlight=False)
