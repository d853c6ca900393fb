"""Forward and backward of one source layer, written out by hand: three ways, equal in what they compute.

    GateSource    relu and jumprelu on whole matrices; decoded by a product, or by gathers once few features are on
    EntrySource   only the kept entries; decoder and encoder gradients by gathers
    KeptMatrix    kept entries put into a matrix, for topk and batchtopk with so large a k that products are faster

A source first adds what it writes to all targets, then (the error being known) puts its gradients where they belong,
and is then done with: no gradient waits for another source, and nothing is kept per pair of source and target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from clt.models import CrossLayerTranscoder
from clt.models.kernels import matmul
from clt.models.kernels.gate import GateGradients, GateTerms, gate, gate_backward, gate_transposed
from clt.models.kernels.sparse import ByFeature, Kept, add_decoded, encode_topk, keep_above
from clt.training import gradients


@dataclass(frozen=True)
class Work:
    """What the sources of one micro-batch share."""

    model: CrossLayerTranscoder
    inputs: Float[Tensor, "layer token d_model"]
    dtype: torch.dtype
    """Of products; sums and weights stay in the type of the parameters."""
    terms: GateTerms
    norms: Sequence[Float[Tensor, " feature"] | None]
    """Decoder norms, where something needs them."""

    def x(self, source: int) -> Float[Tensor, "token d_model"]:
        """Standardised inputs; cheap enough to be made again whenever they are needed."""
        return self.model.standardise_inputs(source, self.inputs[source]).to(self.dtype)

    def preactivation(self, source: int) -> Float[Tensor, "token feature"]:
        """h, computed anew."""
        weight, bias = self.model.W_enc[source].detach(), self.model.b_enc[source].detach()
        return matmul.affine(self.x(source), weight.to(self.dtype), bias.to(self.dtype))

    def best(self, source: int, scale: Float[Tensor, " feature"] | None, k: int) -> Kept:
        """The k entries of each token with the largest h * scale."""
        weight, bias = self.model.W_enc[source].detach(), self.model.b_enc[source].detach()
        return encode_topk(self.x(source), weight.to(self.dtype), bias.to(self.dtype), scale, k)

    def above(
        self, source: int, scale: Float[Tensor, " feature"] | None, bound: Float[Tensor, " feature"]
    ) -> tuple[Kept, Float[Tensor, " entry"]]:
        """The entries with h * scale above a bound, and their scores."""
        return keep_above(self.preactivation(source), scale, bound)

    def decoder(self, source: int) -> Float[Tensor, "feature _"]:
        """All decoders of a source side by side, `[feature, target * d_model]`."""
        return self.model.W_dec[source].detach().flatten(1)

    def columns(self, source: int) -> slice:
        """Where a source's targets lie in `[token, layer * d_model]`."""
        targets, width = self.model.config.targets_of(source), self.model.config.d_model
        return slice(targets.start * width, targets.stop * width)

    def norm(self, source: int) -> Float[Tensor, " feature"]:
        """Decoder norms of a source; zeros where nothing needs them."""
        norm = self.norms[source]
        return torch.zeros_like(self.model.b_enc[source].detach()) if norm is None else norm

    def theta(self, source: int) -> Float[Tensor, " feature"]:
        """The threshold of jumprelu, 0 for others."""
        bias = self.model.b_enc[source].detach()
        return self.model.threshold(source).detach() if self.has_threshold else torch.zeros_like(bias)

    @property
    def has_threshold(self) -> bool:
        """Whether thresholds are learned."""
        return self.model.config.activation_fn == "jumprelu"

    def scale(self, source: int, norm_gradient: Float[Tensor, " feature"]) -> Float[Tensor, " feature"] | None:
        """What a decoder row is multiplied with in its own gradient, from the gradient of its norm."""
        norm = self.norms[source]
        if norm is None or (self.terms.price == 0 and self.terms.pull == 0):
            return None
        return torch.where(norm > 0, norm_gradient / norm, torch.zeros_like(norm)).to(norm.dtype)

    def add_sums(self, source: int, sums: GateGradients) -> None:
        """Gradients of bias and threshold."""
        gradients.add(self.model.b_enc[source], sums.bias)
        if self.has_threshold:
            log_threshold = self.model.log_threshold[source]
            gradients.add(log_threshold, sums.theta * log_threshold.detach().exp())


