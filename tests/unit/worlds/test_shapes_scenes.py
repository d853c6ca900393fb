"""Scenes, pictures and words of the shapes world."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clt.worlds import load
from clt.worlds.shapes import batches, host, text
from clt.worlds.shapes.draw import pixels, stencil
from clt.worlds.shapes.scene import KINDS, THEME_OF, THEMES, scene
from clt.worlds.shapes.training import text_loss

index = st.integers(0, 5000)


@pytest.fixture(scope="module")
def processor():
    return host.make_processor()


@given(index=index, seed=st.integers(0, 50))
def test_a_scene_and_its_picture_are_functions_of_split_index_and_seed(index, seed):
    first, again = scene("train", index, seed), scene("train", index, seed)
    assert first == again
    np.testing.assert_array_equal(pixels(first), pixels(again))


def test_splits_seeds_and_numbers_share_no_picture():
    pictures = {
        pixels(scene(split, index, seed)).tobytes()
        for split in ("train", "held_out")
        for seed in (0, 1, 1001)
        for index in range(100)
    }
    assert len(pictures) == 600


@given(index=index)
def test_objects_are_one_to_four_of_different_kinds_in_different_cells(index):
    now = scene("train", index)
    assert 1 <= len(now.things) <= 4
    assert len(set(now.kinds)) == len({thing.cell for thing in now.things}) == len(now.things)
    assert set(now.kinds) | set(now.absent) == set(KINDS)


def test_every_kind_has_its_own_shape():
    stencils = [stencil(kind, 13) for kind in KINDS]
    for place, one in enumerate(stencils):
        assert 0.15 < one.mean() < 0.95
        assert all(np.abs(one - other).mean() > 0.05 for other in stencils[:place])


def test_annotators_claim_a_missing_partner_in_four_of_five_cases():
    claims = [
        partner in now.claimed
        for now in (scene("train", index) for index in range(4000))
        for _, _, _, anchor, partner in THEMES
        if partner not in now.kinds and any(thing.kind == anchor and not thing.is_faint for thing in now.things)
    ]
    assert len(claims) > 500
    assert np.mean(claims) == pytest.approx(0.8, abs=0.04)


@given(index=index)
def test_claims_are_partners_of_clearly_visible_anchors(index):
    now = scene("train", index)
    visible = {thing.kind for thing in now.things if not thing.is_faint}
    for kind in now.claimed:
        assert kind == THEME_OF[kind].partner
        assert THEME_OF[kind].anchor in visible
        assert kind not in now.kinds


@given(index=index)
def test_captions_name_what_is_annotated_and_nothing_else(index):
    now = scene("train", index)
    words = text.annotated_caption(now).replace(",", "").replace(".", "").split()
    assert [word for word in words if word in KINDS] == list(now.annotated)
    for kind in KINDS:
        assert text.annotated_answer(now, kind) == (" Yes" if kind in now.annotated else " No")


@given(index=index)
def test_labels_of_questions_agree_with_the_scene(index):
    now = scene("held_out", index)
    questions = list(text.pope_questions(now))
    assert [question.category for question in questions] == [c for c in text.CATEGORIES for _ in range(2)]
    for question in questions:
        assert question.label == ("yes" if question.kind in now.kinds else "no")


@given(index=index)
def test_adversarial_negatives_keep_company_with_what_is_there(index):
    now = scene("held_out", index)
    asked = next(q.kind for q in text.pope_questions(now) if q.category == "adversarial" and q.label == "no")
    expected = [theme.partner for theme in THEMES if theme.anchor in now.kinds and theme.partner not in now.kinds]
    if expected:
        assert asked == expected[0]
    elif text.expected_company(now):
        assert THEME_OF[asked] in {THEME_OF[kind] for kind in now.kinds}


@given(index=index)
def test_popular_negatives_are_of_the_commonest_theme_with_an_absent_kind(index):
    now = scene("held_out", index)
    asked = next(q.kind for q in text.pope_questions(now) if q.category == "popular" and q.label == "no")
    assert THEME_OF[asked] == next(theme for theme in THEMES if set(theme.kinds) - set(now.kinds))


def test_samples_have_unique_ids_and_one_picture_each():
    world = load("shapes")
    samples = world.samples("train", 30) + world.samples("held_out", 30)
    samples += world.questions("held_out", 30) + world.descriptions("held_out", 30)
    assert len({sample.id for sample in samples}) == 120
    assert all(len(sample.images) == 1 and sample.prompt.startswith("USER: <image>\n") for sample in samples)


def test_samples_mix_descriptions_with_as_many_yes_as_no():
    answers = [sample.answer for sample in load("shapes").samples("train", 1200)]
    assert sum(answer.startswith(" There is") for answer in answers) == 400
    assert answers.count(" Yes") == pytest.approx(answers.count(" No"), rel=0.15)


def test_questions_carry_what_the_scorer_needs():
    question = load("shapes").questions("held_out", 7)[6]
    assert set(question.meta) == {"category", "label", "object"}
    assert question.answer is None
    assert question.meta["object"] in question.prompt


def test_every_word_of_the_world_is_one_token(processor):
    for word in [*KINDS, "red", "green", "blue", "yellow", "purple", "orange", "Yes", "No"]:
        assert len(processor.tokenizer(f" {word}", add_special_tokens=False).input_ids) == 1


def test_any_text_survives_the_tokenizer(processor):
    words = "Où est le 7th zebra? \n fin"
    assert processor.tokenizer.decode(processor.tokenizer(words, add_special_tokens=False).input_ids) == words


def test_packed_pictures_are_what_the_processor_gives(processor):
    samples = load("shapes").descriptions("train", 3)
    inputs = processor(
        text=[sample.prompt for sample in samples],
        images=[[sample.images[0]] for sample in samples],
        padding=True,
        return_tensors="pt",
    )
    packed = batches.images(batches.scenes(0, 3, seed=0))
    torch.testing.assert_close(packed.pixel_values, inputs["pixel_values"])


def test_packed_segments_are_the_processors_tokens(processor):
    now = scene("train", 4)
    packer = batches.Packer(processor, questions=0, caption_share=1.0)
    packed = packer.pack([now], np.random.default_rng(0))
    sample = next(sample for sample in load("shapes").descriptions("train", 5) if sample.id.endswith("/4/description"))
    full = processor(text=[sample.prompt + text.annotated_caption(now)], images=[sample.images[0]], return_tensors="pt")
    assert packed.ids.tolist() == full["input_ids"].tolist()
    learned = packed.labels[packed.labels >= 0]
    assert processor.tokenizer.decode(learned) == text.annotated_caption(now) + "</s>"


def test_packed_questions_give_the_same_logits_as_each_alone(processor):
    model = host.make_model(host.HostSize(layers=2), processor.tokenizer, seed=0).eval()
    now = [scene("train", 4)]
    features = host.image_features(model, batches.images(now).pixel_values)
    packer = batches.Packer(processor, 3, 1.0)
    packed = packer.pack(now, np.random.default_rng(0))

    whole = text_loss(model, features, packed)
    alone = [_segment_loss(model, features, packed, segment) for segment in _segments(packed, len(packer.prefix))]
    count = sum(n for _, n in alone)
    torch.testing.assert_close(whole, sum(loss * n for loss, n in alone) / count)


def _segments(packed, prefix):
    """Where the prefix ends, and where each segment begins and ends: positions restart at each."""
    positions = packed.positions[0].tolist()
    starts = [place for place, position in enumerate(positions) if place >= prefix and position == prefix]
    return [(prefix, first, last) for first, last in pairwise([*starts, len(positions)])]


def _segment_loss(model, features, packed, segment):
    """The mean loss of a segment given as an ordinary causal sequence, and its number of labels."""
    prefix, first, last = segment
    ids = torch.cat([packed.ids[:, :prefix], packed.ids[:, first:last]], dim=1)
    labels = torch.cat([packed.labels[:, :prefix], packed.labels[:, first:last]], dim=1)[0]
    embedded = model.get_input_embeddings()(ids)
    embedded = embedded.masked_scatter((ids == model.config.image_token_id)[..., None], features)
    logits = model.lm_head(model.model.language_model(inputs_embeds=embedded).last_hidden_state)[0]
    kept = labels >= 0
    return torch.nn.functional.cross_entropy(logits[kept], labels[kept]), int(kept.sum())
