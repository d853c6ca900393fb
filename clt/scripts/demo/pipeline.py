"""The stages of the demo, in order, each a sentence of the story it prints."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from clt import worlds
from clt.activation_generation.corpus import open_model
from clt.activation_generation.generator import ActivationGenerator
from clt.config import ActivationConfig, CLTConfig, TrainingConfig
from clt.config.base import write_text_atomically
from clt.data.stores import LocalActivationStore
from clt.errors import WorldError
from clt.lm import ModelAdapter
from clt.models import CrossLayerTranscoder
from clt.replacement import ReplacementModel
from clt.replacement.fidelity import measure_fidelity
from clt.scripts.demo import Options
from clt.scripts.demo.discovery import discovery_options, run_discovery, run_graph
from clt.scripts.demo.stages import Stages
from clt.scripts.demo.story import summarise, write_report
from clt.scripts.discover import Options as DiscoverOptions
from clt.training.evaluator import evaluate
from clt.training.run_folder import METRICS
from clt.training.setup import origin_of
from clt.training.trainer import CLTTrainer
from clt.types import Sample

WINDOWS = {"clt": None, "plt": 1}
"""Span of the two transcoders that are compared: to the last layer, and the own layer only."""


@dataclass(frozen=True)
class Amounts:
    """How much of everything the demo does."""

    scenes: int
    steps: int
    batch_tokens: int
    questions: int
    descriptions: int
    fidelity_samples: int
    discovery_scenes: int
    """To be described; half of them choose features, the other half are steered."""
    discovery_asked: int
    """Of them, scenes that six questions each are asked about."""
    controls: int
    learned_controls: int
    learned_features: int
    gain_steps: int
    graph_features: int
    features_per_width: int = 8
    k: int = 16


FULL = Amounts(
    scenes=16_000,
    steps=1000,
    batch_tokens=1024,
    questions=900,
    descriptions=300,
    fidelity_samples=300,
    discovery_scenes=900,
    discovery_asked=240,
    controls=3,
    learned_controls=1,
    learned_features=400,
    gain_steps=30,
    graph_features=500,
)
QUICK = Amounts(
    scenes=4_000,
    steps=300,
    batch_tokens=1024,
    questions=300,
    descriptions=100,
    fidelity_samples=100,
    discovery_scenes=100,
    discovery_asked=100,
    controls=2,
    learned_controls=1,
    learned_features=400,
    gain_steps=15,
    graph_features=300,
)


class Demo:
    """One run of the demo in one folder."""

    def __init__(self, options: Options) -> None:
        world = worlds.load(options.world)
        if not isinstance(world, worlds.HostedWorld) or not hasattr(world, "score_descriptions"):
            raise WorldError(
                f"The demo needs a world with a vision-language host; {options.world!r} has none. Use --world shapes."
            )
        self.world: Any = world
        self.options = options
        self.amounts = QUICK if options.quick else FULL
        self.folder = Path(options.output_dir)
        self.stages = Stages(self.folder, self.say)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self._adapter: ModelAdapter | None = None

    @property
    def adapter(self) -> ModelAdapter:
        """The host, loaded when first needed."""
        if self._adapter is None:
            self._adapter = open_model(f"world:{self.options.world}")
        return self._adapter

    def say(self, text: str) -> None:
        """One line of the story."""
        print(f"  {text}", flush=True)

    def run(self) -> dict[str, Any]:
        """All stages; returns the summary that is also written to `summary.json`."""
        print(f"crosslayer demo: {self.world.summary}", flush=True)
        amounts = asdict(self.amounts)
        results: dict[str, Any] = {}
        self._stage(results, "host", amounts, self.host_scores)
        self._stage(results, "activations", amounts, self.capture)
        for name in WINDOWS:
            self._stage(results, name, amounts, self._trainer_of(name))
            self._stage(results, f"{name}-replacement", amounts, self._replacement_of(name))
        self._stage(results, "discovery", amounts, self.discovery)
        self._stage(results, "graph", amounts, self.graph)
        summary = summarise(results, self.stages.seconds, self.options)
        write_report(self.folder, self.world, results, summary)
        write_text_atomically(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        self.say(f"{sum(self.stages.seconds.values()):.0f} s in all; numbers in {self.folder / 'summary.json'}")
        return summary

    def _stage(
        self, results: dict[str, Any], name: str, amounts: dict[str, Any], compute: Callable[[Path], dict[str, Any]]
    ) -> None:
        results[name] = self.stages.run(name, {"world": self.options.world, **amounts}, compute)
        self.say(results[name]["story"])

    # --- the stages -------------------------------------------------------------------------------------------

    def questions(self) -> list[Sample]:
        """Held-out yes/no questions."""
        return self.world.questions("held_out", self.amounts.questions)

    def descriptions(self) -> list[Sample]:
        """Held-out scenes to describe."""
        return self.world.descriptions("held_out", self.amounts.descriptions)

    def host_scores(self, _: Path) -> dict[str, Any]:
        """What the host answers, as it is."""
        parameters = sum(p.numel() for p in self.adapter.model.parameters())
        result = self._scores(self.adapter.generate)
        pope, amber = result["pope"], result["amber_like"]
        result["parameters"] = parameters
        result["story"] = (
            f"host: a {parameters / 1e6:.2f} M parameter LLaVA answers {pope['accuracy']:.1f} % of held-out questions "
            f"rightly (random {pope['categories']['random']['accuracy']:.1f}, adversarial "
            f"{pope['categories']['adversarial']['accuracy']:.1f}); {amber['chair']:.1f} % of the objects it describes "
            "are not there"
        )
        return result

    def _scores(self, generate: Callable[..., list[str]]) -> dict[str, Any]:
        questions, descriptions = self.questions(), self.descriptions()
        answers = generate(questions, max_new_tokens=4, batch_size=100)
        texts = generate(descriptions, max_new_tokens=40, batch_size=100)
        return {
            "pope": self.world.score_questions(questions, answers),
            "amber_like": self.world.score_descriptions(descriptions, texts),
            "answers": answers,
            "descriptions": texts,
        }

    def capture(self, folder: Path) -> dict[str, Any]:
        """The host's MLP inputs and outputs on training and held-out scenes."""
        config = ActivationConfig(
            model_name=f"world:{self.options.world}",
            dataset_path=f"world:{self.options.world}",
            activation_dir=str(folder),
            max_samples=self.amounts.scenes,
            inference_batch_size=128,
            chunk_token_threshold=65_536,
        )
        data = ActivationGenerator(config).run()
        train, held_out = LocalActivationStore(data / "train"), LocalActivationStore(data / "held_out")
        return {
            "folder": str(data.relative_to(self.folder)),
            "train_tokens": train.total_tokens,
            "held_out_tokens": held_out.total_tokens,
            "story": f"activations: {train.total_tokens:,} tokens to train on, {held_out.total_tokens:,} held out "
            f"({train.n_layers} layers x {train.d_model}, bf16)",
        }

    def _trainer_of(self, name: str) -> Callable[[Path], dict[str, Any]]:
        def train(folder: Path) -> dict[str, Any]:
            store, held_out = (LocalActivationStore(self._data() / part, batch_size_tokens=self.amounts.batch_tokens)
                               for part in ("train", "held_out"))  # fmt: skip
            config = CLTConfig(
                num_features=self.amounts.features_per_width * store.d_model,
                num_layers=store.n_layers,
                d_model=store.d_model,
                n_targets=WINDOWS[name],
                activation_fn="topk",
                topk_k=self.amounts.k,
                **origin_of(store),
            )
            training = training_config(self.amounts).replace(activation_path=str(self._data() / "train"))
            trainer = CLTTrainer(config, training, folder / "run", store=store, held_out=held_out.one_pass)
            model = trainer.train()
            result = evaluate(model, held_out.one_pass())
            record = trainer.folder.record() or {}
            return {
                **result.to_dict(),
                "density": result.density.tolist(),
                "parameters": sum(p.numel() for p in model.parameters()),
                "train_seconds": record["summary"]["seconds"],
                "metrics": [json.loads(line) for line in (folder / "run" / METRICS).read_text().splitlines()],
                "story": f"{name}: held-out NMSE {' '.join(f'{x:.3f}' for x in result.nmse_per_layer)} by layer at L0 "
                f"{result.l0:.1f}, {result.dead_share:.1%} dead, trained in {record['summary']['seconds']:.0f} s",
            }

        return train

    def _data(self) -> Path:
        record = json.loads((self.folder / "activations" / "stage.json").read_text())
        return self.folder / record["result"]["folder"]

    def _replacement_of(self, name: str) -> Callable[[Path], dict[str, Any]]:
        def measure(_: Path) -> dict[str, Any]:
            transcoder = CrossLayerTranscoder.from_pretrained(self.folder / name / "run", self.adapter.device)
            replacement = ReplacementModel(self.adapter, transcoder)
            result = self._scores(replacement.generate)
            held_out = self.world.samples("held_out", self.amounts.fidelity_samples)
            report = measure_fidelity(replacement, held_out, max_new_tokens=40, batch_size=50)
            result["fidelity"] = report.to_dict()
            result["story"] = (
                f"{name} in place of all MLPs: {report.token_match.value:.1%} of generated tokens as the host's, KL "
                f"{report.kl.value:.4f}, POPE-like {result['pope']['accuracy']:.1f}, CHAIR "
                f"{result['amber_like']['chair']:.1f}"
            )
            return result

        return measure

    def discovery(self, folder: Path) -> dict[str, Any]:
        """Features that make the host invent things, found on one half of new scenes and steered on the other."""
        return run_discovery(self._discovery_options(folder))

    def graph(self, folder: Path) -> dict[str, Any]:
        """Why the host invents one object: an attribution graph with the image's patches."""
        options = self._discovery_options(self.folder / "discovery")
        return run_graph(options, folder, self.amounts.graph_features)

    def _discovery_options(self, folder: Path) -> DiscoverOptions:
        return discovery_options(self.options.world, self.amounts, self.folder / "clt" / "run", folder)


def training_config(amounts: Amounts) -> TrainingConfig:
    """The demo's training options; docs/benchmarks.md shows what was tried.

    A small dictionary on a narrow host takes a high learning rate, and a short dead-feature window with a strong AuxK
    keeps nearly every feature alive without costing error.
    """
    return TrainingConfig(
        training_steps=amounts.steps,
        train_batch_size_tokens=amounts.batch_tokens,
        learning_rate=6e-3,
        aux_loss_factor=1.0,
        dead_feature_window=3 * amounts.batch_tokens,
        eval_interval=max(1, amounts.steps // 5),
        checkpoint_interval=max(1, amounts.steps // 5),
    )
