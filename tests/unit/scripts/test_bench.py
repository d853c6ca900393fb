"""`clt bench` as typed: what is printed, what is written, what is refused."""

import json

import pytest

import clt.__main__ as command_line
from clt.benchmarks import similarity
from tests.tiny_benchmarks import pope_rows, write_amber, write_lines


@pytest.fixture
def run(capsys):
    def run(*arguments):
        command_line.main(["bench", *map(str, arguments)])
        return capsys.readouterr()

    return run


@pytest.fixture
def refused(capsys):
    def refused(*arguments):
        with pytest.raises(SystemExit) as stopped:
            command_line.main(["bench", *map(str, arguments)])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    return refused


@pytest.fixture
def pope(tmp_path):
    return write_lines(tmp_path / "pope.json", pope_rows())


def test_pope_as_the_documentation_has_it(run, pope, tmp_path):
    answers = write_lines(
        tmp_path / "answers.jsonl", [{"question": row["text"], "answer": "No"} for row in pope_rows()]
    )
    scores = tmp_path / "scores.jsonl"
    printed = run("score", "pope", "--data", pope, "--responses", answers, "--json", "--output", scores)
    result = json.loads(printed.out)
    assert list(result) == ["metrics", "provenance"]
    assert result["metrics"] == {"accuracy": 0.5, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}
    assert "nothing to divide by, printed as 0: precision, f1" in printed.err
    rows = [json.loads(line) for line in scores.read_text().splitlines()]
    assert [row["verdict"] for row in rows] == ["bad", "good"] * 4
    assert rows[0]["fn"] == 1


@pytest.mark.parametrize("task", ["generative", "discriminative"])
def test_amber_as_the_documentation_has_it(run, tmp_path, task):
    data, responses = write_amber(tmp_path / "data"), tmp_path / "responses.json"
    responses.write_text(json.dumps([{"id": 1, "response": "A dog."}, {"id": 3, "response": "No"}]))
    flags = ("--data", data, "--responses", responses, "--task", task, "--similarity", "identity", "--json")
    printed = run("score", "amber", *flags)
    metrics = json.loads(printed.out)["metrics"]
    expected = {
        "generative": {"chair", "cover", "hal", "cog"},
        "discriminative": {"accuracy", "precision", "recall", "f1"},
    }
    assert expected[task] <= set(metrics)
    assert "1 responses belong to other tasks" in printed.err


def test_responses_to_other_tasks_alone_are_an_error(refused, tmp_path):
    data = write_amber(tmp_path / "data")
    responses = write_lines(tmp_path / "responses.jsonl", [{"id": 3, "response": "No"}])
    assert "All 1 responses belong to other tasks of AMBER" in refused(
        "score", "amber", "--data", data, "--responses", responses
    )


def test_verify_reads_everything_and_names_missing_images(run, refused, pope, tmp_path):
    found = json.loads(run("verify", "pope", "--data", pope, "--json").out)
    assert (found["n_samples"], found["labels"], found["reference_metrics"]["accuracy"]) == (8, {"yes": 4, "no": 4}, 1)
    assert "n_samples: 8" in run("verify", "pope", "--data", pope).out
    assert "2 of 2 images are not in" in refused("verify", "pope", "--data", pope, "--images", tmp_path)


def test_list_and_info_tell_what_there_is(run, refused):
    listed = run("list").out
    for name in ("amber", "pope", "chair", "object-halbench", "mme", "hallusionbench", "mmhal", "llava-bench", "jsonl"):
        assert f" {name} " in listed
    info = run("info", "mmhal").out
    assert "rated 0 to 6" in info
    assert "judge_log" in info
    assert "Did you mean 'mmhal'" in refused("info", "mmhall")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--similarity", "identity"), "pope has no option 'similarity'"),
        (("--option", "colour"), "options are NAME=VALUE"),
        (("--option", "colour=red"), "pope has no option 'colour'"),
        (("--split", "easy"), "split = 'easy' is not one of"),
        (("--split", "random"), "needs a folder of question files"),
    ],
)
def test_options_a_benchmark_does_not_have_are_refused(refused, pope, flags, message):
    assert message in refused("score", "pope", "--data", pope, "--responses", pope, *flags)


VALUES = {"dog": 1.0, "cat": 0.9, "car": 0.2}


class Document:
    """A word with a vector of one number, as spaCy would give it."""

    def __init__(self, word):
        self.value = VALUES.get(word, 0.0)

    def similarity(self, other):
        return 1 - abs(self.value - other.value) if self.value and other.value else 0.0


def test_a_table_made_once_replaces_spacy(run, tmp_path, monkeypatch):
    class Model:
        def __init__(self):
            self.meta = {"version": "3.8.0"}

        def __call__(self, word):
            return Document(word)

    monkeypatch.setattr(similarity, "_load_spacy", lambda name: Model())
    data, table = write_amber(tmp_path / "data"), tmp_path / "data" / "amber_similarity.json"
    assert "1 pairs of 13 words" in run("similarity", "--data", data, "--output", table).out
    responses = write_lines(tmp_path / "responses.jsonl", [{"id": 1, "response": "A cat and a car."}])
    by = {}
    for name in ("spacy", "file", "identity"):
        flags = ("--data", data, "--responses", responses, "--similarity", name, "--json")
        by[name] = json.loads(run("score", "amber", *flags).out)
    assert by["file"]["metrics"] == by["spacy"]["metrics"] != by["identity"]["metrics"]
    assert (
        by["file"]["provenance"]["made_with"]
        == "similarity spacy, similarity_model en_core_web_lg 3.8.0, threshold 0.8"
    )


def test_without_spacy_the_way_out_is_named(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(similarity, "find_spec", lambda name: None)
    data = write_amber(tmp_path / "data")
    responses = write_lines(tmp_path / "responses.jsonl", [{"id": 1, "response": "A cat."}])
    assert "pip install spacy" in refused(
        "score", "amber", "--data", data, "--responses", responses, "--similarity", "spacy"
    )
