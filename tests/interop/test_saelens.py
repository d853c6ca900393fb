"""SAELens itself opens what `clt export --format saelens` writes, and we open what it writes."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.interop.cases import SAELENS
from tests.interop.conftest import ours

pytestmark = pytest.mark.interop
sae_lens = pytest.importorskip("sae_lens")
LAYERS, WIDTH, FEATURES = 3, 8, 12


@pytest.mark.parametrize("name", SAELENS)
def test_saelens_computes_what_we_do(made, name):
    computed = load_file(made / name / "computed.safetensors")
    assert (computed["activations"] > 0).float().mean() > 0.05
    for layer, x in enumerate(computed["inputs"]):
        loaded = sae_lens.SAE.load_from_disk(made / name / "theirs" / f"layer_{layer}")
        torch.testing.assert_close(loaded.encode(x), computed["activations"][layer], rtol=1e-5, atol=1e-5)
        assert loaded.cfg.metadata.hook_name == f"blocks.{layer}.hook_resid_mid"
        assert loaded.cfg.metadata.hook_name_out == f"blocks.{layer}.hook_mlp_out"
        if SAELENS[name].own_layer_only:
            assert loaded.cfg.metadata.own_layer_only
        else:
            torch.testing.assert_close(loaded(x), computed["outputs"][layer], rtol=1e-5, atol=1e-5)
            assert loaded.cfg.architecture() == name


@pytest.mark.parametrize("architecture", [name for name in SAELENS if name.endswith("transcoder")])
def test_we_compute_what_saelens_does(architecture, tmp_path):
    x = torch.randn(LAYERS, 50, WIDTH, generator=torch.Generator().manual_seed(1))
    activations, outputs = [], []
    for layer in range(LAYERS):
        loaded = random_transcoder(architecture, layer)
        loaded.save_model(tmp_path / "theirs" / f"layer_{layer}")
        activations.append(loaded.encode(x[layer]).detach())
        outputs.append(loaded(x[layer]).detach())
    save_file({"inputs": x}, tmp_path / "inputs.safetensors")
    ours("run", tmp_path / "theirs", tmp_path / "inputs.safetensors", tmp_path / "found.safetensors")
    found = load_file(tmp_path / "found.safetensors")
    for prefix in ("", "imported_"):
        torch.testing.assert_close(found[f"{prefix}activations"], torch.stack(activations), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[f"{prefix}outputs"], torch.stack(outputs), rtol=1e-5, atol=1e-5)


def random_transcoder(architecture, layer):
    """One of SAELens' own classes with random weights."""
    kind, config = sae_lens.registry.get_sae_class(architecture)
    loaded = kind(
        config(
            d_in=WIDTH, d_sae=FEATURES, d_out=WIDTH, apply_b_dec_to_input=False,
            metadata=sae_lens.saes.sae.SAEMetadata(
                hook_name=f"blocks.{layer}.mlp.hook_in", hook_name_out=f"blocks.{layer}.mlp.hook_out"
            ),
        )
    )  # fmt: skip
    generator = torch.Generator().manual_seed(layer)
    with torch.no_grad():
        for name, parameter in loaded.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values.abs() if name == "threshold" else values)
    return loaded
