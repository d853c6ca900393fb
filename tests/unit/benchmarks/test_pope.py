"""POPE: its evaluator's reading of answers, its numbers, its files, and what is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clt import benchmarks
from clt.benchmarks.yes_no import CELLS, cell, confusion_metrics, pope_rule, says_neither
from clt.errors import BenchmarkError
from tests.tiny_benchmarks import pope_rows, write_lines


@pytest.fixture
def questions(tmp_path):
    return write_lines(tmp_path / "coco_pope_random.json", pope_rows())


def scored(questions, answers):
    pope = benchmarks.load("pope", data=questions)
    return pope.score(dict(zip((sample.id for sample in pope.samples()), answers)))


@pytest.mark.parametrize(
    ("answer", "says_yes", "is_guess"),
    [
        ("Yes", True, False),
        ("No", False, False),
        ("no", False, False),
        ("No, there is not.", False, False),
        ("There is not", False, False),
        ("yes and no", False, False),
        ("I see a dog. There is no cat.", True, True),
        ("NO", True, True),
        ("No!", True, True),
        ("no\n", True, True),
        ('"No"', True, True),
        ("Nope", True, True),
        ("It isn't there", True, True),
        ("none", True, True),
        ("cannot", True, True),
        ("", True, True),
    ],
)
def test_answers_are_read_as_the_official_evaluator_reads_them(answer, says_yes, is_guess):
    assert (pope_rule(answer), says_neither(answer)) == (says_yes, is_guess)


def test_numbers_are_those_of_the_confusion_table(questions):
    report = scored(questions, ["Yes", "Yes", "Yes", "No", "No", "No", "Yes", "No"])
    # Labels are yes, no, ...: 3 true and 1 false yes, 3 true and 1 false no.
    assert report.metrics == {"accuracy": 0.75, "precision": 0.75, "recall": 0.75, "f1": 0.75, "yes_ratio": 0.5}
    assert report.provenance["undefined"] == []


def test_all_no_is_scored_and_said_to_be_undefined(questions):
    report = scored(questions, ["No"] * 8)
    assert report.metrics == {"accuracy": 0.5, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}
    assert report.provenance["undefined"] == ["precision", "f1"]


def test_a_set_without_positives_has_no_recall(tmp_path):
    rows = [row for row in pope_rows() if row["label"] == "no"]
    report = scored(write_lines(tmp_path / "pope.json", rows), ["Yes"] * 4)
    assert report.metrics["recall"] == 0
    assert report.provenance["undefined"] == ["recall", "f1"]


def test_missing_empty_and_unread_answers_are_counted(questions):
    report = scored(questions, ["Yes", "", "Perhaps"])
    counted = {key: report.provenance[key] for key in ("n_samples", "n_scored", "n_missing", "n_empty", "n_unparsed")}
    assert counted == {"n_samples": 8, "n_scored": 3, "n_missing": 5, "n_empty": 1, "n_unparsed": 2}


@given(answers=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1))
def test_counts_of_parts_add_up_to_the_whole(answers):
    cells = [cell(said, truth) for said, truth in answers]
    totals = {name: sum(each[name] for each in cells) for name in CELLS}
    metrics = confusion_metrics(totals)
    assert sum(totals.values()) == len(answers)
    assert metrics["accuracy"] == sum(said == truth for said, truth in answers) / len(answers)
    assert metrics["yes_ratio"] == sum(said for said, _ in answers) / len(answers)
    assert 0 <= metrics["f1"] <= 1


def test_a_json_list_reads_like_json_lines(tmp_path, questions):
    as_list = tmp_path / "aokvqa_pope_seem_random.json"
    as_list.write_text(json.dumps(pope_rows(), indent=1))
    ours, theirs = (list(benchmarks.load("pope", data=path).samples()) for path in (questions, as_list))
    assert ours == theirs


def test_three_splits_are_reported_each_and_as_their_mean(tmp_path):
    for split in ("random", "popular", "adversarial"):
        write_lines(tmp_path / f"coco_pope_{split}.json", pope_rows())
    pope = benchmarks.load("pope", data=tmp_path, split="all")
    samples = list(pope.samples())
    assert [sample.id for sample in samples[::8]] == ["random/1", "popular/1", "adversarial/1"]
    responses = {sample.id: "Yes" if sample.id.startswith("random") else sample.meta["reference"] for sample in samples}
    metrics = pope.score(responses).metrics
    assert (metrics["random_accuracy"], metrics["popular_accuracy"], metrics["accuracy"]) == (0.5, 1, 2.5 / 3)


def test_right_answers_are_good_and_wrong_ones_bad(questions):
    pope = benchmarks.load("pope", data=questions)
    report = pope.score({"1": "Yes", "2": "Yes"})
    assert [pope.verdict(score) for score in report.scores] == ["good", "bad"]


def test_images_are_attached_or_named_as_missing(tmp_path, questions):
    images = tmp_path / "images"
    images.mkdir()
    (images / "picture_0.png").write_bytes(b"")
    pope = benchmarks.load("pope", data=questions, images=images)
    with pytest.raises(BenchmarkError, match=r"1 of 2 images are not in .*picture_1.png"):
        pope.samples()
    (images / "picture_1.png").write_bytes(b"")
    pope = benchmarks.load("pope", data=questions, images=images)
    assert pope.samples()[0].images == (images / "picture_0.png",)


def changed(place, **changes):
    rows = pope_rows()
    rows[place] |= changes
    return rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (changed(3, label="perhaps"), "row 4: the label is 'perhaps'"),
        (changed(3, question_id=1), "1 ids occur more than once: '1'"),
        ([{"question_id": 1, "image": "a"}], "none of the keys label"),
        ([], "is empty"),
    ],
)
def test_damaged_questions_are_refused(tmp_path, rows, message):
    pope = benchmarks.load("pope", data=write_lines(tmp_path / "pope.json", rows))
    with pytest.raises(BenchmarkError, match=message):
        pope.samples()


def test_a_folder_needs_a_split(tmp_path, questions):
    with pytest.raises(BenchmarkError, match="choose --split"):
        benchmarks.load("pope", data=tmp_path).samples()
    with pytest.raises(BenchmarkError, match="one question file of the split 'popular'"):
        benchmarks.load("pope", data=tmp_path, split="popular").samples()
    assert len(benchmarks.load("pope", data=tmp_path, split="random").samples()) == 8
