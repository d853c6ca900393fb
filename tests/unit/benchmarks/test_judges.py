"""Judges: every reply is kept and replayed, failures and nonsense are counted, nobody is asked twice."""

import json

import httpx
import pytest

from clt import benchmarks
from clt.benchmarks import judges
from clt.benchmarks.hallusion import ruling_in
from clt.benchmarks.judged import filled
from clt.benchmarks.llava_bench import marks_in
from clt.benchmarks.mmhal import rating_in
from clt.errors import BenchmarkError, CLTError
from tests.tiny_benchmarks import write_lines


class Scripted:
    """A judge that replies from a list and remembers what it was asked."""

    model = "scripted"

    def __init__(self, replies):
        self.replies, self.asked = list(replies), []

    def __call__(self, prompts):
        self.asked += prompts
        return [self.replies.pop(0) for _ in prompts]


@pytest.fixture
def scripted(monkeypatch):
    """Registers a judge of the given replies."""

    def make(*replies):
        judge = Scripted(replies)
        monkeypatch.setitem(judges._FACTORIES, "scripted", lambda **options: judge)
        return judge

    return make


@pytest.fixture
def questions(tmp_path):
    rows = [
        {
            "question_type": ("attribute", "counting")[place % 2],
            "image_id": f"{place}",
            "image_src": f"https://example.org/pictures/{place}.jpg",
            "image_content": ["Dog", "Ball"],
            "question": f"What is {{odd}} about number {place}?",
            "gt_answer": "Nothing.",
        }
        for place in range(4)
    ]
    path = tmp_path / "mmhal.json"
    path.write_text(json.dumps(rows))
    return path


def mmhal(questions, **options):
    return benchmarks.load("mmhal", data=questions, judge_log=questions.with_name("log.jsonl"), **options)


ANSWERS = {str(place): f"Answer {place}." for place in range(4)}


def test_ratings_are_summed_and_nonsense_and_failures_are_counted(questions, scripted):
    judge = scripted("Fine.\nRating: 6", "rating: 2", "I would rather not say", BenchmarkError("timed out"))
    report = mmhal(questions, judge="scripted").score(ANSWERS)
    assert report.metrics["score"] == (6 + 2 + 0) / 3
    assert report.metrics["score_parsed"] == 4
    assert report.metrics["hallucination_rate"] == 2 / 3
    assert report.metrics["informativeness"] == (3 + 2) / 9
    assert (report.metrics["attribute_score"], report.metrics["counting_score"]) == (3, 2)
    counted = {key: report.provenance[key] for key in ("n_parse_failures", "n_judge_failures", "n_judge_calls")}
    assert counted == {"n_parse_failures": 1, "n_judge_failures": 1, "n_judge_calls": 4}
    assert "Dog, Ball" in judge.asked[0]
    assert "Answer 0." in judge.asked[0]
    assert "What is {odd} about number 0?" in judge.asked[0]
    benchmark = mmhal(questions, judge="scripted")
    assert [benchmark.verdict(score) for score in report.scores] == ["good", "bad", "neither", "neither"]


def test_judgements_are_replayed_and_only_failures_are_asked_again(questions, scripted):
    scripted("rating: 6", "rating: 2", "hm", BenchmarkError("timed out"))
    first = mmhal(questions, judge="scripted").score(ANSWERS)
    replayed = mmhal(questions, judge="file").score(ANSWERS)
    assert replayed.metrics == first.metrics
    assert replayed.provenance["judge_model"] == "scripted"
    assert replayed.provenance["n_judge_failures"] == 1
    again = scripted("rating: 4")
    second = mmhal(questions, judge="scripted").score(ANSWERS)
    assert len(again.asked) == 1, "three requests were answered before"
    assert second.provenance["n_judge_failures"] == 0
    assert mmhal(questions, judge="file").score(ANSWERS).metrics == second.metrics


def test_replay_needs_every_reply_and_one_judge(questions, scripted):
    scripted("rating: 6")
    mmhal(questions, judge="scripted").score({"0": ANSWERS["0"]})
    with pytest.raises(BenchmarkError, match=r"no reply of 'scripted' to 3 of 4 requests"):
        mmhal(questions, judge="file").score(ANSWERS)
    with questions.with_name("log.jsonl").open("a") as log:
        log.write(json.dumps({"model": "another", "prompt": "?", "reply": "rating: 1"}) + "\n")
    with pytest.raises(BenchmarkError, match=r"replies of 2 judges \(another, scripted\)"):
        mmhal(questions, judge="file").score({"0": ANSWERS["0"]})
    report = mmhal(questions, judge="file", judge_model="scripted").score({"0": ANSWERS["0"]})
    assert report.metrics["score"] == 6


