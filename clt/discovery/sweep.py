"""Phase 7 in full: chosen features over doses, learned gains, the seeds' own score and neurons, each with controls."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import tyro
from jaxtyping import Float64

from clt.config.base import Config, require_positive
from clt.discovery.controls import matched_controls
from clt.discovery.effects import Effects, Example
from clt.discovery.gains import GainOptions, learn_gains
from clt.discovery.neurons import NeuronPatch, describe_patch, fit_patch
from clt.discovery.phases import answer_batches, classified, read_features, write_json
from clt.discovery.responses import Response
from clt.discovery.selection import half_of
from clt.discovery.session import Session
from clt.discovery.statistics import class_statistics
from clt.discovery.steering import Arm, Factor, Factors, Steered, Trial, Where, dose_factors, swapped
from clt.errors import ConfigError, DiscoveryError
from clt.replacement import Gains, ReplacementModel, SteeredHost
from clt.replacement.steerable import Steerable
from clt.types import FeatureId


@dataclass(frozen=True, kw_only=True)
class SweepOptions(Config):
    """What is steered, where, how far, and against how many controls."""

    features: int = 20
    """Features per direction: those that push towards BAD answers, and those that push away from them."""
    doses: tuple[float, ...] = (0.5, 1.0)
    """Harmful features times 1 - dose, helpful ones times 1 + dose."""
    where: tuple[Where, ...] = ("host", "replacement", "neurons")
    """The host by decoder differences, the replacement model, neurons of the plain host."""
    controls: int = 5
    """Draws of matched random features per dose."""
    learned: int = 400
    """Features with the largest effects whose gains are learned; 0: none are."""
    learned_controls: int = 2
    """Draws of matched random features whose gains are learned in the same way."""
    seed_score: bool = True
    """Also steer the features that the phase guide's goodness score puts first, amplified."""
    gains: Annotated[GainOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=GainOptions)
    """How gains are learned."""
    eval_batch_size: int = 64
    """Answers at a time."""
    patch_samples: int = 200
    """Answers that neuron factors are fitted on."""

    def __post_init__(self) -> None:
        require_positive("steer", features=self.features, controls=self.controls, eval_batch_size=self.eval_batch_size)
        if not self.doses or not all(dose > 0 for dose in self.doses):
            raise ConfigError(f"steer.doses = {self.doses}: give doses above 0, such as 0.5 1.0.")
        if not self.where:
            raise ConfigError("steer.where is empty: give host, replacement or neurons.")


