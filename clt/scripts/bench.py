"""Benchmarks: list them, explain one, check its files, score responses.

clt bench list
clt bench info amber
clt bench verify pope --data coco_pope_random.json --images val2014
clt bench score pope --data QUESTIONS --responses ANSWERS --json
clt bench score amber --data AMBER_DATA_DIR --responses FILE --task generative --similarity identity --json
"""

from __future__ import annotations

import inspect
import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from clt import benchmarks
from clt.benchmarks import Benchmark, Report
from clt.benchmarks.amber_data import AmberData
from clt.benchmarks.pope_build import PopeRecipe, build_pope, read_objects
from clt.benchmarks.similarity import SPACY_MODEL, SpacySimilarity, write_table
from clt.config.base import write_text_atomically
from clt.errors import BenchmarkError

Name = Annotated[str, tyro.conf.Positional]


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a benchmark may be told; which of these a benchmark takes, `clt bench info NAME` says."""

    data: Path | None = None
    """The benchmark's own file or folder, as its authors release it."""
    images: Path | None = None
    """Folder of the images."""
    task: str | None = None
    """Part of the benchmark, such as generative or discriminative for amber."""
    split: str | None = None
    """Split, such as random, popular, adversarial or all for pope."""
    similarity: Literal["identity", "file", "spacy"] | None = None
    """Which words count as the same."""
    similarity_file: Path | None = None
    """Table for --similarity file; `clt bench similarity` makes one."""
    extractor: Literal["auto", "nltk", "rules"] | None = None
    """How mentioned objects are found."""
    judge: str | None = None
    """Who rates answers that no rule can rate: none, rule, file, openai, local, or a registered judge."""
    judge_model: str | None = None
    """The judge's model."""
    judge_url: str | None = None
    """Base URL of the judge openai; its key is read from CLT_JUDGE_KEY."""
    judge_log: Path | None = None
    """File of all requests and replies; the judge file replays it."""
    option: tuple[str, ...] = ()
    """Further options as NAME=VALUE, such as good_cover=0.9."""

    def load(self, name: str) -> Benchmark:
        """The benchmark with the options that were given."""
        given = {each.name: getattr(self, each.name) for each in fields(Choices) if each.name != "option"}
        given = {key: value for key, value in given.items() if value is not None}
        return benchmarks.load(name, **given, **self.extra())

    def extra(self) -> dict[str, Any]:
        """The further options."""
        found: dict[str, Any] = {}
        for each in self.option:
            key, separator, value = each.partition("=")
            if not separator:
                raise BenchmarkError(f"--option {each}: options are NAME=VALUE, such as good_cover=0.9.")
            found[key.replace("-", "_")] = _value(value)
        return found


@dataclass(frozen=True)
class List:
    """Name every benchmark there is, with one line about it."""

    def run(self) -> None:
        """Print the table."""
        table = Table(box=None, show_header=False)
        for name in benchmarks.names():
            table.add_row(name, _first_line(name))
        Console().print(table)


@dataclass(frozen=True)
class Info:
    """Say what a benchmark measures and which options it takes."""

    name: Name
    """As `clt bench list` calls it."""

    def run(self) -> None:
        """Print its description and options."""
        print(f"{self.name}\n\n{inspect.getdoc(benchmarks.factory_of(self.name)) or 'No description.'}\n\noptions:")
        for name, parameter in benchmarks.options_of(self.name).items():
            if parameter.kind is parameter.VAR_KEYWORD:
                print("  ... see above")
            else:
                print(f"  {name} ({'needed' if parameter.default is parameter.empty else parameter.default})")


@dataclass(frozen=True, kw_only=True)
class Verify(Choices):
    """Check a benchmark's files: read every sample, look for its image, and score the reference answers."""

    name: Name
    """As `clt bench list` calls it."""
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        """Print what was found; damage is an error."""
        benchmark = self.load(self.name)
        samples = list(benchmark.samples())
        answers = {sample.id: str(sample.meta["reference"]) for sample in samples if "reference" in sample.meta}
        labels = Counter(str(sample.meta["label"]) for sample in samples if "label" in sample.meta)
        found = {
            "n_samples": len(samples),
            "n_with_image": sum(bool(sample.images) for sample in samples),
            "labels": dict(labels),
            "n_reference_answers": len(answers),
            "reference_metrics": dict(benchmark.score(answers).metrics) if answers else {},
        }
        if self.json:
            print(json.dumps(found, indent=2))
            return
        for key, value in found.items():
            print(f"{key}: {value}")


