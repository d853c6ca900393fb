"""AMBER's generative part: what a description names, misses and invents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from clt.benchmarks.amber_data import (
    EPSILON,
    GENERATIVE,
    LICENSE,
    SOURCE,
    AmberData,
    amber_samples,
    of_this_task,
    percent,
)
from clt.benchmarks.base import About, Report, SampleScore, Verdict, summed, tally
from clt.benchmarks.matching import Annotated, attainable, credit
from clt.benchmarks.nouns import NounExtractor, reachable_words
from clt.benchmarks.nouns_nltk import EXTRACTORS, amber_nouns
from clt.benchmarks.similarity import SIMILARITIES, Similarity, similarity
from clt.config.base import require_numbers, require_one_of
from clt.errors import ConfigError
from clt.types import Sample


@dataclass(frozen=True, kw_only=True)
class AmberGenerative:
    """Descriptions; chair, cover, hal and cog in percent.

    Cover cannot always reach 100: a mention is credited to the first annotated word it can stand for, and safe words
    never cover one. So each score also counts what was *attainable* by naming every word AMBER knows.
    """

    data: str | Path
    """AMBER's `data` folder."""
    images: str | Path | None = None
    """Folder of the images; needed to ask, not to score."""
    extractor: str = "auto"
    """How nouns are found. auto: NLTK as in the official script if its data is there, otherwise the rules."""
    similarity: str = "identity"
    """Which words count as the same. The official script uses spaCy."""
    similarity_file: str | Path | None = None
    """The table of similarity = file; None: `amber_similarity.json` in the data folder."""
    rule: str = "attainable"
    """attainable: thresholds on covered / attainable, and nothing invented; coverage: the seeds', on coverage alone."""
    good_cover: float = 0.8
    """A good response covers at least this share."""
    bad_cover: float = 0.4
    """A bad response covers less than this share, or invents something (rule = attainable)."""
    digits: int | None = 1
    """Decimals of the metrics, 1 as the official script prints them; None: not rounded."""

    about = About(
        name="amber",
        summary="Descriptions of 1,004 images: objects invented (chair, hal, cog) and objects found (cover)",
        source=SOURCE,
        license=LICENSE,
        higher_is_better={"chair": False, "cover": True, "hal": False, "cog": False},
    )

    def __post_init__(self) -> None:
        for name, allowed in (
            ("extractor", EXTRACTORS),
            ("similarity", SIMILARITIES),
            ("rule", ("attainable", "coverage")),
        ):
            require_one_of("AmberGenerative", name, getattr(self, name), allowed)
        require_numbers("AmberGenerative", good_cover=self.good_cover, bad_cover=self.bad_cover, digits=self.digits)
        if self.bad_cover > self.good_cover:
            raise ConfigError(
                f"AmberGenerative.bad_cover = {self.bad_cover} must not be above good_cover = {self.good_cover}: a "
                "response cannot be good and bad."
            )

    @cached_property
    def _files(self) -> AmberData:
        return AmberData.at(self.data)

    @cached_property
    def _extract(self) -> NounExtractor:
        return amber_nouns(self.extractor, self._files.vocabulary)

    @cached_property
    def _similar(self) -> Similarity:
        given = Path(self.similarity_file) if self.similarity_file else self._files.folder / "amber_similarity.json"
        return similarity(self.similarity, given)

    @cached_property
    def _ids(self) -> list[str]:
        return [id for id, row in self._files.annotations.items() if row["type"] == GENERATIVE]

    @cached_property
    def _neighbours(self) -> dict[str, frozenset[str]]:
        """The words that some text can mention, each with the other words that count as the same."""
        words = self._files.vocabulary & reachable_words()
        return {
            word: frozenset(other for other in self._files.vocabulary - {word} if self._similar(word, other))
            for word in words
        }

    def samples(self) -> Sequence[Sample]:
        """1,004 requests, each "Describe this image."; `meta["reference"]` names every annotated word."""
        return amber_samples(self._files, self._ids, self.images, lambda row: f"There is {', '.join(row['truth'])}.")

    def score(self, responses: Mapping[str, str]) -> Report:
        """Count the responses. Those to questions of AMBER's other tasks are left out and counted.

        Raises:
            BenchmarkError: an id that AMBER does not have, or no response at all.
        """
        ours, n_other = of_this_task(responses, self._ids, self._files)
        scores, provenance = tally("amber", self._ids, ours, self._count)
        totals = summed(scores)
        notes = {
            "task": GENERATIVE,
            "n_other_task": n_other,
            **self._extract.describe(),
            **self._similar.describe(),
            "judge": "not used",
            "attainable_cover": percent(totals["attainable"], totals["truth"], self.digits),
            "undefined": [] if totals["mentions"] else ["chair"],
            "data": self._files.fingerprints(),
        }
        return Report(metrics=self.metrics(totals), scores=scores, provenance={**provenance, **notes})

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """The evaluator's numbers."""
        hal = 100 - totals["clean"] / (totals["responses"] + EPSILON) * 100
        return {
            "chair": percent(totals["hallucinated"], totals["mentions"], self.digits),
            "cover": percent(totals["covered"], totals["truth"], self.digits),
            "hal": hal if self.digits is None else round(hal, self.digits),
            "cog": percent(totals["targeted"], totals["targets"], self.digits),
        }

    def verdict(self, score: SampleScore) -> Verdict:
        """Good: enough covered and nothing invented; bad: something invented or too little covered."""
        counts = score.counts
        if self.rule == "coverage":
            share, is_clean = counts["covered"] / counts["truth"], True
        else:
            share, is_clean = counts["covered"] / max(counts["attainable"], 1), counts["hallucinated"] == 0
        if not is_clean or share < self.bad_cover:
            return "bad"
        return "good" if share >= self.good_cover else "neither"

    def _count(self, id: str, response: str) -> SampleScore:
        annotated = self._annotated(id)
        row = self._files.annotations[id]
        mentions = self._extract(response)
        found = credit(mentions, annotated, self._similar)
        counts = {
            "hallucinated": len(found.hallucinated),
            "mentions": len(mentions),
            "covered": len(found.truth),
            "truth": len(row["truth"]),
            "targeted": len(found.hallucination),
            "targets": len(row["hallu"]),
            "clean": int(not found.hallucinated),
            "responses": 1,
            "attainable": attainable(self._neighbours, annotated, self._neighbours),
        }
        coverage = len(found.truth) / len(row["truth"])
        details = {"mentioned": mentions, "invented": found.hallucinated, "coverage": coverage}
        return SampleScore(id=id, counts=counts, details=details)

    def _annotated(self, id: str) -> Annotated:
        row = self._files.annotations[id]
        candidates = self._files.candidates
        return Annotated(candidates(row["truth"]), candidates(row["hallu"]), self._files.safe_words)
