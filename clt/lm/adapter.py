"""A host model seen as a stack of MLPs that can be read and replaced."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer, UInt8
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from clt.errors import ConfigError, HostModelError
from clt.lm import hooks
from clt.lm.generation import Decoding, OnText, TextStream, generate_ids
from clt.lm.hooks import Captured, Change, Predict, Receive, Site
from clt.lm.inputs import HostInputs, PaddingSide, TokenIds, assemble, check_length, from_tokens, kinds
from clt.lm.loading import load_host, sees_images
from clt.lm.prompts import answer_tokens, extended, image_prompts, text_prompts
from clt.lm.structure import (
    down_projection,
    find_templates,
    hookpoints_of,
    normalised_template,
    sites_of,
    text_config,
    width_of,
)
from clt.types import ActivationBatch, Hookpoint, Sample


class ModelAdapter:
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
    ) -> None:
        """Wrap a loaded model.

        Args:
            tokenizer: needed for samples; taken from the processor if that is given.
            processor: needed for samples with images.
            name: for metadata; the model's own if None.
            input_template: module path, with {} for the layer, of what is read; a bare module means its input.
            output_template: the same for the MLP output; a bare module means its output.

        Raises:
            HostModelError: a template was not given and the structure shows no MLPs, or a module does not exist.
        """
        self.model = model
        self.processor = processor
        self.tokenizer = tokenizer if processor is None or tokenizer is not None else processor.tokenizer
        self.name = name or model.name_or_path or type(model).__name__
        if input_template is None or output_template is None:
            found_input, found_output = find_templates(model)
            input_template, output_template = input_template or found_input, output_template or found_output
        self.input_template = normalised_template(input_template, "input")
        self.output_template = normalised_template(output_template, "output")
        self.hookpoints: tuple[Hookpoint, ...] = hookpoints_of(model, self.input_template, self.output_template)
        self._pairs = sites_of(model, self.hookpoints)
        self._returns_tuple: dict[str, bool] = {}
        self._takes_positions = not self.is_multimodal and "position_ids" in inspect.signature(model.forward).parameters

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
        **model_options: Any,
    ) -> ModelAdapter:
        """Open a model from a folder or the Hub, with its tokenizer and, if it sees images, its processor.

        Args:
            dtype: "float32", "bfloat16", "float16"; None: as saved.
            device: None: a GPU if there is one.
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
            name=str(name_or_path),
            input_template=input_template,
            output_template=output_template,
        )

    # --- what the host is -------------------------------------------------------------------------------------

    @property
    def n_layers(self) -> int:
        """How many MLPs."""
        return len(self.hookpoints)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return text_config(self.model).hidden_size

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.model.dtype

    @property
    def is_multimodal(self) -> bool:
        """Whether the host takes images."""
        return sees_images(self.model.config)

    @property
    def token_ids(self) -> TokenIds:
        """Ids that mean something besides text."""
        image = getattr(self.model.config, "image_token_id", None) if self.is_multimodal else None
        config = text_config(self.model)
        ids: list[Any] = [config.bos_token_id, config.pad_token_id, *self.eos_token_ids]
        padding: list[Any] = [config.pad_token_id, *self.eos_token_ids, 0]
        if self.tokenizer is not None:
            ids += self.tokenizer.all_special_ids
            padding.insert(0, self.tokenizer.pad_token_id)
        special = sorted({token for token in ids if token is not None and token != image})
        return TokenIds(image, tuple(special), next(token for token in padding if token is not None))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a generated answer; chat models have several."""
        generation = self.model.generation_config
        eos: Any = None if generation is None else generation.eos_token_id
        if eos is None and self.tokenizer is not None:
            eos = self.tokenizer.eos_token_id
        if eos is None:
            return ()
        return tuple(eos) if isinstance(eos, list) else (eos,)

    # --- inputs -----------------------------------------------------------------------------------------------

    def prepare(
        self,
        samples: Sequence[Sample],
        *,
        with_answer: bool = True,
        answers: Sequence[Integer[Tensor, " _position"]] | None = None,
        padding_side: PaddingSide = "right",
    ) -> HostInputs:
        """Tokenise prompts and answers, read the images, pad, and note what each position is.

        Args:
            with_answer: whether `Sample.answer` follows the prompt.
            answers: token ids to follow the prompts instead, such as generated ones (no text in between).

        Raises:
            HostModelError: an image, a placeholder or a token is missing; the message names the sample.
        """
        tokenizer = self._require_tokenizer()
        if not samples:
            raise HostModelError("There are no samples to prepare.")
        whole: dict[str, Tensor] = {}
        if self.is_multimodal:
            prompts, whole = image_prompts(self._require_processor(), samples, self.token_ids.image)
        else:
            prompts = text_prompts(tokenizer, samples)
        if answers is None:
            nothing = torch.zeros(0, dtype=torch.long)
            answers = [answer_tokens(tokenizer, sample) if with_answer else nothing for sample in samples]
        rows = [extended(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        inputs = assemble(rows, [sample.id for sample in samples], whole, self.token_ids, padding_side)
        check_length(inputs, self._longest)
        return inputs.to(self.device)

    def prepare_tokens(
        self,
        input_ids: Integer[Tensor, "row position"],
        attention_mask: Integer[Tensor, "row position"] | Bool[Tensor, "row position"] | None = None,
    ) -> HostInputs:
        """Rows that are tokens already, such as packed text."""
        inputs = from_tokens(input_ids, attention_mask, self.token_ids)
        check_length(inputs, self._longest)
        return inputs.to(self.device)

    def kinds_of(self, input_ids: Integer[Tensor, "row position"]) -> UInt8[Tensor, "row position"]:
        """`TokenKind` of tokens by their ids, none of them padding."""
        return kinds(input_ids, torch.ones_like(input_ids), self.token_ids)

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

    # --- running ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, inputs: HostInputs) -> Float[Tensor, "row position vocabulary"]:
        """What the host predicts after each position."""
        return self.model(**self._arguments(inputs)).logits

    def generate_from(
        self, inputs: HostInputs, decoding: Decoding, on_text: OnText | None = None
    ) -> list[Integer[Tensor, " _position"]]:
        """Answers to one batch of prompts padded left, as token ids on the CPU, each with its end token.

        Args:
            on_text: told the new text of each sample as it is generated.

        Raises:
            HostModelError: a prompt with the longest answer would not fit the host's positions.
        """
        check_length(inputs, self._longest, decoding.max_new_tokens)
        stream = None
        if on_text is not None:
            stream = TextStream(self._require_tokenizer(), inputs.sample_ids, self.eos_token_ids, on_text)
        return generate_ids(self.model, inputs, decoding, self.eos_token_ids, self.token_ids, stream)

    def generate_ids(
        self, samples: Sequence[Sample], *, batch_size: int = 16, on_text: OnText | None = None, **how: Any
    ) -> list[Integer[Tensor, " _position"]]:
        """Answers as token ids on the CPU, up to and including the first end-of-answer token.

        Args:
            how: `max_new_tokens` and whatever else `Decoding` has: temperature, top_p, seed, use_cache.
        """
        decoding = Decoding(**how)
        return [
            answer
            for inputs in self.prompt_batches(samples, batch_size)
            for answer in self.generate_from(inputs, decoding, on_text)
        ]

    def generate(self, samples: Sequence[Sample], **options: Any) -> list[str]:
        """Answers as text, without special tokens; options as `generate_ids`."""
        return self.decode(self.generate_ids(samples, **options))

    def prompt_batches(self, samples: Sequence[Sample], batch_size: int) -> Iterator[HostInputs]:
        """The prompts, padded left as generation needs them, a few at a time."""
        if batch_size < 1:
            raise ConfigError(f"batch_size = {batch_size} must be at least 1.")
        for start in range(0, len(samples), batch_size):
            yield self.prepare(samples[start : start + batch_size], with_answer=False, padding_side="left")

    def decode(self, answers: Sequence[Integer[Tensor, " _position"]]) -> list[str]:
        """Token ids as text, without special tokens."""
        tokenizer = self._require_tokenizer()
        return [str(tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers]

    # --- private ----------------------------------------------------------------------------------------------

    @property
    def _longest(self) -> int | None:
        return getattr(text_config(self.model), "max_position_embeddings", None)

    def _arguments(self, inputs: HostInputs) -> dict[str, Any]:
        """Keyword arguments of a forward pass without cache.

        Text hosts get positions that do not count the padding. Vision-language hosts work theirs out (some in
        three dimensions) and are all rotary, so that a common shift changes nothing.
        """
        positions = {"position_ids": inputs.position} if self._takes_positions else {}
        return {**inputs.tensors, **positions, "use_cache": False}

    def _require_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise HostModelError(
                f"{self.name} has no tokenizer, which samples need. Pass tokenizer= (or processor=) to ModelAdapter, "
                "or give tokens with prepare_tokens."
            )
        return self.tokenizer

    def _require_processor(self) -> ProcessorMixin:
        if self.processor is None:
            raise HostModelError(f"{self.name} takes images, for which ModelAdapter needs processor=.")
        return self.processor
