"""The attribute phase: attribution graphs of answers, explained at the token where they go wrong."""

from __future__ import annotations

import dataclasses

from clt.attribution import attribute
from clt.attribution.circuit_tracer_json import write_circuit_tracer_json
from clt.attribution.circuit_tracer_pt import write_circuit_tracer_pt
from clt.discovery.effects import spans_of
from clt.discovery.responses import Response
from clt.discovery.session import Session
from clt.errors import DiscoveryError
from clt.types import Sample


def attribute_answers(session: Session, *, n: int, max_feature_nodes: int, batch_size: int) -> list[str]:
    """A graph (ours, circuit-tracer's .pt and JSON) for each of the first answers, BAD ones first.

    Raises:
        DiscoveryError: nothing was captured.
    """
    verdicts = {score.id: session.benchmark.verdict(score) for score in session.report.scores}
    ordered = sorted(session.responses, key=lambda response: verdicts[response.id] != "bad")
    if not ordered:
        raise DiscoveryError(f"{session.layout.responses} holds no answers to explain.")
    lines = []
    for response in ordered[:n]:
        slug = f"{session.layout.dataset}-{response.number:04d}"
        graph = attribute(
            session.replacement,
            explained_prompt(session, response, verdicts[response.id] == "bad"),
            slug=slug,
            scan=session.run.clt,
            max_feature_nodes=max_feature_nodes,
            batch_size=batch_size,
        )
        folder = session.layout.graphs / slug
        graph.save(folder)
        write_circuit_tracer_pt(graph, folder / f"{slug}.pt")
        write_circuit_tracer_json(graph.prune(), folder / "graph_data")
        lines.append(f"{response.id} ({verdicts[response.id]}): {folder}")
    return lines


def explained_prompt(session: Session, response: Response, is_bad: bool) -> Sample:
    """The prompt with the answer up to the token that is explained: the last of its first bad span, or of its first."""
    sample = next(sample for sample in session.samples if sample.id == response.id)
    score = next(score for score in session.report.scores if score.id == response.id)
    pieces = session.pieces(response)
    spans = spans_of(score.details, is_bad, pieces)
    span = next((span for span in spans if span.is_bad), spans[0] if spans else None)
    by_mention = span is not None and "mentioned" in score.details
    before = pieces[: span.end - 1] if span is not None and by_mention else []
    return dataclasses.replace(sample, prompt=sample.prompt + "".join(before), answer=None)
