"""Killed at random moments and started again: the rows of an uninterrupted run, byte for byte."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.tiny_hosts import tiny_adapter

_COMMAND = "from clt.__main__ import main; main()"


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "metadata.json"
    }


@pytest.mark.slow
@pytest.mark.parametrize("output_format", ["safetensors", "hdf5"])
def test_ten_kills_change_nothing(tmp_path, output_format):
    adapter = tiny_adapter("llama")
    adapter.model.save_pretrained(tmp_path / "host")
    adapter.tokenizer.save_pretrained(tmp_path / "host")
    lines = (json.dumps({"text": f"line {i} " * 20}) + "\n" for i in range(3000))
    (tmp_path / "text.jsonl").write_text("".join(lines))

    def command(where):
        options = {
            "model": tmp_path / "host",
            "dataset": tmp_path / "text.jsonl",
            "activation-dir": tmp_path / where,
            "chunk-token-threshold": 5000,
            "context-size": 32,
            "target-total-tokens": 250_000,
            "output-format": output_format,
        }
        flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        return [sys.executable, "-c", _COMMAND, "generate", *flags]

    subprocess.run(command("whole"), check=True, capture_output=True)
    moments = random.Random(0)
    for _ in range(10):
        process = subprocess.Popen(command("parts"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        enough = n_shards(tmp_path / "parts") + 2
        while n_shards(tmp_path / "parts") < enough and process.poll() is None:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    subprocess.run(command("parts"), check=True, capture_output=True)
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


def n_shards(folder):
    return len([path for path in folder.rglob("*") if path.name.startswith(("shard_", "chunk_"))])
