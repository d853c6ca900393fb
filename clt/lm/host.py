"""A host model with its tokenizer or processor: prompts in, logits and answers out."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer, UInt8
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from clt.errors import ConfigError, HostModelError
from clt.lm.forms import PromptForm, written
from clt.lm.generation import Decoding, OnText, TextStream, generate_ids
from clt.lm.inputs import HostInputs, PaddingSide, TokenIds, assemble, check_length, from_tokens, kinds
from clt.lm.loading import sees_images
from clt.lm.prompts import answer_tokens, extended, image_prompts, text_prompts
from clt.lm.structure import text_config
from clt.types import Sample


class Host:
    """Any Hugging Face language or vision-language model that completes prompts; `ModelAdapter` also sees its MLPs."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None,
        processor: ProcessorMixin | None,
        name: str | None,
        pads_images: bool,
    ) -> None:
        """Wrap a loaded model; arguments as `ModelAdapter`."""
        self.model = model
        self.processor = processor
        self.pads_images = pads_images
        self.tokenizer = tokenizer if processor is None or tokenizer is not None else processor.tokenizer
        self.name = name or model.name_or_path or type(model).__name__
        self._takes_positions = not self.is_multimodal and "position_ids" in inspect.signature(model.forward).parameters

    def __repr__(self) -> str:
        place = f"{self.dtype}, {self.device}".removeprefix("torch.")
        return f"{type(self).__name__}({self.name}: {type(self.model).__name__}, d_model {self.d_model}, {place})"

    # --- what it is -------------------------------------------------------------------------------------------

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

    def asked(self, sample: Sample, form: PromptForm = "auto") -> Sample:
        """The sample with its prompt in the words and with the image placeholders the host expects, see `PromptForm`.

        Raises:
            HostModelError: the host has no chat template, or sees no images.
        """
        prompt = written(sample.prompt, len(sample.images), form, self._require_tokenizer(), self.processor)
        return replace(sample, prompt=prompt)

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
            processor = self._require_processor()
            prompts, whole = image_prompts(processor, samples, self.token_ids.image, self.pads_images)
        else:
            prompts = text_prompts(tokenizer, samples)
        if answers is None:
            nothing = torch.zeros(0, dtype=torch.long)
            answers = [answer_tokens(tokenizer, sample) if with_answer else nothing for sample in samples]
        model_type = self.model.config.model_type
        rows = [extended(prompt, answer, model_type) for prompt, answer in zip(prompts, answers, strict=True)]
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

    # --- running ----------------------------------------------------------------------------------------------

    def logits(self, inputs: HostInputs, *, gradient: bool = False) -> Float[Tensor, "row position vocabulary"]:
        """What the host predicts after each position.

        Args:
            gradient: keep the graph, for what is put in place of the MLPs; the host's own weights never learn.
        """
        with torch.set_grad_enabled(gradient):
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
