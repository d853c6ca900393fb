"""The phase guide's `LLaVAReplacementModel.from_pretrained(...)` on files as vlm-clt-training writes them."""

import json

import pytest
import torch

import clt.__main__ as command_line
from clt.config import CLTConfig
from clt.errors import CheckpointError, HostModelError
from clt.models import CrossLayerTranscoder
from clt.replacement import Intervention
from clt.training.layer_transcoder import LayerTranscoder
from clt.types import Sample
from clt.vlm import LLaVAReplacementModel, VLMReplacementModel
from tests.tiny_hosts import N_LAYERS, WIDTH, llava_model, llava_processor, tiny_adapter, tiny_image, tiny_samples


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    llava_model().save_pretrained(folder)
    llava_processor().save_pretrained(folder)
    return folder


def write_layers(folder, n_targets=(2, 1), features=20, width=WIDTH):
    torch.manual_seed(0)
    for layer, n in enumerate(n_targets):
        model = LayerTranscoder(width, features, n)
        saved = {"layer": layer, "hidden_dim": width, "feature_dim": features, "state_dict": model.state_dict()}
        torch.save(saved, folder / f"transcoder_L{layer}.pt")
    return folder


def test_the_guides_lines_open_host_and_transcoders_and_capture(host, tmp_path):
    replacement_model = LLaVAReplacementModel.from_pretrained(
        model_name=str(host), transcoder_dir=str(write_layers(tmp_path)), capture_activations=True
    )
    assert replacement_model.layers == (1, 2), "nothing is written to layer 0"

    def intervention_hook(layer_idx, features):
        if layer_idx == 1:
            features[:, :, 3] *= 2.0
        return features

    samples = tiny_samples("llava")
    (plain, *_), (steered, *_) = (
        replacement_model.generate(samples, max_new_tokens=4, temperature=0.7, top_p=0.9, interventions=act)
        for act in (None, intervention_hook)
    )
    assert isinstance(plain, str)
    assert isinstance(steered, str)
    assert len(replacement_model.captured) == 6
    first = replacement_model.captured[0]
    assert first.dense(0).shape == (first.n_positions, 20)
    assert (first.dense(1) != 0).any()
    assert not (first.layer == 2).any(), "no transcoder reads the last layer"


def test_the_seeds_sources_are_summed_per_target(host, tmp_path):
    stack = VLMReplacementModel.from_pretrained(tiny_adapter("llava"), write_layers(tmp_path)).transcoder
    layers = [torch.load(tmp_path / f"transcoder_L{i}.pt", weights_only=True)["state_dict"] for i in (0, 1)]
    models = []
    for state, n in zip(layers, (2, 1)):
        models.append(LayerTranscoder(WIDTH, 20, n))
        models[-1].load_state_dict(state)
    x = torch.randn(N_LAYERS, 5, WIDTH)
    with torch.no_grad():
        first, second = (model.decode(model.encode(each)) for model, each in zip(models, x))
        expected = torch.stack([torch.zeros(5, WIDTH), first[:, 0], first[:, 1] + second[:, 0]])
        torch.testing.assert_close(stack(x), expected)
        torch.testing.assert_close(stack.decode(stack.encode(x)), expected)


def test_folders_that_do_not_fit_are_refused_with_what_is_missing(host, tmp_path):
    write_layers(tmp_path)
    with pytest.raises(HostModelError, match="d_model = 16, the transcoder 8"):
        VLMReplacementModel.from_pretrained(tiny_adapter("llava"), write_layers(_folder(tmp_path, "narrow"), width=8))
    (tmp_path / "transcoder_L1.pt").unlink()
    with pytest.raises(CheckpointError, match=r"layers \[0\]; a host of 3 layers needs .* transcoder_L1.pt is missing"):
        VLMReplacementModel.from_pretrained(host, tmp_path)
    with pytest.raises(CheckpointError, match=r"needs those of 0 to 1: \[3, 4\] are beyond it"):
        VLMReplacementModel.from_pretrained(host, write_layers(_folder(tmp_path, "long"), (1, 1, 1, 1, 1)))
    with pytest.raises(CheckpointError, match="nowhere is no transcoder"):
        VLMReplacementModel.from_pretrained(host, tmp_path / "nowhere")
    (_folder(tmp_path, "cut") / "transcoder_L0.pt").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="missing"):
        VLMReplacementModel.from_pretrained(host, tmp_path / "cut")


