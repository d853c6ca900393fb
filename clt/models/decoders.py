"""How features become predictions: one class per way of sharing decoder matrices, behind one set of methods.

    none         W_dec[s]: [feature, target, d_model]    a matrix per (source, target); one product or gather per source
    per_source   W_dec[s]: [feature, d_model]            shared by the targets of s; one product per source
    per_target   W_dec[t]: [feature, d_model]            shared by the sources of t; one product per target
    decoder_rank W_dec[s] + U_dec[s] V_dec[s]            the matrix of s's nearest target plus low rank for the others

All but the last may put an offset and a scale before the matrix (clt/models/post_encoder.py). Everything here is in
standardised units and without biases. Tests hold each equal to its untied expansion.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from clt.config import CLTConfig
from clt.models.codes import Codes, add_windows, merge
from clt.models.post_encoder import PostEncoder, initial_offsets, initial_scales


class Decoders(ABC):
    """The decoders of all sources; the parameters belong to the transcoder, this object only looks at them."""

    def __init__(self, config: CLTConfig, parameters: dict[str, nn.ParameterList]) -> None:
        """Look at what `decoder_parameters` made."""
        self.config = config
        self._parameters = parameters
        self.W_dec = parameters["W_dec"]
        self.post = PostEncoder(config, parameters.get("feature_offset"), parameters.get("feature_scale"))

    @abstractmethod
    def matrix(self, source: int, target: int) -> Float[Tensor, "feature d_model"]:
        """What the features of `source` write to `target` per unit of what leaves the post-encoder."""

    def rows(self, source: int, target: int, features: Integer[Tensor, " kept"]) -> Float[Tensor, "kept d_model"]:
        """Some rows of `matrix`."""
        return self.matrix(source, target)[features]

    @abstractmethod
    def part(
        self, source: int, codes: Codes, features: Integer[Tensor, " kept"] | None = None
    ) -> Float[Tensor, "token _"]:
        """What one source adds to each of its targets, `[token, target * d_model]`.

        Args:
            features: which features the codes are of; None: all of the source's.
        """

    def decode(self, codes: Sequence[Codes]) -> Float[Tensor, "token layer d_model"]:
        """What all sources add to all targets."""
        return add_windows([self.part(source, code) for source, code in enumerate(codes)], self.config)

    def pair(self, source: int, target: int) -> Float[Tensor, "feature d_model"]:
        """What the features of `source` write to `target` per unit of activation."""
        scale = self.post.scale(source)
        matrix = self.matrix(source, target)
        return matrix if scale is None else matrix * scale[target - self.config.targets_of(source).start][:, None]

    def weight(self, source: int) -> Float[Tensor, "feature target d_model"]:
        """Every `pair` of one source, expanded where the family stores less."""
        pairs = [self.pair(source, target) for target in self.config.targets_of(source)]
        return (
            torch.stack(pairs, 1)
            if pairs
            else self.W_dec[0].new_zeros(self.config.num_features, 0, self.W_dec[0].shape[-1])
        )

    def pair_norms(self, source: int) -> Float[Tensor, "target feature"]:
        """Length of what each feature writes to each target per unit of activation."""
        norms = self._matrix_norms(source)
        scale = self.post.scale(source)
        return norms if scale is None else norms * scale.abs()

    def parameters_of(self, source: int) -> list[Tensor]:
        """Every parameter that the norms of a source depend on; of tied decoders all."""
        return [tensor for tensors in self._parameters.values() for tensor in tensors]

    def norm(self, source: int) -> Float[Tensor, " feature"]:
        """Length of what each feature writes to all its targets together, per unit of activation."""
        return torch.linalg.vector_norm(self.pair_norms(source), dim=0)

    def _matrix_norms(self, source: int) -> Float[Tensor, "target feature"]:
        norms = [_row_norms(self.matrix(source, target)) for target in self.config.targets_of(source)]
        return torch.stack(norms) if norms else self.W_dec[0].new_zeros(0, self.config.num_features)

    def _n_targets(self, source: int) -> int:
        return len(self.config.targets_of(source))


class UntiedDecoders(Decoders):
    """A matrix per pair; a source's lie side by side, so that a feature's whole effect is one row."""

    def matrix(self, source: int, target: int) -> Float[Tensor, "feature d_model"]:
        """A view of the stored matrices."""
        return self.W_dec[source][:, target - self.config.targets_of(source).start]

    def part(
        self, source: int, codes: Codes, features: Integer[Tensor, " kept"] | None = None
    ) -> Float[Tensor, "token _"]:
        """One product or gather for all targets."""
        weight = _choose(self.W_dec[source], features)
        if self.post.is_identity:
            return codes.decode(weight.flatten(1))
        shift, scale = self.post.offset(source, features), self.post.scale(source, features)
        return codes.decode_each(weight, shift, scale, self._n_targets(source))

    def parameters_of(self, source: int) -> list[Tensor]:
        """The source's matrices, and whatever scales them."""
        others = [tensor for name, each in self._parameters.items() if name != "W_dec" for tensor in each]
        return [self.W_dec[source], *others]

    def weight(self, source: int) -> Float[Tensor, "feature target d_model"]:
        """The stored matrices themselves, where there is no scale."""
        scale = self.post.scale(source)
        return self.W_dec[source] if scale is None else self.W_dec[source] * scale.T[:, :, None]

    def norm(self, source: int) -> Float[Tensor, " feature"]:
        """A row norm, where there is no scale."""
        if self.post.is_identity:
            return _row_norms(self.W_dec[source].flatten(1))
        return super().norm(source)

    def _matrix_norms(self, source: int) -> Float[Tensor, "target feature"]:
        return _row_norms(self.W_dec[source]).T


