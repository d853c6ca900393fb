"""Attribution graphs: which features made the model say it, exactly, in bounded memory.

graph = attribute(ReplacementModel.from_pretrained("gpt2", "runs/gpt2"), "The capital of France is")
pruned = graph.prune(node_threshold=0.8, edge_threshold=0.98)
graph.save("graphs/france")                # graph.json + graph.safetensors, docs/attribution.md
AttributionGraph.load("graphs/france")
"""

from clt.attribution.attribute import attribute, attribute_on, attribution_plan, run_attribution
from clt.attribution.circuit_tracer_json import write_circuit_tracer_json
from clt.attribution.circuit_tracer_pt import read_circuit_tracer_pt, write_circuit_tracer_pt
from clt.attribution.circuit_tracer_read import read_circuit_tracer_json
from clt.attribution.graph import AttributionGraph
from clt.attribution.options import AttributionOptions
from clt.attribution.plan import Plan
from clt.attribution.prune import PrunedGraph
from clt.attribution.scores import GraphScores, subgraph_scores
from clt.attribution.targets import Contrast, Direction

__all__ = [
    "AttributionGraph",
    "AttributionOptions",
    "Contrast",
    "Direction",
    "GraphScores",
    "Plan",
    "PrunedGraph",
    "attribute",
    "attribute_on",
    "attribution_plan",
    "read_circuit_tracer_json",
    "read_circuit_tracer_pt",
    "run_attribution",
    "subgraph_scores",
    "write_circuit_tracer_json",
    "write_circuit_tracer_pt",
]
