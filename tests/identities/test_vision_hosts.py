"""Identities of replacement and intervention on tiny random vision-language hosts of seven more families."""

import pytest
import torch

from clt.errors import HostModelError
from clt.replacement import Intervention, ReplacementModel, SteeredHost, SteeredNeurons
from clt.types import Sample, TokenKind
from tests.tiny_hosts import plain_transcoder
from tests.tiny_vlms import PLACEHOLDERS, VLMS, vlm_adapter, vlm_samples


@pytest.fixture(scope="module", params=VLMS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def replacement(family):
    adapter = vlm_adapter(family)
    return ReplacementModel(adapter, plain_transcoder(adapter))


def close(ours, theirs, inputs, tolerance=5e-5):
    torch.testing.assert_close(ours[inputs.is_token], theirs[inputs.is_token], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("side", ["left", "right"])
def test_replacement_plus_error_is_the_host_on_images_and_text(family, replacement, side):
    adapter = replacement.adapter
    text = [Sample(id="t0", prompt="only text", answer="yes"), Sample(id="t1", prompt="more", answer="no, not")]
    if family == "paligemma":
        with pytest.raises(HostModelError, match="`images` are expected"):
            adapter.prepare(text)
        text = []
    for samples in filter(None, (vlm_samples(family), vlm_samples(family)[:1], text)):
        inputs = adapter.prepare(samples, padding_side=side)
        assert (inputs.kind == TokenKind.IMAGE).any() == (samples is not text)
        host = adapter.logits(inputs)
        close(replacement.logits(inputs, errors=replacement.errors(inputs)), host, inputs)
        assert (replacement.logits(inputs) - host).abs().max() > 1e-2


def test_left_padded_batches_equal_single_rows(family, replacement):
    adapter, samples = replacement.adapter, vlm_samples(family)
    inputs = adapter.prepare(samples, padding_side="left")
    logits = replacement.logits(inputs)
    for row, sample in enumerate(samples):
        alone = replacement.logits(adapter.prepare([sample]))[0]
        torch.testing.assert_close(logits[row][inputs.is_token[row]], alone, rtol=1e-4, atol=1e-4)


def test_cached_uncached_batched_single_and_teacher_forced_answers_agree(family, replacement):
    adapter, samples = replacement.adapter, vlm_samples(family)
    models = (replacement, SteeredHost(adapter, replacement.transcoder), SteeredNeurons(adapter))
    for model in models:
        acts = [
            Intervention(0, 5, "add", 3.0, positions="generated"),
            Intervention(1, 2, "scale", -4.0, positions="image"),
            Intervention(2, 1, "set", 2.0, positions=(0, -1)),
        ]
        answers = model.generate_ids(samples, max_new_tokens=5, interventions=acts)
        for other in ({"use_cache": False}, {"batch_size": 1}):
            again = model.generate_ids(samples, max_new_tokens=5, interventions=acts, **other)
            assert [row.tolist() for row in again] == [row.tolist() for row in answers]
        inputs = adapter.prepare(samples, answers=answers)
        logits = model.logits(inputs, interventions=acts)
        for row, answer in enumerate(answers):
            first = int(inputs.answer[row].nonzero()[0])
            steps = logits[row, first - 1 : first - 1 + len(answer)]
            image = adapter.token_ids.image
            steps[:, image] = -torch.inf  # never generated
            assert steps.argmax(1).tolist() == answer.tolist()
        assert (logits - model.logits(inputs)).abs().max() > 1e-3


def test_error_mode_reproduces_the_host_token_by_token(family, replacement):
    adapter = replacement.adapter
    sample = vlm_samples(family)[:1]
    host = adapter.generate_ids(sample, max_new_tokens=5)
    inputs = adapter.prepare(sample, answers=host)
    prompt = adapter.prepare(sample, with_answer=False)
    with replacement.active(inputs, errors=replacement.errors(inputs)):
        again = adapter.generate_ids(sample, max_new_tokens=5)
    assert [row.tolist() for row in again] == [row.tolist() for row in host]
    assert prompt.input_ids.shape[1] + 5 == inputs.input_ids.shape[1]


def test_what_a_processor_says_about_positions_reaches_the_host(family, replacement):
    """Token types, three-dimensional positions and patches change the logits when they are left out."""
    adapter = replacement.adapter
    inputs = adapter.prepare(vlm_samples(family)[:1])
    host = adapter.logits(inputs)
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs.tensors:
            without = {key: value for key, value in inputs.tensors.items() if key != name}
            with torch.no_grad():
                assert (adapter.model(**without).logits - host).abs().max() > 1e-3


def test_a_chat_templates_bos_is_not_doubled(family, replacement):
    if family == "paligemma":
        pytest.skip("its processor writes the BOS behind the image itself; there is no chat template")
    tokenizer = replacement.adapter.tokenizer
    placeholder = PLACEHOLDERS.get(family, "<image>")
    sample = vlm_samples(family)[0]
    templated = Sample(id="c", prompt=f"<s>{placeholder}U: a b A:", images=sample.images)
    ids = replacement.adapter.prepare([templated]).input_ids[0]
    assert int((ids == tokenizer.bos_token_id).sum()) == 1
    assert not ids.eq(tokenizer.eos_token_id).any()