class GateSource:
    """relu or jumprelu on the whole matrix of pre-activations."""

    def __init__(
        self, work: Work, source: int, fired: Integer[Tensor, " feature"], is_sparse: bool, recomputes: bool
    ) -> None:
        """Encode.

        Args:
            work: what all sources share.
            source: which layer.
            fired: grows by the number of tokens each feature is on.
            is_sparse: decode by gathers.
            recomputes: compute h again in backward instead of keeping it.
        """
        self._work, self._source = work, source
        h, theta = work.preactivation(source), work.theta(source)
        self._h = None if recomputes else h
        self._kept = self._a = None
        if is_sparse:
            self._kept = keep_above(h, None, theta)[0]
            fired += torch.bincount(self._kept.features, minlength=len(fired))
        else:
            self._a = gate(h, theta, fired)

    def add_decoded(self, total: Float[Tensor, "token _"]) -> None:
        """total += what the source writes."""
        out, weight = total[:, self._work.columns(self._source)], self._work.decoder(self._source)
        if self._kept is not None:
            add_decoded(out, self._kept, weight)
        elif self._a is not None:
            matmul.add_product(out, self._a, weight.to(self._work.dtype))
            self._a = None

    def backward(self, grad: Float[Tensor, "token _"]) -> GateGradients:
        """Put all gradients of the source's parameters where they belong."""
        work, source = self._work, self._source
        wide = grad[:, work.columns(source)]
        g, weight = wide.to(work.dtype).contiguous(), work.decoder(source)
        h = work.preactivation(source) if self._h is None else self._h
        theta, norm = work.theta(source), work.norm(source)
        through_a = matmul.product(g, weight.to(work.dtype).T)
        through_h, sums = gate_backward(h, through_a, theta, norm, work.terms)
        del through_a
        scale, parameter = work.scale(source, sums.norm), work.model.W_dec[source]
        if self._kept is not None:
            out, counts = gradients.place(parameter)
            ByFeature(self._kept).decoder_gradients(wide, weight, scale, out.flatten(1), counts, wants_dots=False)
        else:
            gradients.add_matrices(parameter, gate_transposed(h, theta), g)
            if scale is not None and parameter.grad is not None:
                parameter.grad.flatten(1).addcmul_(scale[:, None], weight)
        gradients.add_matrices(work.model.W_enc[source], through_h, work.x(source))
        work.add_sums(source, sums)
        return sums


class EntrySource:
    """Only entries: what is kept and, for jumprelu, what lies within reach of its straight-through window."""

    def __init__(self, work: Work, source: int, kept: Kept, fired: Integer[Tensor, " feature"], sums: Tensor | None):
        """Take in the entries, whose values are h.

        Args:
            work: what all sources share.
            source: which layer.
            kept: entries; all others have no gradient, or the same one for all tokens (`pull`).
            fired: grows by the number of tokens each feature is on.
            sums: sum over all tokens of relu(theta - h) (or relu(-h)), by feature; None: no pull.
        """
        self._work, self._source, self._h, self._gaps = work, source, kept.values, sums
        theta = work.theta(source)[kept.features].to(kept.values.dtype)
        self._on = ~(kept.values <= theta)
        self._theta = theta
        self._kept = kept.with_values(torch.where(self._on, kept.values, kept.values.new_zeros(())))
        fired += torch.bincount(kept.features[self._on], minlength=len(fired))

    @property
    def n_entries(self) -> int:
        """How many there are."""
        return len(self._h)

    def add_decoded(self, total: Float[Tensor, "token _"]) -> None:
        """total += what the source writes."""
        out = total[:, self._work.columns(self._source)]
        add_decoded(out, self._kept, self._work.decoder(self._source))

    def backward(self, grad: Float[Tensor, "token _"]) -> GateGradients:
        """Put all gradients of the source's parameters where they belong."""
        work, source, terms = self._work, self._source, self._work.terms
        by = ByFeature(self._kept)
        if terms.are_absent:
            return self._backward_of_values(by, grad)
        norm = work.norm(source)
        values, own_norm = self._kept.values, norm[self._kept.features].to(self._kept.values.dtype)
        tanh = (terms.steepness * own_norm * values).tanh() if terms.price else torch.zeros_like(values)
        slope = terms.price * terms.steepness * (1 - tanh.square())
        gaps = torch.zeros_like(norm) if self._gaps is None else self._gaps
        by_norm = 0.0 if terms.negative else terms.pull
        through_norm = by.sum(slope * values).to(norm.dtype) + by_norm * gaps
        through_a = self._decoder_gradients(by, grad, work.scale(source, through_norm)) + slope * own_norm
        sums = self._through_h(by, through_a, through_norm, gaps, by.sum(tanh))
        work.add_sums(source, sums)
        return sums

    def _decoder_gradients(self, by: ByFeature, grad: Tensor, scale: Tensor | None) -> Float[Tensor, " entry"]:
        """Put the decoder's where it belongs, and give that of the values."""
        work, parameter = self._work, self._work.model.W_dec[self._source]
        out, counts = gradients.place(parameter)
        wide = grad[:, work.columns(self._source)]
        dots = by.decoder_gradients(wide, work.decoder(self._source), scale, out.flatten(1), counts)
        assert dots is not None
        return dots.to(self._h.dtype)

    def _encoder_gradients(self, by: ByFeature, through_h: Float[Tensor, " entry"]) -> Float[Tensor, " feature"]:
        """Put the encoder's where it belongs, and give that of the bias."""
        parameter = self._work.model.W_enc[self._source]
        out, counts = gradients.place(parameter)
        by.rows(through_h, self._work.x(self._source).to(parameter.dtype), out, counts)
        return by.sum(through_h).to(parameter.dtype)

    def _backward_of_values(self, by: ByFeature, grad: Tensor) -> GateGradients:
        """Where nothing but the reconstruction has a gradient."""
        bias = self._encoder_gradients(by, self._decoder_gradients(by, grad, None) * self._on)
        none = torch.zeros_like(bias)
        sums = GateGradients(bias, none, none, none, none)
        self._work.add_sums(self._source, sums)
        return sums

    def _through_h(
        self, by: ByFeature, through_a: Tensor, through_norm: Tensor, gaps: Tensor, price: Tensor
    ) -> GateGradients:
        """Gradients of encoder and threshold.

        Every token on which a feature is below its threshold pulls with the same weight. So its sum over those tokens
        is the sum over all tokens less that over the entries above: no matrix is needed for it.
        """
        work, terms, h = self._work, self._work.terms, self._h
        step = torch.zeros_like(h)
        if terms.bandwidth > 0:
            near = (h - self._theta).abs() < terms.bandwidth / 2
            step = through_a * near * (h if terms.height_is_h else self._theta) / terms.bandwidth
        norm = work.norm(self._source)
        pull = terms.pull * (torch.ones_like(norm) if terms.negative else norm)
        above = ~(h < 0) if terms.negative else ~(h < self._theta)
        through_h = through_a * self._on + above * pull[self._kept.features].to(h.dtype)
        if terms.reaches_h:
            through_h = through_h + step
        n_below = len(self._kept.offsets) - 1 - by.sum(above.to(h.dtype)).to(norm.dtype)
        through_theta = -by.sum(step).to(norm.dtype) + (0.0 if terms.negative else 1.0) * pull * n_below
        n_tokens = len(self._kept.offsets) - 1
        bias = self._encoder_gradients(by, through_h) - n_tokens * pull
        encoder = work.model.W_enc[self._source]
        if terms.pull and encoder.grad is not None:
            encoder.grad.addr_(pull, work.x(self._source).to(encoder.dtype).sum(0), alpha=-1)
        return GateGradients(bias, through_theta, through_norm, price, gaps)


