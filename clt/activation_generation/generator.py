"""Shows a corpus to a host and writes what its MLPs read and wrote."""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from clt.activation_generation.batches import SPLITS, BatchPlanner, RowBatch, Split
from clt.activation_generation.corpus import dataset_folder, is_world, model_folder, open_model, samples_of
from clt.activation_generation.packing import TextPacker
from clt.activation_generation.publish import Publisher
from clt.activation_generation.share import Share
from clt.config import ActivationConfig
from clt.data.background import Background
from clt.data.client import ServerClient
from clt.data.codecs import Codec
from clt.data.files import write_file
from clt.data.metadata import METADATA_FILE, DatasetInfo, read_json
from clt.data.progress import require_same_plan
from clt.data.sources import read_metadata
from clt.data.streaming import StreamingActivationStore
from clt.data.writer import ActivationWriter
from clt.errors import DatasetError
from clt.lm import HostInputs, ModelAdapter
from clt.lm.nnsight_backend import NNsightAdapter, require_nnsight, through_nnsight
from clt.parallel.mesh import Mesh
from clt.progress import progress_bar
from clt.types import ActivationBatch, TokenKind

WHERE_ONLY = (
    "activation_dir",
    "device",
    "device_map",
    "cache_path",
    "dataset_trust_remote_code",
    "streaming",
    "compute_norm_stats",
    "on_bad_sample",
    "remote_server_url",
    "delete_after_upload",
    "upload_max_retries",
    "upload_initial_backoff",
    "upload_max_backoff",
    "storage_type",
    "enable_profiling",
    "backend",
    "nnsight_tracer_kwargs_json",
    "nnsight_invoker_args_json",
)
"""Options that say where or how to work, not what comes out."""


