"""Rows of tokens: nothing lost, nothing decoded, held-out samples chosen evenly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clt.activation_generation.packing import HeldOutChoice, TextPacker
from tests.tiny_hosts import tiny_tokenizer

BOS, EOS = 0, 1


class Separated:
    """A tokenizer in the manner of GPT-2: it frames nothing, and has one special token."""

    bos_token_id = eos_token_id = 7

    def __call__(self, texts, *, add_special_tokens, verbose):
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


@given(texts=st.lists(st.text("abc ", min_size=1, max_size=40), max_size=8), context=st.integers(2, 30))
def test_every_token_of_every_text_is_in_exactly_one_place(texts, context):
    tokenizer = tiny_tokenizer()
    packer = TextPacker(tokenizer, context, prepend_bos=True)
    rows = [row for text in texts for row in packer.add([text])] + list(packer.flush())

    assert all(row[0] == BOS and 1 < len(row) <= context for row in rows)
    kept = [token for row in rows for token in row if token not in (BOS, EOS)]
    wanted = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert kept == wanted


def test_documents_are_framed_as_the_tokenizer_does():
    tokenizer = tiny_tokenizer()
    a, b = (tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "ab")
    packer = TextPacker(tokenizer, 16, prepend_bos=True)
    assert [*packer.add(["aa", "b"]), *packer.flush()] == [[BOS, a, a, BOS, b]]
    packer = TextPacker(tokenizer, 16, prepend_bos=False)
    assert [*packer.add(["aa", "b"]), *packer.flush()] == [[BOS, a, a, BOS, b]]


def test_a_tokenizer_that_frames_nothing_gets_separators():
    packer = TextPacker(Separated(), 4, prepend_bos=False)
    assert [*packer.add(["ab", "c"]), *packer.flush()] == [[97, 98, 7, 99]]
    packer = TextPacker(Separated(), 4, prepend_bos=True)
    assert [*packer.add(["ab", "cd"]), *packer.flush()] == [[7, 97, 98, 7], [7, 99, 100, 7]]


def test_a_single_text_is_cut_at_the_context():
    packer = TextPacker(Separated(), 4, prepend_bos=True)
    assert packer.single("abcdef") == [7, 97, 98, 99]


@given(fraction=st.floats(0.01, 0.9), seed=st.integers(0, 9))
def test_any_beginning_of_the_corpus_has_its_share_held_out(fraction, seed):
    choice = HeldOutChoice(fraction, seed)
    chosen = [choice(number) for number in range(400)]
    for end in (37, 200, 400):
        assert abs(sum(chosen[:end]) - end * fraction) <= 2
    assert chosen == [HeldOutChoice(fraction, seed)(number) for number in range(400)]


@pytest.mark.parametrize("fraction", [0.0, 0.1])
def test_nothing_is_held_out_only_if_asked(fraction):
    assert any(HeldOutChoice(fraction, 0)(number) for number in range(10)) == (fraction > 0)
