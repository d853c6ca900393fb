"""Phase 4: which features tell GOOD from BAD, tested on one half of the images and reported on the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float64, Int64

from clt.config.base import Config, require_one_of, require_positive, write_text_atomically
from clt.discovery.classify import says_yes
from clt.discovery.effects import Effects
from clt.discovery.responses import REGIONS, Region, Response
from clt.discovery.selection import half_of, layer_distribution, round_robin
from clt.discovery.statistics import (
    ClassStatistics,
    Significance,
    class_statistics,
    length_bins,
    make_strata,
    permutation_test,
)
from clt.discovery.table import FeatureTable, load_table
from clt.errors import DiscoveryError
from clt.types import FeatureId

Score = Literal["goodness", "gradient", "z"]


@dataclass(frozen=True, kw_only=True)
class AnalysisOptions(Config):
    """How features are scored and chosen."""

    target_features: int = 200
    """Upper bound on selected features: 100-500 for analysis, 7500 for full circuits."""
    min_per_layer: int = 5
    """Features every layer gives at least."""
    score: Score = "goodness"
    """What ranks: the guide's goodness score; gradient x activation on the answers (needs host and transcoder); or the
    permutation statistic."""
    epsilon: float = 0.01
    """Added to frequencies and strengths in denominators; much less, and features seen once win."""
    positions: Region = "counted"
    """Positions that count: the answer with the last prompt token (counted, answer), image, prompt or all."""
    n_permutations: int = 100
    """Shuffles of the labels."""
    min_active: int = 5
    """Features active in fewer of the compared samples are not tested."""
    balance: bool = True
    """Exchange labels only among samples with the same answer class (yes or not) and similar length."""
    halves: bool = True
    """Choose on one half of the images, report the other half's statistics beside; False: all images for both."""
    by_region: bool = False
    """Frequencies and strengths of the chosen features on image, prompt and answer positions, too."""
    seed: int = 0
    """Of the halves and the shuffles."""

    def __post_init__(self) -> None:
        require_positive(
            "analyze",
            target_features=self.target_features,
            epsilon=self.epsilon,
            n_permutations=self.n_permutations,
            min_active=self.min_active,
        )
        require_one_of("analyze", "positions", self.positions, REGIONS)
        require_one_of("analyze", "score", self.score, ("goodness", "gradient", "z"))


@dataclass(frozen=True)
class ClassifiedSamples:
    """GOOD and BAD samples in one order, with what the statistics need of them."""

    responses: tuple[Response, ...]
    files: tuple[Path, ...]
    is_good: Bool[np.ndarray, " sample"]

    @staticmethod
    def of(
        classification: Mapping[str, Sequence[Mapping[str, Any]]],
        responses: Sequence[Response],
        file_of: Callable[[int], Path],
    ) -> ClassifiedSamples:
        """Join the lists with the answers.

        Raises:
            DiscoveryError: an id without an answer.
        """
        by_id = {response.id: response for response in responses}
        ids = [(str(row["id"]), name == "GOOD") for name in ("GOOD", "BAD") for row in classification[name]]
        unknown = [id for id, _ in ids if id not in by_id]
        if unknown:
            raise DiscoveryError(
                f"{len(unknown)} classified ids have no captured answer, among them {', '.join(unknown[:3])}. The "
                "classification is of another run; run `clt phase classify` again."
            )
        chosen = tuple(by_id[id] for id, _ in ids)
        files = tuple(file_of(response.number) for response in chosen)
        return ClassifiedSamples(chosen, files, np.array([good for _, good in ids], dtype=bool))

    def in_half(self, half: str, seed: int) -> Bool[np.ndarray, " sample"]:
        """Which samples' images belong to a half."""
        return np.array([half_of(response.image, seed) == half for response in self.responses], dtype=bool)

    def strata(self, balance: bool) -> Int64[np.ndarray, " sample"]:
        """Samples that may exchange their labels: those with the same answer class and similar length."""
        if not balance:
            return np.zeros(len(self.responses), dtype=np.int64)
        lengths = length_bins([len(response.answer_ids) for response in self.responses])
        return make_strata(np.array([says_yes(response.response) for response in self.responses]), lengths)

    def table(self, region: Region, on_sample: Callable[[], None] = lambda: None) -> FeatureTable:
        """Features active in the region."""
        return load_table(self.files, [response.mask(region) for response in self.responses], on_sample)


@dataclass(frozen=True)
class Analysis:
    """Everything known about every feature, and the chosen ones."""

    samples: ClassifiedSamples
    table: FeatureTable
    selection: ClassStatistics
    report: ClassStatistics
    significance: Significance
    effects: Effects | None
    chosen: tuple[FeatureId, ...]
    options: AnalysisOptions


