"""Transcoders that mean harm, given to `clt import` as a user would: exit 2, one named reason, nothing run or left."""

import gzip
import io
import json
import zipfile

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from clt.__main__ import main
from clt.attribution.feature_examples import INDEX, Example, FeatureCard, read_feature_example, write_feature_examples
from clt.errors import GraphError
from tests.identities import foreign


class Code:
    """Writes a file when it is unpickled by anybody who runs what a pickle says."""

    def __init__(self, ran):
        self.ran = ran

    def __reduce__(self):
        return (exec, (f"open({str(self.ran)!r}, 'w').close()",))


def changed(path, **values):
    """A JSON file with some values changed."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def tensors(path, change):
    """A safetensors file, changed."""
    found = load_file(path)
    change(found)
    save_file(found, path)


def crosslayer_coding(folder, weights):
    sizes = {"num_features": 6, "num_layers": 1, "d_model": 4, "normalization_method": "none", "activation_fn": "relu"}
    foreign.json_to(folder / "cfg.json", {**sizes, "tl_input_template": None})
    torch.save(weights, folder / "clt.pt")


def pickle_per_layer(folder, ran):
    torch.save({"state_dict": Code(ran)}, folder / "transcoder_L0.pt")


def pickle_state_dict(folder, ran):
    crosslayer_coding(folder, {"encoders.0.weight": Code(ran)})


def pickle_openmoss(folder, ran):
    foreign.json_to(folder / "config.json", {"sae_type": "clt"})
    torch.save({"sae": Code(ran)}, folder / "weights.pt")


def pickled_array(folder, ran):
    (folder / "layer_0").mkdir()
    np.savez(folder / "layer_0" / "params.npz", W_enc=np.array([Code(ran)], dtype=object))


def yaml_with_a_call(folder, ran):
    foreign.goreg(folder)
    (folder / "config.yaml").write_text(f"model: !!python/object/apply:os.mkdir ['{ran}']")


def yaml_with_a_class(folder, _):
    foreign.goreg(folder)
    named = {"model": {"init_args": {"nonlinearity": {"class_path": "os.system"}}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(named))


def path_that_leaves(folder, _):
    foreign.per_layer(folder.parent / "outside", "circuit-tracer")
    names = [f"../outside/layer_{i}.safetensors" for i in range(3)]
    (folder / "config.yaml").write_text(yaml.safe_dump({"model_kind": "transcoder_set", "transcoders": names}))


def address_elsewhere(folder, _):
    foreign.per_layer(folder, "circuit-tracer")
    names = ["hf://someone/set/layer_0.safetensors"]
    (folder / "config.yaml").write_text(yaml.safe_dump({"model_kind": "transcoder_set", "transcoders": names}))


def npz_bomb(folder, _):
    (folder / "layer_0").mkdir()
    np.savez_compressed(folder / "layer_0" / "params.npz", W_enc=np.zeros((3000, 3000), np.float32))


def pt_bomb(folder, _):
    crosslayer_coding(folder, {"encoders.0.weight": torch.zeros(3000, 3000)})
    packed = io.BytesIO()
    with zipfile.ZipFile(folder / "clt.pt") as plain, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as small:
        for name in plain.namelist():
            small.writestr(name, plain.read(name))
    (folder / "clt.pt").write_bytes(packed.getvalue())


def json_too_deep(folder, _):
    foreign.clt_forge(folder)
    (folder / "clt_cfg.json").write_text("[" * 100_000)


def header_that_lies(folder, _):
    foreign.circuit_tracer(folder)
    (folder / "W_enc_0.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")


def layers_that_are_not_there(folder, _):
    foreign.clt_forge(folder)
    changed(folder / "clt_cfg.json", n_layers=10**9)


def width_that_is_not_there(folder, _):
    foreign.clt_forge(folder)
    changed(folder / "clt_cfg.json", d_in=10**7)


def wrong_shape(folder, _):
    foreign.circuit_tracer(folder)
    tensors(folder / "W_dec_1.safetensors", lambda found: found.update(W_dec_1=torch.zeros(6, 3, 4)))


def nan_threshold(folder, _):
    foreign.circuit_tracer(folder)
    tensors(folder / "W_enc_1.safetensors", lambda found: found["threshold_1"].fill_(float("nan")))


def negative_threshold(folder, _):
    foreign.circuit_tracer(folder)
    tensors(folder / "W_enc_1.safetensors", lambda found: found["threshold_1"].fill_(-1.0))


def nan_log_threshold(folder, _):
    foreign.clt_forge(folder)
    tensors(folder / "clt_weights.safetensors", lambda found: found["log_threshold"][0].fill_(float("nan")))


def nan_scale(folder, _):
    foreign.openmoss(folder)
    name = "dataset_average_activation_norm.blocks.0.ln2"
    tensors(folder / "sae_weights.safetensors", lambda found: found[name].fill_(float("nan")))


HARM = {
    pickle_per_layer: "would run code",
    pickle_state_dict: "would run code",
    pickle_openmoss: "would run code",
    pickled_array: "no .npz file of plain arrays",
    yaml_with_a_call: "cannot be read as plain values",
    yaml_with_a_class: "never imported",
    path_that_leaves: "lies outside of it",
    address_elsewhere: "Download them",
    npz_bomb: "claims to unpack to",
    pt_bomb: "claims to unpack to",
    json_too_deep: "cannot be read as plain values",
    header_that_lies: "no whole safetensors file",
    layers_that_are_not_there: "are of 3 layers",
    width_that_is_not_there: "has the shape",
    wrong_shape: "W_dec_1 has the shape (6, 3, 4)",
    nan_threshold: "no finite numbers",
    negative_threshold: "negative thresholds",
    nan_log_threshold: "no finite numbers",
    nan_scale: "no finite numbers",
}


@pytest.mark.parametrize("make", HARM, ids=lambda make: make.__name__)
def test_import_refuses_with_one_reason(make, tmp_path, capsys):
    source, ran, output = tmp_path / "theirs", tmp_path / "ran", tmp_path / "ours"
    source.mkdir()
    make(source, ran)
    with pytest.raises(SystemExit) as stopped:
        main(["import", str(source), str(output)])
    told = capsys.readouterr().err
    assert stopped.value.code == 2
    assert HARM[make] in told
    assert "Traceback" not in told
    assert not ran.exists()
    assert not output.exists() or not list(output.iterdir())


def test_an_index_of_examples_cannot_name_files_outside_its_folder(tmp_path):
    card = FeatureCard({"Top": [Example(["a"], [1.0])]})
    for name in ("secret", "features"):
        write_feature_examples({(0, 0): card}, tmp_path / name, n_layers=1, n_features=1, scan="/s")
    index = json.loads(gzip.decompress((tmp_path / "features" / INDEX).read_bytes()))
    index[0]["filename"] = "../secret/layer_0.bin"
    (tmp_path / "features" / INDEX).write_bytes(gzip.compress(json.dumps(index).encode()))
    with pytest.raises(GraphError, match="no file of this folder"):
        read_feature_example(tmp_path / "features", 0, 0)
