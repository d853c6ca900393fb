"""Response files of all makes, joined to their samples, and the files that are refused."""

import json

import pytest

from clt import benchmarks
from clt.benchmarks import read_responses, write_responses
from clt.errors import BenchmarkError
from tests.tiny_benchmarks import pope_rows, write_lines


@pytest.fixture
def pope(tmp_path):
    return benchmarks.load("pope", data=write_lines(tmp_path / "pope.json", pope_rows(4)))


def read(pope, folder, rows):
    return read_responses(write_lines(folder / "answers.jsonl", rows), pope)


def test_what_is_written_is_read_back(tmp_path, pope):
    responses = {"2": "line one\nline two, “quoted” \u2028 and more", "1": ""}
    write_responses(tmp_path / "responses.jsonl", responses)
    assert read_responses(tmp_path / "responses.jsonl", pope) == responses


def test_rows_with_ids_may_come_in_any_order_and_as_a_list(tmp_path, pope):
    path = tmp_path / "list.json"
    path.write_text(json.dumps([{"id": 3, "response": "No"}, {"id": 1, "response": "Yes"}]))
    assert read_responses(path, pope) == {"3": "No", "1": "Yes"}


def test_the_answer_files_of_pope_and_of_llava_are_understood(tmp_path, pope):
    by_place = [{"question": row["text"], "answer": "Yes"} for row in pope_rows(4)]
    assert read(pope, tmp_path, by_place) == dict.fromkeys("1234", "Yes")
    by_id = [{"question_id": row["question_id"], "prompt": row["text"], "text": "No"} for row in pope_rows(4)]
    assert read(pope, tmp_path, by_id) == dict.fromkeys("1234", "No")


def test_a_file_cut_short_leaves_the_last_samples_missing(tmp_path, pope):
    responses = read(pope, tmp_path, [{"answer": "Yes"}])
    assert responses == {"1": "Yes"}
    assert pope.score(responses).provenance["n_missing"] == 3


ROWS = [{"question": row["text"], "answer": "Yes"} for row in pope_rows(4)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": 1, "response": "Yes"}, {"id": 1, "response": "No"}], "1 ids occur more than once: '1'"),
        ([{"id": 1, "response": "Yes"}, {"response": "No"}], "row 2 has no id"),
        (ROWS + ROWS, "8 rows without ids for 4 samples"),
        (ROWS[::-1], "4 rows answer another question than the sample at their place"),
        ([{"id": 1, "score": 5}], "none of the keys response"),
        ([{"id": 1, "response": ["Yes"]}], "response is \\['Yes'\\]; it must be text"),
        ([7], "must be a list of JSON objects"),
        ([], "is empty"),
    ],
)
def test_files_that_cannot_be_joined_are_refused(tmp_path, pope, rows, message):
    with pytest.raises(BenchmarkError, match=message):
        read(pope, tmp_path, rows)


def test_a_missing_folder_like_or_cut_off_file_is_named(tmp_path, pope):
    with pytest.raises(BenchmarkError, match="does not exist"):
        read_responses(tmp_path / "nothing.jsonl", pope)
    with pytest.raises(BenchmarkError, match="is a folder"):
        read_responses(tmp_path, pope)
    path = tmp_path / "cut.jsonl"
    path.write_text('{"id": 1, "response": "Yes"}\n{"id": 2, "resp')
    with pytest.raises(BenchmarkError, match=r"line 2, is not JSON.*cut off"):
        read_responses(path, pope)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BenchmarkError, match="not UTF-8"):
        read_responses(path, pope)
