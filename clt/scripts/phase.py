"""One phase of feature discovery: capture, evaluate, classify, analyze, visualize, map, steer, attribute.

clt phase capture --dataset pope --data coco_pope_random.json --images val2014 --model HOST --clt DIR
clt phase evaluate --dataset pope
clt phase analyze --dataset pope --target-features 200 --min-per-layer 3

`clt discover` runs them in a row. Files lie under --root as the phase guide names them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from clt.config.base import Config, require_positive
from clt.discovery.analyse import AnalysisOptions
from clt.discovery.layout import Layout
from clt.discovery.session import RunOptions
from clt.discovery.sweep import SweepOptions
from clt.progress import progress_bar
from clt.scripts.bench import Choices

if TYPE_CHECKING:
    from clt.discovery.session import Session

Flat = tyro.conf.OmitArgPrefixes


@dataclass(frozen=True, kw_only=True)
class Place(Config):
    """Which files."""

    dataset: str
    """Benchmark, as `clt bench list` names it."""
    root: Path = Path()
    """Folder that holds results/, activations/ and analysis/."""

    @property
    def layout(self) -> Layout:
        """The files of this data set."""
        return Layout(self.root, self.dataset)

    def session(self, overrides: Mapping[str, Any] | None = None) -> Session:
        """What was captured here."""
        from clt.discovery.session import Session

        return Session.of(self.layout, overrides)


@dataclass(frozen=True, kw_only=True)
class Capture(Place):
    """Phase 1: answer every question with the replacement model and keep the features; goes on where it stopped."""

    run_options: Annotated[RunOptions, Flat]
    """Host, transcoder, prompts."""
    choices: Annotated[Choices, Flat] = field(default_factory=Choices)
    """What the benchmark may be told."""
    batch_size: int = 1
    """Answers at a time."""
    dense: bool = False
    """Write whole matrices, as the seeds do, instead of packed features (a hundred times the size)."""

    def run(self) -> None:
        """Capture and say what was written."""
        from clt.discovery import phases
        from clt.discovery.session import Session

        require_positive("capture", batch_size=self.batch_size)
        session = Session(self.layout, self.run_options, given(self.choices))
        with progress("capture", len(session.questions), "answers") as tick:
            lines = phases.capture(session, batch_size=self.batch_size, dense=self.dense, on_batch=tick)
        say("capture", lines)


@dataclass(frozen=True, kw_only=True)
class Evaluate(Place):
    """Phase 2: the benchmark's own numbers."""

    def run(self) -> None:
        """Print them."""
        from clt.discovery import phases
        from clt.scripts.bench import warnings_of

        session = self.session()
        say("evaluate", [*phases.evaluate(session), *warnings_of(session.report)])


@dataclass(frozen=True, kw_only=True)
class Classify(Place):
    """Phase 3: which answers are GOOD and which BAD."""

    min_samples: int = 10
    """How many each class must have."""
    option: tuple[str, ...] = ()
    """Options of the benchmark's verdict as NAME=VALUE: good_cover=0.9; rule=coverage is the seeds' rule for amber."""

    def run(self) -> None:
        """Write the lists and say how they differ."""
        from clt.discovery import phases

        overrides = given(Choices(option=self.option))
        say("classify", phases.classify(self.session(overrides), self.min_samples))


@dataclass(frozen=True, kw_only=True)
class Analyze(Place):
    """Phase 4: score every feature, test it, choose in turns over the layers."""

    options: Annotated[AnalysisOptions, Flat] = field(default_factory=AnalysisOptions)
    """Score, choice, halves."""
    effects: bool = False
    """Compute gradient x activation besides, whatever ranks; it needs host and transcoder."""
    batch_size: int = 16
    """Answers at a time for the gradients."""

    def run(self) -> None:
        """Write the features and name the first."""
        from clt.discovery import phases

        session = self.session()
        with progress("analyze", None, "samples") as tick:
            _, lines = phases.analyze(
                session, self.options, with_effects=self.effects, batch_size=self.batch_size, on_sample=tick
            )
        say("analyze", lines)


