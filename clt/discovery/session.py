"""What the phases of one data set share: its files, its benchmark, and host and transcoder when they are needed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Integer
from torch import Tensor

from clt import benchmarks
from clt.activation_generation.corpus import placed_image
from clt.benchmarks import Benchmark, Report
from clt.benchmarks.prompts import framed
from clt.config.base import Config
from clt.discovery.effects import Example, spans_of
from clt.discovery.layout import Layout
from clt.discovery.responses import Response, read_captured
from clt.errors import DiscoveryError
from clt.lm import ModelAdapter
from clt.models import BaseTranscoder
from clt.replacement import ReplacementModel, SteeredHost, SteeredNeurons
from clt.replacement.intervention import Interventions
from clt.replacement.loading import open_pair
from clt.replacement.steerable import Steerable
from clt.types import Sample


@dataclass(frozen=True, kw_only=True)
class RunOptions(Config):
    """What answers are made with."""

    model: str
    """Host: an id on the Hub, a folder, or world:NAME."""
    clt: str
    """Folder of its transcoder."""
    max_samples: int | None = None
    """Take only the first so many; None: all."""
    max_new_tokens: int | None = None
    """Longest answer; None: as the benchmark says."""
    template: str | None = None
    """Prompt with {question} and one image placeholder per image; None: the host's chat template."""
    suffix: str = ""
    """Appended to every question, such as LLaVA's request for a single word."""
    device: str | None = None
    """Torch device; None: a GPU if there is one."""
    dtype: str | None = None
    """Of the host: float32, bfloat16, float16; None: as saved."""


