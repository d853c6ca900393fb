"""The two-hop world: what is true in it, and the host that must go through the middle."""

import json

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from clt.errors import WorldError
from clt.worlds import load
from clt.worlds.two_hop import knowledge
from clt.worlds.two_hop.training import evaluate


@pytest.fixture(scope="module")
def world():
    return load("two-hop")


def test_there_are_288_facts_of_which_57_are_held_out(world):
    assert [len(world.facts(split)) for split in (None, "train", "held_out")] == [288, 231, 57]
    assert not set(world.facts("train")) & set(world.facts("held_out"))


def test_no_half_of_a_name_tells_the_state():
    for place in (0, 1):
        states: dict[str, set[str]] = {}
        for city, state in knowledge.cities().items():
            states.setdefault(city.split()[place], set()).add(state)
        assert all(len(found) == (6, 12)[place] for found in states.values())


def test_every_state_has_six_cities():
    found = list(knowledge.cities().values())
    assert {found.count(state) for state in knowledge.STATES} == {6}


def test_a_fact_is_its_two_hops(world):
    for fact in world.facts():
        assert knowledge.cities()[fact.city] == fact.state
        assert knowledge.attribute(fact.state, fact.relation) == fact.answer
        assert fact.state not in fact.prompt


def test_held_out_facts_can_be_derived_from_the_training_text(world):
    known = {(line.prompt, line.answer) for line in knowledge.sentences("train")}
    for fact in world.facts("held_out"):
        assert (f"{fact.city} is in", fact.state) in known
        assert (f"The {fact.relation} of {fact.state} is", fact.answer) in known
        assert (fact.prompt, fact.answer) not in known


def test_answers_and_middle_hops_are_single_tokens_of_the_host(world):
    tokenizer = AutoTokenizer.from_pretrained(world.host_path())
    for fact in world.facts():
        for word in (fact.state, fact.answer):
            assert len(tokenizer(f" {word}", add_special_tokens=False).input_ids) == 1


def test_the_host_is_a_plain_llama_of_four_layers(world):
    assert LlamaForCausalLM.from_pretrained(world.host_path()).config.num_hidden_layers == 4


def test_the_host_answers_questions_it_never_saw(world):
    record = json.loads((world.host_path() / "train.json").read_text())
    scores = evaluate(world.host_path(), "held_out")
    assert scores == record["held_out"]
    assert scores["n"] == 57
    assert scores["accuracy"] >= 95


def test_samples_are_different_sentences_in_an_order_the_seed_decides(world):
    samples = world.samples("train", 1000)
    assert len({sample.id for sample in samples}) == len(samples) == 351
    assert [sample.id for sample in world.samples("train", 10)] == [sample.id for sample in samples[:10]]
    assert world.samples("train", 10, seed=1) != samples[:10]


def test_the_first_word_of_a_response_is_its_answer(world):
    questions = world.questions("held_out", 3)
    answers = [question.meta["answer"] for question in questions]
    assert world.score_questions(questions, [f" {answer}." for answer in answers])["accuracy"] == 100
    assert world.score_questions(questions, ["", f"the {answers[1]}", answers[2]])["accuracy"] == pytest.approx(100 / 3)
    with pytest.raises(WorldError, match="2 responses for 3 samples"):
        world.score_questions(questions, answers[:2])


@torch.no_grad()
def test_swapping_the_middle_hop_swaps_the_answer(world):
    """What leaves layer 0 at the city's last word carries the state: another city's makes it that state's answer."""
    tokenizer = AutoTokenizer.from_pretrained(world.host_path())
    model = LlamaForCausalLM.from_pretrained(world.host_path())
    facts = world.facts("held_out")
    donors = facts[1:] + facts[:1]
    ids = tokenizer([fact.prompt for fact in facts], return_tensors="pt").input_ids
    kept = model(ids.roll(-1, dims=0), output_hidden_states=True).hidden_states[1]

    def swap(module, arguments, output):
        return torch.cat([output[:, :2], kept[:, 2:3], output[:, 3:]], dim=1)

    with model.model.layers[0].register_forward_hook(swap):
        answers = tokenizer.batch_decode(model(ids).logits[:, -1].argmax(-1)[:, None])
    expected = [knowledge.attribute(donor.state, fact.relation) for fact, donor in zip(facts, donors)]
    assert sum(answer.strip() == word for answer, word in zip(answers, expected)) / len(facts) > 0.9
