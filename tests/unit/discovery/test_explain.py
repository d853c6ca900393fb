"""Labels from a model behind a fake endpoint: asked rightly, scored rightly, replayed exactly."""

import json
import re

import httpx
import pytest
from fastapi import FastAPI, Request, Response

from clt.discovery.explain import ExplainSettings, Text, chosen_numbers, explain_feature, texts_of
from clt.discovery.feature_files import FeatureFiles
from clt.discovery.labels import FeatureLabel, read_labels, write_labels
from clt.discovery.writers import CachedWriter, EndpointWriter, LocalWriter
from clt.errors import DatasetError, DiscoveryError
from clt.lm import ModelAdapter
from clt.scripts import explain
from clt.types import FeatureId, Sample
from tests.running import running
from tests.tiny_hosts import tiny_adapter

WORDS = {"animals": ["cat", "dog", "horse", "goat"], "colours": ["red", "blue", "green", "black"]}


def examples_of(topic, n=20):
    """The feature fires on a topic's words; the rest of every text is its own."""
    listed = []
    for number in range(n):
        word = WORDS[topic][number % 4]
        tokens = [" The", f" {number}", " old", f" {word}", " came", f" by{number}"]
        listed.append({"tokens": tokens, "tokens_acts_list": [0, 0, 0.1, 5.0, 0, 0], "train_token_ind": 3})
    return {"examples_quantiles": [{"quantile_name": "Top activations", "examples": listed}]}


def knows_topics(request):
    """An endpoint that understands: it labels by the marked word, and picks texts by the label's words."""
    body = json.loads(request.content)
    system, question = (message["content"] for message in body["messages"])
    if "labelling" in system:
        marked = re.findall(r"<<(\w+)>>", question)
        answer = next(topic for topic, words in WORDS.items() if set(marked) <= set(words))
    else:
        label = re.search(r"Label: (\w+)", question)[1]
        inside = r"<<\w*({})\w*>>" if "<<" in question else r"\b({})\b"
        pattern = inside.format("|".join(WORDS[label]))
        lines = [line for line in question.splitlines() if re.match(r"\d+\. ", line)]
        answer = ", ".join(line.split(".")[0] for line in lines if re.search(pattern, line)) or "none"
    return httpx.Response(200, json={"choices": [{"message": {"content": answer}}]})


def served():
    """The same teacher behind a real socket."""
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        answer = knows_topics(httpx.Request("POST", "http://teacher", content=await request.body()))
        return Response(answer.content, media_type="application/json")

    return running(app)


def endpoint(handler=knows_topics):
    return EndpointWriter("http://localhost/v1", "teacher", transport=httpx.MockTransport(handler))


def constant(answer):
    return lambda request: httpx.Response(200, json={"choices": [{"message": {"content": answer}}]})


def label_of(writer, topic="animals", other="colours"):
    strangers = texts_of(examples_of(other))
    return explain_feature(FeatureId(1, 2), examples_of(topic), strangers, writer, ExplainSettings())


def test_a_model_that_understands_scores_one():
    assert label_of(endpoint()) == FeatureLabel(text="animals", source="teacher", detection=1.0, fuzzing=1.0)


def test_a_model_that_says_yes_to_everything_scores_chance():
    label = label_of(endpoint(constant(", ".join(map(str, range(1, 99))))))
    assert label.detection == label.fuzzing == 0.5


def test_a_label_of_something_else_scores_below_chance_in_detection():
    def wrong(request):
        body = json.loads(request.content)
        is_label = "labelling" in body["messages"][0]["content"]
        return constant("colours")(request) if is_label else knows_topics(request)

    assert label_of(endpoint(wrong)).detection == 0.0


def test_an_answer_that_is_no_list_gives_no_score():
    def chats(request):
        is_label = "labelling" in json.loads(request.content)["messages"][0]["content"]
        return constant("animals" if is_label else "I would rather not say.")(request)

    label = label_of(endpoint(chats))
    assert label.detection is label.fuzzing is None


