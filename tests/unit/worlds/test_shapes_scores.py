"""Scores of the shapes world against cases counted by hand."""

import pytest

from clt.benchmarks.yes_no import first_word
from clt.errors import WorldError
from clt.types import Sample
from clt.worlds import load
from clt.worlds.shapes.score import mentioned


def question(category, label):
    return Sample(id=f"{category}-{label}", prompt="?", meta={"category": category, "label": label, "object": "star"})


def description(truth, targets):
    return Sample(id="-".join(truth), prompt="?", meta={"truth": truth, "hallucination_targets": targets})


QUESTIONS = [question(category, label) for category in ("random", "popular", "adversarial") for label in ("yes", "no")]
DESCRIPTIONS = [description(["moon", "ring"], ["star", "drop"]), description(["square"], ["hexagon"])]


def test_perfect_answers_score_a_hundred():
    scores = load("shapes").score_questions(QUESTIONS, ["Yes", "No"] * 3)
    assert scores["accuracy"] == scores["precision"] == scores["recall"] == scores["f1"] == 100
    assert scores["yes_ratio"] == 50
    assert scores["n"] == 6
    assert {category: part["n"] for category, part in scores["categories"].items()} == {
        "random": 2,
        "popular": 2,
        "adversarial": 2,
    }


def test_saying_yes_to_all_has_full_recall_and_half_precision():
    scores = load("shapes").score_questions(QUESTIONS, ["Yes."] * 6)
    assert (scores["accuracy"], scores["precision"], scores["recall"], scores["yes_ratio"]) == (50, 50, 100, 100)
    assert scores["f1"] == pytest.approx(200 / 3)


def test_saying_no_to_all_scores_zero_without_dividing_by_it():
    scores = load("shapes").score_questions(QUESTIONS, ["No"] * 6)
    assert (scores["accuracy"], scores["precision"], scores["recall"], scores["f1"]) == (50, 0, 0, 0)


def test_empty_responses_are_wrong_and_counted():
    scores = load("shapes").score_questions(QUESTIONS, [""] * 6)
    assert (scores["accuracy"], scores["yes_ratio"], scores["unparsed"]) == (0, 0, 6)


def test_categories_are_scored_apart():
    scores = load("shapes").score_questions(QUESTIONS, ["Yes", "No", "Yes", "No", "Yes", "Yes"])
    assert [scores["categories"][c]["accuracy"] for c in ("random", "popular", "adversarial")] == [100, 100, 50]
    assert scores["accuracy"] == pytest.approx(500 / 6)
    assert scores["precision"] == 75


def test_counts_per_question_sum_to_the_scores():
    world = load("shapes")
    responses = ["Yes", "Yes", "No", "No", "maybe", "No"]
    counts = world.question_counts(QUESTIONS, responses)
    assert [count.is_correct for count in counts] == [True, False, False, True, False, True]
    assert world.score_questions(QUESTIONS, responses)["accuracy"] == 50
    assert [count.id for count in counts] == [sample.id for sample in QUESTIONS]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("Yes", True),
        (" no.", False),
        ("Yes, no star", True),
        ("There is", None),
        ("", None),
        ("Nothing", None),
    ],
)
def test_the_first_word_decides(response, expected):
    assert first_word(response) is expected


def test_a_true_and_complete_description_hallucinates_nothing():
    responses = ["There is a red moon and a blue ring.", "There is a square."]
    assert load("shapes").score_descriptions(DESCRIPTIONS, responses) == {
        "chair": 0,
        "cover": 100,
        "hal": 0,
        "cog": 0,
        "n": 2,
        "n_mentions": 3,
    }


def test_inventions_are_counted_per_mention_and_per_response():
    responses = ["There is a moon, a star and a heart.", "There is a square."]
    scores = load("shapes").score_descriptions(DESCRIPTIONS, responses)
    assert scores["chair"] == 50  # star and heart, of moon, star, heart, square
    assert scores["cover"] == pytest.approx(200 / 3)  # moon and square, of moon, ring, square
    assert scores["hal"] == 50
    assert scores["cog"] == 25  # star


def test_repeated_mentions_count_each_time_but_cover_once():
    counts = load("shapes").description_counts(DESCRIPTIONS[:1], ["a moon, a moon and a star, a star"])
    assert counts[0][1:] == (4, 2, 2, 1, 2)


def test_empty_descriptions_cover_nothing_and_invent_nothing():
    scores = load("shapes").score_descriptions(DESCRIPTIONS, ["", ""])
    assert (scores["chair"], scores["cover"], scores["hal"], scores["cog"]) == (0, 0, 0, 0)


def test_mentions_are_whole_words():
    assert mentioned("Stars? A barn, a STAR; a plus-size house.") == ["star", "plus", "house"]


@pytest.mark.parametrize("score", ["score_questions", "score_descriptions"])
def test_a_missing_response_is_refused(score):
    with pytest.raises(WorldError, match="1 responses for 2 samples"):
        getattr(load("shapes"), score)(DESCRIPTIONS, ["Yes"])