class KeptMatrix:
    """Kept entries of topk or batchtopk as a matrix."""

    def __init__(self, work: Work, source: int, kept: Kept, fired: Integer[Tensor, " feature"]) -> None:
        self._work, self._source = work, source
        self._tokens, self._kept = kept.tokens, kept.with_values(kept.values.relu())
        fired += torch.bincount(kept.features[~(kept.values <= 0)], minlength=len(fired))

    def _matrix(self, values: Tensor) -> Float[Tensor, "token feature"]:
        kept = self._kept
        matrix = values.new_zeros(len(kept.offsets) - 1, kept.n_features, dtype=self._work.dtype)
        return matrix.index_put_((self._tokens, kept.features), values.to(matrix.dtype))

    def add_decoded(self, total: Float[Tensor, "token _"]) -> None:
        """total += what the source writes."""
        weight = self._work.decoder(self._source).to(self._work.dtype)
        matmul.add_product(total[:, self._work.columns(self._source)], self._matrix(self._kept.values), weight)

    def backward(self, grad: Float[Tensor, "token _"]) -> GateGradients:
        """Put all gradients of the source's parameters where they belong."""
        work, source = self._work, self._source
        g, weight = grad[:, work.columns(source)].to(work.dtype).contiguous(), work.decoder(source)
        a, zeros = self._matrix(self._kept.values), torch.zeros_like(work.norm(source))
        dots = matmul.product(g, weight.to(work.dtype).T)[self._tokens, self._kept.features]
        # What is kept but not positive gets no gradient, as relu has it: theta = 0.
        through_a = self._matrix(dots)
        through_h, sums = gate_backward(a, through_a, zeros, work.norm(source), work.terms)
        parameter = work.model.W_dec[source]
        gradients.add_matrices(parameter, a.T, g)
        scale = work.scale(source, sums.norm)
        if scale is not None and parameter.grad is not None:
            parameter.grad.flatten(1).addcmul_(scale[:, None], weight)
        gradients.add_matrices(work.model.W_enc[source], through_h, work.x(source))
        work.add_sums(source, sums)
        return sums


Source = GateSource | EntrySource | KeptMatrix