def test_labels_are_not_scored_on_the_texts_they_were_written_from():
    seen = []

    def record(request):
        question = json.loads(request.content)["messages"][1]["content"]
        seen.append(set(re.findall(r"by\d+", question)))
        return knows_topics(request)

    explain_feature(FeatureId(0, 0), examples_of("animals"), [], endpoint(record), ExplainSettings(n_shown=99))
    shown, *tested = seen
    assert shown
    assert all(not shown & one for one in tested)


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (lambda request: httpx.Response(401, text="bad key"), "401: bad key"),
        (lambda request: httpx.Response(200, json={"no": "choices"}), "OpenAI-compatible"),
        (lambda request: httpx.Response(200, text="<html>"), "OpenAI-compatible"),
        (constant(""), "empty label"),
    ],
)
def test_endpoints_that_fail_are_named(handler, message):
    with pytest.raises(DiscoveryError, match=message):
        label_of(endpoint(handler))


def test_a_busy_endpoint_is_asked_again():
    answers = iter([httpx.Response(429), httpx.Response(503)])
    writer = endpoint(lambda request: next(answers, None) or constant("animals")(request))
    assert writer.answer("s", "q", 5) == "animals"


def test_kept_answers_are_replayed_without_a_model(tmp_path):
    path = tmp_path / "answers.jsonl"
    first = CachedWriter(path, endpoint(), "teacher")
    label = label_of(first)
    assert first.n_asked == 3
    with path.open("a") as file:
        file.write('{"key": "cut o')
    assert label_of(CachedWriter(path, None, "teacher")) == label
    with pytest.raises(DiscoveryError, match="--replay"):
        label_of(CachedWriter(path, None, "another"))


def test_marks_go_around_runs_of_tokens():
    text = Text((" a", " b", " c", "d"), (0.0, 3.0, 2.0, 0.0))
    assert text.fires == [False, True, True, False]
    assert text.marked(text.fires) == "a <<b c>>d"


def test_numbers_outside_the_list_do_not_count():
    assert chosen_numbers("1, 3 and 40", 4) == {1, 3}
    assert chosen_numbers("None of them.", 4) == set()
    assert chosen_numbers("well", 4) is None


def test_the_command_labels_a_folder_and_asks_nothing_twice(tmp_path, capsys):
    for place, topic in enumerate(WORDS):
        (tmp_path / f"{FeatureId(place, 5).number}.json").write_text(json.dumps(examples_of(topic)))
    with served() as address:
        options = {"features": str(tmp_path), "model": "teacher", "base_url": f"{address}/v1"}
        explain.main(explain.Options(**options))
    labels = read_labels(tmp_path / "labels.json")
    assert {key: label.text for key, label in labels.items()} == {"0/5": "animals", "1/5": "colours"}
    assert labels["0/5"].detection == 1.0
    assert "6 questions asked" in capsys.readouterr().out
    (tmp_path / "labels.json").unlink()
    explain.main(explain.Options(**options, replay=True))
    assert read_labels(tmp_path / "labels.json") == labels
    assert "0 questions asked" in capsys.readouterr().out
    explain.main(explain.Options(**options))
    assert "Nothing to do" in capsys.readouterr().out
    assert [feature.layer for feature in FeatureFiles(tmp_path).features()] == [0, 1]


def test_a_file_that_is_no_labels_is_refused(tmp_path):
    path = tmp_path / "labels.json"
    write_labels(path, {"1/2": FeatureLabel(text="x", source="y")})
    assert read_labels(path)["1/2"].detection is None
    path.write_text('{"format": "something"}')
    with pytest.raises(DatasetError, match="Move it away"):
        read_labels(path)


def test_a_local_model_answers_in_its_own_words(monkeypatch):
    adapter = tiny_adapter("gpt2")
    monkeypatch.setattr(ModelAdapter, "from_pretrained", lambda *_, **__: adapter)
    writer = LocalWriter("a-folder")
    answer = writer.answer("Label this.", "1. a <<b>>", 5)
    sample = Sample(id="same", prompt="Label this.\n\n1. a <<b>>\n\nAnswer:")
    assert answer == adapter.generate([sample], max_new_tokens=5)[0]
    assert writer.name == "a-folder"