@dataclass(frozen=True, kw_only=True)
class Score(Choices):
    """Score responses; says which plug-ins were used and what was missing, empty or could not be read."""

    name: Name
    """As `clt bench list` calls it."""
    responses: Path
    """JSON list or JSON lines of responses."""
    json: bool = False
    """Print {"metrics": ..., "provenance": ...}."""
    output: Path | None = None
    """File for one JSON line per sample: id, verdict, counts."""

    def run(self) -> None:
        """Print the numbers, and warnings to standard error."""
        benchmark = self.load(self.name)
        report = benchmark.score(benchmarks.read_responses(self.responses, benchmark))
        if self.output is not None:
            rows = ({**score.to_dict(), "verdict": benchmark.verdict(score)} for score in report.scores)
            write_text_atomically(self.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        for warning in warnings_of(report):
            sys.stderr.write(f"clt bench: {warning}\n")
        if self.json:
            print(json.dumps(report.to_dict(), indent=2))
        else:
            _print_table(report)


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """Ask spaCy once which words of AMBER count as the same, and write the table for --similarity file."""

    data: Path
    """AMBER's data folder."""
    output: Path
    """The table."""
    model: str = SPACY_MODEL
    """spaCy model with word vectors; AMBER's official script uses en_core_web_lg."""

    def run(self) -> None:
        """Write it and say how many pairs there are."""
        words = AmberData.at(self.data).vocabulary
        n_pairs = write_table(self.output, words, SpacySimilarity(self.model))
        print(f"{self.output}: {n_pairs:,} pairs of {len(words):,} words count as the same.")


@dataclass(frozen=True, kw_only=True)
class BuildPope(PopeRecipe):
    """Write POPE questions for your own annotated images."""

    data: Path
    """JSON list or lines of {"image": FILE, "objects": [NAMES]}."""
    output: Path
    """The question file."""

    def run(self) -> None:
        """Draw and write them."""
        rows = build_pope(read_objects(self.data), self)
        write_text_atomically(self.output, "".join(json.dumps(row) + "\n" for row in rows))
        print(
            f"{self.output}: {len(rows):,} questions about {self.n_images:,} images ({self.split}, seed {self.seed})."
        )


Options = List | Info | Verify | Score | Similarity | BuildPope


def main(options: List | Info | Verify | Score | Similarity | BuildPope) -> None:
    """Do what was asked."""
    options.run()


def warnings_of(report: Report) -> list[str]:
    """What a reader of the numbers must know, in words."""
    provenance = report.provenance
    texts = {
        "n_missing": f"of {provenance['n_samples']:,} samples have no response; the numbers are of the others",
        "n_empty": "responses are empty; they are scored like any other",
        "n_unparsed": "answers could not be read as yes or no; the benchmark's own rule decided",
        "n_other_task": "responses belong to other tasks of the benchmark and were left out",
        "n_parse_failures": "judgements could not be read",
        "n_judge_failures": "calls of the judge failed; their responses are not in the numbers",
        "n_incomplete_images": "images have only one of their two answers",
        "n_incomplete_figures": "figures lack answers to some of their questions",
        "n_incomplete_questions": "questions lack answers about some of their figures",
    }
    found = [f"{provenance[key]:,} {text}" for key, text in texts.items() if provenance.get(key)]
    if provenance.get("undefined"):
        found.append(f"nothing to divide by, printed as 0: {', '.join(provenance['undefined'])}")
    return found


def _print_table(report: Report) -> None:
    table = Table(box=None, show_header=False)
    for name, value in report.metrics.items():
        table.add_row(name, f"{value:.4g}")
    console = Console()
    console.print(table)
    plain = {key: value for key, value in report.provenance.items() if not isinstance(value, list | Mapping)}
    console.print(", ".join(f"{key} {value}" for key, value in plain.items()), style="dim")


def _first_line(name: str) -> str:
    """What it is; a package that announces a benchmark it does not have must not hide the others."""
    try:
        return (inspect.getdoc(benchmarks.factory_of(name)) or "").split("\n")[0]
    except BenchmarkError as error:
        return f"cannot be loaded: {error}"


def _value(text: str) -> Any:
    """A number, true, false or null where the text is one; otherwise the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
