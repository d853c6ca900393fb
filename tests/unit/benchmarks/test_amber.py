"""AMBER on two images and seven questions that were counted by hand, following the evaluator's steps."""

import pytest

from clt import benchmarks
from clt.benchmarks.amber_data import AmberData
from clt.errors import BenchmarkError, CLTError
from tests.tiny_benchmarks import GENERATIVE_IDS, QUESTION_IDS, write_amber


@pytest.fixture
def folder(tmp_path):
    return write_amber(tmp_path / "data")


def generative(folder, **options):
    return benchmarks.load("amber", data=folder, extractor="rules", **options)


def counts(benchmark, response, id="1"):
    (score,) = benchmark.score({id: response}).scores
    return score.counts


def test_a_mention_is_credited_to_the_first_word_it_can_stand_for(folder):
    found = counts(generative(folder), "There is ground.")
    # `ground` is associated with grass (slot 0) before road (slot 1): one slot, no hallucination.
    assert (found["covered"], found["truth"], found["hallucinated"]) == (1, 3, 0)


def test_invented_objects_count_per_mention_and_targets_once(folder):
    found = counts(generative(folder), "A cat, a cat and a car beside a dog.")
    assert found["mentions"] == 4
    assert found["hallucinated"] == 3  # cat, cat, car
    assert (found["targeted"], found["targets"]) == (1, 2)  # cat; the car is no target
    assert found["clean"] == 0


def test_safe_words_count_as_mentions_and_nothing_else(folder):
    found = counts(generative(folder), "A sign behind the car.", id="2")
    assert (found["mentions"], found["covered"], found["hallucinated"]) == (2, 1, 0)
    assert (found["attainable"], found["truth"]) == (1, 2)  # `sign` is safe, so it can never be covered


def test_numbers_are_pooled_over_responses_and_rounded_like_the_script(folder):
    report = generative(folder).score({"1": "A dog and a cat.", "2": "A car."})
    assert report.metrics == {
        "chair": round(1 / 3.001 * 100, 1),
        "cover": round(2 / 5.001 * 100, 1),
        "hal": round(100 - 1 / 2.001 * 100, 1),
        "cog": round(1 / 4.001 * 100, 1),
    }
    exact = generative(folder, digits=None).score({"1": "A dog and a cat.", "2": "A car."}).metrics
    assert exact["chair"] == 1 / 3.001 * 100
    assert report.provenance["extractor"] == "rules"
    assert report.provenance["similarity"] == "identity"


def test_similar_words_may_hit_a_target_and_still_be_safe(folder, tmp_path):
    table = tmp_path / "similar.json"
    table.write_text('{"pairs": [["bush", "dog"], ["bush", "tiger"]]}')
    benchmark = generative(folder, similarity="file", similarity_file=table)
    found = counts(benchmark, "A bush.")
    # Similar to a word of the target `cat`, equal to one of the target `tree`, and similar to the truth `dog`.
    assert (found["targeted"], found["covered"], found["hallucinated"]) == (2, 1, 0)
    assert benchmark.score({"1": "A bush."}).provenance["similarity"] == "file"


def test_verdicts_look_at_inventions_and_at_what_was_attainable(folder):
    benchmark = generative(folder)
    texts = {
        "good": "Grass, a road and a dog are here: grass, road, dog.",
        "neither": "There is grass and a dog.",
        "bad": "There is grass, a road, a dog and a car.",
    }
    for verdict, text in texts.items():
        (score,) = benchmark.score({"1": text}).scores
        assert benchmark.verdict(score) == verdict, text
    (nothing,) = benchmark.score({"1": ""}).scores
    assert benchmark.verdict(nothing) == "bad"
    (invented,) = generative(folder).score({"1": texts["bad"]}).scores
    assert generative(folder, rule="coverage").verdict(invented) == "good", "the seeds' rule looks at coverage alone"


def test_missing_and_empty_descriptions_are_counted(folder):
    report = generative(folder).score({"2": " "})
    assert (report.provenance["n_missing"], report.provenance["n_empty"]) == (1, 1)
    assert report.provenance["undefined"] == ["chair"]
    assert report.metrics == {"chair": 0, "cover": 0, "hal": round(100 - 1 / 1.001 * 100, 1), "cog": 0}


ANSWERS = dict(zip(QUESTION_IDS, ["No", "Yes", "No", "No", "Yes", "yes", "No"]))


