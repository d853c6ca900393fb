"""The phases one after the other: each reads files of earlier ones and writes its own.

Every function takes a `Session`, does its phase, and returns lines that tell a person what came out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from clt.config.base import write_text_atomically
from clt.discovery import classify as classes
from clt.discovery.analyse import Analysis, AnalysisOptions, ClassifiedSamples, analyse, save_analysis
from clt.discovery.capture import capture as capture_samples
from clt.discovery.effects import Effects, feature_effects
from clt.discovery.mapping import map_features, save_mapping
from clt.discovery.neurons import down_matrices, mean_neuron_strength
from clt.discovery.selection import half_of
from clt.discovery.session import Session
from clt.errors import DiscoveryError, HostModelError
from clt.lm import HostInputs
from clt.models import CrossLayerTranscoder

Tick = Callable[[int], None]
"""Called with how many more steps are done."""


def no_tick(n: int) -> None:
    """Nobody is watching."""


def capture(session: Session, *, batch_size: int, dense: bool = False, on_batch: Tick = no_tick) -> list[str]:
    """Phase 1."""
    rows = capture_samples(
        session.capturing,
        session.samples,
        session.layout,
        max_new_tokens=session.max_new_tokens,
        batch_size=batch_size,
        dense=dense,
        made_with=session.made_with(),
        on_batch=on_batch,
    )
    size = sum(session.layout.sample_file(row.number).stat().st_size for row in rows)
    return [
        f"{len(rows):,} answers in {session.layout.responses}",
        f"features: {size / 1e6:.1f} MB in {session.layout.activations}",
    ]


def evaluate(session: Session) -> list[str]:
    """Phase 2: the benchmark's own numbers, and every sample's counts."""
    report, layout = session.report, session.layout
    rows = ({**score.to_dict(), "verdict": session.benchmark.verdict(score)} for score in report.scores)
    write_text_atomically(layout.scores, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_text_atomically(layout.metrics, json.dumps(report.to_dict(), indent=2) + "\n")
    return [", ".join(f"{name} {value:.4g}" for name, value in report.metrics.items())]


def classify(session: Session, min_samples: int) -> list[str]:
    """Phase 3."""
    layout, report = session.layout, session.report
    found = classes.classify(
        [_numbered(score.to_dict()) for score in report.scores],
        [session.benchmark.verdict(score) for score in report.scores],
        session.responses,
        session.activation_files(),
        min_samples,
    )
    found.save(layout.classification, layout.analysis("classification_report"))
    return classes.describe(found)


def classified(session: Session) -> ClassifiedSamples:
    """GOOD and BAD samples as phase 3 left them."""
    layout = session.layout
    lists = classes.read_classification(layout.require(layout.classification, "classify"))
    return ClassifiedSamples.of(lists, session.responses, layout.sample_file)


def effects(
    session: Session, seed: int, halves: bool, batch_size: int, keep_errors: bool, on_batch: Tick = no_tick
) -> Effects:
    """Gradient x activation on the selection half's answers."""
    chosen = [row for row in session.responses if not halves or half_of(row.image, seed) == "selection"]
    examples = session.examples(chosen)
    return feature_effects(
        session.replacement, examples, batch_size=batch_size, keep_errors=keep_errors, on_batch=on_batch
    )


def analyze(
    session: Session, options: AnalysisOptions, *, with_effects: bool, batch_size: int, on_sample: Tick = no_tick
) -> tuple[Analysis, list[str]]:
    """Phase 4."""
    samples = classified(session)
    found = None
    if with_effects or options.score == "gradient":
        found = effects(session, options.seed, options.halves, batch_size, keep_errors=True)
        found.save(session.layout.effects)
    analysis = analyse(samples, options, found, lambda: on_sample(1))
    content = save_analysis(session.layout.good_features, session.layout.dataset, analysis)
    best = content["features"][0] if content["features"] else None
    lines = [
        f"{content['total_features_analyzed']:,} active features, {content['n_tested']:,} tested, "
        f"{content['n_q_below_0.05']:,} differ at q < 0.05",
        f"{content['selected_features_count']} selected by {options.score}: {session.layout.good_features}",
    ]
    if best:
        lines.append(f"first: L{best['layer']} F{best['feature_idx']} (goodness {best['goodness_score']:.2f})")
    return analysis, lines


def read_features(session: Session) -> dict[str, Any]:
    """What phase 4 wrote.

    Raises:
        DiscoveryError: it is missing or damaged.
    """
    path = session.layout.require(session.layout.good_features, "analyze")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DiscoveryError(f"{path} is not JSON (line {error.lineno}: {error.msg}). Was it cut off?") from None
    if not isinstance(content, dict) or "features" not in content:
        raise DiscoveryError(f"{path} must be an object with `features`, as `clt phase analyze` writes it.")
    return content


def map_to_mlp(session: Session, *, top_k: int, amplification: float, n_samples: int, batch_size: int) -> list[str]:
    """Phase 6."""
    features = read_features(session)["features"]
    transcoder = session.transcoder
    if not isinstance(transcoder, CrossLayerTranscoder):
        raise DiscoveryError(
            f"Features of a {type(transcoder).__name__} cannot be mapped; convert it with `clt convert`."
        )
    down = strength = None
    note = "true neurons beside the seeds' list"
    try:
        down = down_matrices(session.adapter)
        strength = mean_neuron_strength(session.adapter, answer_batches(session, n_samples, batch_size))
    except HostModelError as error:
        note = f"no true neurons: {error}"
    entries = map_features(
        transcoder, features, top_k=top_k, down=down, neuron_strength=strength, amplification=amplification
    )
    save_mapping(session.layout.mapping, entries)
    return [f"{len(entries)} features mapped ({note}): {session.layout.mapping}"]


def answer_batches(
    session: Session, n_samples: int, batch_size: int, ids: Sequence[str] | None = None
) -> list[HostInputs]:
    """The first answered samples, prompts with their answers, ready to run."""
    samples = {sample.id: sample for sample in session.samples}
    rows = [row for row in session.responses if ids is None or row.id in set(ids)][:n_samples]
    batches = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        answers = [torch.tensor(row.answer_ids, dtype=torch.long) for row in batch]
        batches.append(session.adapter.prepare([samples[row.id] for row in batch], answers=answers))
    return batches


def _numbered(row: Mapping[str, Any]) -> dict[str, Any]:
    """Ids that are numbers as numbers, as the phase guide prints them."""
    id = str(row["id"])
    return {**row, "id": int(id) if id.isdecimal() and str(int(id)) == id else id}


def write_json(path: Path, content: Any) -> None:
    """Indented, in one step."""
    write_text_atomically(path, json.dumps(content, indent=2) + "\n")
