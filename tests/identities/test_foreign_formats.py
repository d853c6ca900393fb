"""Transcoders of other projects compute here what their own formulas say, in memory and written tensor by tensor."""

import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from clt.__main__ import main
from clt.config import CLTConfig
from clt.errors import CheckpointError, ConfigError
from clt.models import CrossLayerTranscoder
from clt.models.formats import build, detect, read, write
from clt.models.formats.export import Target, export
from clt.models.formats.hooks import Hooks
from tests.identities import foreign

LAYERS, WIDTH, FEATURES = foreign.LAYERS, foreign.WIDTH, foreign.FEATURES
HOOKS = Hooks(input="model.layers.{}.mlp", output="model.layers.{}.mlp", model_name="tiny")
FOLDERS = {
    "clt-forge": foreign.clt_forge,
    "clt-forge, two shards": lambda folder: foreign.clt_forge(folder, shards=2),
    "openmoss": foreign.openmoss,
    "openmoss, plain thresholds": lambda folder: foreign.openmoss(folder, by_norm=False),
    "openmoss, topk": lambda folder: foreign.openmoss(folder, act="topk"),
    "crosslayer-transcoder": foreign.goreg,
    "crosslayer-transcoder, folded": lambda folder: foreign.goreg(folder, folded=True),
    "crosslayer-transcoder, batchtopk": lambda folder: foreign.goreg(folder, nonlinearity="BatchTopK"),
    "circuit-tracer": foreign.circuit_tracer,
    "circuit-tracer, relu": lambda folder: foreign.circuit_tracer(folder, thresholds=False),
    "circuit-tracer, set": lambda folder: foreign.per_layer(folder, "circuit-tracer"),
    "saelens": lambda folder: foreign.per_layer(folder, "saelens"),
    "gemma-scope": lambda folder: foreign.per_layer(folder, "gemma-scope"),
    "kokosdev": foreign.kokosdev,
    "kokosdev, one target": lambda folder: foreign.kokosdev(folder, n_targets=1),
    "eleuther": foreign.eleuther,
    "eleuther, two targets": lambda folder: foreign.eleuther(folder, span=2),
    "eleuther, per layer": lambda folder: foreign.eleuther(folder, span=1),
    "eleuther, source-tied": lambda folder: foreign.eleuther(folder, tied=True),
    "eleuther, concat": lambda folder: foreign.eleuther(folder, coalesce="concat"),
    "eleuther, concat, two targets": lambda folder: foreign.eleuther(folder, coalesce="concat", span=2),
    "eleuther, blocks": lambda folder: foreign.eleuther(folder, coalesce="per-layer", skip=False),
}


def inputs(seed=1):
    return torch.randn(LAYERS, 40, WIDTH, generator=torch.Generator().manual_seed(seed))


def assert_same(found, expected, tolerance=1e-5):
    """Equal to float32's precision, seen from the largest value."""
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", FOLDERS)
def test_their_formula_is_what_ours_computes(name, tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    forward, x = FOLDERS[name](folder), inputs()
    assert detect(folder) == name.split(",")[0]
    model = CrossLayerTranscoder.from_pretrained(folder)
    assert (model.encode(x) > 0).float().mean() > 0.05
    assert_same(model(x), forward(x))
    write(read(folder), tmp_path / "ours")
    again = CrossLayerTranscoder.from_pretrained(tmp_path / "ours")
    assert again.config == model.config
    for (key, one), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, other), key


