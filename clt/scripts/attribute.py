"""Compute an attribution graph: which features made the model say what it says next, and what made them fire.

clt attribute --model gpt2 --transcoder runs/gpt2 --prompt "The capital of France is"
clt attribute --world two-hop
clt attribute --model llava --transcoder runs/llava --image cat.jpg --prompt "USER: <image> What is it? ASSISTANT:"
torchrun --nproc-per-node 4 -m clt attribute ...     the same graph by 4 processes (docs/many-machines.md)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from clt.attribution import AttributionGraph, AttributionOptions, Contrast, Plan, attribute_on, attribution_plan
from clt.attribution.circuit_tracer_json import write_circuit_tracer_json
from clt.attribution.circuit_tracer_pt import write_circuit_tracer_pt
from clt.attribution.prompt import token_text
from clt.attribution.prune import PrunedGraph
from clt.attribution.targets import TargetChoice
from clt.errors import ConfigError
from clt.parallel.mesh import PATIENCE_SECONDS, Mesh, open_mesh, own_device
from clt.replacement import ReplacementModel
from clt.scripts.plans import record_options, transcoder_line
from clt.types import Sample
from clt.viz.graph_page import write_graph_page


@dataclass(frozen=True, kw_only=True)
class Options(AttributionOptions):
    """Host, transcoder, prompt, targets, and where the graph goes."""

    model: Annotated[str | None, tyro.conf.arg(aliases=("--model-name", "-m"))] = None
    """Hugging Face id or local folder of the host, or world:NAME."""
    transcoder: Annotated[str | None, tyro.conf.arg(aliases=("--clt", "-t"))] = None
    """Folder of the transcoder: ours, or another project's that can be read."""
    prompt: Annotated[str | None, tyro.conf.arg(aliases=("-p",))] = None
    """What the host reads, up to the token to be explained."""
    image: tuple[Path, ...] = ()
    """Images of the prompt, in the order of its placeholders."""
    world: str | None = None
    """An embedded world instead: its host, one of its questions, and a transcoder trained on the spot."""
    target: tuple[str, ...] = ()
    """Explain these tokens (with the space in front) instead of the most probable ones."""
    minus: str | None = None
    """Explain the logit of --target minus that of this token."""
    node_threshold: float = 0.8
    """Share of the influence that kept nodes hold."""
    edge_threshold: float = 0.98
    """Share of the edges' scores that kept edges hold."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=("-o",))] = None
    """Folder for the graph; None: graphs/SLUG."""
    slug: str | None = None
    """Short name for files and links; None: made from the prompt."""
    scan: str | None = None
    """What exports call the transcoder (a Neuronpedia model id to upload there); None: its folder."""
    neuronpedia: Path | None = None
    """Also write circuit-tracer's and Neuronpedia's JSON, with graph-metadata.json, into this folder."""
    pt: Path | None = None
    """Also write circuit-tracer's .pt file."""
    html: Path | None = None
    """Also write a page that shows the graph in any browser, all in one file."""
    features: Path | None = None
    """Folder of feature examples and labels for --html."""
    plan: bool = False
    """Only say what the graph would take in memory and on disk; costs one pass of the host."""
    work_dir: Path | None = None
    """Keep rows here while they are computed, so that the same command goes on after a kill."""
    dtype: str | None = None
    """Type the host runs in; None: as saved."""
    device: str | None = None
    """Torch device; None: a GPU if there is one."""
    json: bool = False
    """Print the result as JSON instead of tables."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.world is None and (self.model is None or self.transcoder is None or self.prompt is None):
            raise ConfigError(
                "clt attribute needs --model, --transcoder and --prompt, or --world (two-hop or shapes) to try it out."
            )
        if self.minus is not None and len(self.target) != 1:
            raise ConfigError("--minus goes with exactly one --target: the two tokens whose logits are compared.")
        if self.features is not None and self.html is None:
            raise ConfigError("--features is for the page: give --html PAGE.html too, or use `clt serve graphs`.")

    @property
    def attribution(self) -> dict[str, object]:
        """The options of `attribute` among these."""
        return {name: getattr(self, name) for name in AttributionOptions.__dataclass_fields__}

    @property
    def targets(self) -> list[TargetChoice] | None:
        """What to explain; None: the most probable tokens."""
        if self.minus is not None:
            return [Contrast(self.target[0], self.minus)]
        return list(self.target) or None


def plan(options: Options) -> dict[str, Any]:
    """What would be read and written."""
    folder = options.out or Path("graphs") / (options.slug or "<a name made from the prompt>")
    files = [each for each in (options.neuronpedia, options.pt, options.html) if each is not None]
    reads = [f"the world {options.world}: its host, and a transcoder trained on the spot"]
    if options.world is None:
        reads = [f"the host {options.model}", transcoder_line(str(options.transcoder))]
    return {"read": [*reads, *map(str, options.image)], "write": [str(each) for each in (folder, *files)]}


def main(options: Options) -> None:
    """Compute, check, save, print."""
    # Ranks exchange rows through the machine's memory and network, even where hosts are on GPUs.
    with open_mesh(device="cpu", timeout_seconds=PATIENCE_SECONDS) as mesh:
        model, prompt, scan = open_all(options, mesh)
        if options.plan:
            if mesh.is_main:
                show_plan(attribution_plan(model, prompt, targets=options.targets, **options.attribution), options.json)
            return
        graph = attribute_on(
            mesh,
            model,
            prompt,
            targets=options.targets,
            work_dir=options.work_dir,
            progress=not options.json,
            slug=options.slug,
            scan=scan,
            **options.attribution,
        )
        if graph is not None:
            write_and_report(options, graph, model)


def write_and_report(options: Options, graph: AttributionGraph, model: ReplacementModel) -> None:
    """Save the graph in every form asked for, and print."""
    folder = options.out or Path("graphs") / str(graph.info["slug"])
    graph.save(folder)
    record_options(folder, options)
    pruned = graph.prune(node_threshold=options.node_threshold, edge_threshold=options.edge_threshold)
    if options.neuronpedia is not None:
        write_circuit_tracer_json(
            pruned,
            options.neuronpedia,
            scan=options.scan,
            node_threshold=options.node_threshold,
            edge_threshold=options.edge_threshold,
        )
    if options.pt is not None:
        write_circuit_tracer_pt(graph, options.pt)
    if options.html is not None:
        write_graph_page(folder, options.html, features=options.features)
    if options.json:
        print(json.dumps(summary(graph, pruned, folder), indent=2))
        return
    report(graph, pruned, model, folder)


def show_plan(plan: Plan, as_json: bool) -> None:
    """Sizes, largest parts named."""
    if as_json:
        print(json.dumps(plan.to_dict(), indent=2))
        return
    names = ("model", "patterns", "prompt", "pairs", "backward", "memory", "disk", "graph")
    sizes = plan.to_dict()
    print(
        f"{plan.n_positions:,} positions, {plan.n_active:,} active features with {plan.n_pairs:,} pairs of feature and "
        f"layer written to; {plan.n_rows:,} rows, {plan.batch_size} at a time.\n"
        + "\n".join(f"{name:9} {sizes[name] / 1e9:7.2f} GB" for name in names)
    )


def open_all(options: Options, mesh: Mesh) -> tuple[ReplacementModel, str | Sample, str]:
    """Host with transcoder, prompt, and what to call the transcoder."""
    if options.world is not None:
        from clt.attribution.faithfulness.models import world_model, world_prompt

        model = world_model(options.world)
        chosen = options.prompt or world_prompt(options.world)
        return model, _prompt(chosen, options.image), f"world:{options.world}"
    transcoder = str(options.transcoder)
    model = ReplacementModel.from_pretrained(
        str(options.model), transcoder, dtype=options.dtype, device=own_device(mesh, options.device)
    )
    scan = options.scan or str(Path(transcoder).resolve())
    return model, _prompt(str(options.prompt), options.image), scan


def _prompt(prompt: str | Sample, images: tuple[Path, ...]) -> str | Sample:
    if isinstance(prompt, Sample) or not images:
        return prompt
    return Sample(id="prompt", prompt=prompt, images=images)


def summary(graph: AttributionGraph, pruned: PrunedGraph, folder: Path) -> dict[str, object]:
    """What the JSON output says."""
    return {
        "graph": str(folder),
        "slug": graph.info["slug"],
        "targets": [
            {"text": target.text, "token_id": target.token_id, "probability": target.probability}
            for target in graph.targets
        ],
        "checks": graph.info["checks"],
        "nodes": graph.n_nodes,
        "edges": len(graph.edges.weight),
        "kept_nodes": int(pruned.node_mask.sum()),
        "kept_edges": int(pruned.kept_edges.sum()),
    }


def report(graph: AttributionGraph, pruned: PrunedGraph, model: ReplacementModel, folder: Path) -> None:
    """Targets, the strongest features, and the checks."""
    console = Console()
    checks = graph.info["checks"]
    for target in graph.targets:
        console.print(f"{target.text!r}  p = {target.probability:.3f}", markup=False, highlight=False)
    table = Table(title="Strongest features")
    for column in ("layer", "position", "token", "feature", "activation", "influence"):
        table.add_column(column, justify="left" if column == "token" else "right")
    for number in graph.influence[: graph.n_features].argsort(descending=True)[:10].tolist():
        layer, position, feature = graph.features[number].tolist()
        shown = repr(token_text(model.adapter, graph.positions[position].token_id))
        strength = f"{graph.activations[number]:.3f}", f"{graph.influence[number]:.4f}"
        table.add_row(str(layer), str(position), shown, str(feature), *strength)
    console.print(table)
    scores = ", ".join(f"{name} {value:.3f}" for name, value in checks["scores"].items())
    console.print(
        f"{checks['n_selected']:,} of {checks['n_active']:,} active features; {graph.n_nodes:,} nodes, "
        f"{len(graph.edges.weight):,} edges; kept {int(pruned.node_mask.sum()):,} and "
        f"{int(pruned.kept_edges.sum()):,}.\nRows add up to {checks['row_sum_error']:.1e} of their absolute sum. "
        f"{scores}.\n{folder}",
        highlight=False,
    )
