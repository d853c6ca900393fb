"""circuit-tracer's `.pt` graphs: written so that its `Graph.from_pt` loads them, and read without running anything.

Such a file is a pickle with classes inside, which circuit-tracer loads unrestrictedly. We write it as an export only,
and read it with torch's restricted unpickler, for which every class the file names is a plain record of ours: nothing
in a file is imported or called. Keys: circuit-tracer 0.4.1 and 0.5.0, `Graph.to_pt`.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from clt.attribution.graph import AttributionGraph, Edges, Position, TargetNode
from clt.errors import GraphError

_KEYS = ("input_string", "input_tokens", "active_features", "activation_values", "selected_features")


def write_circuit_tracer_pt(graph: AttributionGraph, path: str | Path, *, tokenizer: str | None = None) -> Path:
    """Write a whole graph (nothing pruned, the bias node left out) for circuit-tracer.

    Args:
        tokenizer: folder or id that circuit-tracer is to open for tokens' texts; None: the host's name.

    Raises:
        GraphError: the dense matrix that the format wants would be too large, or the graph's active features (of an
            imported graph, say) are not all known.
    """
    number = {tuple(feature): place for place, feature in enumerate(graph.active_features.tolist())}
    selected = [number.get(tuple(feature)) for feature in graph.features.tolist()]
    if None in selected:
        raise GraphError("The graph does not know where its features are among the active ones; compute it again.")
    torch.save(
        {
            "input_string": "".join(position.text for position in graph.positions),
            "input_tokens": torch.tensor([position.token_id for position in graph.positions]),
            "active_features": graph.active_features,
            "activation_values": graph.active_values,
            "selected_features": torch.tensor(selected, dtype=torch.int64),
            "adjacency_matrix": graph.to_dense(),
            "logit_targets": [_LogitTarget(target.text, target.token_id) for target in graph.targets],
            "logit_probabilities": graph.target_weights,
            "vocab_size": int(graph.info.get("vocabulary", 0)),
            "cfg": _host_config(graph, tokenizer),
            "scan": str(graph.info.get("scan", "")),
        },
        Path(path),
        pickle_module=SimpleNamespace(Pickler=_Pickler, __name__=__name__),
    )
    return Path(path)


class _LogitTarget(NamedTuple):
    token_str: str
    vocab_idx: int


@dataclass
class _HostConfig:
    n_layers: int
    d_model: int
    d_head: int
    n_heads: int
    d_mlp: int
    d_vocab: int
    tokenizer_name: str
    model_name: str
    original_architecture: str
    n_key_value_heads: int | None = None
    dtype: str | None = None


_THEIR_NAMES = {
    _LogitTarget: ("circuit_tracer.attribution.targets", "LogitTarget"),
    _HostConfig: ("circuit_tracer.utils.tl_nnsight_mapping", "UnifiedConfig"),
}
"""Classes with circuit-tracer's fields -> the names under which its own unpickler finds its own."""


# The pickler in Python, whose opcodes a subclass can write; its stub does not list them.
_PythonPickler: Any = pickle._Pickler


class _Pickler(_PythonPickler):
    """Writes the names of circuit-tracer's classes, which need not be installed here."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if obj not in _THEIR_NAMES:
            return super().save_global(obj, name)
        self.write(pickle.GLOBAL + "{}\n{}\n".format(*_THEIR_NAMES[obj]).encode())
        return self.memoize(obj)


def _host_config(graph: AttributionGraph, tokenizer: str | None) -> _HostConfig:
    name = str(graph.info.get("model", ""))
    shape = dict(graph.info.get("host", {}))
    sizes = {key: int(shape.get(key, 0)) for key in ("d_model", "d_head", "n_heads", "d_mlp")}
    return _HostConfig(
        n_layers=graph.n_layers,
        d_vocab=int(graph.info.get("vocabulary", 0)),
        tokenizer_name=tokenizer or name,
        model_name=name,
        original_architecture=str(shape.get("architecture", "")),
        dtype="float32",
        **sizes,
    )


def read_circuit_tracer_pt(path: str | Path) -> AttributionGraph:
    """A graph of circuit-tracer's, whole.

    It has no bias node's values, so rows do not add up to what they explain; `row_value` is what they do add up to.

    Raises:
        GraphError: not such a file.
    """
    path = Path(path)
    try:
        records: list[Any] = [(type(name, (Record,), {}), name) for name in get_unsafe_globals_in_checkpoint(path)]
        with safe_globals(records):
            values = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise GraphError(f"{path} does not exist.") from None
    except pickle.UnpicklingError:
        raise GraphError(
            f"{path} is no graph of circuit-tracer: it holds calls, not only tensors and records."
        ) from None
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise GraphError(f"{path} is no graph of circuit-tracer ({error}).") from None
    missing = [key for key in (*_KEYS, "adjacency_matrix") if not isinstance(values, dict) or key not in values]
    if missing:
        raise GraphError(f"{path} is no graph of circuit-tracer: it lacks {', '.join(missing)}.")
    return _graph_of(values)


def _graph_of(values: dict[str, Any]) -> AttributionGraph:
    tokens, features = values["input_tokens"].tolist(), values["active_features"][values["selected_features"]]
    matrix: Tensor = values["adjacency_matrix"]
    n_targets = len(values["logit_probabilities"])
    n_layers = (len(matrix) - len(features) - len(tokens) - n_targets) // max(len(tokens), 1)
    rows = torch.cat([matrix[: len(features)], matrix[len(matrix) - n_targets :]]).float()
    row, source = rows.nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=len(rows))
    edges = Edges(torch.cat([counts.new_zeros(1), counts.cumsum(0)]), source.int(), rows[row, source])
    return AttributionGraph(
        features=features.long(),
        activations=values["activation_values"][values["selected_features"]].float(),
        positions=[Position(token, "", "text") for token in tokens],
        targets=[
            TargetNode(str(text), int(token), probability, len(tokens) - 1)
            for (text, token), probability in zip(_targets_of(values), values["logit_probabilities"].tolist())
        ],
        edges=edges,
        row_value=edges.sums(edges.weight),
        active_features=values["active_features"].long(),
        active_values=values["activation_values"].float(),
        n_layers=n_layers,
        prompt=str(values["input_string"]),
        info={
            "slug": "imported",
            "model": "",
            "scan": str(values.get("scan") or ""),
            "labels": {},
            "vocabulary": int(values.get("vocab_size") or 0),
            "options": {"unselected": "drop"},
        },
    )


def _targets_of(values: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Text and id of each target: tuples, records of circuit-tracer's class, or (in older files) ids alone."""
    targets: Any = values.get("logit_targets", values.get("logit_tokens"))
    if isinstance(targets, Tensor):
        return [("", token) for token in targets.tolist()]
    return [tuple(target.arguments if isinstance(target, Record) else target) for target in targets]


class Record:
    """What a class in a file is turned into: its arguments and state, nothing else."""

    def __init__(self, *arguments: Any) -> None:
        """Take whatever the class was made of."""
        self.arguments = arguments

    def __call__(self, *arguments: Any) -> Record:
        """Where a file would call what a class gave it."""
        return Record(*arguments)

    def __setstate__(self, state: Any) -> None:
        """Keep the state as it is."""
        self.state = state

    @staticmethod
    def __new__(cls: type[Record], *arguments: Any) -> Record:
        """Named tuples are made by __new__ alone."""
        record = object.__new__(cls)
        record.arguments = arguments
        return record