@pytest.mark.parametrize("named", [False, True])
def test_clt_import_reads_a_set_with_and_without_a_list_of_files(named, tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    forward, x = foreign.per_layer(theirs, "circuit-tracer"), inputs()
    config = {"model_kind": "transcoder_set", "model_name": "tiny", "feature_input_hook": "mlp.hook_in"}
    if named:
        files = [
            (theirs / f"layer_{i}.safetensors").rename(theirs / f"part-{9 - i}.safetensors") for i in range(LAYERS)
        ]
        config["transcoders"] = [file.name for file in files]
    (theirs / "config.yaml").write_text(yaml.safe_dump({**config, "feature_output_hook": "mlp.hook_out"}))
    main(["import", str(theirs), str(ours)])
    model = CrossLayerTranscoder.from_pretrained(ours)
    assert_same(model(x), forward(x))
    assert (model.config.model_name, model.config.mlp_input_template) == ("tiny", "blocks.{}.mlp.hook_in")


def random_clt(**options):
    defaults = {
        "num_features": FEATURES,
        "num_layers": LAYERS,
        "d_model": WIDTH,
        "activation_fn": "jumprelu",
        "model_name": "tiny",
    }
    model = CrossLayerTranscoder(CLTConfig(**{**defaults, **options}))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        scaling = [] if model.config.normalization_method == "none" else list(model.named_buffers())
        for name, tensor in (*model.named_parameters(), *scaling):
            positive = "scale" in name or "variance" in name or "threshold" in name
            values = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(values.exp() if positive and "log" not in name else values)
    return model


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("circuit-tracer", {}),
        ("circuit-tracer", {"n_targets": 2, "normalization_method": "mean_std"}),
        ("circuit-tracer", {"first_target": 1}),
        ("circuit-tracer", {"decoder_tying": "per_source", "enable_feature_scale": True}),
        ("circuit-tracer", {"n_targets": 1, "skip_connection": "own"}),
        ("circuit-tracer", {"activation_fn": "relu", "normalization_method": "none", "decoder_rank": 2}),
        ("saelens", {"n_targets": 1}),
        ("saelens", {"n_targets": 1, "skip_connection": "own", "activation_fn": "relu"}),
        ("crosslayer-coding", {"skip_connection": "all"}),
        ("crosslayer-coding", {"n_targets": 2, "skip_connection": "own", "decoder_tying": "per_target"}),
        ("clt-forge", {}),
        ("clt-forge", {"n_targets": 1}),
        ("eleuther", {"activation_fn": "topk", "topk_k": 2}),
        (
            "eleuther",
            {"activation_fn": "topk", "topk_k": 2, "n_targets": 2, "ranking": "value", "skip_connection": "own"},
        ),
        ("eleuther", {"activation_fn": "topk", "topk_k": 2, "first_target": 1, "enable_feature_offset": True}),
        ("eleuther", {"activation_fn": "topk", "topk_k": 2, "normalization_method": "none", "n_targets": 1}),
        ("ours", {"activation_fn": "batchtopk", "batchtopk_k": 4}),
    ],
)
def test_exported_and_imported_again_it_is_the_same_function(format, options, tmp_path):
    model, x = random_clt(**options), inputs(2)
    export(model, format, Target(folder=tmp_path / "theirs", hooks=HOOKS))
    assert detect(tmp_path / "theirs") in (None, format)
    again = CrossLayerTranscoder.from_pretrained(tmp_path / "theirs")
    assert_same(again(x), model(x))
    writing = [layer for layer in range(LAYERS) if model.config.targets_of(layer)]
    assert torch.equal(again.encode(x)[writing] > 0, model.encode(x)[writing] > 0)


def test_what_a_format_cannot_hold_is_refused_with_the_way_out(tmp_path):
    def refused(format, match, **options):
        with pytest.raises(ConfigError, match=match):
            export(random_clt(**options), format, Target(folder=tmp_path / "x", hooks=HOOKS))
        assert not (tmp_path / "x").exists()

    refused("circuit-tracer", "Convert first: clt convert", activation_fn="topk", topk_k=2)
    refused("circuit-tracer", "no place for a skip connection", skip_connection="own")
    refused("clt-forge", "no place for feature offsets", enable_feature_offset=True)
    refused("saelens", "sum is not a decoder of any layer")
    refused("eleuther", "Formats for JumpReLU")
    with pytest.raises(ConfigError, match="--input-hook"):
        export(random_clt(), "circuit-tracer", Target(folder=tmp_path / "x", hooks=Hooks(output="hook_mlp_out")))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match="not empty"):
        export(random_clt(), "ours", Target(folder=tmp_path / "x", hooks=HOOKS))


def test_zero_padding_is_told_with_its_size(tmp_path):
    notes = export(random_clt(n_targets=2), "circuit-tracer", Target(folder=tmp_path / "x", hooks=HOOKS))
    assert "1 of 6 decoders are zeros" in notes[0]
    first = load_file(tmp_path / "x" / "W_dec_0.safetensors")["W_dec_0"]
    assert first.shape == (FEATURES, LAYERS, WIDTH)
    assert first[:, :2].abs().min() > 0
    assert not first[:, 2].any()


def test_saelens_gets_encoders_alone_only_when_asked(tmp_path):
    model, x = random_clt(), inputs()
    target = Target(folder=tmp_path / "x", hooks=HOOKS, own_layer_only=True)
    assert "left out" in export(model, "saelens", target)[0]
    again = CrossLayerTranscoder.from_pretrained(tmp_path / "x")
    assert torch.equal(again.encode(x) > 0, model.encode(x) > 0)