class PerSourceDecoders(Decoders):
    """One matrix per source, whatever the target."""

    def matrix(self, source: int, target: int) -> Float[Tensor, "feature d_model"]:
        """The source's."""
        return self.W_dec[source]

    def part(
        self, source: int, codes: Codes, features: Integer[Tensor, " kept"] | None = None
    ) -> Float[Tensor, "token _"]:
        """Decoded once and repeated, unless each target shifts the activations its own way."""
        weight = _choose(self.W_dec[source], features)
        if self.post.is_identity:
            return codes.decode(weight).repeat(1, self._n_targets(source))
        shift, scale = self.post.offset(source, features), self.post.scale(source, features)
        return codes.decode_each(weight[:, None], shift, scale, self._n_targets(source))

    def _matrix_norms(self, source: int) -> Float[Tensor, "target feature"]:
        return _row_norms(self.W_dec[source]).expand(self._n_targets(source), -1)


class PerTargetDecoders(Decoders):
    """One matrix per target, whatever the source: feature f of every layer writes the same direction."""

    def matrix(self, source: int, target: int) -> Float[Tensor, "feature d_model"]:
        """The target's."""
        return self.W_dec[target]

    def part(
        self, source: int, codes: Codes, features: Integer[Tensor, " kept"] | None = None
    ) -> Float[Tensor, "token _"]:
        """One product per target."""
        parts = [
            code.decode(_choose(self.W_dec[target], features))
            for target, code in zip(self.config.targets_of(source), self._shifted(source, codes, features))
        ]
        return torch.cat(parts, 1) if parts else self.W_dec[0].new_zeros(codes.n_tokens, 0)

    def decode(self, codes: Sequence[Codes]) -> Float[Tensor, "token layer d_model"]:
        """The sources of a target are added up first, so each target is decoded once."""
        arriving: list[list[Codes]] = [[] for _ in codes]
        for source, code in enumerate(codes):
            for target, shifted in zip(self.config.targets_of(source), self._shifted(source, code)):
                arriving[target].append(shifted)
        nothing = self.W_dec[0].new_zeros(codes[0].n_tokens, self.config.d_model)
        decoded = [merge(each).decode(weight) if each else nothing for each, weight in zip(arriving, self.W_dec)]
        return torch.stack(decoded, 1)

    def _shifted(self, source: int, codes: Codes, features: Tensor | None = None) -> list[Codes]:
        """The codes as each target sees them."""
        n_targets = self._n_targets(source)
        if self.post.is_identity:
            return [codes] * n_targets
        shift, scale = self.post.offset(source, features), self.post.scale(source, features)
        return [
            codes.shifted(None if shift is None else shift[i], None if scale is None else scale[i])
            for i in range(n_targets)
        ]


