"""The embedded world's two benchmarks, beside the world's own scores."""

import pytest

from clt import benchmarks
from clt.benchmarks import Benchmark
from clt.errors import BenchmarkError, ConfigError
from clt.worlds import load
from clt.worlds.shapes.benchmarks import ShapesAmber, ShapesPope

QUESTIONS, DESCRIPTIONS = ShapesPope(n=60), ShapesAmber(n=20)
ANSWERS = ["Yes", "no", "No.", "Yes, a star", "perhaps", "No"] * 10
TEXTS = ["There is a star and a moon.", "", "There is a red square and a red square."] * 7


def responses(benchmark, texts):
    return {sample.id: text for sample, text in zip(benchmark.samples(), texts)}


def test_they_are_found_by_name():
    for name in ("shapes-pope", "shapes-amber"):
        assert name in benchmarks.names()
        assert isinstance(benchmarks.load(name, n=3), Benchmark)
        assert len(list(benchmarks.load(name, n=3).samples())) == 3


def test_the_questions_score_as_the_world_scores_them():
    report = QUESTIONS.score(responses(QUESTIONS, ANSWERS))
    world = load("shapes").score_questions(QUESTIONS.samples(), ANSWERS)
    for name in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        assert report.metrics[name] == pytest.approx(world[name])
        assert report.metrics[f"adversarial_{name}"] == pytest.approx(world["categories"]["adversarial"][name])
    assert report.provenance["n_unparsed"] == world["unparsed"] == 10


def test_the_descriptions_score_as_the_world_scores_them():
    report = DESCRIPTIONS.score(responses(DESCRIPTIONS, TEXTS))
    world = load("shapes").score_descriptions(DESCRIPTIONS.samples(), TEXTS[:20])
    assert report.metrics == pytest.approx({name: world[name] for name in report.metrics})


@pytest.mark.parametrize("benchmark", [QUESTIONS, DESCRIPTIONS])
def test_the_reference_answers_are_perfect_and_good(benchmark):
    report = benchmark.score({sample.id: sample.meta["reference"] for sample in benchmark.samples()})
    for metric, is_better in benchmark.about.higher_is_better.items():
        assert report.metrics[metric] == (100 if is_better else 0)
    assert {benchmark.verdict(score) for score in report.scores} == {"good"}


def test_an_invention_makes_a_bad_description():
    first = DESCRIPTIONS.samples()[0]
    target = first.meta["hallucination_targets"][0]
    (score,) = DESCRIPTIONS.score({first.id: f"{first.meta['reference']} And a {target}."}).scores
    assert DESCRIPTIONS.verdict(score) == "bad"
    (score,) = DESCRIPTIONS.score({first.id: "Nothing."}).scores
    assert DESCRIPTIONS.verdict(score) == "neither"


def test_splits_and_seeds_draw_other_scenes():
    ids = [ShapesAmber(n=5, **options).samples()[0].id for options in ({}, {"seed": 1}, {"split": "train"})]
    assert len(set(ids)) == 3
    with pytest.raises(ConfigError, match="split"):
        ShapesAmber(split="validation")
    with pytest.raises(ConfigError, match="n = 0"):
        ShapesPope(n=0)


def test_questions_may_be_asked_about_the_first_scenes_only():
    every, some = benchmarks.load("shapes", n=4), benchmarks.load("shapes", n=4, asked=1)
    kept = [sample for sample in every.samples() if "label" not in sample.meta or "/0/question" in sample.id]
    assert [sample.id for sample in some.samples()] == [sample.id for sample in kept]
    assert len(kept) == 4 + 6
    answers = {sample.id: sample.meta["reference"] for sample in some.samples()}
    report = some.score(answers)
    assert report.metrics["cover"] == report.metrics["adversarial_accuracy"] == 100
    for wrong, message in ((0, "greater than 0"), (5, "more than n = 4")):
        with pytest.raises(ConfigError, match=rf"asked = .*{message}"):
            benchmarks.load("shapes", n=4, asked=wrong)


def test_an_option_that_is_no_number_is_refused_by_name():
    with pytest.raises(BenchmarkError, match=r"shapes: option n = 'two' must be a number, such as 600"):
        benchmarks.load("shapes", n="two")
