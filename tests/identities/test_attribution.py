"""Rows of an attribution graph add up, do not depend on how they are computed, and say what freezing shows."""

import pytest
import torch

from clt.attribution import AttributionGraph, Contrast, Direction, attribute, attribution_plan
from clt.attribution.rows import RowStore
from clt.attribution.sources import written
from clt.errors import GraphError
from tests.attribution_hosts import random_replacement
from tests.tiny_hosts import tiny_samples

FAMILIES = ["gpt2", "llama", "gemma2", "qwen3", "llava", "qwen2_5_vl"]
KINDS = {
    "relu, CLT": {},
    "jumprelu": {"activation_fn": "jumprelu", "jumprelu_threshold": 0.3},
    "topk, PLT": {"activation_fn": "topk", "topk_k": 3, "n_targets": 1},
    "two targets": {"n_targets": 2},
    "later layers only": {"first_target": 1},
    "tied with offsets": {"decoder_tying": "per_source", "enable_feature_offset": True, "enable_feature_scale": True},
    "low rank": {"decoder_rank": 2},
    "norm of its own": {"input_norm": "layer"},
    "skips to all targets": {"skip_connection": "all"},
    "own skip, standardised": {"skip_connection": "own", "n_targets": 1},
}


def graph_of(family="llama", seed=0, kind=None, **options):
    model, inputs = random_replacement(family, seed, **(kind or {}))
    return attribute(model, inputs, **{"max_feature_nodes": None, **options})


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_add_up_with_the_bias(family):
    graph = graph_of(family)
    assert graph.n_features > 20
    assert graph.row_sum_errors.max() < 1e-5
    relative = (graph.edges.sums(graph.edges.weight.double()) - graph.row_value).abs() / graph.row_value.abs()
    assert relative.quantile(0.95) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ignored", [0, 1])
def test_rows_add_up_for_every_kind_of_transcoder(kind, ignored):
    graph = graph_of("llama", kind=KINDS[kind], ignored_positions=ignored)
    assert graph.row_sum_errors.max() < 1e-5
    assert (graph.features[:, 1] == 0).any() == (ignored == 0)


