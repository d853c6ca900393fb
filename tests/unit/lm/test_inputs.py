"""What samples become: tokens, kinds, positions, answers, pixels."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clt.errors import HostModelError
from clt.lm import ModelAdapter
from clt.types import Sample, TokenKind
from tests.tiny_hosts import tiny_adapter, tiny_image, tiny_samples


@pytest.fixture(scope="module")
def llama():
    return tiny_adapter("llama")


@pytest.fixture(scope="module")
def llava():
    return tiny_adapter("llava")


@pytest.mark.parametrize("family", ["llama", "llava"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_is_prompt_then_answer_whatever_the_padding(family, side, request):
    adapter = request.getfixturevalue(family)
    samples = tiny_samples(family)

    inputs = adapter.prepare(samples, padding_side=side)

    for row, sample in enumerate(samples):
        ids = inputs.input_ids[row][inputs.is_token[row]]
        answer = inputs.input_ids[row][inputs.answer[row]]
        kept = ids[ids != 3]
        assert adapter.tokenizer.decode(kept) == "<s>" + (sample.prompt + sample.answer).replace("<image>", "")
        assert adapter.tokenizer.decode(answer) == sample.answer
        assert inputs.position[row][inputs.is_token[row]].tolist() == list(range(len(ids)))
    assert inputs.sample_ids == ("s0", "s1", "s2")


def test_answers_can_be_left_out(llama):
    samples = tiny_samples("llama")
    without = llama.prepare(samples, with_answer=False)
    assert not without.answer.any()
    bare = llama.prepare([replace(sample, answer=None) for sample in samples])
    torch.testing.assert_close(without.input_ids, bare.input_ids)


def test_answers_given_as_ids_follow_the_prompt_unchanged(llama):
    ids = [torch.tensor([9, 8, 1]), torch.tensor([], dtype=torch.long), torch.tensor([7])]
    inputs = llama.prepare(tiny_samples("llama"), answers=ids)
    for row, answer in enumerate(ids):
        torch.testing.assert_close(inputs.input_ids[row][inputs.answer[row]], answer)


def test_a_bos_in_the_prompt_is_not_doubled(llama):
    plain = llama.prepare([Sample(id="a", prompt="hello")])
    with_bos = llama.prepare([Sample(id="a", prompt="<s>hello")])
    torch.testing.assert_close(with_bos.input_ids, plain.input_ids)


def test_kinds_tell_image_special_and_text_apart(llava):
    inputs = llava.prepare(tiny_samples("llava"))
    kind = inputs.kind
    assert ((kind == TokenKind.IMAGE).sum(1) == 4).all()
    assert (kind[:, 0] == TokenKind.SPECIAL).all()
    assert (kind[~inputs.is_token] == TokenKind.SPECIAL).all()
    assert (kind[inputs.answer] == TokenKind.TEXT).all()


def test_text_only_samples_may_share_a_batch_with_images(llava):
    samples = [*tiny_samples("llava")[:1], Sample(id="text", prompt="no image here")]
    together = llava.logits(llava.prepare(samples))
    alone = llava.prepare(samples[1:])
    torch.testing.assert_close(together[1, : alone.input_ids.shape[1]], llava.logits(alone)[0])


def test_images_may_be_paths(llava, tmp_path):
    tiny_image(0).save(tmp_path / "image.png")
    sample = tiny_samples("llava")[0]
    from_path = llava.prepare([replace(sample, images=(tmp_path / "image.png",))])
    torch.testing.assert_close(from_path.tensors["pixel_values"], llava.prepare([sample]).tensors["pixel_values"])


def test_packed_tokens_keep_their_padding_mask(llama):
    ids = torch.tensor([[0, 5, 6], [7, 2, 2]])
    inputs = llama.prepare_tokens(ids, torch.tensor([[True, True, True], [True, False, False]]))
    assert inputs.kind.tolist() == [[2, 0, 0], [0, 2, 2]]
    assert inputs.position.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert llama.prepare_tokens(ids).attention_mask.all()


def test_a_missing_image_names_file_and_sample(llava):
    sample = replace(tiny_samples("llava")[0], images=(Path("/nowhere/cat.png"),))
    with pytest.raises(HostModelError, match=r"Sample 's0': its image /nowhere/cat.png does not exist"):
        llava.prepare([sample])


def test_a_corrupt_image_names_file_and_sample(llava, tmp_path):
    path = tmp_path / "cut.png"
    tiny_image(0).save(path)
    path.write_bytes(path.read_bytes()[:200])
    for name, content in (("cut.png", None), ("text.png", b"no image")):
        if content:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(HostModelError, match=rf"Sample 's0': its image .*{name} cannot be read"):
            llava.prepare([replace(tiny_samples("llava")[0], images=(tmp_path / name,))])


def test_a_prompt_without_placeholder_is_refused(llava):
    with pytest.raises(HostModelError, match="placeholder"):
        llava.prepare([Sample(id="x", prompt="what is this?", images=(tiny_image(0),))])


def test_an_image_for_a_text_host_is_refused(llama):
    with pytest.raises(HostModelError, match=r"Sample 'x' has 1 image\(s\), but the host sees none"):
        llama.prepare([Sample(id="x", prompt="what is this?", images=(tiny_image(0),))])


def test_a_prompt_longer_than_the_host_reaches_is_refused(llama):
    with pytest.raises(HostModelError, match="Sample 'long' has 201 positions, but the host takes at most 128"):
        llama.prepare([Sample(id="long", prompt="x" * 200)])


def test_no_tokens_and_no_samples_are_refused(llama):
    with pytest.raises(HostModelError, match="Sample '0' has no tokens"):
        llama.prepare_tokens(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(HostModelError, match="no samples"):
        llama.prepare([])


def test_samples_need_a_tokenizer_and_images_a_processor(llama, llava):
    with pytest.raises(HostModelError, match="has no tokenizer"):
        ModelAdapter(llama.model).prepare(tiny_samples("llama"))
    with pytest.raises(HostModelError, match="needs processor="):
        ModelAdapter(llava.model, tokenizer=llava.tokenizer).prepare(tiny_samples("llava"))
