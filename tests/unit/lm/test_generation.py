"""Drawing tokens: the right distribution, the same draws in any batch; and telling text as it grows."""

import jaxtyping
import pytest
import torch

from clt.errors import ConfigError, HostModelError
from clt.lm import Decoding
from clt.lm.generation import TextStream, _Draw, kept_by_top_p
from tests.tiny_hosts import tiny_adapter, tiny_samples, tiny_tokenizer


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0 must be at least 1"),
        ({"temperature": -1.0}, "temperature = -1.0 must be 0"),
        ({"top_p": 0.0}, "top_p = 0.0 must be above 0"),
        ({"top_p": 0.5}, "top_p = 0.5 has no effect at temperature 0"),
    ],
)
def test_what_cannot_be_is_refused(wrong, why, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ConfigError, match=why):
        Decoding(**{"max_new_tokens": 4, **wrong})


def test_draws_follow_the_softmax():
    n = 4000
    logits = torch.tensor([2.0, 1.0, 0.0, -30.0])
    draw = _Draw(Decoding(max_new_tokens=1, temperature=2.0), [str(i) for i in range(n)])
    chosen = draw(torch.zeros(n, 1, dtype=torch.long), logits.expand(n, -1)).argmax(1)
    shares = torch.bincount(chosen, minlength=4) / n
    torch.testing.assert_close(shares, (logits / 2).softmax(0), atol=0.03, rtol=0)


def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p():
    probability = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]])
    for top_p, kept in ((0.4, 1), (0.5, 1), (0.51, 2), (0.8 + 1e-6, 3), (0.96, 4), (1.0, 4)):
        finite = kept_by_top_p(probability.log().double(), top_p).isfinite()
        assert finite[0].tolist() == [i < kept for i in range(4)]
        assert finite[1].tolist() == finite[0].tolist()[::-1]


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_a_sample_draws_the_same_whatever_batch_it_is_in(family):
    adapter = tiny_adapter(family, dtype=torch.float64)
    samples = tiny_samples(family)
    how = {"max_new_tokens": 8, "temperature": 1.5, "top_p": 0.9}
    together = adapter.generate_ids(samples, **how)
    alone = adapter.generate_ids(samples[::-1], batch_size=1, use_cache=False, **how)[::-1]
    assert [row.tolist() for row in together] == [row.tolist() for row in alone]
    other = adapter.generate_ids(samples, seed=1, **how)
    assert [row.tolist() for row in together] != [row.tolist() for row in other]
    before = torch.get_rng_state()
    adapter.generate_ids(samples, **how)
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers are left alone"


def test_streamed_pieces_are_the_answers():
    adapter = tiny_adapter("llama")
    samples = tiny_samples("llama")
    heard = {sample.id: "" for sample in samples}

    def listen(sample_id, piece):
        heard[sample_id] += piece

    answers = adapter.generate(samples, max_new_tokens=12, on_text=listen, batch_size=2)
    # What is left unsaid at the end can only be half a character.
    assert [answer.rstrip("\ufffd") for answer in answers] == [text.rstrip("\ufffd") for text in heard.values()]


def test_a_piece_never_ends_in_half_a_character():
    tokenizer = tiny_tokenizer()
    said = []
    stream = TextStream(tokenizer, ["a"], (1,), lambda sample_id, piece: said.append(piece))
    for token in [*tokenizer("é ü", add_special_tokens=False)["input_ids"], 1, 50]:
        stream(torch.tensor([token]))
    assert said == ["é", " ", "ü"]


def test_an_answer_that_would_not_fit_is_refused_before_it_begins():
    adapter = tiny_adapter("gpt2")
    with pytest.raises(
        HostModelError, match=r"may grow by max_new_tokens = 200, but the host takes at most 128.*--max-new-tokens"
    ):
        adapter.generate(tiny_samples("gpt2"), max_new_tokens=200)
    with pytest.raises(ConfigError, match="batch_size = 0 must be at least 1"):
        adapter.generate(tiny_samples("gpt2"), max_new_tokens=2, batch_size=0)