@dataclass(frozen=True, kw_only=True)
class Visualize(Place):
    """Phase 5: the guide's figures, top examples per feature, and one page with everything."""

    examples: int = 20
    """Features whose top examples are written and shown; 0: none."""
    per_feature: int = 8
    """Examples per feature."""

    def run(self) -> None:
        """Draw and say where the page is."""
        from clt.viz.discovery_page import visualize

        say("visualize", visualize(self.session(), n_features=self.examples, per_feature=self.per_feature))


@dataclass(frozen=True, kw_only=True)
class Map(Place):
    """Phase 6: features as coordinates of the MLP outputs and as true neurons."""

    top_k: int = 50
    """Neurons per feature."""
    amplification: float = 2.0
    """Written beside them for whoever applies the list."""
    samples: int = 100
    """Answers on which the neurons' mean strength is taken."""
    batch_size: int = 8
    """Answers at a time."""

    def run(self) -> None:
        """Write the mapping."""
        from clt.discovery import phases

        require_positive("map", top_k=self.top_k, samples=self.samples, batch_size=self.batch_size)
        options = {"top_k": self.top_k, "amplification": self.amplification}
        say("map", phases.map_to_mlp(self.session(), n_samples=self.samples, batch_size=self.batch_size, **options))


@dataclass(frozen=True, kw_only=True)
class Steer(Place):
    """Phase 7: turn the features up and down on the half of the images that did not choose them."""

    options: Annotated[SweepOptions, Flat] = field(default_factory=SweepOptions)
    """What, where, how far, against how many controls."""

    def run(self) -> None:
        """Steer and print changes, intervals and controls."""
        from clt.discovery.sweep import Sweep, describe

        with progress("steer", None, "runs") as tick:
            content = Sweep(self.session(), self.options, lambda: tick(1)).run()
        say("steer", [*describe(content), str(self.layout.steering)])


@dataclass(frozen=True, kw_only=True)
class Attribute(Place):
    """Phase 7: attribution graphs of answers, BAD ones first, explained where they go wrong."""

    samples: int = 1
    """How many answers."""
    max_feature_nodes: int = 500
    """Features that get rows of the graph."""
    batch_size: int = 64
    """Rows per backward pass."""

    def run(self) -> None:
        """Write one folder per answer."""
        from clt.scripts.phase_graphs import attribute_answers

        require_positive("attribute", samples=self.samples, max_feature_nodes=self.max_feature_nodes)
        sizes = {"max_feature_nodes": self.max_feature_nodes, "batch_size": self.batch_size}
        say("attribute", attribute_answers(self.session(), n=self.samples, **sizes))


Options = Capture | Evaluate | Classify | Analyze | Visualize | Map | Steer | Attribute


def main(options: Capture | Evaluate | Classify | Analyze | Visualize | Map | Steer | Attribute) -> None:
    """Run the phase."""
    options.run()


def given(choices: Choices) -> dict[str, Any]:
    """The options of the benchmark that were set, as `clt bench` reads them."""
    named = {each.name: getattr(choices, each.name) for each in fields(Choices) if each.name != "option"}
    return {**{name: value for name, value in named.items() if value is not None}, **choices.extra()}


def say(phase: str, lines: Sequence[str]) -> None:
    """Print what a phase tells."""
    for line in lines:
        print(f"{phase}: {line}", flush=True)


class progress:
    """A bar that disappears when the phase is over; the block gets the function that moves it."""

    def __init__(self, name: str, total: int | None, unit: str) -> None:
        """Nothing is shown before the first step."""
        self._bar = progress_bar(total, name, unit, fleeting=True)

    def __enter__(self) -> Callable[[int], None]:
        def move(n: int) -> None:
            self._bar.update(n)

        return move

    def __exit__(self, *_: object) -> None:
        self._bar.close()
