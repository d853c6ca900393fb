"""What is exported and compared; read by both environments, so nothing but the standard library here."""

from dataclasses import dataclass, field
from typing import Any

PROMPT = [0, 40, 50, 60, 70, 45, 110]
"""Token ids; the first is the tokenizer's BOS."""
HOSTS = ("gpt2", "llama")
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
    "clean_up_tokenization_spaces": False,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A random transcoder of ours, and what it is exported as."""

    host: str
    format: str
    options: dict[str, Any] = field(default_factory=dict)
    hooks: tuple[str, str] | None = None
    """What circuit-tracer calls the MLP's input and output; None: no graph is made."""
    backend: str = "transformerlens"
    own_layer_only: bool = False


_MLP = ("mlp.hook_in", "mlp.hook_out")
CIRCUIT_TRACER = {
    "jumprelu": Case("gpt2", "circuit-tracer", {"activation_fn": "jumprelu", "normalization_method": "mean_std"}, _MLP),
    "window": Case("gpt2", "circuit-tracer", {"n_targets": 2}, _MLP),
    "tied": Case("gpt2", "circuit-tracer", {"decoder_tying": "per_source", "enable_feature_scale": True}, _MLP),
    "nnsight": Case("llama", "circuit-tracer", {"activation_fn": "jumprelu"}, _MLP, backend="nnsight"),
    "set": Case("gpt2", "circuit-tracer", {"activation_fn": "jumprelu", "n_targets": 1}, _MLP),
    "skips": Case("gpt2", "circuit-tracer", {"n_targets": 1, "skip_connection": "own"}, _MLP),
}
SAELENS = {
    "transcoder": Case("gpt2", "saelens", {"n_targets": 1}),
    "jumprelu_transcoder": Case("gpt2", "saelens", {"n_targets": 1, "activation_fn": "jumprelu"}),
    "skip_transcoder": Case("gpt2", "saelens", {"n_targets": 1, "skip_connection": "own"}),
    "jumprelu_skip_transcoder": Case(
        "gpt2", "saelens", {"n_targets": 1, "skip_connection": "own", "activation_fn": "jumprelu"}
    ),
    "encoders": Case("gpt2", "saelens", {"activation_fn": "jumprelu"}, own_layer_only=True),
}
CASES = {**CIRCUIT_TRACER, **SAELENS}