def test_questions_are_scored_with_no_as_the_positive_class(folder):
    report = benchmarks.load("amber", data=folder, task="discriminative").score(ANSWERS)
    metrics = report.metrics
    # Right: 3, 4, 5, 9; said No: 3, 5, 6, 9 of which 3, 5, 9 rightly; truth no: 3, 5, 7, 9.
    assert metrics["accuracy"] == round(4 / 7.001 * 100, 1)
    assert metrics["precision"] == metrics["recall"] == round(3 / 4.001 * 100, 1) == 75.0
    assert metrics["f1"] == round(2 * 0.75 * 0.75 / (1.5 + 0.0001) * 100, 1)
    assert metrics["attribute_accuracy"] == round(2 / 4.003 * 100, 1)
    assert metrics["state_accuracy"] == round(2 / 2.001 * 100, 1)
    assert metrics["existence_f1"] == round(2 * 0.999 * 0.999 / (2 * 0.999 + 0.001) * 100, 1)
    assert metrics["relation_accuracy"] == round(1 / 2.001 * 100, 1)
    assert report.provenance["n_unparsed"] == 1, "`yes` is not `Yes` to the evaluator"


def test_the_first_word_can_be_read_instead(folder):
    answers = {id: f"{text.lower()}, it is." for id, text in ANSWERS.items()}
    report = benchmarks.load("amber", data=folder, task="discriminative", parser="first_word").score(answers)
    assert report.provenance["n_unparsed"] == 0
    assert report.metrics["accuracy"] == round(5 / 7.001 * 100, 1)


@pytest.mark.parametrize(
    ("task", "n"), [("discriminative", 7), ("existence", 1), ("attribute", 4), ("relation", 2), ("generative", 2)]
)
def test_each_task_has_its_samples_and_scores_the_same_file(folder, task, n):
    benchmark = benchmarks.load("amber", data=folder, task=task)
    assert len(benchmark.samples()) == n
    report = benchmark.score({**ANSWERS, **dict.fromkeys(GENERATIVE_IDS, "A dog.")})
    assert report.provenance["n_scored"] == n
    assert report.provenance["n_other_task"] == 9 - n


def test_a_task_without_any_no_is_said_to_be_undefined(folder):
    answers = {"3": "Yes"}
    report = benchmarks.load("amber", data=folder, task="existence").score(answers)
    assert report.metrics == {"accuracy": 0, "precision": 0, "recall": 0, "f1": 0}
    assert report.provenance["undefined"] == ["precision"]


def test_scoring_needs_no_queries_and_the_repository_root_will_do(folder):
    for path in (folder / "query").iterdir():
        path.unlink()
    report = benchmarks.load("amber", data=folder.parent, task="generative").score({"1": "A dog."})
    assert report.provenance["n_scored"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "poetry"}, "no task 'poetry'"),
        ({"task": "discriminative", "rule": "coverage"}, "no option 'rule'"),
        ({"task": "generative", "similarity": "telepathy"}, "similarity = 'telepathy' is not one of"),
        ({"task": "generative", "extractor": "guess"}, "extractor = 'guess' is not one of"),
        ({"task": "generative", "good_cover": 0.3}, "bad_cover = 0.4 must not be above good_cover = 0.3"),
        ({"task": "discriminative", "parser": "psychic"}, "parser = 'psychic' is not one of"),
        ({"task": "generative", "similarity": "file"}, "amber_similarity.json .*does not exist"),
    ],
)
def test_options_that_do_not_exist_are_refused(folder, options, message):
    with pytest.raises(CLTError, match=message):
        benchmarks.load("amber", data=folder, **options).score({"1": "A dog."})


def test_unknown_ids_and_damaged_files_are_refused(folder):
    with pytest.raises(BenchmarkError, match=r"1 of 2 responses have ids .*'77'"):
        generative(folder).score({"1": "A dog.", "77": "A cat."})
    with pytest.raises(BenchmarkError, match="no responses to score"):
        generative(folder).score({})
    with pytest.raises(BenchmarkError, match=r"holds no annotations.json"):
        AmberData.at(folder / "query")
    (folder / "annotations.json").write_text('[{"id": 1, "type": "gen')
    with pytest.raises(BenchmarkError, match="is not JSON"):
        generative(folder).score({"1": "A dog."})
