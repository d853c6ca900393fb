"""Change features while a host answers: the text before and after, and which next tokens gain or lose.

clt steer --model world:shapes --clt runs/demo/clt --prompt "What is there?" --image photo.png --feature 2:17 --scale 4
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from clt.activation_generation.corpus import open_model as open_host
from clt.config.base import Config, require_positive
from clt.data.corpora import Corpus
from clt.errors import ConfigError
from clt.lm import ModelAdapter, PromptForm
from clt.replacement import Intervention, ReplacementModel, SteeredHost, SteeredNeurons, feature_std
from clt.replacement.intervention import Kind, Unit
from clt.replacement.loading import open_pair
from clt.replacement.passes import Positions, check_positions
from clt.replacement.statistics import read_feature_std, save_feature_std
from clt.replacement.steerable import Steerable
from clt.types import Sample

_OPERATIONS: dict[str, Kind] = {"x": "scale", "+": "add", "-": "add", "=": "set"}
# Tokens less probable than this on both sides stay out of the table (not out of the JSON).
WORTH_SHOWING = 5e-5
_FEATURE = re.compile(r"(\d+):(\d+)(?:([x+=-])(.+))?")


@dataclass(frozen=True, kw_only=True)
class Options(Config):
    """What to show to the host, and what to change in it."""

    model: Annotated[str, tyro.conf.arg(aliases=("--model-name",))]
    """Hugging Face id or local folder of the host, or world:NAME."""
    clt: Annotated[str | None, tyro.conf.arg(aliases=("--transcoder",))] = None
    """Folder of the transcoder; not needed with `--on neurons`."""
    prompt: str
    """What to ask."""
    image: tuple[str, ...] = ()
    """Image files, for hosts that see."""
    feature: tuple[str, ...]
    """LAYER:FEATURE, one or several; each may say what to do itself: 8:3648x2, 8:3648+1.5, 8:3648-1.5, 8:3648=0."""
    scale: float | None = None
    """Multiply the features by this."""
    set: float | None = None
    """Give them this activation."""
    add: float | None = None
    """Add this to them."""
    ablate: bool = False
    """Switch them off."""
    unit: Unit = "absolute"
    """Whether --set and --add are activations, or numbers of each feature's standard deviation."""
    std_from: str | None = None
    """Samples (as for `clt fidelity --dataset`) to measure standard deviations on; kept beside the transcoder."""
    positions: str = "all"
    """all, prompt, generated, text, image, special, last, or places such as 0,5,-1 (-1: the last of the prompt)."""
    on: Literal["host", "replacement", "neurons"] = "host"
    """What is steered: the host through decoder differences, the replacement model, or true MLP neurons."""
    form: PromptForm = "auto"
    """How the prompt is put: chat template if there is one (auto, chat), as it stands (raw), LLaVA-1.5's two forms."""
    pad_images: bool = False
    """Pad images to squares, as the original LLaVA-1.5 does, instead of what the processor does (often a cut)."""
    max_new_tokens: int = 48
    """Longest answer."""
    temperature: float = 0.0
    """0: greedy; otherwise tokens are drawn, with the same random numbers before and after."""
    top_p: float = 1.0
    """Draw among the fewest tokens that together have this probability."""
    seed: int = 0
    """Of the draws."""
    top: int = 8
    """How many next tokens to compare, after the prompt."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type the host runs in; None: as saved."""
    device: str | None = None
    """Torch device; None: a GPU if there is one."""
    json: bool = False
    """Print one JSON object instead of text and tables."""

    def __post_init__(self) -> None:
        require_positive("steer", max_new_tokens=self.max_new_tokens, top=self.top)
        given = [name for name in ("scale", "set", "add") if getattr(self, name) is not None]
        given += ["ablate"] * self.ablate
        if len(given) > 1:
            raise ConfigError(
                f"--{' and --'.join(given)} at once: give one for all features, or write each feature's own beside it "
                "(8:3648x2 3:17=0)."
            )
        if self.clt is None and self.on != "neurons":
            raise ConfigError(f"--on {self.on} needs --clt, the folder of a transcoder.")

    def interventions(self) -> list[Intervention]:
        """What the flags ask for."""
        return [self._one(text) for text in self.feature]

    def _one(self, text: str) -> Intervention:
        match = _FEATURE.fullmatch(text)
        if match is None:
            raise ConfigError(
                f"--feature {text}: write LAYER:FEATURE, such as 8:3648, or with its own change, such as 8:3648x2."
            )
        layer, feature, sign, number = match.groups()
        if sign is None:
            kind, value = self._common(text)
        else:
            kind, value = _OPERATIONS[sign], _number(text, number)
            value = -value if sign == "-" else value
        unit: Unit = self.unit if kind in ("set", "add") else "absolute"
        return Intervention(int(layer), int(feature), kind, value, unit, parsed_positions(self.positions))

    def _common(self, text: str) -> tuple[Kind, float | None]:
        named: list[tuple[Kind, float | None]] = [("scale", self.scale), ("set", self.set), ("add", self.add)]
        for kind, value in named:
            if value is not None:
                return kind, value
        if self.ablate:
            return "ablate", None
        raise ConfigError(f"--feature {text}: say what to do with it: --scale 2, --set 5, --add 1 or --ablate.")


