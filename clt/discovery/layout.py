"""Where each phase of feature discovery keeps its files: the folders and names of the phase guide."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clt.errors import DiscoveryError

FIGURES = ("top_features", "layer_dist", "activation_heatmap", "frequency_ratios")


@dataclass(frozen=True)
class Layout:
    """The files of one data set under one root folder."""

    root: Path
    dataset: str

    @property
    def responses(self) -> Path:
        """Answers of the replacement model, one JSON object per line (phase 1)."""
        return self.results / "answer" / "model_responses.jsonl"

    @property
    def results(self) -> Path:
        """Folder of responses and metrics."""
        return self.root / "results" / self.dataset

    @property
    def run(self) -> Path:
        """What the responses were made with: host, transcoder, data, options."""
        return self.results / "run.json"

    @property
    def metrics(self) -> Path:
        """The benchmark's own numbers and how they came about (phase 2)."""
        return self.results / "metrics.json"

    @property
    def scores(self) -> Path:
        """Counts of each sample, one JSON object per line (phase 2)."""
        return self.results / "scores.jsonl"

    @property
    def activations(self) -> Path:
        """Folder of feature activations, a file per sample (phase 1)."""
        return self.root / "activations" / self.dataset

    @property
    def classification(self) -> Path:
        """GOOD and BAD samples (phase 3)."""
        return self.analysis("classification")

    @property
    def good_features(self) -> Path:
        """Selected features with their statistics (phase 4)."""
        return self.analysis("good_features")

    @property
    def effects(self) -> Path:
        """Gradient x activation of every feature (phase 4, if asked for)."""
        return self.root / "analysis" / f"{self.dataset}_effects.npz"

    @property
    def mapping(self) -> Path:
        """Features as neurons (phase 6)."""
        return self.analysis("clt_to_mlp_mapping")

    @property
    def steering(self) -> Path:
        """Dose sweeps with controls and intervals (phase 7)."""
        return self.analysis("steering")

    @property
    def patch(self) -> Path:
        """Neuron gains for the plain host (phase 7), for `clt apply-neurons`."""
        return self.analysis("neuron_patch")

    @property
    def examples(self) -> Path:
        """Folder of feature examples (phase 5)."""
        return self.root / "analysis" / f"{self.dataset}_examples"

    @property
    def report(self) -> Path:
        """The page with everything (phase 5, again after phase 7)."""
        return self.root / "analysis" / f"{self.dataset}_report.html"

    @property
    def graphs(self) -> Path:
        """Folder of attribution graphs (phase 7)."""
        return self.root / "analysis" / "graphs" / self.dataset

    def analysis(self, what: str) -> Path:
        """`analysis/{dataset}_{what}.json`."""
        return self.root / "analysis" / f"{self.dataset}_{what}.json"

    def figure(self, what: str) -> Path:
        """`analysis/visualizations/{dataset}_{what}.png`."""
        return self.root / "analysis" / "visualizations" / f"{self.dataset}_{what}.png"

    def sample_file(self, number: int) -> Path:
        """`activations/{dataset}/sample_XXXX.pt`."""
        return self.activations / f"sample_{number:04d}.pt"

    def require(self, path: Path, phase: str) -> Path:
        """The path, if the phase that writes it has run.

        Raises:
            DiscoveryError: it has not.
        """
        if not path.exists():
            raise DiscoveryError(
                f"{path} does not exist. Phase `{phase}` writes it: run `clt phase {phase} --dataset {self.dataset}` "
                "first, with the same --root, or `clt discover` for all phases in a row."
            )
        return path