def test_row_values_are_preactivations_and_logits():
    model, inputs = random_replacement("llama")
    graph = attribute(model, inputs, max_feature_nodes=None)
    captured = model.adapter.capture(inputs)
    layer, position, feature = graph.features.T
    h = torch.stack(
        [
            model.transcoder.preactivation(k, model.transcoder.standardise_inputs(k, x))
            for k, x in enumerate(captured.inputs)
        ]
    )
    torch.testing.assert_close(graph.row_value[: len(layer)], h[layer, position, feature], rtol=1e-4, atol=1e-5)
    logits = model.adapter.logits(inputs)[0, -1]
    ids = [target.token_id for target in graph.targets]
    torch.testing.assert_close(graph.row_value[len(layer) :], logits[ids] - logits.mean(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_changes_nothing(batch_size):
    whole, other = graph_of(batch_size=33).to_dense(), graph_of(batch_size=batch_size).to_dense()
    torch.testing.assert_close(other, whole, rtol=1e-5, atol=1e-5)


def test_vectors_made_again_for_each_use_change_nothing(monkeypatch):
    kept = graph_of().to_dense()
    monkeypatch.setattr("clt.attribution.sources._KEPT_BYTES", 0)
    monkeypatch.setattr("clt.attribution.sources._BLOCK_NUMBERS", {"cpu": 16 * 5})
    torch.testing.assert_close(graph_of().to_dense(), kept, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "llava"])
def test_doubling_a_node_changes_every_row_by_its_column(family):
    """With everything held, one more of what a node writes moves each target by exactly its edge."""
    model, inputs = random_replacement(family)
    graph = attribute(model, inputs, max_feature_nodes=None)
    linear, dense = model.adapter.linearised(inputs), graph.to_dense()
    rng = torch.Generator().manual_seed(0)
    for node in torch.randint(0, graph.first_target, (12,), generator=rng).tolist():
        moved = moved_reads(model, linear, graph, node) - moved_reads(model, linear, graph, None)
        for row in range(graph.n_features):
            layer, position, feature = graph.features[row].tolist()
            read = model.transcoder.W_enc[layer][feature] * model.transcoder.input_scale[layer]
            torch.testing.assert_close(moved[layer, position] @ read, dense[row, node], rtol=1e-3, atol=2e-4)


@torch.no_grad()
def moved_reads(model, linear, graph, node):
    """What all layers read when one node writes twice."""
    embeddings, writes = linear.embeddings.clone(), linear.writes.clone()
    if node is not None and node < graph.n_features:
        source, position, feature = graph.features[node].tolist()
        for target in model.transcoder.config.targets_of(source):
            vector = written(
                model.transcoder, source, target, torch.tensor([feature]), graph.activations[node : node + 1]
            )
            writes[target, position] += vector[0]
    elif node is not None and node < graph.first_embedding:
        layer, position = divmod(node - graph.first_error, graph.n_positions)
        writes[layer, position] += errors_of(model, linear)[layer, position]
    elif node is not None:
        embeddings[node - graph.first_embedding] *= 2
    reads = []
    linear.run(embeddings[None], lambda layer, x: reads.append(x[0].clone()) or writes[layer][None])
    return torch.stack(reads)


def errors_of(model, linear):
    """True MLP outputs minus the transcoder's; nothing at the first position, which is held."""
    features = model.transcoder.encode(linear.reads)
    errors = linear.writes - model.transcoder.decode(features, linear.reads)
    errors[:, 0] = 0
    return errors


def test_unselected_features_become_their_errors():
    every, some = graph_of(), graph_of(max_feature_nodes=15, batch_size=4)
    assert some.n_features == 15
    assert some.row_sum_errors.max() < 1e-5
    dense, full = some.to_dense(), every.to_dense()
    number = {tuple(feature): node for node, feature in enumerate(every.features.tolist())}
    chosen = [number[tuple(feature)] for feature in some.features.tolist()]
    torch.testing.assert_close(dense[:15, :15], full[chosen][:, chosen], rtol=1e-5, atol=1e-5)
    others = torch.tensor([node for node in range(every.n_features) if node not in chosen])
    place = every.features[others, 0] * every.n_positions + every.features[others, 1]
    folded = full[chosen][:, every.first_error : every.first_embedding].clone()
    folded.index_add_(1, place, full[chosen][:, others])
    torch.testing.assert_close(dense[:15, some.first_error : some.first_embedding], folded, rtol=1e-4, atol=1e-5)

    dropped = graph_of(max_feature_nodes=15, batch_size=4, unselected="drop")
    assert torch.equal(dropped.features, some.features)
    errors = full[chosen][:, every.first_error : every.first_embedding]
    torch.testing.assert_close(dropped.to_dense()[:15, some.first_error : some.first_embedding], errors)


def test_a_killed_computation_goes_on_to_the_same_graph(tmp_path, monkeypatch):
    options = {"max_feature_nodes": 20, "batch_size": 3, "update_interval": 2}
    whole = graph_of(**options)
    append, calls = RowStore.append, []

    def killed(self, *args):
        calls.append(1)
        if len(calls) == 5:
            with open(self.folder / "weights.bin", "ab") as file:
                file.write(b"half a ro")
            raise KeyboardInterrupt
        append(self, *args)

    monkeypatch.setattr(RowStore, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        graph_of(**options, work_dir=tmp_path)
    monkeypatch.setattr(RowStore, "append", append)
    resumed = graph_of(**options, work_dir=tmp_path)
    assert torch.equal(resumed.features, whole.features)
    torch.testing.assert_close(resumed.to_dense(), whole.to_dense())
    with pytest.raises(GraphError, match="another graph"):
        graph_of(**{**options, "max_feature_nodes": 19}, work_dir=tmp_path)


def test_targets_can_be_tokens_contrasts_and_directions():
    model, inputs = random_replacement("llama")
    ids = [5, 9]
    direction = Direction("mine", model.adapter.model.lm_head.weight[5].detach())
    graph = attribute(model, inputs, targets=[*ids, Contrast(5, 9), direction], max_feature_nodes=None)
    first, second, contrast, mine = graph.to_dense()[graph.first_target :]
    torch.testing.assert_close(contrast, first - second, rtol=1e-4, atol=1e-5)
    mean = attribute(
        model,
        inputs,
        targets=[Direction("mean", model.adapter.model.lm_head.weight.mean(0).detach())],
        max_feature_nodes=None,
    ).to_dense()[-1]
    torch.testing.assert_close(first[:-4] + mean[:-1], mine[:-4], rtol=1e-4, atol=1e-5)
    assert [target.token_id for target in graph.targets] == [5, 9, 302, 303]
    with pytest.raises(GraphError, match="Mind the space"):
        attribute(model, inputs, targets=["two words"])


def test_an_earlier_position_sees_nothing_after_it():
    graph = graph_of(position=2)
    assert graph.targets[0].position == 2
    assert int(graph.to_dense()[graph.first_target :].abs().sum(0).nonzero().max()) <= graph.first_embedding + 2
    assert graph.row_sum_errors.max() < 1e-5


def test_image_tokens_know_their_patches():
    model, _ = random_replacement("llava")
    sample = tiny_samples("llava")[0]
    graph = attribute(model, sample, max_feature_nodes=10)
    patches = [position.patch for position in graph.positions if position.kind == "image"]
    assert [(patch.row, patch.column) for patch in patches] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    # 40 x 30 pixels: the host sees the 30 x 30 in the middle.
    assert patches[0].box == (5.0, 0.0, 20.0, 15.0)
    assert patches[3].box == (20.0, 15.0, 35.0, 30.0)
    assert graph.images[0].size == (40, 30)


def test_a_group_of_patches_has_the_sums_of_its_members():
    """Patches less alike than asked for stay apart; embeddings and errors are summed, features are not."""
    model, _ = random_replacement("llava")
    sample = tiny_samples("llava")[0]
    apart = attribute(model, sample, max_feature_nodes=15, batch_size=4)
    inputs = model.adapter.prepare([sample])
    patches = [number for number, position in enumerate(apart.positions) if position.patch]
    directions = torch.nn.functional.normalize(model.adapter.linearised(inputs).embeddings[patches], dim=1)
    cosines = directions @ directions.T
    between = float(cosines[0, 1:].sort().values[1:].mean())
    together = attribute(model, sample, max_feature_nodes=15, batch_size=4, group_patches=between)

    groups = [position.group for position in together.positions]
    assert [group is None for group in groups] == [position.patch is None for position in together.positions]
    assert groups[patches[0]] == patches[0]
    assert len({groups[number] for number in patches}) < len(patches)
    for number, patch in enumerate(patches):
        leader = patches.index(groups[patch])
        assert leader == number or cosines[leader, number] >= between

    summed = apart.to_dense()
    for member, leader in enumerate(groups):
        if leader in (None, member):
            continue
        for row in range(apart.n_layers + 1):
            start = apart.first_error + row * apart.n_positions
            summed[:, start + leader] += summed[:, start + member]
            summed[:, start + member] = 0
    assert torch.equal(together.features, apart.features)
    torch.testing.assert_close(together.to_dense(), summed, rtol=1e-5, atol=1e-6)
    assert together.row_sum_errors.max() < 1e-5


def test_the_plan_says_what_the_graph_takes():
    model, inputs = random_replacement("gpt2")
    options = {"max_feature_nodes": 15, "batch_size": 4}
    plan, graph = attribution_plan(model, inputs, **options), attribute(model, inputs, **options)
    assert plan.n_active == len(graph.active_features)
    assert plan.n_rows == graph.edges.n_rows
    assert plan.graph == 8 * graph.edges.n_rows * (graph.n_nodes - len(graph.targets))
    weights = [*model.adapter.model.parameters(), *model.transcoder.parameters()]
    assert plan.model >= 4 * sum(weight.numel() for weight in weights)
    # One block: nothing of a short pattern is cut off.
    assert plan.patterns == 4 * 3 * 4 * plan.n_positions**2


def test_bfloat16_hosts_close_to_their_rounding():
    model, inputs = random_replacement("llama")
    model.adapter.model.to(torch.bfloat16)
    graph = attribute(model, inputs, max_feature_nodes=None)
    assert 0 < graph.row_sum_errors.max() < 0.05


def test_a_saved_graph_comes_back(tmp_path):
    graph = attribute(random_replacement("llava")[0], tiny_samples("llava")[0], max_feature_nodes=12)
    graph.save(tmp_path / "graph")
    loaded = AttributionGraph.load(tmp_path / "graph")
    assert torch.equal(loaded.to_dense(), graph.to_dense())
    assert loaded.positions == graph.positions
    assert loaded.targets == list(graph.targets)
    assert loaded.info == graph.info
    assert torch.equal(loaded.cumulative, graph.cumulative)
    assert loaded.images[0].tobytes() == graph.images[0].tobytes()
    (tmp_path / "graph" / "graph.safetensors").write_bytes(b"half")
    with pytest.raises(GraphError, match="no whole safetensors"):
        AttributionGraph.load(tmp_path / "graph")
