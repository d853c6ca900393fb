"""Killed at random moments and started again: the rows of an uninterrupted run, byte for byte.

The host is stories260K in `../shared/models`, through the command line; without it these tests are skipped.
"""

import json
import multiprocessing
import os
import random
import signal
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from clt.__main__ import main

HOST = Path(__file__).parents[3] / "shared" / "models" / "stories260K"
WORDS = (
    "once",
    "upon",
    "a",
    "time",
    "there",
    "was",
    "little",
    "girl",
    "who",
    "liked",
    "to",
    "play",
    "with",
    "her",
    "dog",
)
FORMATS = [
    ("safetensors", "bfloat16"),
    ("hdf5", "float16"),
    *(
        pytest.param(*each, marks=pytest.mark.slow)
        for each in (
            ("safetensors", "float16"),
            ("safetensors", "float32"),
            ("safetensors", "int8"),
            ("hdf5", "bfloat16"),
            ("hdf5", "float32"),
        )
    ),
]

pytestmark = pytest.mark.skipif(not HOST.is_dir(), reason=f"needs the model stories260K in {HOST}")


@pytest.fixture(scope="module")
def processes():
    """Makes processes that have imported everything when they start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clt.activation_generation", "clt.scripts.generate", "transformers"])
    return context


@pytest.mark.parametrize(("output_format", "dtype"), FORMATS)
def test_ten_kills_change_nothing(tmp_path, output_format, dtype, processes):
    write_text(tmp_path / "text.txt", words=12_000)
    whole, parts = (arguments(tmp_path, folder, output_format, dtype) for folder in ("whole", "parts"))
    assert exit_code_of(processes, whole) == 0
    assert len(shards(tmp_path / "whole")) > 25
    moments = random.Random(0)
    for kill in range(10):
        process = processes.Process(target=generate, args=(parts,))
        process.start()
        # One more shard each time, so that every run is killed in the middle of its work.
        while len(shards(tmp_path / "parts")) <= kill and process.is_alive():
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert exit_code_of(processes, parts) == 0
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


def test_int8_in_hdf5_is_refused_before_work_begins(tmp_path, capsys):
    write_text(tmp_path / "text.txt", words=100)
    with pytest.raises(SystemExit) as stopped:
        main(arguments(tmp_path, "x", "hdf5", "int8"))
    assert stopped.value.code != 0
    assert "int8' needs output_format = 'safetensors'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def write_text(path, words):
    chosen = random.Random(1).choices(WORDS, k=words)
    path.write_text("\n\n".join(" ".join(chosen[start : start + 60]) for start in range(0, words, 60)))


def arguments(folder, name, output_format, dtype):
    options = {
        "model": HOST,
        "dataset": folder / "text.txt",
        "activation-dir": folder / name,
        "chunk-token-threshold": 500,
        "context-size": 64,
        "inference-batch-size": 8,
        "output-format": output_format,
        "activation-dtype": dtype,
    }
    return ["generate", *(text for name, value in options.items() for text in (f"--{name}", str(value)))]


def generate(command_line):
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        main(command_line)


def exit_code_of(processes, command_line):
    process = processes.Process(target=generate, args=(command_line,))
    process.start()
    process.join()
    return process.exitcode


def shards(folder):
    return [
        path for path in folder.rglob("*") if path.name.startswith(("shard_", "chunk_")) and ".tokens." not in path.name
    ]


def files_of(folder):
    """Every file's content; of metadata.json, all but the time it was made."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            name = str(path.relative_to(folder))
            found[name] = path.read_bytes()
            if path.name == "metadata.json":
                values = json.loads(found[name])
                values.pop("created")
                found[name] = json.dumps(values)
    return found
