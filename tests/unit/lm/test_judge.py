"""A host model as judge."""

import pytest

from clt.benchmarks import judges
from clt.errors import HostModelError
from clt.lm.judge import LocalJudge
from clt.worlds import load


@pytest.fixture(scope="module")
def judge():
    return LocalJudge(str(load("two-hop").host_path()), max_new_tokens=4)


def test_a_local_model_answers_each_prompt(judge):
    world = load("two-hop")
    questions = world.questions("train", 5)
    replies = judge([question.prompt for question in questions])
    assert world.score_questions(questions, replies)["accuracy"] == 100


def test_its_replies_are_logged_like_any_judges(judge, tmp_path, monkeypatch):
    monkeypatch.setitem(judges._FACTORIES, "local", lambda **options: judge)
    prompts = [question.prompt for question in load("two-hop").questions("train", 2)]
    asked = judges.ask("local", prompts, tmp_path / "log.jsonl", judge.model)
    replayed = judges.ask("file", prompts, tmp_path / "log.jsonl", None)
    assert replayed.replies == asked.replies
    assert replayed.provenance["judge_model"] == judge.model


def test_a_chat_template_frames_the_prompt(judge, monkeypatch):
    template = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}<assistant>"
    monkeypatch.setattr(judge._adapter.tokenizer, "chat_template", template)
    assert judge._framed("How good?") == "<user>How good?<assistant>"


def test_it_needs_a_model_and_no_address():
    with pytest.raises(HostModelError, match="needs --judge-model"):
        LocalJudge()
    with pytest.raises(HostModelError, match="no use for --judge-url"):
        LocalJudge("model", url="http://127.0.0.1")
