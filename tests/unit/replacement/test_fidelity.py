"""The fidelity measures against values known beforehand."""

import json
import math

import pytest
import torch

from clt.errors import ConfigError, HostModelError
from clt.replacement import ReplacementModel, measure_fidelity
from clt.replacement.ablation import mean_outputs
from clt.replacement.bootstrap import Resampled
from clt.replacement.scores import answer_scores, scored_positions, token_scores
from clt.types import Sample, TokenKind
from tests.tiny_hosts import plain_transcoder, tiny_adapter, tiny_samples


class Exact:
    """A 'replacement' that is the host, or its mean ablation: the two ends of the scale."""

    def __init__(self, adapter, means=None):
        self.adapter, self.means, self.n_layers = adapter, means, adapter.n_layers
        self.layers = range(adapter.n_layers)

    def logits(self, inputs):
        return self._run(lambda: self.adapter.logits(inputs))

    def generate_ids(self, samples, **options):
        return self._run(lambda: self.adapter.generate_ids(samples, **options))

    def _run(self, call):
        if self.means is None:
            return call()
        with self.adapter.replacing(lambda layer, x: self.means[layer].to(x).expand_as(x)):
            return call()


class Stand(Exact, ReplacementModel):
    """Passes for a replacement model at the type-checked door."""