class Sweep:
    """One session's steering."""

    def __init__(self, session: Session, options: SweepOptions, on_run: Callable[[], None] = lambda: None) -> None:
        """Read what was found and set the report half's questions aside."""
        self.session, self.options, self._on_run = session, options, on_run
        self._found = read_features(session)
        analysis = self._found.get("options", {})
        self._seed, self._halves = int(analysis.get("seed", 0)), bool(analysis.get("halves", True))
        self._effects = Effects.load(session.layout.effects) if session.layout.effects.is_file() else None
        self._frequency, self._strength, self._goodness = self._statistics(float(analysis.get("epsilon", 0.01)))

    # --- who is on which side -------------------------------------------------------------------------------------

    def _half(self, half: str) -> list[Response]:
        """Answers about a half's images; all of them if the analysis did not divide."""
        return [r for r in self.session.responses if not self._halves or half_of(r.image, self._seed) == half]

    def _statistics(self, epsilon: float) -> tuple[Float64[np.ndarray, "layer feature"], ...]:
        """Frequency, strength and goodness score on the selection half."""
        samples = classified(self.session)
        mine = samples.in_half("selection", self._seed) if self._halves else np.ones(len(samples.responses), dtype=bool)
        table = samples.table("counted").select(mine)
        everyone = np.ones(table.n_samples, dtype=bool)
        goodness = class_statistics(table, samples.is_good[mine], epsilon).goodness_score
        return table.frequency(everyone), table.mean_strength(everyone), goodness

    # --- what to steer --------------------------------------------------------------------------------------------

    def chosen(self) -> tuple[list[FeatureId], list[FeatureId]]:
        """Harmful and helpful features, best first. Without effects the guide's: its best features, amplified."""
        rows = self._found["features"]
        n = self.options.features
        if all("direction" in row for row in rows):
            ranked = sorted(rows, key=lambda row: -abs(row["effect"]))
            sides = {side: [_id(row) for row in ranked if row["direction"] == side] for side in ("harmful", "helpful")}
            return sides["harmful"][:n], sides["helpful"][:n]
        return [], [_id(row) for row in rows[:n]]

    def arms(self) -> list[Arm]:
        """Everything to be tried on replacement and host."""
        harmful, helpful = self.chosen()
        arms = [self._arm("chosen", dose, dose_factors(harmful, helpful, dose)) for dose in self.options.doses]
        if self.options.seed_score:
            arms.append(self._arm("seed_score", max(self.options.doses), self._seed_factors()))
        return arms

    def _seed_factors(self) -> Factors:
        """As many features by the goodness score, turned up as the guide has it."""
        best = np.argsort(-self._goodness, axis=None, kind="stable")[: 2 * self.options.features]
        ids = [FeatureId(*map(int, np.unravel_index(place, self._goodness.shape))) for place in best]
        return dose_factors([], ids, max(self.options.doses))

    def _arm(self, name: str, dose: float, factors: Factors) -> Arm:
        chosen = list(factors)
        drawn = [swapped(factors, chosen, self._controls(chosen, n)) for n in range(self.options.controls)]
        return Arm(name, dose, factors, tuple(drawn))

    def _controls(self, chosen: Sequence[FeatureId], number: int) -> list[FeatureId]:
        excluded = {_id(row) for row in self._found["features"][: 4 * self.options.features]}
        return self._matched(chosen, excluded, number)

    def _matched(self, chosen: Sequence[FeatureId], excluded: Collection[FeatureId], number: int) -> list[FeatureId]:
        return matched_controls(chosen, self._frequency, self._strength, excluded, seed=1000 * self._seed + number)

    def learned_arm(self, model: ReplacementModel | SteeredHost) -> Arm | None:
        """Gains learned on the selection half, and learned in the same way on matched random features."""
        if not self.options.learned or self._effects is None:
            return None
        order = np.argsort(-np.abs(self._effects.selective), axis=None, kind="stable")[: self.options.learned]
        chosen = [FeatureId(*map(int, np.unravel_index(place, self._effects.bad.shape))) for place in order]
        mine = self._half("selection")

        def answer_again(gains: Gains | None) -> list[Example]:
            return self.session.examples_under(model, gains, mine, self.options.eval_batch_size)

        # What was captured are the replacement model's answers.
        examples = self.session.examples(mine) if isinstance(model, ReplacementModel) else answer_again(None)

        def learn(features: Sequence[FeatureId]) -> dict[FeatureId, Factor]:
            self._on_run()
            return learn_gains(model, examples, features, self.options.gains, answer_again)

        gains = learn(chosen)
        others = [self._matched(chosen, chosen, 5000 + n) for n in range(self.options.controls)]
        others_learned = [self._matched(chosen, chosen, 5000 + n) for n in range(self.options.learned_controls)]
        moved = [swapped(gains, chosen, other) for other in others]
        return Arm("learned", 1.0, gains, tuple(moved), tuple(map(learn, others_learned)))

    # --- doing it -------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Steer everything, write the results and the patch; returns the content of the file."""
        trial = self._trial()
        results: list[Steered] = []
        before: dict[str, Mapping[str, float]] = {}
        arms = self.arms()
        config = self.session.transcoder.config
        widths = [config.num_features] * config.num_layers
        learned: Arm | None = None
        for where in self.options.where:
            model = self._model(where)
            before[where] = trial.before(where, model).metrics
            if where == "neurons":
                best = learned or arms[len(self.options.doses) - 1]
                results.append(self._neurons(trial, model, best))
                continue
            assert isinstance(model, ReplacementModel | SteeredHost)
            learned = self.learned_arm(model)
            for arm in [*arms, *([learned] if learned else [])]:
                results.append(trial.run(arm, where, model, widths, self._on_run))
        content = self._content(results, before, learned)
        write_json(self.session.layout.steering, content)
        return content

    def _trial(self) -> Trial:
        reported = {row.id: row for row in self._half("report")}
        samples = [sample for sample in self.session.samples if sample.id in reported]
        if not samples:
            raise DiscoveryError("No image is in the half that reports. Capture more samples.")
        trial = Trial(
            self.session.benchmark,
            samples,
            {id: row.image for id, row in reported.items()},
            max_new_tokens=self.session.max_new_tokens,
            batch_size=self.options.eval_batch_size,
            expected_lengths={id: len(row.answer_ids) for id, row in reported.items()},
            seed=self._seed,
        )
        # What was captured are the replacement model's answers.
        trial.remember("replacement", {id: row.response for id, row in reported.items()})
        return trial

    def _model(self, where: Where) -> Steerable:
        session = self.session
        return {
            "host": lambda: session.host,
            "replacement": lambda: session.replacement,
            "neurons": lambda: session.neurons,
        }[where]()

    def _neurons(self, trial: Trial, model: Steerable, arm: Arm) -> Steered:
        """The patch that imitates an arm, kept for `clt apply-neurons`, and those that imitate its controls."""
        ids = [row.id for row in self._half("selection")]
        batches = answer_batches(self.session, self.options.patch_samples, self.options.eval_batch_size, ids)

        def fit(factors: Factors) -> NeuronPatch:
            return fit_patch(self.session.adapter, self.session.transcoder, factors, batches)

        patch = fit(arm.factors)
        patch.save(self.session.layout.patch)
        controls, learned = (
            tuple(fit(factors).factors for factors in each) for each in (arm.controls, arm.learned_controls)
        )
        on_neurons = Arm(arm.name, arm.dose, patch.factors, controls, learned)
        return trial.run(on_neurons, "neurons", model, self.session.adapter.neuron_counts, self._on_run)

    def _content(
        self, results: Sequence[Steered], before: Mapping[str, Mapping[str, float]], learned: Arm | None
    ) -> dict[str, Any]:
        harmful, helpful = self.chosen()
        report = self._half("report")
        content = {
            "dataset": self.session.layout.dataset,
            "higher_is_better": dict(self.session.benchmark.about.higher_is_better),
            "n_samples": len(report),
            "n_images": len({row.image for row in report}),
            "before": {where: dict(metrics) for where, metrics in before.items()},
            "harmful": [list(feature) for feature in harmful],
            "helpful": [list(feature) for feature in helpful],
            "results": [result.to_dict() for result in results],
            "options": self.options.to_dict(),
        }
        if learned:
            content["learned_gains"] = [
                [*feature, *(round(each, 4) for each in (gain if isinstance(gain, tuple) else (gain,)))]
                for feature, gain in learned.factors.items()
            ]
        if "neurons" in before:
            content["patch"] = describe_patch(NeuronPatch.load(self.session.layout.patch))
        return content


def describe(content: Mapping[str, Any]) -> list[str]:
    """A table for people: change, interval and controls of the main metrics."""
    main = [name for name in content["higher_is_better"] if name in next(iter(content["before"].values()))]
    lines = [
        f"change on {content['n_samples']} answers about {content['n_images']} other images; [95 % interval]; controls"
    ]
    for row in content["results"]:
        cells = []
        for name in main:
            change = row["changes"][name]
            low, high = change["interval"]
            against = _control(row["controls"].get(name)) + _control(row["learned_controls"].get(name), ", learned ")
            cells.append(f"{name} {change['value']:+.2f} [{low:+.2f}, {high:+.2f}]{against}")
        lines.append(f"{row['where']}, {row['name']}, dose {row['dose']:g}: {'; '.join(cells)}")
    return lines


def _control(control: Mapping[str, Any] | None, word: str = " against ") -> str:
    if control is None:
        return ""
    spread = "" if control["std"] is None else f" ± {control['std']:.2f}"
    return f"{word}{control['mean']:+.2f}{spread}"


def _id(row: Mapping[str, Any]) -> FeatureId:
    return FeatureId(int(row["layer"]), int(row["feature_idx"]))