class TestFilesThatMeanHarm:
    """Code in pickles and YAML, paths that leave the folder, bombs, wrong shapes, numbers that are none."""

    def test_a_pickle_with_code_is_not_run(self, tmp_path):
        class Harm:
            def __reduce__(self):
                return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w').close()",))

        (tmp_path / "config.json").write_text(json.dumps({"sae_type": "clt"}))
        torch.save({"sae": Harm()}, tmp_path / "weights.pt")
        with pytest.raises(CheckpointError, match="would run code"):
            read(tmp_path)
        assert not (tmp_path / "ran").exists()

    def test_yaml_does_not_make_objects_nor_import_classes(self, tmp_path):
        foreign.goreg(tmp_path)
        config = tmp_path / "config.yaml"
        config.write_text("model: !!python/object/apply:os.system ['true']")
        with pytest.raises(CheckpointError, match="cannot be read as plain values"):
            read(tmp_path)
        config.write_text(yaml.safe_dump({"model": {"init_args": {"nonlinearity": {"class_path": "os.system"}}}}))
        with pytest.raises(CheckpointError, match="never imported"):
            read(tmp_path)

    def test_an_archive_that_blows_up_is_refused(self, tmp_path):
        place = tmp_path / "layer_0"
        place.mkdir()
        np.savez_compressed(place / "params.npz", W_enc=np.zeros((2000, 2000), np.float32))
        with pytest.raises(CheckpointError, match="claims to unpack to"):
            read(tmp_path)

    def test_pickled_arrays_are_refused(self, tmp_path):
        (tmp_path / "layer_0").mkdir()
        np.savez(tmp_path / "layer_0" / "params.npz", W_enc=np.array([{}], dtype=object))
        with pytest.raises(CheckpointError, match="plain arrays"):
            read(tmp_path)

    def test_thresholds_must_be_numbers_and_not_negative(self, tmp_path):
        foreign.circuit_tracer(tmp_path)
        path = tmp_path / "W_enc_1.safetensors"
        tensors = load_file(path)
        for value, match in ((float("nan"), "no finite numbers"), (-0.5, "negative thresholds")):
            tensors["threshold_1"][3] = value
            save_file(tensors, path)
            with pytest.raises(CheckpointError, match=match):
                build(read(tmp_path))

    def test_wrong_shapes_missing_layers_and_cut_files_are_named(self, tmp_path):
        foreign.circuit_tracer(tmp_path)
        whole = (tmp_path / "W_dec_1.safetensors").read_bytes()
        save_file({"W_dec_1": torch.zeros(FEATURES, LAYERS, WIDTH)}, tmp_path / "W_dec_1.safetensors")
        with pytest.raises(CheckpointError, match=r"W_dec_1 has the shape \(6, 3, 4\)"):
            build(read(tmp_path))
        with pytest.raises(CheckpointError, match=r"W_dec_1 has the shape"):
            write(read(tmp_path), tmp_path / "ours")
        assert not list((tmp_path / "ours").iterdir())
        (tmp_path / "W_dec_1.safetensors").write_bytes(whole[:-9])
        with pytest.raises(CheckpointError, match="cut off"):
            build(read(tmp_path))
        (tmp_path / "W_dec_1.safetensors").unlink()
        with pytest.raises(CheckpointError, match="does not exist"):
            build(read(tmp_path))

    def test_layers_that_are_not_there_are_not_invented(self, tmp_path):
        foreign.per_layer(tmp_path, "circuit-tracer")
        (tmp_path / "layer_1.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"\[1\] are missing"):
            read(tmp_path)

    def test_a_missing_shard_is_noticed(self, tmp_path):
        foreign.clt_forge(tmp_path, shards=2)
        (tmp_path / "rank1_clt_weights.safetensors").unlink()
        with pytest.raises(CheckpointError, match="3 features of 6"):
            read(tmp_path)


def test_types_are_kept_or_widened_but_never_narrowed(tmp_path):
    foreign.circuit_tracer(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        save_file({name: value.bfloat16() for name, value in load_file(path).items()}, path)
    assert build(read(tmp_path)).W_dec[0].dtype == torch.bfloat16
    first = tmp_path / "W_enc_0.safetensors"
    save_file({**load_file(first), "b_enc_0": torch.full((FEATURES,), 1 + 2**-12)}, first)
    model = build(read(tmp_path))
    assert model.b_enc[0][0] == 1 + 2**-12
    second = tmp_path / "W_enc_1.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(first).items()}, first)
    save_file({name: value.float() for name, value in load_file(second).items()}, second)
    with pytest.raises(CheckpointError, match="cannot hold"):
        build(read(tmp_path))


def test_batch_topk_without_a_threshold_needs_a_decision(tmp_path):
    forward = foreign.openmoss(tmp_path, act="topk")
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "act_fn": "batchtopk"}))
    with pytest.raises(CheckpointError, match="--batchtopk-as-topk"):
        read(tmp_path)
    model, x = build(read(tmp_path, batchtopk_as_topk=True)), inputs()
    assert_same(model(x), forward(x))


def test_the_commands(tmp_path, capsys):
    forward, x = foreign.clt_forge(tmp_path / "forge"), inputs()
    main(["import", str(tmp_path / "forge"), str(tmp_path / "ours")])
    assert "clt-forge: 3 layers of 6 features" in capsys.readouterr().out
    main(
        [
            "export",
            "--clt",
            str(tmp_path / "ours"),
            "--format",
            "circuit-tracer",
            "--output",
            str(tmp_path / "ct"),
            "--input-hook",
            "ln2.hook_normalized",
            "--output-hook",
            "hook_mlp_out",
        ]
    )
    torch.testing.assert_close(
        CrossLayerTranscoder.from_pretrained(tmp_path / "ct")(x), forward(x), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(SystemExit) as stopped:
        main(["import", str(tmp_path), str(tmp_path / "new")])
    assert stopped.value.code == 2
    assert "no transcoder that is known here" in capsys.readouterr().err
