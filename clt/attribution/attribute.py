"""Compute the attribution graph of one prompt.

    pass 1  the host, recorded; its features, errors and constants
    pass 2  the linearised host on copies of the prompt, with gradient
    rows    targets first, then features, the most influential on the targets next, until there are enough

Several ranks (`attribute_on`) compute batches of rows in turn; the first keeps and ranks them, so that the graph is
that of one rank. Rows go to disk as they come. At the end the features without a row become part of their layer's
error, and every row is checked: its entries must add up to what it explains.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from clt import __version__
from clt.attribution.assemble import assemble
from clt.attribution.backward import Backward, Reads, constants
from clt.attribution.graph import AttributionGraph
from clt.attribution.options import AttributionOptions
from clt.attribution.patch_groups import with_groups
from clt.attribution.plan import Plan, automatic_batch_size, plan_of
from clt.attribution.prompt import Prompt, describe_positions, images_of, prepare_prompt, token_text
from clt.attribution.rows import RowStore, influence_so_far
from clt.attribution.sources import ActiveFeatures, Sources, active_features
from clt.attribution.targets import TargetChoice, Targets, choose_targets
from clt.errors import ConfigError, GraphError
from clt.lm import HostInputs
from clt.lm.linear import LinearHost
from clt.lm.linear_constants import not_linear
from clt.models import CrossLayerTranscoder
from clt.parallel.collectives import Group, first_difference
from clt.parallel.mesh import Mesh, mesh_of_one
from clt.progress import progress_bar
from clt.replacement import ReplacementModel
from clt.replacement.loading import check_same_device
from clt.types import Sample

# Rows of a host that is linear add up to rounding; others do not, by far.
_CLOSED = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}


@dataclass(frozen=True)
class Setting:
    """Everything rows are computed from."""

    linear: LinearHost
    transcoder: CrossLayerTranscoder
    sources: Sources
    targets: Targets
    constants: Float32[Tensor, "layer_and_final position d_model"]

    @property
    def active(self) -> ActiveFeatures:
        """Every feature that fires."""
        return self.sources.active


def attribute(
    model: ReplacementModel,
    prompt: Prompt,
    *,
    targets: Sequence[TargetChoice] | None = None,
    work_dir: str | Path | None = None,
    progress: bool = False,
    slug: str | None = None,
    scan: str | None = None,
    **options: Any,
) -> AttributionGraph:
    """The graph of direct effects between embeddings, features, errors and targets on one prompt.

    The host itself is explained, with nothing replaced: attention patterns and norm denominators are held as they are
    and every MLP output is features plus error. An entry `[t, s]` is how much of t's pre-activation (of a target's
    logit minus the mean logit) comes directly from s.

    Args:
        prompt: text, a `Sample` with images, or token ids.
        targets: token ids, single-token texts, `Contrast`s or `Direction`s; None: the most probable tokens.
        work_dir: where rows are kept while they are computed; the same call goes on from there after a kill. None: a
            temporary folder.
        slug: short name for files; None: made from the prompt.
        scan: what the graph and its exports call the transcoder; None: after its host.
        options: fields of `AttributionOptions`.

    Raises:
        GraphError: no feature fires, a target is no token, `work_dir` belongs to another graph.
        HostModelError: the host cannot be linearised.
        ConfigError: an option is out of range, or the transcoder is of a kind without decoders.
    """
    given: dict[str, Any] = {"targets": targets, "work_dir": work_dir, "progress": progress, "slug": slug, "scan": scan}
    graph = attribute_on(mesh_of_one("cpu"), model, prompt, **given, **options)
    assert graph is not None
    return graph


def attribute_on(
    mesh: Mesh,
    model: ReplacementModel,
    prompt: Prompt,
    *,
    targets: Sequence[TargetChoice] | None = None,
    work_dir: str | Path | None = None,
    progress: bool = False,
    slug: str | None = None,
    scan: str | None = None,
    **options: Any,
) -> AttributionGraph | None:
    """`attribute` by all ranks of a mesh, each with its own copy of the host.

    Returns the graph on the first rank, None on the others.

    Args:
        mesh: every rank calls this with the same arguments.

    Raises:
        GraphError: ranks see different activations; else as `attribute`.
    """
    chosen = AttributionOptions(**options)
    inputs = prepare_prompt(model.adapter, prompt)
    positions = describe_positions(model.adapter, inputs, prompt)
    with torch.no_grad():
        setting = _setting(model, inputs, targets, chosen)
    info = _information(model, setting, chosen, slug or _slug(prompt, inputs), scan)
    if chosen.group_patches is not None:
        positions = with_groups(positions, setting.linear.embeddings, chosen.group_patches)
    made_of = {**info, "prompt": inputs.input_ids.tolist(), "data": _digest(setting)}
    if (found := first_difference(mesh.world, made_of, "what all ranks are to explain")) is not None:
        raise GraphError(
            f"Rank {found[0]} is to explain something else than rank 0: {', '.join(found[1])} differ. All ranks need "
            "the same command line, and machines that compute the same numbers."
        )
    batch = info["options"]["batch_size"]
    if not mesh.is_main:
        compute_rows(None, setting, chosen, batch, False, mesh.world)
        return None
    with _folder(work_dir) as folder:
        store = RowStore(folder, made_of, setting.sources.n_columns)
        compute_rows(store, setting, chosen, batch, progress, mesh.world)
        text, images = _text(model, prompt, inputs), images_of(prompt)
        graph = assemble(store, setting.sources, setting.targets.nodes, positions, text, chosen, info, images)
    _check_closed(graph, model)
    return graph


def attribution_plan(
    model: ReplacementModel, prompt: Prompt, *, targets: Sequence[TargetChoice] | None = None, **options: Any
) -> Plan:
    """What `attribute` with the same arguments would take in memory and on disk; costs one pass of the host.

    Raises:
        GraphError, HostModelError, ConfigError: as `attribute`.
    """
    chosen = AttributionOptions(**options)
    with torch.no_grad():
        setting = _setting(model, prepare_prompt(model.adapter, prompt), targets, chosen)
    return plan_of(model, setting, chosen)


def run_attribution(
    *,
    prompt: Prompt,
    model: ReplacementModel,
    max_feature_nodes: int | None = 7500,
    desired_logit_prob: float = 0.95,
    **options: Any,
) -> AttributionGraph:
    """`attribute` under the name and with the arguments that the seeds' phase guide uses."""
    return attribute(
        model, prompt, max_feature_nodes=max_feature_nodes, desired_logit_prob=desired_logit_prob, **options
    )