class LowRankDecoders(Decoders):
    """The matrix of the nearest target, plus for each further one a product of two thin ones.

    For dictionaries too large to store a full matrix per pair, where what a feature writes changes little over layers.
    """

    def __init__(self, config: CLTConfig, parameters: dict[str, nn.ParameterList]) -> None:
        """Look at what `decoder_parameters` made."""
        super().__init__(config, parameters)
        self.U_dec = parameters["U_dec"]
        self.V_dec = parameters["V_dec"]

    def matrix(self, source: int, target: int) -> Float[Tensor, "feature d_model"]:
        """Multiplied out."""
        further = target - self.config.targets_of(source).start - 1
        near = self.W_dec[source]
        return near if further < 0 else near + self.U_dec[source][:, further] @ self.V_dec[source][further]

    def rows(self, source: int, target: int, features: Integer[Tensor, " kept"]) -> Float[Tensor, "kept d_model"]:
        """Only these multiplied out."""
        further = target - self.config.targets_of(source).start - 1
        near = self.W_dec[source][features]
        return near if further < 0 else near + self.U_dec[source][features, further] @ self.V_dec[source][further]

    def part(
        self, source: int, codes: Codes, features: Integer[Tensor, " kept"] | None = None
    ) -> Float[Tensor, "token _"]:
        """Decoded once in full, and once into the thin middle of every further target."""
        near = codes.decode(_choose(self.W_dec[source], features))
        if self._n_targets(source) < 2:
            return near[:, : near.shape[1] * self._n_targets(source)]
        U, V = _choose(self.U_dec[source], features), self.V_dec[source]
        middle = codes.decode(U.flatten(1)).view(len(near), *U.shape[1:])
        far = near[:, None] + torch.einsum("ntr,trd->ntd", middle, V.to(middle.dtype))
        return torch.cat([near, far.flatten(1)], 1)

    def _matrix_norms(self, source: int) -> Float[Tensor, "target feature"]:
        """|W|² + 2 W·(U V) + |U V|², without multiplying out."""
        if self._n_targets(source) == 0:
            return super()._matrix_norms(source)
        W, U, V = (each[source].to(_wide(each[source])) for each in (self.W_dec, self.U_dec, self.V_dec))
        square = W.square().sum(1)
        cross = torch.einsum("ftr,trf->tf", U, V @ W.T)
        own = torch.einsum("ftr,trq,ftq->tf", U, V @ V.transpose(1, 2), U)
        far = (square + 2 * cross + own).clamp_min(torch.finfo(square.dtype).tiny)
        return torch.cat([_row_norms(self.W_dec[source])[None], far.sqrt()])


def build_decoders(config: CLTConfig, parameters: dict[str, nn.ParameterList]) -> Decoders:
    """The decoders of a configuration, over the parameters that `decoder_parameters` gave."""
    if config.decoder_rank is not None:
        return LowRankDecoders(config, parameters)
    families = {"none": UntiedDecoders, "per_source": PerSourceDecoders, "per_target": PerTargetDecoders}
    return families[config.decoder_tying](config, parameters)


def decoder_parameters(config: CLTConfig, like: Tensor) -> dict[str, list[Tensor]]:
    """The tensors a configuration's decoders need, by name; matrices are not filled yet (see initialise.py).

    Thin matrices `V_dec` and skip connections start at zero: they have a partner (`U_dec`, the input) that does not.
    """
    layers, shape = range(config.num_layers), (config.num_features, config.d_model)
    windows = [config.targets_of(source) for source in layers]
    if config.decoder_tying == "none" and config.decoder_rank is None:
        tensors = {"W_dec": [like.new_empty(shape[0], len(window), shape[1]) for window in windows]}
    else:
        tensors = {"W_dec": [like.new_empty(shape) for _ in layers]}
    if config.decoder_rank is not None:
        further = [max(len(window) - 1, 0) for window in windows]
        tensors["U_dec"] = [like.new_empty(shape[0], n, config.decoder_rank) for n in further]
        tensors["V_dec"] = [like.new_zeros(n, config.decoder_rank, shape[1]) for n in further]
    if config.enable_feature_offset:
        tensors["feature_offset"] = initial_offsets(config, like)
    if config.enable_feature_scale:
        tensors["feature_scale"] = initial_scales(config, like)
    if config.skip_connection != "none":
        width = (config.d_model, config.d_model)
        tensors["W_skip"] = [like.new_zeros(len(config.skip_targets_of(s)), *width) for s in layers]
    return tensors


def _choose(weight: Tensor, features: Tensor | None) -> Tensor:
    return weight if features is None else weight[features]


def _wide(tensor: Tensor) -> torch.dtype:
    """At least fp32: a sum of squares overflows or drowns in half precision."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _row_norms(rows: Float[Tensor, "*any out"]) -> Float[Tensor, "*any"]:
    return torch.linalg.vector_norm(rows, dim=-1, dtype=_wide(rows))
