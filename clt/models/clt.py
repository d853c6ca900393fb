"""The cross-layer transcoder: sparse features that read one layer and write to the MLP outputs of later ones.

    h_s = W_enc_s x_s + b_enc_s          a_s = activation(h_s)
    y_t = b_dec_t + sum over sources s of W_dec_{s->t} a_s     for first_target <= t - s < first_target + n_targets

(Ameisen et al. 2025, "Circuit Tracing", methods.) The decoders of a source lie side by side, `[feature, target,
d_model]`: a feature's whole effect is one row, so decoding is one product (or one gather) per source, the decoder
norm is a row norm, and the gradient of a source is complete as soon as its own backward has run. Decoders that share
matrices are in clt/models/decoders.py; a skip connection adds W_skip x_s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from clt.config import CLTConfig
from clt.errors import ConfigError
from clt.models.activations import keep_above
from clt.models.base import BaseTranscoder
from clt.models.choice import activate, topk
from clt.models.codes import Codes, DenseCodes, SparseCodes, add_windows
from clt.models.decoders import build_decoders, decoder_parameters
from clt.models.initialise import initialise
from clt.models.peers import Peers
from clt.models.standardise import ActivationStatistics, fit_scaling
from clt.types import choose_device

# Share of the old value in the running mean of batchtopk's threshold.
_THRESHOLD_MEMORY = 0.99
# Gathering a decoder row costs about as much as this many rows of a matrix product (measured on CPU, 1 to 512 tokens).
_GATHER_COST = 32


@dataclass(frozen=True)
class TrainingForward:
    """What one training step computed, in standardised units."""

    reconstruction: Float[Tensor, "token layer d_model"]
    codes: Sequence[Codes]
    preactivations: Sequence[Float[Tensor, "token feature"]]


class CrossLayerTranscoder(BaseTranscoder):
    """Encoders of every layer and decoders of every (source, target) pair in the window."""

    W_dec: nn.ParameterList
    U_dec: nn.ParameterList
    V_dec: nn.ParameterList
    feature_offset: nn.ParameterList
    feature_scale: nn.ParameterList
    W_skip: nn.ParameterList

    def __init__(
        self,
        config: CLTConfig,
        process_group: None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
        *,
        peers: Peers | None = None,
    ) -> None:
        """Build with random weights (see `initialise`).

        Args:
            config: of the features held here.
            process_group: accepted for crosslayer-coding's sake.
            device: torch device.
            seed: of the weights.
            peers: who holds the rest of the dictionary; None: there is no rest.
        """
        super().__init__()
        if process_group is not None:
            raise ConfigError("CrossLayerTranscoder knows no ranks: pass process_group=None.")
        self.config = config
        self.peers = peers or Peers(config)
        layers, features, width = config.num_layers, config.num_features, config.d_model
        like = {"device": device, "dtype": getattr(torch, config.clt_dtype or "float32")}
        wide = {"device": device, "dtype": torch.promote_types(like["dtype"], torch.float32)}
        self.W_enc = nn.ParameterList(torch.empty(features, width, **like) for _ in range(layers))
        self.b_enc = nn.ParameterList(torch.zeros(features, **like) for _ in range(layers))
        tensors_of = decoder_parameters(config, torch.empty(0, **like))
        lists = {name: nn.ParameterList(each) for name, each in tensors_of.items()}
        for name, tensors in lists.items():
            self.add_module(name, tensors)
        self.decoders = build_decoders(config, lists)
        self._norms: dict[int, tuple[Any, Tensor]] = {}
        self.b_dec = nn.Parameter(torch.zeros(layers, width, **like))
        if config.activation_fn == "jumprelu":
            start = torch.full((features,), config.jumprelu_threshold, **wide).log()
            self.log_threshold = nn.ParameterList(start.clone() for _ in range(layers))
        # Scaling and running values are at least fp32 whatever the weights are in.
        self.input_shift: Tensor
        self.input_scale: Tensor
        self.target_shift: Tensor
        self.target_scale: Tensor
        self.target_variance: Tensor
        self.running_threshold: Tensor
        for side in ("input", "target"):
            self.register_buffer(f"{side}_shift", torch.zeros(layers, width, **wide))
            self.register_buffer(f"{side}_scale", torch.ones(layers, width, **wide))
        self.register_buffer("target_variance", torch.ones(layers, **wide))
        self.register_buffer("running_threshold", torch.zeros(layers, **wide))
        self.last_cut: Tensor | None = None  # of the latest batch; says where to look in the next, and is not saved
        self.initialise(seed)

    # --- set-up -----------------------------------------------------------------------------------------------

    def initialise(self, seed: int) -> None:
        """Fill encoders and decoders with the random values of a seed."""
        initialise(self, seed)

    def fit_standardisation(self, statistics: ActivationStatistics) -> None:
        """Take scale (and, for mean_std, shift) from the training data; decoder biases start at the targets' mean."""
        method = self.config.normalization_method
        with torch.no_grad():
            for side, mean, std in (
                ("input", statistics.input_mean, statistics.input_std),
                ("target", statistics.target_mean, statistics.target_std),
            ):
                shift, scale = fit_scaling(mean, std, method)
                getattr(self, f"{side}_shift").copy_(shift)
                getattr(self, f"{side}_scale").copy_(scale)
            self.target_variance.copy_(
                (statistics.target_std.to(self.target_scale) * self.target_scale).square().sum(1)
            )
            mean = statistics.target_mean.to(self.target_shift)
            self.b_dec.copy_((mean - self.target_shift) * self.target_scale)

    def fit_encoder_bias(self, inputs: Float[Tensor, "layer token d_model"], firing_rate: float) -> None:
        """Set each encoder bias so that its feature would fire on `firing_rate` of these tokens.

        Features that start silent get no gradient and never wake up; ones that start on everywhere crowd out the
        others. Source: Anthropic Circuits Updates, January 2025 (initialisation).
        """
        with torch.no_grad():
            for layer in range(self.config.num_layers):
                x = self.standardise_inputs(layer, inputs[layer]).to(self.W_enc[layer].dtype)
                h = (x @ self.W_enc[layer].T).to(self.input_scale.dtype)
                threshold = torch.quantile(h, 1 - firing_rate, dim=0)
                self.b_enc[layer].copy_(self.threshold(layer) - threshold)

    # --- pieces -----------------------------------------------------------------------------------------------

    def standardise_inputs(self, layer: int, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """From the host's units to the transcoder's."""
        x = x.to(self.input_scale.dtype)
        if self.config.input_norm == "layer":
            x = layer_norm(x, x.shape[-1:])
        return (x - self.input_shift[layer]) * self.input_scale[layer]

    def standardise_targets(self, y: Float[Tensor, "token layer d_model"]) -> Float[Tensor, "token layer d_model"]:
        """From the host's units to the transcoder's."""
        return (y.to(self.target_scale.dtype) - self.target_shift) * self.target_scale

    def preactivation(self, layer: int, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token feature"]:
        """h of one layer, from standardised inputs."""
        return torch.addmm(self.b_enc[layer], x.to(self.W_enc[layer].dtype), self.W_enc[layer].T)

    def threshold(self, layer: int) -> Float[Tensor, " feature"]:
        """What h must exceed for a feature to fire at inference; 0 for relu and topk."""
        if self.config.activation_fn == "jumprelu":
            return self.log_threshold[layer].exp()
        if self.config.activation_fn == "batchtopk":
            running = self.running_threshold[layer]
            if self.config.ranking == "norm":
                return running / self._known_norm(layer).clamp_min(1e-12)
            return running.expand(self.config.num_features)
        return torch.zeros_like(self.b_enc[layer])

    def decoder_norm(self, layer: int) -> Float[Tensor, " feature"]:
        """Length of each feature's decoder over all its targets, in standardised units."""
        return self.decoders.norm(layer)

    def _known_norm(self, layer: int) -> Float[Tensor, " feature"]:
        """The decoder norm, computed once for weights that do not change: per token it would cost a full read of them.

        A tensor counts its changes in place, and has another address when it is replaced.
        """
        state = tuple((p.data_ptr(), p._version) for p in self.decoders.parameters_of(layer))
        if self._norms.get(layer, (None,))[0] != state:
            self._norms[layer] = (state, self.decoder_norm(layer).detach())
        return self._norms[layer][1]

    def decoder_norms(self, layer: int) -> Float[Tensor, "target feature"]:
        """Length of each feature's decoder for each of its targets, in standardised units."""
        return self.decoders.pair_norms(layer)

    def scores(self, layer: int, h: Float[Tensor, "token feature"]) -> Float[Tensor, "token feature"]:
        """What topk and batchtopk rank by; carries no gradient."""
        h = h.detach()
        return h * self.decoder_norm(layer).detach().to(h.dtype) if self.config.ranking == "norm" else h

    # --- training ---------------------------------------------------------------------------------------------

    def forward_training(self, inputs: Float[Tensor, "layer token d_model"], k_factor: float = 1.0) -> TrainingForward:
        """Encode with the training-time activation and decode, in standardised units.

        Args:
            inputs: in the host's units.
            k_factor: how many times the configured k is kept (k-annealing).
        """
        x = [self.standardise_inputs(layer, each) for layer, each in enumerate(inputs)]
        h = [self.preactivation(layer, each) for layer, each in enumerate(x)]
        codes = activate(self, h, k_factor)
        reconstruction = self.reconstruct(codes)
        if self.config.skip_connection != "none":
            reconstruction = reconstruction + self._skip_all(x)
        return TrainingForward(reconstruction, codes, h)

    def reconstruct(self, codes: Sequence[Codes]) -> Float[Tensor, "token layer d_model"]:
        """Biases plus every source's features' contribution to every target, in standardised units."""
        return self.b_dec + self.peers.sum(self.decoders.decode(codes))

    def _skip_all(self, x: Sequence[Float[Tensor, "token d_model"]]) -> Float[Tensor, "token layer d_model"]:
        """What all skip connections add, in standardised units, as the inputs are."""
        windows = [self.config.skip_targets_of(source) for source in range(self.config.num_layers)]
        parts = [self._skip(source, each).transpose(0, 1).flatten(1) for source, each in enumerate(x)]
        return add_windows(parts, self.config, windows)

    def _skip(self, source: int, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "target token d_model"]:
        return x.to(self.W_skip[source].dtype) @ self.W_skip[source]

    def add_windows(self, parts: Sequence[Float[Tensor, "token _"]]) -> Float[Tensor, "token layer d_model"]:
        """Place each source's output, `[token, target * d_model]`, at the layers it writes to, and sum."""
        return add_windows(parts, self.config)

    def remember_threshold(self, cut: Float[Tensor, " layer"]) -> None:
        """Running mean of the threshold, used at inference instead of the batch."""
        self.last_cut = cut.detach()
        first = self.running_threshold == 0
        mixed = torch.lerp(cut.to(self.running_threshold), self.running_threshold, _THRESHOLD_MEMORY)
        self.running_threshold.copy_(torch.where(first, cut.to(mixed), mixed))

    def predicts(self, target: int) -> bool:
        """Not where no source writes and no bias was learned: that MLP is better left alone."""
        if not super().predicts(target):
            return False
        return bool(self.config.sources_of(target)) or bool((self.bias(target) != 0).any())

    # --- inference, in the host's units -----------------------------------------------------------------------

    def encode_layer(self, layer: int, inputs: Float[Tensor, "token d_model"]) -> Float[Tensor, "token feature"]:
        """Activations of one layer at inference; batchtopk uses its running threshold, never the batch.

        Raises:
            ConfigError: topk over all layers together, whose choice needs the layers that come later.
        """
        if self.config.activation_fn == "topk" and self.config.topk_mode == "global":
            raise ConfigError(
                "topk_mode = 'global' chooses among all layers of a token at once, so one layer alone cannot be "
                "encoded. Use topk_mode = 'per_layer' or batchtopk, or encode all layers together."
            )
        h = self.preactivation(layer, self.standardise_inputs(layer, inputs))
        if self.config.activation_fn == "topk":
            scores = h.detach() * self._known_norm(layer).to(h.dtype) if self.config.ranking == "norm" else h.detach()
            return self.peers.best([h], [scores], self.peers.whole.topk_count)[0].dense()
        return keep_above(h, h > self.threshold(layer).to(h.dtype))

    def encode(self, inputs: Float[Tensor, "layer token d_model"]) -> Float[Tensor, "layer token feature"]:
        """Activations of all layers at inference."""
        layers = range(self.config.num_layers)
        if self.config.activation_fn == "topk" and self.config.topk_mode == "global":
            h = [self.preactivation(layer, self.standardise_inputs(layer, inputs[layer])) for layer in layers]
            return torch.stack([code.dense() for code in topk(self, h, 1.0)])
        return torch.stack([self.encode_layer(layer, inputs[layer]) for layer in layers])

    def contributions(
        self, source: int, features: Float[Tensor, "token feature"]
    ) -> Float[Tensor, "target token d_model"]:
        """What one layer's features add to each MLP output of `config.targets_of(source)`, in the host's units."""
        targets = self.config.targets_of(source)
        flat = self.decoders.part(source, _compact(features.to(self.b_dec.dtype)))
        standard = flat.reshape(len(features), len(targets), self.config.d_model)
        scaled = standard / self.target_scale[targets.start : targets.stop].to(flat.dtype)
        return scaled.transpose(0, 1)

    @property
    def writes_linearly(self) -> bool:
        """Unless post-encoders shift the activations."""
        return self.decoders.post.is_identity

    def skip(self, source: int, inputs: Float[Tensor, "token d_model"]) -> Float[Tensor, "target token d_model"]:
        """What one layer's input adds to each MLP output of `config.skip_targets_of(source)`, in the host's units."""
        if self.config.skip_connection == "none":
            return super().skip(source, inputs)
        targets = self.config.skip_targets_of(source)
        standard = self._skip(source, self.standardise_inputs(source, inputs))
        return standard / self.target_scale[targets.start : targets.stop, None].to(standard.dtype)

    def bias(self, target: int) -> Float[Tensor, " d_model"]:
        """The decoder bias of one MLP output, in the host's units."""
        return self.b_dec[target] / self.target_scale[target] + self.target_shift[target]

    def decode(
        self,
        features: Float[Tensor, "layer token feature"],
        inputs: Float[Tensor, "layer token d_model"] | None = None,
    ) -> Float[Tensor, "layer token d_model"]:
        """All MLP outputs, in the host's units.

        Raises:
            ConfigError: there is a skip connection, but no inputs to feed it.
        """
        standard = self.reconstruct([DenseCodes(each.to(self.b_dec.dtype)) for each in features])
        if self.config.skip_connection != "none":
            if inputs is None:
                raise ConfigError(
                    f"skip_connection = {self.config.skip_connection!r}: the MLP outputs depend on the inputs too. "
                    "Call decode(features, inputs)."
                )
            x = [self.standardise_inputs(layer, each) for layer, each in enumerate(inputs)]
            standard = standard + self._skip_all(x)
        return (standard / self.target_scale + self.target_shift).transpose(0, 1)

    def decoder(self, source: int, target: int) -> Float[Tensor, "feature d_model"]:
        """W_dec of one (source, target) pair, in the host's units; row f is what feature f writes when it is 1.

        Where features have an offset, writing is not proportional: see `decoders.post.offset`.
        """
        targets = self.config.targets_of(source)
        if target not in targets:
            raise ValueError(f"Layer {source} writes to layers {list(targets)}, not to {target}.")
        return self.decoders.pair(source, target) / self.target_scale[target]

    @torch.no_grad()
    def untied(self) -> CrossLayerTranscoder:
        """The same function with one decoder per (source, target), whatever was shared."""
        from clt.models.fold import untie

        return untie(self)

    @torch.no_grad()
    def folded(self) -> CrossLayerTranscoder:
        """The same function with the standardisation multiplied into the weights (normalization_method = none)."""
        from clt.models.fold import fold

        return fold(self)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `cfg.json` and `clt.safetensors`."""
        from clt.models.checkpoint import save_transcoder

        save_transcoder(self, Path(folder))

    @classmethod
    def from_pretrained(
        cls, path_or_repo: str | Path, device: torch.device | str | None = None, *, revision: str | None = None
    ) -> CrossLayerTranscoder:
        """Read what `save_pretrained` wrote, or a transcoder of another project (clt/models/formats).

        Args:
            path_or_repo: a folder, or OWNER/NAME on the Hub.
            device: torch device; None: a GPU if there is one, as for hosts.
            revision: commit, branch or tag on the Hub; None: main.

        Raises:
            CheckpointError: a file is missing, cut off, or does not fit its configuration.
            ConfigError: another project's transcoder uses an option that has no counterpart here.
        """
        from clt.models.checkpoint import load_transcoder
        from clt.models.hub import local_folder

        return load_transcoder(cls, local_folder(path_or_repo, revision), choose_device(device))

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload with a generated card; returns the address. To keep figures beside it, use `clt push` on a run folder.

        Raises:
            CheckpointError: the Hub refuses or cannot be reached.
        """
        from tempfile import TemporaryDirectory

        from clt.models.hub import push_folder

        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_folder(Path(folder), repo_id, private=private, token=token)


def _compact(features: Float[Tensor, "token feature"]) -> Codes:
    """Only what is on, where that is little; dense if a gradient must reach the features that are off."""
    if features.requires_grad or features.numel() < _GATHER_COST**2:
        return DenseCodes(features)
    is_on = features != 0
    few = int(is_on.sum()) * _GATHER_COST < is_on.numel()
    return SparseCodes.from_mask(features, is_on) if few else DenseCodes(features)
