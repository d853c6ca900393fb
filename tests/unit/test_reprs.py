"""What the public objects say about themselves in a notebook."""

import pytest
import torch

from clt.activation_generation.corpus import open_model
from clt.config import CLTConfig
from clt.models import CrossLayerTranscoder
from clt.replacement import ReplacementModel, SteeredHost
from clt.types import Sample
from clt.worlds import load
from tests.tiny_data import sparse_batch, store_of, write_data


@pytest.fixture(scope="module")
def adapter():
    return open_model("world:two-hop")


@pytest.fixture(scope="module")
def transcoder(adapter):
    config = CLTConfig(num_layers=adapter.n_layers, num_features=96, d_model=adapter.d_model, activation_fn="relu")
    return CrossLayerTranscoder(config, device=adapter.device)


def test_a_batch_says_its_sizes_and_kinds():
    assert repr(sparse_batch()) == ("ActivationBatch(3 layers x 600 tokens x 8, float32, cpu; 300 text, 300 image)")


def test_a_worlds_host_goes_by_the_worlds_name(adapter):
    assert adapter.name == "world:two-hop"
    assert "world:two-hop" in repr(adapter)


def test_a_store_says_where_it_is(tmp_path):
    store = store_of(write_data(tmp_path / "d"))
    next(store)
    text = repr(store)
    assert text.startswith("LocalActivationStore(tiny, sparse: 600 tokens x 3 layers x 8")
    assert text.endswith("batches of 64, epoch 0, step 1)")


def test_a_transcoder_says_its_window(transcoder, adapter):
    n = sum(each.numel() for each in transcoder.parameters())
    text = repr(transcoder)
    assert f"96 features, d_model {adapter.d_model}, relu, targets +0..+{adapter.n_layers - 1}" in text
    assert f"{n / 1e6:.2f} M weights" in text
    per_layer = CrossLayerTranscoder(CLTConfig(num_layers=2, num_features=4, d_model=3, n_targets=1))
    assert "per layer" in repr(per_layer)


def test_replacements_say_host_and_transcoder(adapter, transcoder):
    text = repr(ReplacementModel(adapter, transcoder, first_n_layers=1))
    assert text.startswith(f"ReplacementModel(1 of {adapter.n_layers} MLPs of ModelAdapter(")
    assert "LlamaForCausalLM" in text
    assert repr(transcoder) in text
    assert repr(adapter) in repr(SteeredHost(adapter, transcoder))


def test_graphs_say_prompt_answer_and_sizes(adapter, transcoder):
    from clt.attribution import attribute

    prompt = load("two-hop").questions("held_out", 1)[0]
    graph = attribute(ReplacementModel(adapter, transcoder), Sample(id="0", prompt=prompt.prompt))
    assert repr(graph).startswith(f"AttributionGraph({graph.prompt!r} -> {graph.targets[0].text!r}")
    assert f"{graph.n_features:,} of" in repr(graph)
    pruned = graph.prune()
    assert repr(pruned).startswith(f"PrunedGraph({int(pruned.node_mask.sum()):,} of")
    assert torch.equal(pruned.graph.activations, graph.activations)
