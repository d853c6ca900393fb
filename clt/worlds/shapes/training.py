"""Training the shapes world's host: first its eyes, then everything.

Stage 1 teaches vision tower and projector to say, cell by cell, which kind and colour stands there, in the words of
the decoder's own token embeddings. Without it the decoder stays near chance for minutes. Stage 2 trains all weights
on what the annotators wrote, packed behind each image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from clt.worlds.recipe import optimiser, schedule, seconds_of, update, write_record
from clt.worlds.shapes.batches import Images, PackedBatch, Packer, images, scenes
from clt.worlds.shapes.evaluation import evaluate
from clt.worlds.shapes.host import HostSize, image_features, make_model, make_processor
from clt.worlds.shapes.scene import COLOURS, KINDS
from clt.worlds.weights import save_host

Report = Callable[[int, float], None]
"""Called after each step with the steps done in all and the loss."""


@dataclass(frozen=True, kw_only=True)
class ShapesRecipe:
    """How the shapes host is trained; the defaults made the shipped one."""

    seed: int = 0
    alignment_steps: int = 1000
    alignment_batch: int = 64
    steps: int = 1500
    batch: int = 32
    questions: int = 8
    """Questions packed behind each image."""
    caption_share: float = 0.6
    rate: float = 3e-3
    weight_decay: float = 0.05
    alignment_weight: float = 0.1
    """Weight of stage 1's loss during stage 2."""
    temperature: float = 15.0
    evaluation_samples: int = 600
    """Held-out questions, and as many descriptions, for the scores in the record."""
    size: HostSize = field(default_factory=HostSize)

    @property
    def total_steps(self) -> int:
        """Steps of both stages."""
        return self.alignment_steps + self.steps


class Alignment(torch.nn.Module):
    """Stage 1's loss: each patch against the token embeddings of the kinds and colours, and `nothing`."""

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor, temperature: float) -> None:
        super().__init__()
        width = model.config.get_text_config().hidden_size
        tokenizer = processor.tokenizer
        self.temperature = temperature
        self.words = model.model.language_model.embed_tokens
        self.nothing = torch.nn.Parameter(torch.zeros(2, width).normal_(0, width**-0.5))
        for name, words in (("kind_ids", KINDS), ("colour_ids", COLOURS)):
            ids = [tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in words]
            self.register_buffer(name, torch.tensor(ids))

    def forward(self, features: Float[Tensor, "row cell d_model"], truth: Images) -> Float[Tensor, ""]:
        """Mean cross entropy of kind plus that of colour; the embeddings are read, not trained."""
        table = self.words.weight.detach()
        kinds = torch.cat([table[self.kind_ids], self.nothing[:1]])
        colours = torch.cat([table[self.colour_ids], self.nothing[1:]])
        kind_loss = cross_entropy((self.temperature * features @ kinds.T).flatten(0, 1), truth.kind.flatten())
        colour_loss = cross_entropy((self.temperature * features @ colours.T).flatten(0, 1), truth.colour.flatten())
        return kind_loss + colour_loss


def train_shapes(recipe: ShapesRecipe, folder: Path, report: Report) -> dict[str, Any]:
    """Train, save and score the host; returns what `train.json` says."""
    torch.manual_seed(recipe.seed)
    processor = make_processor()
    model = make_model(recipe.size, processor.tokenizer, recipe.seed)
    alignment = Alignment(model, processor, recipe.temperature)
    packer = Packer(processor, recipe.questions, recipe.caption_share)
    seconds = {
        "alignment": seconds_of(lambda: align_vision(model, alignment, recipe, report)),
        "end_to_end": seconds_of(lambda: train_end_to_end(model, alignment, packer, recipe, report)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_host(model, folder)
    processor.save_pretrained(folder)
    record = {
        "world": "shapes",
        "recipe": asdict(recipe),
        "seconds": seconds,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "held_out": evaluate(folder, recipe.evaluation_samples),
    }
    write_record(folder, record)
    return record


def align_vision(
    model: LlavaForConditionalGeneration, alignment: Alignment, recipe: ShapesRecipe, report: Report
) -> None:
    """Stage 1: vision tower and projector alone."""
    eyes = [model.model.vision_tower, model.model.multi_modal_projector]
    optim = optimiser(eyes, recipe.rate, recipe.weight_decay)
    optim.add_param_group({"params": [alignment.nothing], "weight_decay": 0.0})
    rates = schedule(optim, recipe.alignment_steps)
    model.train()
    for step in range(recipe.alignment_steps):
        truth = images(scenes(step * recipe.alignment_batch, recipe.alignment_batch, _stream(recipe, 1)))
        loss = alignment(image_features(model, truth.pixel_values), truth)
        update(loss, optim, rates)
        report(step + 1, loss.item())


def train_end_to_end(
    model: LlavaForConditionalGeneration, alignment: Alignment, packer: Packer, recipe: ShapesRecipe, report: Report
) -> None:
    """Stage 2: all weights, on what the annotators wrote."""
    optim = optimiser([model], recipe.rate, recipe.weight_decay)
    optim.add_param_group({"params": [alignment.nothing], "weight_decay": 0.0})
    rates = schedule(optim, recipe.steps)
    random = np.random.default_rng(recipe.seed)
    for step in range(recipe.steps):
        batch = scenes(step * recipe.batch, recipe.batch, _stream(recipe, 2))
        truth = images(batch)
        features = image_features(model, truth.pixel_values)
        loss = text_loss(model, features, packer.pack(batch, random))
        loss = loss + recipe.alignment_weight * alignment(features, truth)
        update(loss, optim, rates)
        report(recipe.alignment_steps + step + 1, loss.item())


def text_loss(
    model: LlavaForConditionalGeneration, features: Float[Tensor, "row cell d_model"], packed: PackedBatch
) -> Float[Tensor, ""]:
    """Mean cross entropy of the answers' tokens."""
    embedded = model.get_input_embeddings()(packed.ids)
    is_image = (packed.ids == model.config.image_token_id)[..., None]
    embedded = embedded.masked_scatter(is_image, features)
    hidden = model.model.language_model(
        inputs_embeds=embedded, attention_mask=packed.visible, position_ids=packed.positions, use_cache=False
    ).last_hidden_state
    is_answer = packed.labels >= 0
    return cross_entropy(model.lm_head(hidden[is_answer]), packed.labels[is_answer])


def _stream(recipe: ShapesRecipe, stage: int) -> int:
    """Seed of a stage's scenes, so that the stages do not see the same ones."""
    return 1000 * (recipe.seed + 1) + stage
