"""Text for a model without a corpus at hand, sampled from the model itself at temperature 1.

Run: python recipes/sample_text.py --model PATH_OR_HUB_ID --output stories.jsonl --texts 4000
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to sample."""

    model: str
    """Hugging Face id or local folder of a language model with a BOS token."""
    output: Path
    """JSONL file, one {"text": ...} per line."""
    texts: int = 4000
    """How many texts."""
    tokens: int = 200
    """Longest text."""
    batch_size: int = 200
    """Texts at once."""
    seed: int = 0
    """Seed of the sampling."""


def main(options: Options) -> None:
    """Sample and write."""
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w") as file, torch.no_grad():
        for start in tqdm(range(0, options.texts, options.batch_size)):
            n = min(options.batch_size, options.texts - start)
            prompt = torch.full((n, 1), tokenizer.bos_token_id)
            rows = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                top_k=0,
                max_new_tokens=options.tokens,
                pad_token_id=tokenizer.eos_token_id,
            )
            for text in tokenizer.batch_decode(rows, skip_special_tokens=True):
                file.write(json.dumps({"text": text.strip()}) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