def compute_rows(
    store: RowStore | None,
    setting: Setting,
    options: AttributionOptions,
    batch: int,
    progress: bool,
    group: Group | None = None,
) -> None:
    """All rows that are not there yet, targets first.

    Args:
        store: of the group's first rank, which says what comes next; None: of the others.
        group: the ranks that share the work; None: this process alone.
    """
    group = mesh_of_one("cpu").world if group is None else group
    backward = Backward(setting.linear, setting.transcoder, setting.sources, batch)
    queues: Iterator[list[int]] = iter(()) if store is None else _queues(store, setting, options, batch)
    total = _n_wanted(setting, options) + len(setting.targets.nodes)
    done_before = 0 if store is None else len(store.row_ids)
    with progress_bar(total, "rows", "rows", initial=done_before, hidden=not progress) as bar:
        while queue := group.tell(next(queues, []), "the next rows"):
            for start in range(0, len(queue), batch * group.size):
                here = start + group.rank * batch
                computed = group.bring(_compute(setting, backward, queue[here : here + batch]), "rows")
                for each in computed:
                    if store is not None and each is not None:
                        store.append(*each)
                        bar.update(len(each[0]))


def _n_wanted(setting: Setting, options: AttributionOptions) -> int:
    """Features that get a row."""
    active = len(setting.active)
    return active if options.max_feature_nodes is None else min(active, options.max_feature_nodes)


