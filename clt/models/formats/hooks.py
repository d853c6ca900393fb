"""What the places that a transcoder reads and writes are called elsewhere.

Ours are module paths with {} for the layer (`model.layers.{}.mlp`). circuit-tracer and SAELens use TransformerLens'
names (`hook_resid_mid`, `mlp.hook_in`, ...), which say the place in a block, not the module.
"""

from __future__ import annotations

from dataclasses import dataclass

from clt.errors import ConfigError

_NORMS = ("ln_2", "ln2", "post_attention_layernorm", "pre_feedforward_layernorm", "post_attention_norm")
_MLPS = ("mlp", "feed_forward", "block_sparse_moe", "ffn")


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """Names as the user or the transcoder's configuration gives them."""

    input: str | None = None
    """What is read: a module path with {} or TransformerLens' name."""
    output: str | None = None
    """What is written."""
    model_name: str | None = None
    """The host."""

    def circuit_tracer(self) -> dict[str, str]:
        """`feature_input_hook` and `feature_output_hook`.

        Raises:
            ConfigError: a path does not tell which place in a block it is.
        """
        return {
            "feature_input_hook": _place(self.input, "input"),
            "feature_output_hook": _place(self.output, "output"),
        }

    def saelens(self, layer: int) -> dict[str, str]:
        """`hook_name` and `hook_name_out` of one layer, with the same names."""
        names = self.circuit_tracer()
        return {
            "hook_name": f"blocks.{layer}.{names['feature_input_hook']}",
            "hook_name_out": f"blocks.{layer}.{names['feature_output_hook']}",
        }

    def module(self, layer: int) -> str:
        """The module of one layer, for folders that are called after it."""
        path = self.output or self.input
        if path is None or "{}" not in path:
            return f"layers.{layer}.mlp"
        return path.removesuffix(".output").removesuffix(".input").format(layer)


def _place(path: str | None, side: str) -> str:
    """TransformerLens' name of a place in a block."""
    if path is not None and "hook_" in path:
        return path.removeprefix("blocks.{}.")
    module = (path or "").removesuffix(f".{side}").rsplit(".", 1)[-1]
    if side == "input" and module in _NORMS:
        return "hook_resid_mid"
    if module in _MLPS:
        return "mlp.hook_in" if side == "input" else "mlp.hook_out"
    raise ConfigError(
        f"Where in a block {path!r} is, is unknown, and graph tools need it. Give --{side}-hook with TransformerLens' "
        + ("name: hook_resid_mid (before the MLP's norm), ln2.hook_normalized or mlp.hook_in." if side == "input"
           else "name: hook_mlp_out (what is added to the residual stream) or mlp.hook_out.")
    )  # fmt: skip
