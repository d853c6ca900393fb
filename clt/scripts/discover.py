"""From a benchmark to features that steer: all phases in a row, resumable, skipping what is up to date.

clt discover --dataset shapes --clt runs/demo/clt/run
clt discover --dataset pope --data coco_pope_random.json --images val2014 --model llava-hf/llava-1.5-7b-hf --clt DIR

Features are chosen on one half of the images; steering is measured on the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from clt.config.base import Config, write_text_atomically
from clt.discovery.analyse import AnalysisOptions
from clt.discovery.layout import Layout
from clt.discovery.session import RunOptions, Session
from clt.discovery.sweep import SweepOptions
from clt.errors import ConfigError
from clt.scripts.bench import Choices
from clt.scripts.phase import given, progress, say
from clt.scripts.plans import record_options, transcoder_line

Flat = tyro.conf.OmitArgPrefixes
WORLDS = ("shapes", "shapes-pope", "shapes-amber")


@dataclass(frozen=True, kw_only=True)
class Options(Config):
    """Everything the phases can be told; the rest is `clt phase`."""

    dataset: str
    """Benchmark, as `clt bench list` names it; shapes is the embedded world."""
    root: Path = Path("runs/discovery")
    """Folder for results/, activations/ and analysis/."""
    clt: str
    """Folder of the host's transcoder; `clt demo` trains one for the embedded world in runs/demo/clt/run."""
    model: str | None = None
    """Host: an id on the Hub, a folder, or world:NAME; None: the world's own, for the embedded world."""
    choices: Annotated[Choices, Flat] = field(default_factory=Choices)
    """What the benchmark may be told."""
    max_samples: int | None = None
    """Take only the first so many; None: all."""
    max_new_tokens: int | None = None
    """Longest answer; None: as the benchmark says."""
    template: str | None = None
    """Prompt with {question} and one image placeholder per image; None: the host's chat template."""
    suffix: str = ""
    """Appended to every question."""
    device: str | None = None
    """Torch device; None: a GPU if there is one."""
    dtype: str | None = None
    """Of the host; None: as saved."""
    batch_size: int = 16
    """Answers at a time."""
    min_samples: int = 10
    """How many GOOD and how many BAD answers there must be."""
    analysis: Annotated[AnalysisOptions, Flat] = field(default_factory=lambda: AnalysisOptions(score="gradient"))
    """How features are scored and chosen."""
    steering: Annotated[SweepOptions, Flat] = field(default_factory=SweepOptions)
    """What is steered, where, how far, against how many controls."""
    steer: bool = True
    """Steer; False: stop at the mapping."""

    @property
    def run_options(self) -> RunOptions:
        """What answers are made with.

        Raises:
            ConfigError: no host was named, and the data set is not of the embedded world.
        """
        if self.model is None and self.dataset not in WORLDS:
            raise ConfigError(f"--model is needed for --dataset {self.dataset}: the host to ask, with its transcoder.")
        names = ("clt", "max_samples", "max_new_tokens", "template", "suffix", "device", "dtype")
        return RunOptions(model=self.model or "world:shapes", **{name: getattr(self, name) for name in names})


def plan(options: Options) -> dict[str, Any]:
    """What would be read and written."""
    layout, run = Layout(options.root, options.dataset), options.run_options
    done = "some phases are done and stay as they are if their options are the same"
    return {
        "read": [f"the host {run.model}", transcoder_line(options.clt), f"the questions of {options.dataset}"],
        "write": [str(layout.results), str(layout.activations), str(layout.report)],
        "note": [done] if phases_file(layout).is_file() else [],
    }


def phases_file(layout: Layout) -> Path:
    """Which phases are up to date."""
    return layout.results / "phases.json"


def main(options: Options) -> dict[str, Any]:
    """Run what is not up to date and say where the page is; gives the files and what each phase said."""
    layout = Layout(options.root, options.dataset)
    discover(options)
    record_options(options.root, options)
    print(f"Open {layout.report} in a browser.")
    said = {name: record["lines"] for name, record in json.loads(phases_file(layout).read_text()).items()}
    return {"report": str(layout.report), "features": str(layout.good_features), "phases": said}


def discover(options: Options) -> None:
    """All phases."""
    from clt.discovery import phases
    from clt.discovery.sweep import Sweep, describe
    from clt.viz.discovery_page import visualize

    layout = Layout(options.root, options.dataset)
    new = Session(layout, options.run_options, given(options.choices))
    session = new
    done = Done(phases_file(layout))
    size, analysis, steering = options.batch_size, options.analysis, options.steering
    done.run("capture", new.made_with(), layout.responses, lambda: _capture(new, size))
    done.run("evaluate", {}, layout.metrics, lambda: phases.evaluate(session))
    least = options.min_samples
    done.run("classify", {"min_samples": least}, layout.classification, lambda: phases.classify(session, least))
    done.run("analyze", analysis.to_dict(), layout.good_features, lambda: _analyze(session, analysis, size))
    mapped: dict[str, Any] = {"top_k": 50, "amplification": 2.0, "n_samples": 100}
    done.run("map", mapped, layout.mapping, lambda: phases.map_to_mlp(session, batch_size=size, **mapped))
    if options.steer:

        def steer() -> list[str]:
            with progress("steer", None, "runs") as tick:
                return describe(Sweep(session, steering, lambda: tick(1)).run())

        done.run("steer", steering.to_dict(), layout.steering, steer)
    shown = {"n_features": 20, "per_feature": 8}
    done.run("visualize", shown, layout.report, lambda: visualize(session, **shown))


def _capture(session: Session, batch_size: int) -> list[str]:
    from clt.discovery import phases

    with progress("capture", len(session.questions), "answers") as tick:
        return phases.capture(session, batch_size=batch_size, on_batch=tick)


def _analyze(session: Session, options: AnalysisOptions, batch_size: int) -> list[str]:
    from clt.discovery import phases

    with progress("analyze", None, "samples") as tick:
        _, lines = phases.analyze(session, options, with_effects=True, batch_size=batch_size, on_sample=tick)
    return lines


class Done:
    """Which phases are up to date: each depends on its own options and on all phases before it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        self._chain = ""

    def run(self, name: str, options: Mapping[str, Any], output: Path, phase: Callable[[], list[str]]) -> None:
        """Run the phase, unless its file was written with these options after the same earlier phases."""
        text = self._chain + name + json.dumps(dict(options), sort_keys=True, default=str)
        self._chain = hashlib.sha256(text.encode()).hexdigest()[:16]
        record = self._records.get(name)
        if record and record["key"] == self._chain and output.is_file():
            say(name, [*record["lines"], "(done before)"])
            return
        lines = phase()
        say(name, lines)
        self._records[name] = {"key": self._chain, "lines": lines}
        write_text_atomically(self._path, json.dumps(self._records, indent=2) + "\n")