def _number(text: str, number: str) -> float:
    try:
        return float(number)
    except ValueError:
        raise ConfigError(f"--feature {text}: {number!r} is no number.") from None


def parsed_positions(text: str) -> Positions:
    """A name, or places separated by commas."""
    if re.fullmatch(r"-?\d+(,-?\d+)*", text):
        return tuple(int(place) for place in text.split(","))
    check_positions("--positions", text)
    return cast(Positions, text)


def open_model(options: Options) -> Steerable:
    """Host and transcoder, ready to be steered."""
    host_options = {"dtype": options.dtype, "device": options.device, "pads_images": options.pad_images}
    if options.on == "neurons":
        return SteeredNeurons(open_host(options.model, **host_options))
    assert options.clt is not None
    adapter, transcoder = open_pair(options.model, options.clt, host_options)
    transcoder = transcoder.to(adapter.device)
    std = read_feature_std(Path(options.clt))
    if options.std_from is not None:
        samples = [adapter.asked(sample, "auto") for sample in Corpus(path=options.std_from)]
        std = feature_std(adapter, transcoder, samples)
        save_feature_std(Path(options.clt), std)
    return (ReplacementModel if options.on == "replacement" else SteeredHost)(adapter, transcoder, feature_std=std)


def steer(model: Steerable, sample: Sample, options: Options) -> dict[str, Any]:
    """Run before and after, and compare."""
    acts = options.interventions()
    how = {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}
    inputs = model.adapter.prepare([sample], with_answer=False)
    seen: dict[int, Tensor] = {}

    def look(layer: int, features: Tensor) -> Tensor:
        seen[layer] = features[0].float().cpu()
        return features

    before = model.logits(inputs, interventions=look)[0, -1]
    after = model.logits(inputs, interventions=acts)[0, -1]
    return {
        "prompt": sample.prompt,
        "before": model.generate([sample], **how)[0],
        "after": model.generate([sample], interventions=acts, **how)[0],
        "features": [_described(act, seen[act.layer][:, act.feature]) for act in acts],
        **compared(model.adapter, before, after, options.top),
    }


def _described(act: Intervention, activation: Tensor) -> dict[str, Any]:
    """What is done, and what the feature does by itself at the prompt."""
    return {
        **{name: getattr(act, name) for name in ("layer", "feature", "kind", "value", "unit", "positions")},
        "active_positions": int((activation != 0).sum()),
        "prompt_positions": len(activation),
        "largest_activation": float(activation.max()),
    }


def compared(adapter: ModelAdapter, before: Tensor, after: Tensor, top: int) -> dict[str, Any]:
    """The most probable next tokens of either side, largest change first, and KL(before || after) in nats."""
    log_before, log_after = (logits.double().cpu().log_softmax(0) for logits in (before, after))
    chosen = torch.cat([log.topk(min(top, len(log))).indices for log in (log_before, log_after)]).unique()
    change = log_after[chosen].exp() - log_before[chosen].exp()
    tokens = chosen[change.abs().argsort(descending=True)].tolist()
    decode: Any = adapter.tokenizer
    rows = [
        {
            "token": str(decode.decode([token])),
            "id": token,
            "before": float(log_before[token].exp()),
            "after": float(log_after[token].exp()),
        }
        for token in tokens
    ]
    return {"kl": float((log_before.exp() * (log_before - log_after)).sum()), "next_tokens": rows}


def show(result: dict[str, Any], console: Console) -> None:
    """Print texts and table."""
    for feature in result["features"]:
        what = feature["kind"] if feature["value"] is None else f"{feature['kind']} {feature['value']:g}"
        console.print(
            f"{feature['layer']}:{feature['feature']} {what} at {feature['positions']}: on at "
            f"{feature['active_positions']} of {feature['prompt_positions']} prompt positions, at most "
            f"{feature['largest_activation']:.3g}",
            highlight=False,
        )
        if feature["kind"] in ("scale", "ablate") and not feature["active_positions"]:
            console.print(
                "  It is off throughout the prompt, where this changes nothing. `clt attribute` with the same prompt "
                "lists features that are on; --set and --add switch this one on.",
                highlight=False,
            )
    print()
    for when in ("before", "after"):
        console.print(f"{when:>6} | {result[when].strip()}", highlight=False, markup=False)
    console.print(f"\nNext token after the prompt; KL(before || after) = {result['kl']:.4f} nats", highlight=False)
    table = Table()
    for column in ("token", "before", "after", "change"):
        table.add_column(column, justify="left" if column == "token" else "right")
    for row in result["next_tokens"]:
        before, after = row["before"], row["after"]
        if max(before, after) >= WORTH_SHOWING:
            table.add_row(escape(repr(row["token"])), f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}")
    console.print(table)


def main(options: Options) -> None:
    """Open, run before and after, print."""
    options.interventions()
    model = open_model(options)
    sample = Sample(id="prompt", prompt=options.prompt, images=tuple(Path(image) for image in options.image))
    result = steer(model, model.adapter.asked(sample, options.form), options)
    if options.json:
        print(json.dumps({"options": options.to_dict(), **result}, indent=2))
    else:
        show(result, Console())
