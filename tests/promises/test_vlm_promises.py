"""The names of vlm-clt-training's hooks and replacement model work on a tiny LLaVA."""

import pytest
import torch

from clt.vlm import LLaVAReplacementModel, VLMReplacementModel, get_vlm_hookpoints, register_activation_hooks
from tests.tiny_hosts import MLP_PATHS, N_LAYERS, plain_transcoder, tiny_adapter, tiny_samples


@pytest.mark.parametrize("side", ["input", "output"])
def test_hooks_store_what_the_adapter_captures_and_can_be_removed(side):
    adapter, storage = tiny_adapter("llava"), {}
    hookpoints = get_vlm_hookpoints(adapter.model)
    assert list(hookpoints) == [MLP_PATHS["llava"].format(layer) for layer in range(N_LAYERS)]
    handles = register_activation_hooks(adapter.model, hookpoints, storage, side)
    inputs = adapter.prepare(tiny_samples("llava"))
    batch = adapter.capture(inputs)
    expected = batch.inputs if side == "input" else batch.targets
    for layer, name in enumerate(hookpoints):
        assert torch.equal(storage[name][inputs.is_token], expected[layer])
    for handle in handles:
        handle.remove()
    storage.clear()
    adapter.capture(inputs)
    assert not storage


def test_both_replacement_models_run_the_transcoder_on_images():
    adapter = tiny_adapter("llava")
    for name in (VLMReplacementModel, LLaVAReplacementModel):
        replacement = name(adapter, plain_transcoder(adapter))
        assert len(replacement.generate(tiny_samples("llava"), max_new_tokens=2)) == 3