class Session:
    """One data set under one root, as phase 1 recorded it."""

    def __init__(self, layout: Layout, run: RunOptions | None, choices: Mapping[str, Any]) -> None:
        """`run` and `choices` (options of the benchmark) are those of a new run; `Session.of` reads them back."""
        self.layout = layout
        self._run = run
        self.choices = dict(choices)

    @classmethod
    def of(cls, layout: Layout, overrides: Mapping[str, Any] | None = None) -> Session:
        """The session that captured this data set.

        Args:
            overrides: options of the benchmark that take the place of the recorded ones.

        Raises:
            DiscoveryError: nothing was captured here.
        """
        content = json.loads(layout.require(layout.run, "capture").read_text(encoding="utf-8"))
        run = RunOptions.from_dict(content["run"])
        return cls(layout, run, {**content["benchmark"], **(overrides or {})})

    def made_with(self) -> dict[str, Any]:
        """What answers depend on, for the record."""
        return {"dataset": self.layout.dataset, "run": self.run.to_dict(), "benchmark": _plain(self.choices)}

    @property
    def run(self) -> RunOptions:
        """What answers are made with.

        Raises:
            DiscoveryError: nobody said.
        """
        if self._run is None:
            raise DiscoveryError("This needs host and transcoder. Give --model and --clt.")
        return self._run

    @cached_property
    def benchmark(self) -> Benchmark:
        """The benchmark with its options."""
        return benchmarks.load(self.layout.dataset, **self.choices)

    @cached_property
    def questions(self) -> list[Sample]:
        """The benchmark's samples, as many as were asked for."""
        samples = list(self.benchmark.samples())
        return samples if self.run.max_samples is None else samples[: self.run.max_samples]

    @cached_property
    def samples(self) -> list[Sample]:
        """The samples with prompts as the host takes them."""
        if self.run.template is not None:
            return [framed(sample, self.run.template, self.run.suffix) for sample in self.questions]
        placed = []
        for sample in self.questions:
            is_bare = placed_image(sample, self.adapter).prompt != sample.prompt
            with_suffix = _with_suffix(sample, self.run.suffix) if is_bare else sample
            placed.append(placed_image(with_suffix, self.adapter))
        return placed

    @property
    def max_new_tokens(self) -> int:
        """Longest answer."""
        return self.run.max_new_tokens or self.benchmark.about.max_new_tokens

    @cached_property
    def responses(self) -> list[Response]:
        """The captured answers."""
        return read_captured(self.layout.require(self.layout.responses, "capture"))

    @cached_property
    def report(self) -> Report:
        """The benchmark's numbers on the captured answers."""
        return self.benchmark.score({response.id: response.response for response in self.responses})

    def activation_files(self) -> dict[str, Path]:
        """Activation file by sample id."""
        return {response.id: self.layout.sample_file(response.number) for response in self.responses}

    # --- models -----------------------------------------------------------------------------------------------

    @cached_property
    def pair(self) -> tuple[ModelAdapter, BaseTranscoder]:
        """Host and transcoder, neither of them trainable."""
        options: dict[str, Any] = {"device": self.run.device, "dtype": self.run.dtype}
        adapter, transcoder = open_pair(self.run.model, self.run.clt, options)
        return adapter, transcoder.to(adapter.device).requires_grad_(False)

    @property
    def adapter(self) -> ModelAdapter:
        """The host."""
        return self.pair[0]

    @property
    def transcoder(self) -> BaseTranscoder:
        """The transcoder."""
        return self.pair[1]

    @cached_property
    def capturing(self) -> ReplacementModel:
        """The replacement model that keeps its features."""
        return ReplacementModel(*self.pair, capture_activations=True)

    @cached_property
    def replacement(self) -> ReplacementModel:
        """The replacement model."""
        return ReplacementModel(*self.pair)

    @cached_property
    def host(self) -> SteeredHost:
        """The host, steered through decoder differences."""
        return SteeredHost(*self.pair)

    @cached_property
    def neurons(self) -> SteeredNeurons:
        """The host, steered by its neurons."""
        return SteeredNeurons(self.adapter)

    # --- answers as examples ----------------------------------------------------------------------------------

    def examples(self, responses: Sequence[Response]) -> list[Example]:
        """Captured answers cut into good and bad spans; those that are no clear example of either are left out."""
        answers = {row.id: torch.tensor(row.answer_ids, dtype=torch.long) for row in responses}
        return self._cut(answers, self.report)

    def examples_under(
        self, model: Steerable, interventions: Interventions | None, responses: Sequence[Response], batch_size: int
    ) -> list[Example]:
        """The same of other answers to the same questions, given now, by another model or under interventions.

        Args:
            responses: the captured answers; questions with answers of about the same length run together.
        """
        samples = {sample.id: sample for sample in self.samples}
        asked = [samples[row.id] for row in sorted(responses, key=lambda row: len(row.answer_ids))]
        answers = model.generate_ids(
            asked, interventions=interventions, max_new_tokens=self.max_new_tokens, batch_size=batch_size
        )
        texts = self.adapter.decode(answers)
        report = self.benchmark.score({sample.id: text.strip() for sample, text in zip(asked, texts)})
        return self._cut({sample.id: answer for sample, answer in zip(asked, answers)}, report)

    def _cut(self, answers: Mapping[str, Integer[Tensor, " _position"]], report: Report) -> list[Example]:
        scores = {score.id: score for score in report.scores}
        samples = {sample.id: sample for sample in self.samples}
        found = []
        for id, answer in answers.items():
            score = scores[id]
            verdict = self.benchmark.verdict(score)
            by_mention = "mentioned" in score.details
            if verdict == "neither" and not by_mention:
                continue
            spans = spans_of(score.details, verdict == "bad", self._pieces(answer))
            task = "mentions" if by_mention else "whole answer"
            found.append(Example(samples[id], answer, spans, task))
        return found

    def pieces(self, response: Response) -> list[str]:
        """The answer's tokens as text; together they are the decoded answer, special tokens left out."""
        return self._pieces(torch.tensor(response.answer_ids, dtype=torch.long))

    def _pieces(self, ids: Integer[Tensor, " _position"]) -> list[str]:
        texts = ["", *self.adapter.decode([ids[: end + 1] for end in range(len(ids))])]
        return [after[len(before) :] for before, after in pairwise(texts)]

    def prompt_pieces(self, sample: Sample) -> list[str]:
        """The prompt's tokens as text, one by one, special ones and image places by their names."""
        inputs = self.adapter.prepare([sample], with_answer=False)
        tokenizer = self.adapter.tokenizer
        assert tokenizer is not None
        return [str(tokenizer.decode([token])) for token in inputs.input_ids[0].tolist()]


def _with_suffix(sample: Sample, suffix: str) -> Sample:
    return Sample(**{**vars(sample), "prompt": sample.prompt + suffix}) if suffix else sample


def _plain(choices: Mapping[str, Any]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in choices.items()}
