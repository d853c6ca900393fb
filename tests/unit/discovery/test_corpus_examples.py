"""Examples from a corpus are the samples in which a plain search finds each feature strongest."""

import json

import numpy as np
import pytest
import torch

from clt.__main__ import main
from clt.config import CLTConfig
from clt.discovery import corpus_examples, examples
from clt.discovery.corpus_examples import CorpusExamples, parse_features
from clt.discovery.examples import TopExamples
from clt.discovery.feature_files import FeatureFiles
from clt.discovery.features_file import LayerFeatures
from clt.discovery.pictures import with_pictures
from clt.errors import DatasetError
from clt.models import CrossLayerTranscoder
from clt.types import FeatureId, TokenKind
from tests.tiny_hosts import plain_transcoder, tiny_adapter, tiny_samples


def strongest(adapter, transcoder, samples):
    """Feature -> (largest activation, sample, position), sample by sample without batching."""
    best = {}
    for number, sample in enumerate(samples):
        batch = adapter.capture(adapter.prepare([sample]))
        for layer, matrix in enumerate(transcoder.encode(batch.inputs)):
            values, positions = matrix.max(0)
            for feature, (value, position) in enumerate(zip(values.tolist(), positions.tolist())):
                if value > best.get(FeatureId(layer, feature), (0,))[0] + 1e-6:
                    best[FeatureId(layer, feature)] = (value, number, position)
    return best


@pytest.mark.parametrize("family", ["llava", "gpt2"])
@torch.no_grad()
def test_the_first_example_is_the_largest_activation_of_the_corpus(family, monkeypatch):
    monkeypatch.setattr(corpus_examples, "PRUNE_AT", 1)
    adapter = tiny_adapter(family, dtype=torch.float64)
    transcoder = plain_transcoder(adapter)
    samples = list(tiny_samples(family))
    found = CorpusExamples(adapter, transcoder, None, 2)
    assert found.read(samples, batch_size=2) == len(samples)
    records = {FeatureId(r["layer"], r["feature"]): r for r in found.records("t", context=None)}
    expected = strongest(adapter, transcoder, samples)
    assert set(records) == set(expected)
    for feature, (value, number, position) in expected.items():
        first = records[feature]["examples_quantiles"][0]["examples"][0]
        assert first["activation"] == pytest.approx(value, rel=1e-5)
        assert (first["example_id"], first["train_token_ind"]) == (samples[number].id, position)
        assert len(first["tokens"]) == len(first["tokens_acts_list"])


def test_image_examples_carry_every_patch_and_the_picture_lies_beside_them(tmp_path):
    adapter = tiny_adapter("llava")
    found = CorpusExamples(adapter, plain_transcoder(adapter), None, 3)
    samples = [sample for sample in tiny_samples("llava") if sample.images]
    found.read(samples, batch_size=4)
    n_written = examples.write_examples(tmp_path, found.records("t", context=4))
    assert found.save_pictures(tmp_path) > 0
    files = FeatureFiles(tmp_path)
    assert len(files.features()) == n_written
    n_patches = int((adapter.prepare(samples[:1]).kind[0] == TokenKind.IMAGE).sum())
    for feature in files.features():
        for one in with_pictures(files.read(*feature), [tmp_path])["examples_quantiles"][0]["examples"]:
            assert len(one["images"][0]["activations"]) == n_patches
            assert one["images"][0]["src"].startswith("data:image/jpeg")
            assert len(one["tokens"]) <= 7
            values = one["tokens_acts_list"]
            assert values[one["train_token_ind"]] == max(values)


def test_the_histogram_of_a_common_feature_is_a_fair_draw_of_bounded_size(monkeypatch):
    monkeypatch.setattr(examples, "MOST_PEAKS", 50)
    top = TopExamples(None, 2)
    for number in range(2000):
        matrix = torch.zeros(1, 3)
        matrix[0, 1] = (number + 1) / 2000
        top.add(number, {0: LayerFeatures.from_dense(matrix)})
    peaks = top.peaks(FeatureId(0, 1))
    assert len(peaks) == 50
    assert np.mean(peaks) == pytest.approx(0.5, abs=0.15)
    assert top.largest(FeatureId(0, 1)) == 1.0
    assert top.features() == [FeatureId(0, 1)]
    assert top.samples() == {1998, 1999}


def test_features_that_do_not_exist_are_refused():
    adapter = tiny_adapter("gpt2")
    with pytest.raises(DatasetError, match="Feature 1:99 does not exist"):
        CorpusExamples(adapter, plain_transcoder(adapter), parse_features(["0:1", "1:99"]), 2)
    with pytest.raises(DatasetError, match="'x:1' names no feature"):
        parse_features(["x:1"])


def test_the_command_writes_what_pages_read(tmp_path, capsys):
    adapter = tiny_adapter("gpt2")
    config = CLTConfig(num_layers=adapter.n_layers, d_model=adapter.d_model, num_features=20, activation_fn="relu")
    CrossLayerTranscoder(config).save_pretrained(tmp_path / "clt")
    adapter.model.save_pretrained(tmp_path / "host")
    adapter.tokenizer.save_pretrained(tmp_path / "host")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"the cat sat on mat {n}"}) + "\n" for n in range(5)))
    place = ["--model", str(tmp_path / "host"), "--clt", str(tmp_path / "clt"), "--dataset", str(corpus)]
    main(["examples", *place, "--output", str(tmp_path / "examples"), "--per-feature", "2", "--samples", "4"])
    assert "from 4 samples" in capsys.readouterr().out
    files = FeatureFiles(tmp_path / "examples")
    record = files.read(*files.features()[0])
    assert len(record["examples_quantiles"][0]["examples"]) <= 2