class ActivationGenerator:
    """One data set of activations.

    `run()` may be interrupted at any moment; running it again goes on from the last finished shard and gives the same
    rows as a run without interruption. A finished data set is left alone.

    Args:
        config: host, corpus, format and place.
        adapter: the host, if it is already loaded.
        mesh: the ranks that share the work, each every n-th batch (docs/many-machines.md); None: this process alone.
    """

    def __init__(self, config: ActivationConfig, adapter: ModelAdapter | None = None, mesh: Mesh | None = None) -> None:
        if config.backend == "nnsight":
            require_nnsight()
        self.config = config
        self.folder = (
            Path(config.activation_dir)
            / model_folder(config.model_name)
            / dataset_folder(config.dataset_path, config.dataset_split)
        )
        self._adapter = adapter
        self._share = Share.of(mesh)
        self._codec = Codec(config.output_format, "none" if config.compression == "None" else config.compression)
        self._skipped: list[dict[str, str]] = []

    @property
    def splits(self) -> dict[Split, Path]:
        """The folder of each split; without held-out samples everything lies in the data set's own folder."""
        if self.config.held_out_fraction == 0:
            return {"train": self.folder}
        return {split: self.folder / split for split in SPLITS}

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to do.

        Raises:
            DatasetError: there is a finished data set made with other options.
        """
        finished = [folder for folder in self.splits.values() if (folder / METADATA_FILE).exists()]
        for folder in finished:
            saved = read_json(folder)["provenance"].get("options", {})
            require_same_plan(folder, _comparable(saved), _comparable(self._options()))
        return len(finished) == len(self.splits)

    def run(self) -> Path:
        """Write the data set and return its folder.

        Raises:
            DatasetError: other options than before, a corpus that cannot be read, a full disk.
            HostModelError: the host cannot be loaded or hooked.
        """
        self._share.require_same_options(self.config)
        if not self._share.mesh.is_main:
            if not self.is_finished:
                self._make(dict.fromkeys(self.splits))
            return self.folder
        with ExitStack() as uploads:
            publishers: dict[Split, Publisher | None] = {
                split: self._publisher(split, uploads) for split in self.splits
            }
            if not self.is_finished:
                self._make(publishers)
            for split, publisher in publishers.items():
                if publisher is not None:
                    publisher.finish(read_metadata(self.splits[split]).shards)
        return self.folder

    def stream(self, **options: Any) -> StreamingActivationStore:
        """The training part of the data set as a live store that never touches the disk.

        Args:
            options: see `StreamingActivationStore`.
        """
        adapter = self.host()
        options = {"seed": self.config.seed, **options}
        return StreamingActivationStore(lambda _: self._live(adapter), **options)

    def batches(self) -> Iterator[ActivationBatch]:
        """The training part of the data set once, batch by batch as the host gives it."""
        return self._live(self.host())

    @torch.no_grad()
    def _live(self, adapter: ModelAdapter) -> Iterator[ActivationBatch]:
        for rows in self._batches(adapter):
            if rows.split == "train":
                inputs = rows.prepare(adapter)
                if n_tokens := self._count(inputs):
                    yield self._capture(adapter, inputs, rows, n_tokens)

    def _make(self, publishers: Mapping[Split, Publisher | None]) -> None:
        self._share.require_same_count(list(self.splits.values()))
        adapter = self.host()
        missing: dict[Split, Path] = {
            split: path for split, path in self.splits.items() if not (path / METADATA_FILE).exists()
        }
        with ExitStack() as stack:
            writers: dict[Split, ActivationWriter] = {
                split: stack.enter_context(self._writer(split, folder, adapter, publishers[split]))
                for split, folder in missing.items()
            }
            with torch.no_grad():
                self._write(adapter, writers)
            self._require_tokens(writers)
        if not self._share.is_whole:
            for split, folder in missing.items():
                self._share.merge(folder, self._info(split, adapter), self._codec, **self._form)
        if self._share.mesh.is_main:
            self._list_skipped()

    def _publisher(self, split: Split, uploads: ExitStack) -> Publisher | None:
        config = self.config
        if config.remote_server_url is None:
            return None
        client = ServerClient(
            config.remote_server_url,
            str(self.splits[split].relative_to(config.activation_dir)),
            timeout_seconds=300,
            attempts=config.upload_max_retries + 1,
            first_pause_seconds=config.upload_initial_backoff,
            longest_pause_seconds=config.upload_max_backoff,
        )
        uploads.callback(client.close)
        publisher = Publisher(self.splits[split], client, delete_after_upload=config.delete_after_upload)
        uploads.callback(publisher.close)
        return publisher

    def host(self) -> ModelAdapter:
        """The host, loaded on first use."""
        config = self.config
        if self._adapter is None:
            self._adapter = self._load_host()
        if config.backend == "nnsight" and not isinstance(self._adapter, NNsightAdapter):
            self._adapter = through_nnsight(self._adapter, config.nnsight_tracer_kwargs, config.nnsight_invoker_args)
        return self._adapter

    def _load_host(self) -> ModelAdapter:
        config = self.config
        placed: dict[str, Any] = {} if config.device_map is None else {"device_map": config.device_map}
        return open_model(
            config.model_name,
            dtype=config.model_dtype,
            device=self._share.device(config),
            input_template=config.mlp_input_module_path_template,
            output_template=config.mlp_output_module_path_template,
            **placed,
        )

    def _writer(
        self, split: Split, folder: Path, adapter: ModelAdapter, publisher: Publisher | None
    ) -> ActivationWriter:
        return ActivationWriter(
            self._share.folder(folder),
            self._info(split, adapter),
            codec=self._codec,
            resume=True,
            on_shard=publisher.shard if publisher and self._share.is_whole else None,
            part=self._share.part,
            **self._form,
        )

    @property
    def _form(self) -> dict[str, Any]:
        """Type, size and order of shards."""
        config = self.config
        return {"dtype": config.activation_dtype, "shard_tokens": config.chunk_token_threshold, "seed": config.seed}

    def _info(self, split: Split, adapter: ModelAdapter) -> DatasetInfo:
        return DatasetInfo(
            model_name=self.config.model_name,
            dataset=self.config.dataset_path,
            split=split,
            num_layers=adapter.n_layers,
            d_model=adapter.d_model,
            hookpoints=adapter.hookpoints,
            provenance=self._provenance(adapter),
        )

    def _options(self) -> dict[str, Any]:
        options = self.config.to_dict()
        return {name: value for name, value in options.items() if name not in WHERE_ONLY}

    def _provenance(self, adapter: ModelAdapter) -> dict[str, Any]:
        path = Path(self.config.dataset_path)
        return {
            "options": self._options(),
            "model_class": type(adapter.model).__name__,
            "model_revision": getattr(adapter.model.config, "_commit_hash", None),
            "model_dtype": str(adapter.dtype).removeprefix("torch."),
            "tokenizer": type(adapter.tokenizer).__name__,
            "corpus_bytes": path.stat().st_size if path.is_file() else None,
        }

    def _batches(self, adapter: ModelAdapter) -> Iterator[RowBatch]:
        config = self.config
        packers: dict[Split, TextPacker] | None = None
        if not is_world(config.dataset_path):
            tokenizer = adapter.tokenizer
            packers = {split: TextPacker(tokenizer, config.context_size, config.prepend_bos) for split in SPLITS}
        planner = BatchPlanner(packers, config.inference_batch_size, config.pack)
        on_bad_sample = self._skip if config.on_bad_sample == "skip" else None
        return planner(samples_of(config, adapter, on_bad_sample))

    def _write(self, adapter: ModelAdapter, writers: dict[Split, ActivationWriter]) -> None:
        left = self._budgets()
        # The writer shuffles, measures and saves a batch while the host is at the next one.
        with (
            progress_bar(
                self.config.target_total_tokens, "capture", "tokens", hidden=not self._share.mesh.is_main
            ) as bar,
            Background() as background,
        ):
            for rows in self._batches(adapter):
                is_ours = self._share.owns(rows.mark)
                # How many tokens another rank's batch has matters only where their number is limited.
                if left[rows.split] == 0 or not (is_ours or self.config.target_total_tokens):
                    continue
                inputs = rows.prepare(adapter)
                n_tokens = min(self._count(inputs), left[rows.split])
                writer = writers.get(rows.split) if is_ours else None
                if writer is not None and rows.mark >= writer.resume_mark and n_tokens > 0:
                    background.do(writer.append, self._capture(adapter, inputs, rows, n_tokens), mark=rows.mark)
                left[rows.split] -= n_tokens
                bar.update(n_tokens)
                if not any(left.values()):
                    return

    def _budgets(self) -> dict[Split, int]:
        """Tokens each split still takes; together `target_total_tokens`."""
        limit = self.config.target_total_tokens
        if limit is None:
            return dict.fromkeys(self.splits, sys.maxsize)
        held_out = math.ceil(limit * self.config.held_out_fraction)
        return {split: held_out if split == "held_out" else limit - held_out for split in self.splits}

    def _capture(self, adapter: ModelAdapter, inputs: HostInputs, rows: RowBatch, n_tokens: int) -> ActivationBatch:
        batch = adapter.capture(inputs, sample_ids=torch.tensor(rows.numbers))
        if self.config.exclude_special_tokens:
            batch = batch.select(torch.nonzero(batch.kind != TokenKind.SPECIAL)[:n_tokens, 0])
        return batch if batch.n_tokens == n_tokens else batch.select(torch.arange(n_tokens))

    def _count(self, inputs: HostInputs) -> int:
        keep = inputs.is_token
        if self.config.exclude_special_tokens:
            keep = keep & (inputs.kind != TokenKind.SPECIAL)
        return int(keep.sum())

    def _require_tokens(self, writers: dict[Split, ActivationWriter]) -> None:
        for split, writer in writers.items():
            if self._share.count(writer.total_tokens) == 0:
                left_out = ""
                if self._skipped:
                    left_out = f"{len(self._skipped)} samples were left out, the first because: "
                    left_out += f"{self._skipped[0]['reason']}\n"
                raise DatasetError(
                    f"The corpus {self.config.dataset_path} gave no tokens for {split}.\n{left_out}It is too small for "
                    f"held_out_fraction = {self.config.held_out_fraction}.\n"
                    "Give more samples, another --held-out-fraction, or --held-out-fraction 0 for none."
                )

    def _skip(self, name: str, error: DatasetError) -> None:
        self._skipped.append({"sample": name, "reason": str(error)})

    def _list_skipped(self) -> None:
        if self._skipped:
            lines = "".join(json.dumps(entry) + "\n" for entry in self._skipped)
            write_file(self.folder / "skipped.jsonl", lines.encode())


def _comparable(options: dict[str, Any]) -> dict[str, Any]:
    """What must agree with a finished data set; the rows per forward pass need not."""
    return {name: value for name, value in options.items() if name != "inference_batch_size"}