def _folder(parent, name):
    folder = parent / name
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    config = CLTConfig(
        num_features=20,
        num_layers=N_LAYERS,
        d_model=WIDTH,
        activation_fn="relu",
        mlp_input_template="model.language_model.layers.{}.mlp.input",
        mlp_output_template="model.language_model.layers.{}.mlp.output",
    )
    folder = tmp_path_factory.mktemp("clt")
    CrossLayerTranscoder(config).save_pretrained(folder)
    return folder


def test_clt_steer_shows_both_texts_and_the_tokens_that_changed(host, saved, tmp_path, capsys):
    tiny_image(0).save(tmp_path / "picture.png")
    common = ["steer", "--model", str(host), "--clt", str(saved), "--prompt", "U: what? A:"]
    common += ["--image", str(tmp_path / "picture.png"), "--max-new-tokens", "6"]
    command_line.main([*common, "--feature", "1:3", "--scale", "2", "--json"])
    result = json.loads(capsys.readouterr().out)
    replacement = VLMReplacementModel.from_pretrained(host, saved)
    sample = Sample(id="prompt", prompt="<image>\nU: what? A:", images=(tmp_path / "picture.png",))
    assert result["prompt"] == sample.prompt
    assert result["before"] == replacement.adapter.generate([sample], max_new_tokens=6)[0]
    assert {row["token"] for row in result["next_tokens"]}
    assert result["features"][0]["prompt_positions"] == replacement.adapter.prepare([sample]).input_ids.shape[1]
    command_line.main([*common, "--feature", "1:3x40", "2:5=30", "--on", "replacement"])
    shown = capsys.readouterr().out
    acts = [Intervention(1, 3, "scale", 40.0), Intervention(2, 5, "set", 30.0)]
    for when, text in (
        ("before", replacement.generate([sample], max_new_tokens=6)),
        ("after", replacement.generate([sample], max_new_tokens=6, interventions=acts)),
    ):
        assert f"{when} | {text[0].strip()}"[:12] in shown
    assert "1:3 scale 40 at all: on at" in shown


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--feature", "7:0", "--ablate"], "there are 3 layers, 0 to 2"),
        (["--feature", "1:20", "--ablate"], "layer 1 has 20 features, 0 to 19"),
        (["--feature", "1-2", "--ablate"], "write LAYER:FEATURE"),
        (["--feature", "1:2"], "say what to do with it"),
        (["--feature", "1:2xx"], "'x' is no number"),
        (["--feature", "1:2", "--ablate", "--positions", "answer"], "positions = 'answer' is none of"),
        (["--feature", "1:2", "--ablate", "--positions", "999"], "has no position 999"),
        (["--feature", "1:2", "--add", "1", "--unit", "std"], "in standard deviations, but those of the features"),
        (["--feature", "1:2", "--ablate", "--image", "nowhere.png"], "its image nowhere.png does not exist"),
        (["--feature", "1:2", "--ablate", "--positions", "image"], "no sample has image positions"),
        (["--feature", "1:2", "--ablate", "--form", "chat"], "no chat template"),
    ],
)
def test_clt_steer_says_what_is_wrong(host, saved, capsys, flags, why):
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["steer", "--model", str(host), "--clt", str(saved), "--prompt", "what?", *flags])
    assert stopped.value.code == 2
    assert why in " ".join(capsys.readouterr().err.split())


def test_a_host_hooked_elsewhere_than_the_transcoder_was_trained_is_refused(host, tmp_path, saved, capsys):
    config = CLTConfig.from_json(saved / "cfg.json").replace(mlp_input_template="transformer.h.{}.mlp")
    CrossLayerTranscoder(config).save_pretrained(tmp_path)
    with pytest.raises(HostModelError, match=r"cannot be opened for this transcoder, .* at transformer.h.{}.mlp and"):
        VLMReplacementModel.from_pretrained(host, tmp_path)
