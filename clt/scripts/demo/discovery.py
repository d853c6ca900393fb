"""The demo's last two stages: features that make the host invent things, steered; and one invention as a graph."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clt.attribution import attribute
from clt.discovery.analyse import AnalysisOptions
from clt.discovery.examples import write_examples
from clt.discovery.gains import GainOptions
from clt.discovery.layout import Layout
from clt.discovery.responses import Response
from clt.discovery.session import Session
from clt.discovery.sweep import SweepOptions
from clt.errors import DiscoveryError
from clt.scripts import discover
from clt.scripts.bench import Choices
from clt.scripts.phase_graphs import explained_prompt
from clt.types import FeatureId
from clt.viz.discovery_page import feature_examples, write_pictures
from clt.viz.graph_page import write_graph_page

if TYPE_CHECKING:
    from clt.scripts.demo.pipeline import Amounts

GRAPH_PAGE = "graph.html"
EXAMPLES_PER_FEATURE = 4
KEPT = ("total_features_analyzed", "n_tested", "n_q_below_0.05", "selected_features_count", "layer_distribution")


def discovery_options(world: str, amounts: Amounts, transcoder: Path, folder: Path) -> discover.Options:
    """All phases on one half of the scenes, steering of the host on the other, beside matched random features."""
    return discover.Options(
        dataset=world,
        root=folder,
        clt=str(transcoder),
        model=f"world:{world}",
        choices=Choices(option=(f"n={amounts.discovery_scenes}", f"asked={amounts.discovery_asked}")),
        batch_size=100,
        min_samples=5,
        analysis=AnalysisOptions(score="gradient"),
        steering=SweepOptions(
            where=("host",),
            doses=(1.0,),
            controls=amounts.controls,
            learned=amounts.learned_features,
            learned_controls=amounts.learned_controls,
            gains=GainOptions(steps=amounts.gain_steps),
            eval_batch_size=256,
        ),
    )


def run_discovery(options: discover.Options) -> dict[str, Any]:
    """Everything that is not up to date; returns what the summary keeps."""
    discover.discover(options)
    layout = Layout(options.root, options.dataset)
    found, steered = (_read(path) for path in (layout.good_features, layout.steering))
    kept = {name: found[name] for name in KEPT}
    kept |= {name: steered[name] for name in ("n_samples", "n_images", "before", "results", "higher_is_better")}
    kept |= {"n_harmful": len(steered["harmful"]), "n_helpful": len(steered["helpful"])}
    kept["page"] = str(layout.report.relative_to(options.root))
    kept["story"] = _story(kept)
    return kept


def _story(kept: Mapping[str, Any]) -> str:
    before = kept["before"]["host"]
    learned = next(row for row in kept["results"] if row["name"] == "learned")
    told = []
    for name, words in (("hal", "descriptions with an invention"), ("adversarial_accuracy", "adversarial accuracy")):
        change = learned["changes"][name]
        low, high = change["interval"]
        control = learned["learned_controls"].get(name)
        against = f", learned on random features {control['mean']:+.1f}" if control else ""
        told.append(f"{words} {before[name]:.1f} % {change['value']:+.1f} [{low:+.1f}, {high:+.1f}]{against}")
    return f"steered on {kept['n_images']} other scenes: {'; '.join(told)}"


def run_graph(options: discover.Options, folder: Path, max_feature_nodes: int) -> dict[str, Any]:
    """The graph of the first invented object, its page, and examples of the features on it.

    Raises:
        DiscoveryError: the replacement model invents nothing in any description.
    """
    session = Session.of(Layout(options.root, options.dataset))
    response, word = _first_invention(session)
    prompt = explained_prompt(session, response, is_bad=True)
    graph = attribute(
        session.replacement,
        prompt,
        slug=f"{options.dataset}-{response.number:04d}",
        scan="demo",
        max_feature_nodes=max_feature_nodes,
        batch_size=64,
    )
    graph.save(folder / "graph")
    pruned = graph.prune()
    shown = graph.features[pruned.node_mask[: graph.n_features]].tolist()
    ids = sorted({FeatureId(layer, feature) for layer, _, feature in shown})
    examples = feature_examples(session, ids, EXAMPLES_PER_FEATURE)
    write_examples(folder / "features", examples)
    write_pictures(session, examples, folder / "features")
    write_graph_page(folder / "graph", folder / GRAPH_PAGE, features=folder / "features")
    target = graph.targets[0]
    return {
        "page": GRAPH_PAGE,
        "image": response.id,
        "answer": response.response,
        "invented": word,
        "target": target.text,
        "probability": target.probability,
        "n_nodes": graph.n_nodes,
        "n_kept": int(pruned.node_mask.sum()),
        "n_patches": sum(position.patch is not None for position in graph.positions),
        "checks": graph.info["checks"],
        "story": f"graph of {word!r}, which is not in the picture ({response.response!r}): {graph.n_nodes:,} nodes, "
        f"{int(pruned.node_mask.sum()):,} kept",
    }


def _first_invention(session: Session) -> tuple[Response, str]:
    scores = {score.id: score.details for score in session.report.scores}
    for response in session.responses:
        invented = scores[response.id].get("invented")
        if invented:
            return response, str(invented[0])
    raise DiscoveryError(f"None of {len(session.responses)} answers invents an object, so there is nothing to explain.")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
