"""Importing needs memory for one layer, however many there are: measured on sparse files of several hundred MB."""

import json
import math
import subprocess
import sys

import pytest
import yaml

WIDTH, FEATURES = 512, 2048
LAYER_MB = FEATURES * WIDTH * 4 / 2**20
IMPORT = """
import sys
from pathlib import Path
import torch
from clt.models.formats import read, write

def kilobytes(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1])

torch.set_num_threads(1)
write(read(Path(sys.argv[1])), Path(sys.argv[3]))  # everything is loaded that will be
before = kilobytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
write(read(Path(sys.argv[2])), Path(sys.argv[4]))
print((kilobytes("VmHWM") - before) / 1024)
"""


def sparse(path, shapes):
    """A safetensors file of float32 zeros that takes no room on the disk."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


def circuit_tracer(folder, layers):
    for i in range(layers):
        vectors = {f"b_enc_{i}": (FEATURES,), f"b_dec_{i}": (WIDTH,), f"threshold_{i}": (FEATURES,)}
        sparse(folder / f"W_enc_{i}.safetensors", {f"W_enc_{i}": (FEATURES, WIDTH), **vectors})
        sparse(folder / f"W_dec_{i}.safetensors", {f"W_dec_{i}": (FEATURES, layers - i, WIDTH)})
    (folder / "config.yaml").write_text(yaml.safe_dump({"model_kind": "cross_layer_transcoder"}))


def circuit_tracer_set(folder, layers):
    shapes = {"W_enc": (FEATURES, WIDTH), "W_dec": (FEATURES, WIDTH), "b_enc": (FEATURES,), "b_dec": (WIDTH,)}
    for i in range(layers):
        sparse(folder / f"layer_{i}.safetensors", shapes)


def clt_forge(folder, layers):
    pairs = layers * (layers + 1) // 2
    shapes = {
        "W_enc": (layers, WIDTH, FEATURES), "b_enc": (layers, FEATURES), "W_dec": (pairs, FEATURES, WIDTH),
        "b_dec": (pairs, WIDTH), "log_threshold": (layers, FEATURES),
    }  # fmt: skip
    sparse(folder / "clt_weights.safetensors", shapes)
    values = {"d_in": WIDTH, "d_latent": FEATURES, "n_layers": layers, "cross_layer_decoders": True}
    (folder / "clt_cfg.json").write_text(json.dumps(values))


def openmoss(folder, layers):
    shapes = {"W_E": (layers, WIDTH, FEATURES), "b_E": (layers, FEATURES)}
    shapes |= {f"W_D.{t}": (t + 1, FEATURES, WIDTH) for t in range(layers)} | {
        f"b_D.{t}": (WIDTH,) for t in range(layers)
    }
    sparse(folder / "sae_weights.safetensors", shapes)
    values = {"sae_type": "clt", "act_fn": "relu", "norm_activation": "none"}
    (folder / "config.json").write_text(json.dumps(values))


def crosslayer_coding(folder, layers):
    shapes = {}
    for s in range(layers):
        shapes[f"encoder_module.encoders.{s}.weight"] = (FEATURES, WIDTH)
        shapes[f"encoder_module.encoders.{s}.bias_param"] = (FEATURES,)
        for t in range(s, layers):
            shapes[f"decoder_module.decoders.{s}->{t}.weight"] = (WIDTH, FEATURES)
            shapes[f"decoder_module.decoders.{s}->{t}.bias_param"] = (WIDTH,)
    sparse(folder / "model.safetensors", shapes)
    sizes = {"num_features": FEATURES, "num_layers": layers, "d_model": WIDTH}
    values = {**sizes, "activation_fn": "relu", "normalization_method": "none", "tl_input_template": None}
    (folder / "cfg.json").write_text(json.dumps(values))


def growth(tmp_path, make, layers):
    """Peak memory of an import above what was there before, in MB, and the size of what was read."""
    make(tmp_path / "small", 1)
    make(tmp_path / "large", layers)
    places = [str(tmp_path / name) for name in ("small", "large", "first", "second")]
    done = subprocess.run([sys.executable, "-c", IMPORT, *places], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    size = sum(path.stat().st_size for path in (tmp_path / "large").rglob("*.safetensors")) / 2**20
    return float(done.stdout), size


def test_many_layers_need_no_more_than_one(tmp_path):
    few, _ = growth(tmp_path / "few", circuit_tracer_set, 4)
    many, size = growth(tmp_path / "many", circuit_tracer_set, 32)
    assert size > 250
    assert many < few + LAYER_MB
    assert many < 4 * LAYER_MB


@pytest.mark.parametrize("make", [circuit_tracer, clt_forge, openmoss, crosslayer_coding])
def test_cross_layer_decoders_need_no_more_than_the_largest_layer(make, tmp_path):
    layers = 11
    peak, size = growth(tmp_path, make, layers)
    assert size > 300
    # The decoders of layer 0 reach all layers; on the way there is a copy of them and the file's pages.
    assert peak < 3.5 * layers * LAYER_MB
    assert peak < size / 2
