"""What a replacement, an evaluation or an attribution may ask of any transcoder."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn

from clt.config import CLTConfig


class BaseTranscoder(nn.Module, ABC):
    """Reads the residual stream at every layer and predicts MLP outputs; all values in the host's own units."""

    config: CLTConfig

    def __repr__(self) -> str:
        config, weights = self.config, sum(each.numel() for each in self.parameters())
        is_per_layer = (config.first_target, config.span) == (0, 1)
        last = config.first_target + config.span - 1
        window = "per layer" if is_per_layer else f"targets +{config.first_target}..+{last}"
        shape = f"{config.num_layers} layers x {config.num_features:,} features, d_model {config.d_model}"
        return f"{type(self).__name__}({shape}, {config.activation_fn}, {window}, {weights / 1e6:,.2f} M weights)"

    @abstractmethod
    def encode_layer(self, layer: int, inputs: Float[Tensor, "token d_model"]) -> Float[Tensor, "token feature"]:
        """Feature activations of one layer at inference; they depend on no other token and no other layer."""

    @abstractmethod
    def encode(self, inputs: Float[Tensor, "layer token d_model"]) -> Float[Tensor, "layer token feature"]:
        """Feature activations of all layers at inference."""

    @abstractmethod
    def contributions(
        self, source: int, features: Float[Tensor, "token feature"]
    ) -> Float[Tensor, "target token d_model"]:
        """What one layer's features add to each MLP output of `config.targets_of(source)`, without biases."""

    @property
    def writes_linearly(self) -> bool:
        """Whether twice the features contribute twice as much, so that differences may be taken before writing."""
        return False

    @abstractmethod
    def bias(self, target: int) -> Float[Tensor, " d_model"]:
        """What is added to the MLP output of `target` whatever the features do."""

    @abstractmethod
    def decode(
        self,
        features: Float[Tensor, "layer token feature"],
        inputs: Float[Tensor, "layer token d_model"] | None = None,
    ) -> Float[Tensor, "layer token d_model"]:
        """All MLP outputs: the biases plus the contributions of all sources, plus the skip connections of `inputs`."""

    def predicts(self, target: int) -> bool:
        """Whether there is anything to put in place of the MLP output of `target`, be it only a bias."""
        return 0 <= target < self.config.num_layers

    def skip(self, source: int, inputs: Float[Tensor, "token d_model"]) -> Float[Tensor, "target token d_model"]:
        """What one layer's input adds, past its features, to each MLP output of `config.skip_targets_of(source)`."""
        return inputs.new_zeros(0, *inputs.shape)

    def forward(self, inputs: Float[Tensor, "layer token d_model"]) -> Float[Tensor, "layer token d_model"]:
        """Predicted MLP outputs for what the MLPs read."""
        return self.decode(self.encode(inputs), inputs)
