"""Training the two-hop world's host: a tiny Llama on one-hop facts and most of the two-hop ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from clt.worlds.base import Split
from clt.worlds.recipe import optimiser, schedule, seconds_of, update, write_record
from clt.worlds.tokens import BOS_ID, EOS_ID, PAD_ID, train_tokenizer
from clt.worlds.two_hop.knowledge import sentences
from clt.worlds.two_hop.world import TwoHopWorld
from clt.worlds.weights import initialise, save_host

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class TwoHopRecipe:
    """How the two-hop host is trained; the defaults made the shipped one."""

    seed: int = 0
    steps: int = 1200
    batch: int = 64
    """Sentences."""
    rate: float = 3e-3
    weight_decay: float = 0.1
    width: int = 64
    layers: int = 4
    heads: int = 4
    ffn: int = 172

    @property
    def total_steps(self) -> int:
        """Steps in all."""
        return self.steps


def train_two_hop(recipe: TwoHopRecipe, folder: Path, report: Callable[[int, float], None]) -> dict[str, Any]:
    """Train, save and score the host; returns what `train.json` says."""
    text = [f"{line.prompt} {line.answer}." for line in sentences("train")]
    tokenizer = train_tokenizer(text)
    model = make_model(recipe, tokenizer)
    ids, labels = tokens_and_labels(text, tokenizer)
    seconds = seconds_of(lambda: learn(model, ids, labels, recipe, report))
    folder.mkdir(parents=True, exist_ok=True)
    save_host(model, folder)
    tokenizer.save_pretrained(folder)
    record = {
        "world": "two-hop",
        "recipe": asdict(recipe),
        "seconds": seconds,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **{split: evaluate(folder, split) for split in ("train", "held_out")},
    }
    write_record(folder, record)
    return record


def make_model(recipe: TwoHopRecipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama whose initial weights are a function of the seed."""
    config = LlamaConfig(
        hidden_size=recipe.width,
        intermediate_size=recipe.ffn,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    model = LlamaForCausalLM(config)
    initialise(model, recipe.seed, n_layers={"model": recipe.layers})
    return model


def tokens_and_labels(text: list[str], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Padded rows of ids and, for each place, the next token; the city's own name is not to be predicted."""
    rows = [[*tokenizer(line).input_ids, EOS_ID] for line in text]
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), PAD_ID)
    labels = torch.full((len(rows), length), IGNORED)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        labels[place, 2 : len(row) - 1] = torch.tensor(row[3:])
    return ids, labels


def learn(
    model: LlamaForCausalLM, ids: Tensor, labels: Tensor, recipe: TwoHopRecipe, report: Callable[[int, float], None]
) -> None:
    """Random batches of sentences, every token after the name predicted."""
    optim = optimiser([model], recipe.rate, recipe.weight_decay)
    rates = schedule(optim, recipe.steps)
    random = torch.Generator().manual_seed(recipe.seed)
    model.train()
    for step in range(recipe.steps):
        rows = torch.randint(len(ids), (recipe.batch,), generator=random)
        logits = model(input_ids=ids[rows], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), labels[rows].flatten(), ignore_index=IGNORED)
        update(loss, optim, rates)
        report(step + 1, loss.item())


@torch.no_grad()
def evaluate(folder: Path, split: Split) -> dict[str, Any]:
    """The saved host's score on all two-hop questions of a split, through `generate`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # transformers annotates `generate` with a protocol that its own models do not meet.
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    world = TwoHopWorld()
    questions = world.questions(split, len(world.facts(split)))
    inputs = tokenizer([question.prompt for question in questions], padding=True, return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    answers = tokenizer.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return world.score_questions(questions, answers)