def analyse(
    samples: ClassifiedSamples,
    options: AnalysisOptions,
    effects: Effects | None = None,
    on_sample: Callable[[], None] = lambda: None,
) -> Analysis:
    """Statistics, tests and the round-robin choice.

    Args:
        effects: gradient x activation of the same half, for `score = "gradient"` and for the record.

    Raises:
        DiscoveryError: a class is empty in the half that chooses, or the score's effects were not given.
        ConfigError: impossible numbers of features.
    """
    if options.score == "gradient" and effects is None:
        raise DiscoveryError(
            "score = 'gradient' needs the effects, which need host and transcoder. Use 'goodness' or 'z'."
        )
    everyone = np.ones(len(samples.responses), dtype=bool)
    chooses = samples.in_half("selection", options.seed) if options.halves else everyone
    reports = ~chooses if options.halves else everyone
    _check_halves(samples.is_good, chooses, reports)
    table = samples.table(options.positions, on_sample)
    mine = table.select(chooses)
    selection = class_statistics(mine, samples.is_good[chooses], options.epsilon)
    significance = permutation_test(
        mine,
        samples.is_good[chooses],
        samples.strata(options.balance)[chooses],
        n_permutations=options.n_permutations,
        min_active=options.min_active,
        seed=options.seed,
    )
    eligible = (selection.good_freq + selection.bad_freq) > 0
    chosen = round_robin(
        _scores(options.score, selection, significance, effects),
        eligible,
        target=options.target_features,
        min_per_layer=options.min_per_layer,
        layers=list(table.layers),
    )
    report = class_statistics(table.select(reports), samples.is_good[reports], options.epsilon)
    return Analysis(samples, table, selection, report, significance, effects, tuple(chosen), options)


def _scores(
    score: Score, statistics: ClassStatistics, significance: Significance, effects: Effects | None
) -> Float64[np.ndarray, "layer feature"]:
    if score == "gradient":
        assert effects is not None
        # The effect on BAD spans less that on GOOD ones: features to turn up have it negative, to turn down positive.
        return np.abs(effects.selective)
    return statistics.goodness_score if score == "goodness" else significance.z


def _check_halves(
    is_good: Bool[np.ndarray, " sample"], chooses: Bool[np.ndarray, " sample"], reports: Bool[np.ndarray, " sample"]
) -> None:
    for name, half in (("chooses", chooses), ("reports", reports)):
        for label, members in (("GOOD", is_good & half), ("BAD", ~is_good & half)):
            if not members.any():
                raise DiscoveryError(
                    f"The half that {name} has no {label} sample ({is_good.sum()} GOOD and {(~is_good).sum()} BAD in "
                    "all). Capture more, change --seed, or use --no-halves, which judges on what it chose by."
                )


# --- the file -----------------------------------------------------------------------------------------------------


def to_json(dataset: str, analysis: Analysis) -> dict[str, Any]:
    """`{dataset}_good_features.json` with the guide's fields, and ours behind them."""
    is_good = analysis.samples.is_good
    active = (analysis.selection.good_freq + analysis.selection.bad_freq) > 0
    regions = _by_region(analysis) if analysis.options.by_region else {}
    return {
        "dataset": dataset,
        "total_good_samples": int(is_good.sum()),
        "total_bad_samples": int((~is_good).sum()),
        "total_features_analyzed": int(active.sum()),
        "selected_features_count": len(analysis.chosen),
        "layer_distribution": layer_distribution(analysis.chosen),
        "features": [_feature(analysis, each, regions) for each in analysis.chosen],
        "options": analysis.options.to_dict(),
        "n_tested": analysis.significance.n_tested,
        "n_q_below_0.05": int((analysis.significance.q_value < 0.05).sum()),
    }


def save_analysis(path: Path, dataset: str, analysis: Analysis) -> dict[str, Any]:
    """Write the file; returns what is in it."""
    content = to_json(dataset, analysis)
    write_text_atomically(path, json.dumps(content, indent=2) + "\n")
    return content


def _feature(analysis: Analysis, feature: FeatureId, regions: Mapping[str, ClassStatistics]) -> dict[str, Any]:
    place = list(analysis.table.layers).index(feature.layer), feature.feature
    test = analysis.significance
    entry = {
        "layer": feature.layer,
        "feature_idx": feature.feature,
        **statistics_at(analysis.selection, place),
        "z": float(test.z[place]),
        "p_value": float(test.p_value[place]),
        "q_value": float(test.q_value[place]),
        "held_out": statistics_at(analysis.report, place),
    }
    if analysis.effects is not None:
        entry |= analysis.effects.at(place)
    if regions:
        entry["by_region"] = {region: statistics_at(each, place) for region, each in regions.items()}
    return entry


def statistics_at(statistics: ClassStatistics, place: tuple[int, int]) -> dict[str, float]:
    """The guide's fields of one feature."""
    fields = {
        "goodness_score": statistics.goodness_score,
        "frequency_ratio": statistics.frequency_ratio,
        "activation_ratio": statistics.activation_ratio,
        "good_freq": statistics.good_freq,
        "bad_freq": statistics.bad_freq,
        "good_avg_activation": statistics.good_avg,
        "bad_avg_activation": statistics.bad_avg,
    }
    return {name: float(values[place]) for name, values in fields.items()}


def _by_region(analysis: Analysis) -> dict[str, ClassStatistics]:
    """The same statistics on other positions, over all samples; one region's table at a time in memory."""
    samples, epsilon = analysis.samples, analysis.options.epsilon
    regions: tuple[Region, ...] = ("image", "prompt", "answer")
    return {region: class_statistics(samples.table(region), samples.is_good, epsilon) for region in regions}