def test_without_a_judge_or_a_log_the_benchmark_says_what_it_needs(questions):
    with pytest.raises(BenchmarkError, match="needs a judge: --judge openai"):
        mmhal(questions).score(ANSWERS)
    with pytest.raises(BenchmarkError, match="No rule can rate these answers"):
        mmhal(questions, judge="rule").score(ANSWERS)
    with pytest.raises(CLTError, match="judge = 'oracle' is not one of"):
        mmhal(questions, judge="oracle")
    with pytest.raises(BenchmarkError, match="needs --judge-log"):
        benchmarks.load("mmhal", data=questions, judge="file").score(ANSWERS)
    with pytest.raises(BenchmarkError, match="does not exist"):
        mmhal(questions, judge="file").score(ANSWERS)


def test_a_judge_that_only_fails_is_an_error(questions, scripted):
    scripted(*[BenchmarkError("ConnectTimeout")] * 4)
    with pytest.raises(BenchmarkError, match=r"All 4 calls of the judge 'scripted' failed.*ConnectTimeout"):
        mmhal(questions, judge="scripted").score(ANSWERS)


def test_a_judge_that_never_answers_is_not_waited_for_a_thousand_times(questions, scripted):
    rows = json.loads(questions.read_text())
    questions.write_text(json.dumps(rows * 3))
    judge = scripted(*[BenchmarkError("ReadTimeout")] * 12)
    answers = {str(place): f"Answer {place}." for place in range(12)}
    with pytest.raises(BenchmarkError, match=r"first 5 calls of the judge 'scripted' failed.*other 7 .*ReadTimeout"):
        mmhal(questions, judge="scripted").score(answers)
    assert len(judge.asked) == 5


def test_one_answer_is_enough_to_go_on_after_failures(questions, scripted):
    questions.write_text(json.dumps(json.loads(questions.read_text()) * 3))
    scripted("rating: 6", *[BenchmarkError("ReadTimeout")] * 11)
    report = mmhal(questions, judge="scripted").score({str(place): f"Answer {place}." for place in range(12)})
    assert report.provenance["n_judge_failures"] == 11


def test_a_judge_that_only_talks_nonsense_is_an_error(questions, scripted):
    scripted(*["banana"] * 4)
    with pytest.raises(BenchmarkError, match=r"None of 4 replies of the judge 'scripted' could be read.*'banana'"):
        mmhal(questions, judge="scripted").score(ANSWERS)


def test_unknown_ids_are_refused_before_anybody_is_asked(questions, scripted):
    judge = scripted("rating: 6")
    with pytest.raises(BenchmarkError, match="'99'"):
        mmhal(questions, judge="scripted").score({"99": "?"})
    assert judge.asked == []


def test_a_template_of_ones_own_replaces_ours(questions, scripted, tmp_path):
    judge = scripted("rating: 1")
    template = tmp_path / "template.txt"
    template.write_text("{contents}|{question}|{reference}|{answer}")
    report = mmhal(questions, judge="scripted", template=template).score({"0": "{question}"})
    assert judge.asked == ["Dog, Ball|What is {odd} about number 0?|Nothing.|{question}"]
    assert report.provenance["template"] == str(template)
    template.write_text("no fields")
    with pytest.raises(BenchmarkError, match=r"lacks \{contents\}"):
        mmhal(questions, judge="scripted", template=template).score({"0": "?"})


def test_only_named_fields_are_filled_and_only_once():
    assert filled("{a} {b} {c}", {"a": "{b}", "b": "2"}) == "{b} 2 {c}"


def endpoint(handler, **options):
    return judges.OpenAIJudge("model", "http://judge/v1", transport=httpx.MockTransport(handler), **options)


def test_the_endpoint_is_asked_with_the_key_and_tried_again(monkeypatch):
    monkeypatch.setenv("CLT_JUDGE_KEY", "secret")
    seen = []

    def handler(request):
        seen.append(request)
        if len(seen) == 1:
            raise httpx.ReadTimeout("slow")
        if len(seen) == 2:
            return httpx.Response(429, text="later")
        return httpx.Response(200, json={"choices": [{"message": {"content": "rating: 5"}}]})

    assert endpoint(handler)(["How good?"]) == ["rating: 5"]
    assert len(seen) == 3
    assert seen[0].url == "http://judge/v1/chat/completions"
    assert seen[0].headers["authorization"] == "Bearer secret"
    body = json.loads(seen[0].content)
    assert (body["model"], body["temperature"], body["messages"][0]["content"]) == ("model", 0, "How good?")


