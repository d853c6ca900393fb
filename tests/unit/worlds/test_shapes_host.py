"""The shipped LLaVA: it loads with plain Auto classes and does what its record says."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from clt.worlds import load
from clt.worlds.shapes.evaluation import respond

N = 240


@pytest.fixture(scope="module")
def world():
    return load("shapes")


@pytest.fixture(scope="module")
def record(world):
    return json.loads((world.host_path() / "train.json").read_text())


def test_the_host_loads_as_a_plain_llava_in_fp32(world):
    model = AutoModelForImageTextToText.from_pretrained(world.host_path())
    assert isinstance(model, LlavaForConditionalGeneration)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert isinstance(AutoProcessor.from_pretrained(world.host_path()), LlavaProcessor)


def test_the_record_says_that_the_host_hallucinates_from_company(record):
    pope, amber = record["held_out"]["pope"], record["held_out"]["amber_like"]
    assert 75 <= pope["accuracy"] <= 95
    assert pope["categories"]["adversarial"]["accuracy"] < pope["categories"]["random"]["accuracy"] - 4
    assert 5 <= amber["chair"] <= 35
    assert amber["cog"] > amber["chair"] / 2


def test_answers_on_new_scenes_score_as_recorded(world, record):
    questions = world.questions("held_out", N, seed=7)
    scores = world.score_questions(questions, respond(world.host_path(), questions))
    assert scores["accuracy"] == pytest.approx(record["held_out"]["pope"]["accuracy"], abs=6)
    assert scores["unparsed"] == 0


def test_descriptions_of_new_scenes_score_as_recorded(world, record):
    descriptions = world.descriptions("held_out", N, seed=7)
    scores = world.score_descriptions(descriptions, respond(world.host_path(), descriptions))
    for name in ("chair", "cover", "cog"):
        assert scores[name] == pytest.approx(record["held_out"]["amber_like"][name], abs=6)


def test_the_chat_template_writes_the_worlds_prompt(world):
    processor = AutoProcessor.from_pretrained(world.host_path())
    sample = world.descriptions("held_out", 1)[0]
    words = {"type": "text", "text": "Describe this image."}
    messages = [{"role": "user", "content": [{"type": "image"}, words]}]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == sample.prompt


def test_padding_a_batch_changes_no_response(world):
    questions = world.questions("held_out", 3) + world.descriptions("held_out", 2)
    assert respond(world.host_path(), questions) == respond(world.host_path(), questions, batch=1)
