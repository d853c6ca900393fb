"""How activations are captured from a host model and written to disk."""

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import tyro

from clt.config.base import Config, require_one_of, require_positive
from clt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ActivationConfig(Config):
    """Host, corpus, what to keep of each token, and the format on disk."""

    model_name: Annotated[str, tyro.conf.arg(aliases=("--model",))]
    """Hugging Face id or local folder of the host, or `world:NAME` for an embedded one."""
    dataset_path: Annotated[str, tyro.conf.arg(aliases=("--dataset", "--data"))]
    """Local .txt, .jsonl or .parquet file or folder, a Hugging Face data set id, or `world:NAME`."""
    mlp_input_module_path_template: Annotated[str | None, tyro.conf.arg(aliases=("--mlp-input-template",))] = None
    """Module path of what is read, with {} for the layer; None: found by structure."""
    mlp_output_module_path_template: Annotated[str | None, tyro.conf.arg(aliases=("--mlp-output-template",))] = None
    """Module path of the MLP output, with {} for the layer; None: found by structure."""
    model_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type the host runs in; None: as saved."""
    activation_dtype: Literal["float32", "bfloat16", "float16", "int8"] = "bfloat16"
    """Type on disk; int8 has one scale per token, layer and side, and records its error."""
    dataset_split: str = "train"
    """Split of a Hugging Face data set or of a world."""
    dataset_text_column: str = "text"
    """Column (or JSONL key) that holds the text."""
    context_size: int = 128
    """Tokens per row of text."""
    pack: bool = True
    """Join texts end to end into full rows; False: one text per row, cut at context_size."""
    inference_batch_size: int = 32
    """Rows per forward pass of the host."""
    exclude_special_tokens: bool = True
    """Leave out BOS, EOS and other special tokens."""
    prepend_bos: bool = True
    """Start each packed row with BOS if the tokenizer has one."""
    streaming: bool = True
    """Stream a Hugging Face data set instead of downloading it first."""
    dataset_trust_remote_code: Annotated[bool, tyro.conf.arg(aliases=("--trust-remote-code",))] = False
    """Accepted for old command lines; loading code of data sets is never run."""
    image_prompt: str = "Describe this image."
    """Prompt for pictures that come without one."""
    on_bad_sample: Literal["stop", "skip"] = "stop"
    """What to do with a sample that lacks its text or its picture; skipped ones are listed in `skipped.jsonl`."""
    cache_path: str | None = None
    """Cache folder of the Hugging Face data set."""
    target_total_tokens: int | None = None
    """Stop after this many tokens; None: the whole corpus."""
    max_samples: int | None = None
    """Stop after this many texts or image-text pairs."""
    held_out_fraction: float = 0.1
    """Share of the samples whose tokens go to the `held_out` folder instead of `train`; whole samples, never split."""
    activation_dir: str = "./activations"
    """Folder under which the data set folder is made."""
    output_format: Literal["safetensors", "hdf5"] = "safetensors"
    """Token-contiguous rows in safetensors shards, or crosslayer-coding's HDF5 chunks."""
    compression: Literal["none", "None", "gzip", "lzf", "lz4"] = "none"
    """Of HDF5 chunks; every one of them makes random reads tens of times slower."""
    compute_norm_stats: bool = True
    """Accepted for old command lines; statistics are always written, because they cost nothing here."""
    chunk_token_threshold: int = 262_144
    """Tokens per shard."""
    remote_server_url: str | None = None
    """Upload the data set to this activation server while it is made (token: environment variable CLT_SERVER_TOKEN)."""
    delete_after_upload: bool = False
    """Delete each shard here once the server has it and its checksum agrees."""
    upload_max_retries: int = 5
    """How often an upload request is tried again."""
    upload_initial_backoff: float = 1.0
    """Seconds before the first retry; doubled each time."""
    upload_max_backoff: float = 30.0
    """Longest pause between retries, in seconds."""
    storage_type: Literal["local", "remote"] = "local"
    """Accepted for old command lines; `remote_server_url` alone decides about uploading."""
    enable_profiling: bool = False
    """Accepted for old command lines; `benchmarks/activations.py` measures."""
    seed: int = 42
    """Seed of the shuffle at writing and of the held-out choice."""
    backend: Literal["hooks", "nnsight"] = "hooks"
    """What reads the host: plain hooks, or the package nnsight (`pip install 'crosslayer[nnsight]'`); same values."""
    nnsight_tracer_kwargs_json: str = "{}"
    """Arguments of nnsight's `trace`, as a JSON object, such as '{"remote": true}'; only with --backend nnsight."""
    nnsight_invoker_args_json: str = "{}"
    """Arguments of nnsight's `invoke`, as a JSON object; only with --backend nnsight."""
    device: str | None = None
    """Torch device of the host; None: a GPU if there is one."""
    device_map: str | None = None
    """Spread one host over the GPUs of its machine (`auto`, needs accelerate); start one process per machine then."""

    def __post_init__(self) -> None:
        owner = "ActivationConfig"
        require_positive(
            owner,
            context_size=self.context_size,
            inference_batch_size=self.inference_batch_size,
            target_total_tokens=self.target_total_tokens,
            max_samples=self.max_samples,
            chunk_token_threshold=self.chunk_token_threshold,
        )
        require_one_of(owner, "activation_dtype", self.activation_dtype, ("float32", "bfloat16", "float16", "int8"))
        if self.remote_server_url is None and (self.delete_after_upload or self.storage_type == "remote"):
            raise ConfigError(
                f"{owner}.remote_server_url is not set, but delete_after_upload = {self.delete_after_upload} and "
                f"storage_type = {self.storage_type!r} ask for an upload. Give --remote-server-url."
            )
        if self.device is not None and self.device_map is not None:
            raise ConfigError(
                f"{owner}.device_map = {self.device_map!r} spreads the host over several devices; it does not go with "
                f"device = {self.device!r}. Give one of the two."
            )
        _ = self.nnsight_tracer_kwargs, self.nnsight_invoker_args
        if not 0 <= self.held_out_fraction < 1:
            raise ConfigError(f"{owner}.held_out_fraction = {self.held_out_fraction} must be in [0, 1).")
        templates = (self.mlp_input_module_path_template, self.mlp_output_module_path_template)
        if (templates[0] is None) != (templates[1] is None):
            raise ConfigError(
                f"{owner}: mlp_input_module_path_template = {templates[0]!r} and mlp_output_module_path_template = "
                f"{templates[1]!r} must be given together, or neither (then the hookpoints are found by structure)."
            )
        for template in templates:
            if template is not None and "{}" not in template:
                raise ConfigError(f"{owner}: the template {template!r} needs {{}} where the layer number goes.")

    @property
    def nnsight_tracer_kwargs(self) -> dict[str, Any]:
        """Arguments of nnsight's `trace`."""
        return _json_object("--nnsight-tracer-kwargs-json", self.nnsight_tracer_kwargs_json)

    @property
    def nnsight_invoker_args(self) -> dict[str, Any]:
        """Arguments of nnsight's `invoke`."""
        return _json_object("--nnsight-invoker-args-json", self.nnsight_invoker_args_json)

    @classmethod
    def migrate(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Accept the two template names of the command line, and nnsight's arguments as dictionaries."""
        for name in ("nnsight_tracer_kwargs", "nnsight_invoker_args"):
            if name in values:
                values[f"{name}_json"] = json.dumps(values.pop(name) or {})
        for short in ("mlp_input", "mlp_output"):
            if f"{short}_template" in values:
                values[f"{short}_module_path_template"] = values.pop(f"{short}_template")
        return values


def _json_object(flag: str, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{flag} {text!r} is not JSON ({error.msg}). Quote it: '{{\"remote\": true}}'.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{flag} {text!r} is no JSON object; it needs names, such as '{{\"remote\": true}}'.")
    return cast(dict[str, Any], values)