@pytest.fixture(scope="module", params=["llama", "llava"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def adapter(family):
    return tiny_adapter(family)


def test_the_host_itself_is_perfectly_faithful(adapter, family):
    report = measure_fidelity(Stand(adapter), tiny_samples(family), max_new_tokens=5, batch_size=2)
    ones = {"loss_recovered", "top1", "top1_filtered", "token_match", "identical_answers"}
    for name, measure in report.measures().items():
        plain = name.removeprefix("text_")
        if plain in ones:
            assert measure.value == pytest.approx(1)
            assert measure.interval == pytest.approx((1, 1))
        if plain in ("kl", "ce_increase"):
            assert measure.value == pytest.approx(0, abs=1e-6)
    assert report.token_match.n == sum(map(len, adapter.generate_ids(tiny_samples(family), max_new_tokens=5)))
    assert report.identical_answers.n == report.n_samples == 3


def test_mean_ablation_recovers_nothing(adapter, family):
    samples = tiny_samples(family)
    means = mean_outputs(adapter, samples, 2)
    report = measure_fidelity(Stand(adapter, means), samples, max_new_tokens=5)
    assert report.loss_recovered is not None
    assert report.loss_recovered.value == pytest.approx(0, abs=1e-4)
    assert report.ce_mean_ablated.value == pytest.approx(report.ce_replacement.value)


def test_measures_are_the_plain_averages(adapter, family):
    replacement = ReplacementModel(adapter, plain_transcoder(adapter))
    samples = tiny_samples(family)
    report = measure_fidelity(replacement, samples, max_new_tokens=5, batch_size=2)

    kl, ce, agree = [], [], []
    for sample in samples:
        inputs = adapter.prepare([sample])
        p, q = (model.logits(inputs)[0].log_softmax(-1) for model in (adapter, replacement))
        for position in (inputs.answer[0].nonzero().squeeze(1) - 1).tolist():
            following = inputs.input_ids[0, position + 1]
            kl.append(float((p[position].exp() * (p[position] - q[position])).sum()))
            ce.append(float(p[position, following] - q[position, following]))
            agree.append(float(p[position].argmax() == q[position].argmax()))

    assert report.positions == "answer"
    assert report.kl.n == report.top1.n == len(kl) == sum(len(sample.answer) for sample in samples)
    assert report.kl.value == pytest.approx(sum(kl) / len(kl), rel=1e-5)
    assert report.ce_increase.value == pytest.approx(sum(ce) / len(ce), rel=1e-4)
    assert report.ce_increase.value == pytest.approx(report.ce_replacement.value - report.ce_host.value)
    assert report.top1.value == pytest.approx(sum(agree) / len(agree))
    low, high = report.kl.interval
    assert low <= report.kl.value <= high
    assert report.text["kl"].n > report.kl.n


def test_batch_size_does_not_matter(adapter, family):
    replacement = ReplacementModel(adapter, plain_transcoder(adapter))
    reports = [
        measure_fidelity(replacement, tiny_samples(family), max_new_tokens=3, batch_size=size).measures()
        for size in (1, 3)
    ]
    for name, measure in reports[0].items():
        assert measure.value == pytest.approx(reports[1][name].value, rel=1e-4, abs=1e-6)
        assert measure.n == reports[1][name].n


def test_a_report_is_plain_json():
    adapter = tiny_adapter("llama")
    report = measure_fidelity(
        ReplacementModel(adapter, plain_transcoder(adapter), first_n_layers=1),
        tiny_samples("llama"),
        max_new_tokens=3,
    )
    read = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert read["n_layers_replaced"] == 1
    assert set(read["kl"]) == {"value", "interval", "n"}


def test_text_without_answers_is_measured_everywhere():
    adapter = tiny_adapter("llama")
    samples = [Sample(id="a", prompt="some text"), Sample(id="b", prompt="more of it")]
    report = measure_fidelity(ReplacementModel(adapter, plain_transcoder(adapter)), samples, max_new_tokens=3)
    assert report.positions == "text"
    assert report.kl.n == len("some text") + len("more of it")


def test_image_and_special_tokens_are_not_predicted():
    adapter = tiny_adapter("llava")
    inputs = adapter.prepare(tiny_samples("llava"), padding_side="left")
    scored = scored_positions(inputs)
    assert len(scored.following) == int((inputs.kind == TokenKind.TEXT).sum())
    assert not torch.isin(scored.following, torch.tensor([0, 1, 2, 3])).any()
    assert int(scored.is_answer.sum()) == int(inputs.answer.sum())


def test_the_filtered_set_is_where_the_host_is_right_but_unsure():
    probability = torch.tensor([[0.7, 0.2, 0.1], [0.9, 0.05, 0.05], [0.7, 0.2, 0.1]])
    other = torch.tensor([[0.2, 0.7, 0.1], [0.9, 0.05, 0.05], [0.7, 0.2, 0.1]])
    scores = token_scores(probability.log(), other.log(), other.log(), torch.tensor([0, 0, 1]))
    assert scores["n_filtered"].tolist() == [1, 0, 0]
    assert scores["top1_filtered"].tolist() == [0, 0, 0]
    assert scores["top1"].tolist() == [0, 1, 1]
    assert scores["ce_host"][0].item() == pytest.approx(-math.log(0.7))


def test_token_match_counts_to_the_longer_answer_both_ways():
    short, long = torch.tensor([5, 6, 1]), torch.tensor([5, 7, 8, 1])
    for pair in ((short, long), (long, short)):
        scores = answer_scores([pair[0]], [pair[1]])
        assert (scores["matched"].item(), scores["generated"].item(), scores["identical"].item()) == (1, 4, 0)
    same = answer_scores([short], [short.clone()])
    assert (same["matched"].item(), same["identical"].item()) == (3, 1)


def test_bootstrap_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(200):
        n = torch.randint(1, 9, (60,), generator=rng).double()
        hits = torch.binomial(n, torch.full((60,), 0.3, dtype=torch.float64), generator=rng)
        sums = Resampled({"hits": hits, "n": n}, 200, seed=trial)
        measure = sums.ratio(sums.total("hits"), sums.total("n"), "n")
        covered += measure.interval[0] <= 0.3 <= measure.interval[1]
    assert 180 <= covered <= 199


def test_bootstrap_is_seeded_and_refuses_nothing_over_nothing():
    sums = {"a": torch.rand(20).double(), "n": torch.ones(20).double(), "none": torch.zeros(20).double()}
    first, again, other = (Resampled(sums, 300, seed) for seed in (1, 1, 2))
    measures = [draw.ratio(draw.total("a"), draw.total("n"), "n") for draw in (first, again, other)]
    assert measures[0] == measures[1] != measures[2]
    assert first.ratio(first.total("a"), first.total("none"), "none") is None


def test_samples_with_nothing_to_predict_are_refused():
    adapter = tiny_adapter("llama")
    replacement = ReplacementModel(adapter, plain_transcoder(adapter))
    with pytest.raises(HostModelError, match="None of the 1 samples has a text token to predict"):
        measure_fidelity(replacement, [Sample(id="a", prompt="")], max_new_tokens=3)
    with pytest.raises(ConfigError, match="n_resamples = 5 is too few"):
        measure_fidelity(replacement, tiny_samples("llama"), max_new_tokens=3, n_resamples=5)
    with pytest.raises(ConfigError, match="max_new_tokens"):
        measure_fidelity(replacement, tiny_samples("llama"), max_new_tokens=0)