@pytest.mark.parametrize(
    ("answer", "message", "n_calls"),
    [
        (httpx.Response(401, text="no key"), "HTTP 401: no key", 1),
        (httpx.Response(500, text="broken"), "HTTP 500: broken", 3),
        (httpx.Response(200, text="<html>"), "no chat completion", 1),
        (httpx.Response(200, json={"choices": []}), "no chat completion", 1),
        (httpx.Response(200, json={"choices": [{"message": {"content": None}}]}), "holds no text", 1),
    ],
)
def test_an_endpoint_that_answers_nonsense_gives_an_error_in_the_replys_place(answer, message, n_calls):
    calls = []

    def handler(request):
        calls.append(request)
        return answer

    (reply,) = endpoint(handler)(["?"])
    assert isinstance(reply, BenchmarkError)
    assert message in str(reply)
    assert len(calls) == n_calls


def test_a_timeout_is_an_error_in_the_replys_place():
    def handler(request):
        raise httpx.ConnectTimeout("too slow")

    (reply,) = endpoint(handler)(["?"])
    assert "ConnectTimeout: too slow" in str(reply)


def test_an_endpoint_needs_a_model_and_a_url(monkeypatch):
    for variable in ("CLT_JUDGE_URL", "CLT_JUDGE_MODEL"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(BenchmarkError, match="--judge-model and --judge-url"):
        judges.OpenAIJudge("model")


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Rating: 4", 4),
        ("rating: 3\nrating: 3", 3),
        ("rating: 3 or rating: 4", None),
        ("four", None),
        ("rating: 9", None),
    ],
)
def test_a_rating_counts_when_there_is_exactly_one(reply, rating):
    assert rating_in(reply) == rating


@pytest.mark.parametrize(
    ("reply", "marks"),
    [
        ("8 7\nbecause", (8, 7)),
        ("8, 7.5", (8, 7.5)),
        ("8", None),
        ("8 7 6", None),
        ("Good 7", None),
        ("", None),
        ("80 7", None),
    ],
)
def test_marks_are_the_two_numbers_of_the_first_line(reply, marks):
    assert marks_in(reply) == marks


@pytest.mark.parametrize(
    ("reply", "ruling"),
    [
        ("Correct.", "correct"),
        ("incorrect", "incorrect"),
        ("2", "unclear"),
        ("correct or incorrect", None),
        ("?", None),
    ],
)
def test_a_ruling_is_the_one_word_that_was_asked_for(reply, ruling):
    assert ruling_in(reply) == ruling


def test_llava_bench_compares_marks_per_category(tmp_path, scripted):
    categories = ("conv", "detail", "complex")
    rows = [{"question_id": id, "image": f"{id}.jpg", "text": "Why?", "category": categories[id]} for id in range(3)]
    data = write_lines(tmp_path / "questions.jsonl", rows)
    reference = write_lines(
        tmp_path / "answers.jsonl", [{"question_id": id, "text": f"Because {id}."} for id in range(3)]
    )
    context = write_lines(
        tmp_path / "context.jsonl", [{"image": f"{id}.jpg", "caption": f"Scene {id}"} for id in range(3)]
    )
    judge = scripted("8 6\nfair", "10 10", "no idea")
    benchmark = benchmarks.load(
        "llava-bench",
        data=data,
        reference=reference,
        context=context,
        judge="scripted",
        judge_log=tmp_path / "log.jsonl",
    )
    report = benchmark.score({"0": "a", "1": "b", "2": "c"})
    assert report.metrics["relative_score"] == 100 * 16 / 18
    assert report.metrics["conv_relative_score"] == 75
    assert report.provenance["n_parse_failures"] == 1
    assert [benchmark.verdict(score) for score in report.scores] == ["neither", "good", "neither"]
    assert "Scene 1" in judge.asked[1]
    assert "Because 1." in judge.asked[1]
    assert [sample.meta["reference"] for sample in benchmark.samples()] == ["Because 0.", "Because 1.", "Because 2."]
    short = write_lines(tmp_path / "short.jsonl", [{"question_id": 0, "text": "Because."}])
    with pytest.raises(BenchmarkError, match="no answer to 2 questions: '1', '2'"):
        benchmarks.load("llava-bench", data=data, reference=short).samples()