def _queues(store: RowStore, setting: Setting, options: AttributionOptions, batch: int) -> Iterator[list[int]]:
    """What to compute next: the targets, then features as the rows so far rank them."""
    n_targets, wanted = len(setting.targets.nodes), _n_wanted(setting, options)
    first_target = setting.sources.n_columns + 1
    weights = {first_target + k: node.probability for k, node in enumerate(setting.targets.nodes)}
    if missing := sorted(set(weights) - set(store.row_ids)):
        yield missing
    while (done := len(store.row_ids) - n_targets) < wanted:
        queue = store.queue() or _next_features(store, setting, weights, wanted - done, options, batch, wanted)
        # A batch of one layer goes back no further than it must.
        queue = sorted(queue)
        store.save_queue(queue)
        yield queue


def _next_features(
    store: RowStore,
    setting: Setting,
    weights: dict[int, float],
    missing: int,
    options: AttributionOptions,
    batch: int,
    wanted: int,
) -> list[int]:
    """The features to compute next: all, or the most influential ones through the rows there are."""
    active = len(setting.active)
    visited = np.zeros(active, dtype=bool)
    visited[[row for row in store.row_ids if row < active]] = True
    if wanted == active:
        return np.flatnonzero(~visited).tolist()
    influence = influence_so_far(store, weights, setting.sources.n_columns)[:active]
    ranked = np.argsort(-influence, kind="stable")
    return ranked[~visited[ranked]][: min(options.update_interval * batch, missing)].tolist()


def _compute(setting: Setting, backward: Backward, ids: Sequence[int]) -> Any:
    """One batch of rows as `RowStore.append` takes them; None for no rows."""
    if not ids:
        return None
    reads, constant = _reads(setting, ids)
    rows = backward.rows(reads)
    seen = reads.vector.double()
    where = reads.layer, reads.position
    everything = torch.cat([setting.linear.reads, setting.linear.final[None]])[where].double()
    values = (seen * everything).sum(1) + constant
    bias = (seen * setting.constants[where].double()).sum(1) + constant
    with_bias = torch.cat([rows, bias[:, None].float()], 1).cpu()
    return list(ids), reads.layer.tolist(), values.tolist(), with_bias


def _reads(setting: Setting, ids: Sequence[int]) -> tuple[Reads, Tensor]:
    """Read vectors of rows, and the constant each adds to its sum."""
    linear, transcoder, active = setting.linear, setting.transcoder, setting.active
    first_target, top = setting.sources.n_columns + 1, len(linear.reads)
    layers, places, vectors, constant = [], [], [], []
    for row in ids:
        if row >= first_target:
            layers.append(top)
            places.append(setting.targets.nodes[row - first_target].position)
            vectors.append(setting.targets.vectors[row - first_target])
            constant.append(torch.zeros((), dtype=torch.float64, device=vectors[-1].device))
            continue
        layer, feature = int(active.layer[row]), int(active.feature[row])
        layers.append(layer)
        places.append(int(active.position[row]))
        vector = transcoder.W_enc[layer][feature].detach().float() * transcoder.input_scale[layer]
        shift = (vector.double() * transcoder.input_shift[layer].double()).sum()
        constant.append(transcoder.b_enc[layer][feature].detach().double() - shift)
        vectors.append(_through_norm(transcoder, vector, linear.reads[layer, places[-1]]))
    device = linear.reads.device
    reads = Reads(
        torch.tensor(layers, device=device), torch.tensor(places, device=device), torch.stack(vectors).to(device)
    )
    return reads, torch.stack(constant)


def _through_norm(transcoder: CrossLayerTranscoder, vector: Tensor, x: Tensor) -> Tensor:
    """What reads x as `vector` reads its norm, where the transcoder has one; its denominator is held, as the host's."""
    if transcoder.config.input_norm == "none":
        return vector
    # 1e-5 is layer_norm's default, which the transcoder uses.
    return (vector - vector.mean()) * (x.float().var(unbiased=False) + 1e-5).rsqrt()


