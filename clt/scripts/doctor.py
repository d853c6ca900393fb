"""What this machine has, what is missing for which feature, and whether a host model is supported.

clt doctor
clt doctor --model llava-hf/llava-1.5-7b-hf --folder /scratch/activations --json

A host is judged by its config.json alone, on an empty copy without weights, so a 7B model takes seconds and no memory.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clt import __version__
from clt.activation_generation.corpus import host_path
from clt.config.base import Config
from clt.errors import HostModelError
from clt.lm.support import HostSupport, inspect_host
from clt.models.kernels import build

PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "h5py",
    "tyro",
)
_PROBE_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class Options(Config):
    """What to look at."""

    model: Annotated[str | None, tyro.conf.arg(aliases=("--model-name",))] = None
    """Host to judge: a local folder, a Hugging Face id, or world:NAME."""
    folder: Path = Path()
    """Where activations would be written: its free space and speed are measured."""
    json: bool = False
    """Print the report as JSON instead of tables."""


@dataclass(frozen=True)
class Feature:
    """Something this package can do only with the help of something else."""

    name: str
    needs: str
    is_there: bool
    remedy: str


def main(options: Options) -> None:
    """Look, and print what was found.

    Raises:
        HostModelError: --model was given and cannot be a host; the rest is printed first.
    """
    report = {
        "versions": versions(),
        "machine": machine(),
        "disk": disk(options.folder),
        "features": [asdict(feature) for feature in features()],
    }
    refusal: HostModelError | None = None
    if options.model is not None:
        try:
            report["host"] = asdict(inspect_host(host_path(options.model)))
        except HostModelError as error:
            refusal = error
            report["host"] = {"name": options.model, "problem": str(error)}
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    if refusal is not None:
        raise refusal


def versions() -> dict[str, str]:
    """Of this package, of Python, and of what decides results."""
    return {
        "crosslayer": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def machine() -> dict[str, Any]:
    """Cores, memory and accelerators."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
    gpus = [
        {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    return {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": None if pages is None else round(pages / 2**30, 1),
        "gpus": gpus,
        "mps": torch.backends.mps.is_available(),
        "bf16_in_hardware": _has_bf16(),
    }


def _has_bf16() -> bool:
    """Whether bf16 products are fast here: on a GPU of that kind, or on a CPU with AMX or AVX-512-BF16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = build.processor()
    return "amx_bf16" in flags or "avx512_bf16" in flags


def disk(folder: Path) -> dict[str, Any]:
    """Free space and speed of the place where activations would go.

    Only writing, flushed to the disk, is measured: what was just written would be read from memory.
    """
    place = next(each for each in (folder.resolve(), *folder.resolve().parents) if each.is_dir())
    free = shutil.disk_usage(place).free
    found: dict[str, Any] = {"folder": str(place), "free_gib": round(free / 2**30, 1)}
    if free < 4 * _PROBE_BYTES or not os.access(place, os.W_OK):
        return {**found, "write_mb_s": None, "note": "not measured: no space, or no permission to write"}
    block = os.urandom(2**20)
    with tempfile.NamedTemporaryFile(dir=place, prefix=".clt-doctor-") as probe:
        began = time.perf_counter()
        for _ in range(_PROBE_BYTES // len(block)):
            probe.write(block)
        probe.flush()
        os.fsync(probe.fileno())
        wrote = time.perf_counter() - began
    return {**found, "write_mb_s": round(_PROBE_BYTES / 1e6 / wrote)}


def features() -> list[Feature]:
    """Everything optional, and what it takes."""
    compiled = build.library() is not None
    cuda = torch.cuda.is_available()
    triton = _installed("triton")
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    extras = (
        ("host read through nnsight (--backend nnsight)", "nnsight"),
        ("8-bit optimiser moments (--optimizer adamw8bit)", "torchao"),
        ("logging to Weights & Biases (--enable-wandb)", "wandb"),
        ("logging to trackio (--enable-trackio)", "trackio"),
        ("AMBER's own noun extractor (nltk)", "nltk"),
        ("AMBER's own word similarity (spacy)", "spacy"),
    )
    return [
        Feature("fast CPU training", "a C compiler", compiled, "apt install gcc; torch's operations work meanwhile"),
        Feature("training and hosts on a GPU", "CUDA in torch", cuda, "install torch's CUDA build (docs: Install)"),
        Feature("sparse GPU kernels", "triton", cuda and triton, "pip install 'crosslayer[triton]', and a GPU"),
        *(Feature(name, extra, _installed(extra), f"pip install 'crosslayer[{extra}]'") for name, extra in extras),
        Feature("reading lz4 HDF5 chunks", "hdf5plugin", _installed("hdf5plugin"), "pip install hdf5plugin"),
        Feature("tests of the pages", "Chromium", browser is not None, "apt install chromium (only for tests)"),
    ]


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def show(report: dict[str, Any]) -> None:
    """Tables for people."""
    console = Console()
    facts = Table(show_header=False, box=None)
    facts.add_row("versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    what = report["machine"]
    gpus = ", ".join(f"{gpu['name']} ({gpu['memory_gib']} GiB)" for gpu in what["gpus"]) or "none"
    facts.add_row("machine", f"{what['cores']} cores, {what['memory_gib']} GiB memory; GPU: {gpus}; {what['platform']}")
    where = report["disk"]
    speed = where["note"] if where["write_mb_s"] is None else f"writes {where['write_mb_s']:,} MB/s"
    facts.add_row("disk", f"{where['folder']}: {where['free_gib']:,} GiB free, {speed}")
    console.print(facts)
    table = Table("feature", "needs", "here", "way out")
    for feature in report["features"]:
        here = "yes" if feature["is_there"] else "no"
        way_out = "" if feature["is_there"] else escape(feature["remedy"])
        table.add_row(feature["name"], feature["needs"], here, way_out)
    console.print(table)
    host = report.get("host")
    if host is not None and "problem" not in host:
        console.print(describe(HostSupport(**host)), highlight=False, markup=False)


def describe(host: HostSupport) -> str:
    """A host in a few lines."""
    kind = "vision-language model" if host.is_multimodal else "language model"
    shape = f"{host.n_layers} MLPs of {host.d_model}, {host.parameters / 1e6:,.1f} M parameters"
    weights = f"{2 * host.parameters / 2**30:,.1f} GiB of weights"
    needs = f"{weights}, {host.bytes_per_token:,} bytes of activations per token"
    return (
        f"host {host.name}: {host.model_class}, {kind}, {shape}\n  in bf16: {needs}\n"
        f"  reads {host.input_template}\n  replaces {host.output_template}"
    )
