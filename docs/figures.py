"""Makes the pictures of these pages from code: python docs/figures.py --demo runs/demo

windows.svg, activations.svg    from the classes themselves
error-by-distance.svg           the demo's transcoder, measured on its held-out activations
vlm-graph.png                   the page of one answer of the embedded model, photographed in Chromium
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import tyro
from matplotlib.figure import Figure

from clt.attribution import attribute
from clt.config import CLTConfig
from clt.replacement import ReplacementModel
from clt.scripts.evaluate import Options as EvaluateOptions
from clt.scripts.evaluate import evaluate_folder
from clt.viz.graph_page import write_graph_page
from clt.viz.training_plots import error_by_distance
from clt.worlds import load

IMAGES = Path(__file__).parent / "images"
mpl.rcParams["svg.hashsalt"] = "crosslayer"  # the same bytes each time


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to draw from."""

    demo: Path = Path("runs/demo")
    """Folder that `clt demo` wrote."""
    work: Path = Path("runs/figures")
    """Folder for the graph behind the picture."""


def windows(n_layers: int = 8) -> Figure:
    """Which layer's features write to which MLP output, for three windows."""
    kinds = {"CLT (0, to the end)": (0, None), "PLT (0, 1)": (0, 1), "VLM seeds (1, 3)": (1, 3)}
    figure = Figure(figsize=(8, 3.1), layout="constrained")
    for axis, (name, (first, count)) in zip(figure.subplots(1, 3), kinds.items(), strict=True):
        config = CLTConfig(num_features=1, num_layers=n_layers, d_model=1, first_target=first, n_targets=count)
        writes = np.zeros((n_layers, n_layers))
        for source in range(n_layers):
            writes[list(config.targets_of(source)), source] = 1
        axis.imshow(writes, cmap="Blues", vmin=0, vmax=1.4, origin="lower")
        axis.set(title=name, xlabel="features of layer", ylabel="MLP output of layer")
    return figure


def activations() -> Figure:
    """What each activation function keeps of eight pre-activations of one token."""
    import torch

    from clt.models import CrossLayerTranscoder

    h = torch.tensor([0.9, -0.4, 0.2, 0.6, 0.05, -0.1, 0.35, 0.5])
    kinds = {"relu": {}, "jumprelu": {"jumprelu_threshold": 0.4}, "topk": {"topk_k": 3}}
    figure = Figure(figsize=(8, 2.4), layout="constrained")
    for axis, (name, options) in zip(figure.subplots(1, 3, sharey=True), kinds.items(), strict=True):
        config = CLTConfig(num_features=8, num_layers=1, d_model=8, activation_fn=name, **options)
        model = CrossLayerTranscoder(config)
        with torch.no_grad():
            model.W_enc[0].copy_(torch.eye(8))
            model.b_enc[0].zero_()
            kept = model.encode(h.reshape(1, 1, 8))[0, 0]
        axis.bar(range(8), h, color="0.85", label="pre-activation")
        axis.bar(range(8), kept, color="tab:blue", label="activation")
        axis.set_title(", ".join([name, *(f"{key} = {value}" for key, value in options.items())]), fontsize=9)
        axis.set_xlabel("feature")
    figure.axes[0].legend(fontsize=7)
    return figure


def graph_picture(options: Options) -> None:
    """The graph page of one question, in a browser."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("The picture of the graph needs Chromium: apt install chromium")
    replacement = ReplacementModel.from_pretrained("world:shapes", options.demo / "clt" / "run")
    replacement.adapter.name = "world:shapes"  # instead of where the package is installed
    graph = attribute(replacement, load("shapes").questions("held_out", 4)[2])
    graph.save(options.work / "graph")
    write_graph_page(options.work / "graph", options.work / "graph.html")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        page.goto((options.work / "graph.html").resolve().as_uri())
        page.get_by_test_id("count").wait_for()
        page.get_by_text("Pin the 12 most influential features").click()
        page.mouse.move(1100, 740)  # away from the nodes, whose labels would cover the graph
        page.wait_for_timeout(1000)
        page.screenshot(path=IMAGES / "vlm-graph.png")
        browser.close()


def main(options: Options) -> None:
    """Draw all of them."""
    IMAGES.mkdir(exist_ok=True)
    clt, data = options.demo / "clt" / "run", next((options.demo / "activations").glob("*/*"))
    measured = evaluate_folder(EvaluateOptions(clt_checkpoint_path=str(clt), data_path=str(data)))
    drawn = {
        "windows": windows(),
        "activations": activations(),
        "error-by-distance": error_by_distance(measured.nmse_within_distance),
    }
    for name, figure in drawn.items():
        figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})
    graph_picture(options)


if __name__ == "__main__":
    main(tyro.cli(Options))