def _setting(
    model: ReplacementModel,
    inputs: HostInputs,
    targets: Sequence[TargetChoice] | None,
    options: AttributionOptions,
) -> Setting:
    """Pass 1: the host recorded, its features, targets and constants."""
    adapter, transcoder = model.adapter, model.transcoder
    if not isinstance(transcoder, CrossLayerTranscoder):
        raise ConfigError(f"{type(transcoder).__name__} has no decoders to attribute to; use a CrossLayerTranscoder.")
    check_same_device(adapter, transcoder)
    if transcoder.config.input_norm != "none" and transcoder.config.skip_connection != "none":
        raise ConfigError("A skip connection behind a norm (input_norm = 'layer') is not linear. Train without one.")
    position = _position(options.position, inputs.input_ids.shape[1])
    linear = adapter.linearised(inputs, keep=[position])
    active = active_features(linear, transcoder, options.ignored_positions)
    sources = Sources(linear, transcoder, active, options.ignored_positions)
    tokenizer: Any = adapter.tokenizer
    chosen = choose_targets(
        linear,
        targets,
        options,
        position,
        tokens_of=lambda text: [] if tokenizer is None else tokenizer(text, add_special_tokens=False)["input_ids"],
        text_of=lambda token: token_text(adapter, token),
    )
    return Setting(linear, transcoder, sources, chosen, constants(linear, transcoder, sources))


def _information(
    model: ReplacementModel, setting: Setting, options: AttributionOptions, slug: str, scan: str | None
) -> dict[str, Any]:
    """What graph.json says besides nodes."""
    config = setting.transcoder.config
    return {
        "slug": slug,
        "model": model.adapter.name,
        "scan": scan or f"transcoder of {config.model_name or model.adapter.name}",
        "n_features": config.num_features,
        "vocabulary": len(setting.linear.unembedding),
        "host": {"d_model": config.d_model, "architecture": type(model.adapter.model).__name__},
        "options": {
            **options.to_dict(),
            "batch_size": options.batch_size or automatic_batch_size(setting.sources),
        },
        "labels": {},
        "versions": {"crosslayer": __version__, "torch": torch.__version__},
    }


def _check_closed(graph: AttributionGraph, model: ReplacementModel) -> None:
    """Refuse a graph whose rows do not add up: the host is curved somewhere."""
    if graph.info["options"]["unselected"] == "drop":
        return
    error = graph.info["checks"]["row_sum_error"]
    if error > _CLOSED.get(model.adapter.dtype, 0.2):
        raise not_linear(
            type(model.adapter.model).__name__,
            f"the rows of the graph miss what they explain by up to {error:.1%} of their absolute sum",
        )


def _position(position: int, length: int) -> int:
    if not -length <= position < length:
        raise GraphError(f"position = {position}, but the prompt has {length} positions. -1 is the last.")
    return position % length


def _digest(setting: Setting) -> str:
    """Fingerprint of what the rows depend on besides names and options: weights, images."""
    digest = hashlib.sha256()
    tensors = (setting.active.feature, setting.active.value, setting.sources.errors, setting.targets.vectors)
    for tensor in (*tensors, setting.linear.embeddings):
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _slug(prompt: Prompt, inputs: HostInputs) -> str:
    """The prompt's first words and a few digits of its fingerprint."""
    text = prompt.prompt if isinstance(prompt, Sample) else prompt if isinstance(prompt, str) else "tokens"
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in text.lower()).split()
    return "-".join([*words[:6], hashlib.sha256(json.dumps(inputs.input_ids.tolist()).encode()).hexdigest()[:6]])


def _text(model: ReplacementModel, prompt: Prompt, inputs: HostInputs) -> str:
    """The prompt as the host reads it; image tokens as the user wrote them."""
    if isinstance(prompt, Sample):
        return prompt.prompt
    return "".join(token_text(model.adapter, token) for token in inputs.input_ids[0].tolist())


@contextmanager
def _folder(work_dir: str | Path | None) -> Iterator[Path]:
    if work_dir is not None:
        yield Path(work_dir)
        return
    with tempfile.TemporaryDirectory(prefix="clt-attribute-") as folder:
        yield Path(folder)
