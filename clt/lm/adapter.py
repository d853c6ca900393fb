"""A host model seen as a stack of MLPs that can be read and replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Integer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from clt.errors import HostModelError
from clt.lm import hooks
from clt.lm.hook_names import resolved_template
from clt.lm.hooks import Captured, Change, Predict, Receive, Site
from clt.lm.host import Host
from clt.lm.inputs import HostInputs
from clt.lm.linear import Decoder, LinearHost
from clt.lm.linear_constants import Constants
from clt.lm.loading import load_host
from clt.lm.structure import (
    down_projection,
    find_templates,
    hookpoints_of,
    sites_of,
    width_of,
)
from clt.types import ActivationBatch, Hookpoint


class ModelAdapter(Host):
    """Any Hugging Face language or vision-language model, with its MLPs found by structure.

    adapter = ModelAdapter.from_pretrained("gpt2")
    inputs = adapter.prepare([Sample(id="0", prompt="The cat sat")])
    batch = adapter.capture(inputs)                       # what the MLPs read and wrote
    with adapter.replacing(lambda layer, x: my_mlp(layer, x)):
        logits = adapter.logits(inputs)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        processor: ProcessorMixin | None = None,
        name: str | None = None,
        input_template: str | None = None,
        output_template: str | None = None,
        pads_images: bool = False,
    ) -> None:
        """Wrap a loaded model.

        Args:
            tokenizer: needed for samples; taken from the processor if that is given.
            processor: needed for samples with images.
            name: for metadata; the model's own if None.
            input_template: module path, with {} for the layer, of what is read; a bare module means its input.
            output_template: the same for the MLP output; a bare module means its output.
            pads_images: whether images are padded to squares first, as the original LLaVA-1.5 does.

        Raises:
            HostModelError: a template was not given and the structure shows no MLPs, or a module does not exist.
        """
        super().__init__(model, tokenizer=tokenizer, processor=processor, name=name, pads_images=pads_images)
        if input_template is None or output_template is None:
            found_input, found_output = find_templates(model)
            input_template, output_template = input_template or found_input, output_template or found_output
        self.input_template = resolved_template(model, input_template, "input")
        self.output_template = resolved_template(model, output_template, "output")
        self.hookpoints: tuple[Hookpoint, ...] = hookpoints_of(model, self.input_template, self.output_template)
        self._pairs = sites_of(model, self.hookpoints)
        self._returns_tuple: dict[str, bool] = {}

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        input_template: str | None = None,
        output_template: str | None = None,
        pads_images: bool = False,
        name: str | None = None,
        **model_options: Any,
    ) -> ModelAdapter:
        """Open a model from a folder or the Hub, with its tokenizer and, if it sees images, its processor.

        Args:
            dtype: "float32", "bfloat16", "float16"; None: as saved.
            device: None: a GPU if there is one.
            name: what it is called in files; None: as `name_or_path`.
            model_options: passed on to the model's own `from_pretrained` (`device_map`, `quantization_config`, ...).

        Raises:
            HostModelError: naming what could not be opened, why, and the way out.
        """
        host = load_host(
            name_or_path,
            dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype,
            device=device,
            revision=revision,
            **model_options,
        )
        return cls(
            host.model,
            tokenizer=host.tokenizer,
            processor=host.processor,
            name=name or str(name_or_path),
            input_template=input_template,
            output_template=output_template,
            pads_images=pads_images,
        )

    @property
    def n_layers(self) -> int:
        """How many MLPs."""
        return len(self.hookpoints)

    # --- reading ----------------------------------------------------------------------------------------------

    def capturing(self, keep: Bool[Tensor, "row position"] | None = None) -> AbstractContextManager[Captured]:
        """Read what the MLPs read and write in any forward pass inside the block.

        Args:
            keep: positions to copy; None copies all, in the host's own shape.
        """
        return hooks.capturing(self._pairs, self.d_model, keep)

    @torch.no_grad()
    def capture(self, inputs: HostInputs, *, sample_ids: Integer[Tensor, " row"] | None = None) -> ActivationBatch:
        """Run the decoder (no logits) and flatten what its MLPs read and wrote, padding left out.

        Args:
            sample_ids: the caller's number for each row, repeated for its tokens; None: 0, 1, 2, ...
        """
        keep = inputs.is_token
        if sample_ids is None:
            sample_ids = torch.arange(inputs.n_rows)
        captured = self._captured(inputs, keep)
        return ActivationBatch(
            inputs=captured.inputs,
            targets=captured.targets,
            kind=inputs.kind[keep],
            sample=sample_ids.to(keep.device)[:, None].expand_as(keep)[keep],
            position=inputs.position[keep],
        )

    def _captured(self, inputs: HostInputs, keep: Bool[Tensor, "row position"]) -> Captured:
        with self.capturing(keep) as captured:
            self.model.base_model(**self._arguments(inputs))
        return captured

    # --- replacing --------------------------------------------------------------------------------------------

    def replacing(self, predict: Predict, layers: Sequence[int] | None = None) -> AbstractContextManager[None]:
        """Put `predict(layer, what its MLP reads)` in place of the MLPs while the block runs.

        Where the hookpoint is a whole module, that module is not computed. Whatever happens inside, the host is
        itself again afterwards.

        Args:
            layers: which to replace; None: all.
        """
        return hooks.replacing(self._chosen(layers), predict, self._returns_tuple)

    def rewriting(self, change: Change, layers: Sequence[int] | None = None) -> AbstractContextManager[None]:
        """Let the host go on with `change(layer, what its MLP reads, what it writes)` instead of what it writes."""
        return hooks.rewriting(self._chosen(layers), change)

    def reading(self, receive: Receive, layers: Sequence[int] | None = None) -> AbstractContextManager[None]:
        """Show `receive(layer, what its MLP reads)` while the block runs, before the MLP itself runs."""
        return hooks.reading(self._chosen(layers), receive)

    @cached_property
    def _down(self) -> list[Site]:
        return [down_projection(pair, self.d_model) for pair in self._pairs]

    @property
    def neuron_counts(self) -> list[int]:
        """How many neurons the MLP of each layer has.

        Raises:
            HostModelError: an MLP whose neurons cannot be told apart, such as a mixture of experts.
        """
        return [width_of(site.module) for site in self._down]

    @property
    def down_projections(self) -> list[nn.Module]:
        """The layers that lead from each MLP's neurons back to the residual stream.

        Raises:
            HostModelError: an MLP whose neurons cannot be told apart.
        """
        return [site.module for site in self._down]

    @contextmanager
    def rewriting_neurons(self, change: Predict, layers: Sequence[int]) -> Iterator[None]:
        """Let the host go on with `change(layer, activations of its MLP's neurons)`."""
        with ExitStack() as undo:
            for layer in layers:
                undo.callback(self._down[layer].overwrite(partial(change, layer)).remove)
            yield

    def _chosen(self, layers: Sequence[int] | None) -> Sequence[hooks.SitePair]:
        return self._pairs if layers is None else [self._pairs[layer] for layer in layers]

    @contextmanager
    def before_each_pass(self, begin: Callable[[Tensor], None]) -> Iterator[None]:
        """Call `begin` with the token ids, `[row, position]`, that each forward pass of the decoder starts on."""
        # The one module that every host calls with its tokens, once per pass.
        handle = self.model.get_input_embeddings().register_forward_pre_hook(lambda module, args: begin(args[0]))
        try:
            yield
        finally:
            handle.remove()

    def linearised(self, inputs: HostInputs, keep: Sequence[int] = (-1,)) -> LinearHost:
        """The host on one prompt as an affine map of its embeddings and MLP outputs.

        Args:
            inputs: one row, without padding.
            keep: positions whose logits are wanted.

        Raises:
            HostModelError: several rows, padding, or a host that cannot be held linear (named by its class).
        """
        if inputs.n_rows != 1 or not bool(inputs.is_token.all()):
            raise HostModelError(f"A host is linearised on one prompt without padding, not on {inputs.n_rows} rows.")
        decoder = Decoder(self.model, self.hookpoints, self._pairs)
        places = [place % inputs.input_ids.shape[1] for place in keep]
        return decoder.record(self._arguments(inputs), places)

    def patterns_of(self, inputs: HostInputs) -> Callable[[], AbstractContextManager[None]]:
        """Record the attention patterns of one prompt; inside the context managers returned the host keeps to them.

        Raises:
            HostModelError: as `linearised`.
        """
        if inputs.n_rows != 1 or not bool(inputs.is_token.all()):
            raise HostModelError(f"Patterns are held of one prompt without padding, not of {inputs.n_rows} rows.")
        module, constants = Decoder(self.model, self.hookpoints, self._pairs).module, Constants()
        with constants.holding_patterns(module):
            self.logits(inputs)
        return lambda: constants.holding_patterns(module)
