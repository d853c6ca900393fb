"""crosslayer-coding's generation and scramble commands run as printed, and its remote way from end to end."""

import json
import shlex
import sys

import pytest
import torch

from clt.activation_generation import ActivationGenerator
from clt.config import ActivationConfig, CLTConfig
from clt.data import LocalActivationStore, RemoteActivationStore
from tests.contracts.serving import serving
from tests.promises.commands import run_script, smaller, words
from tests.tiny_hosts import TEXT_CONFIGS, from_config, tiny_tokenizer

GENERATE = r"""python scripts/generate_activations.py \
    --model-name gpt2 \
    --dataset-path monology/pile-uncopyrighted \
    --mlp-input-template "transformer.h.{}.mlp.c_fc" \
    --mlp-output-template "transformer.h.{}.mlp.c_proj" \
    --activation-dir ./tutorial_activations \
    --target-total-tokens 2000000 \
    --chunk-token-threshold 1000000 \
    --activation_dtype bfloat16 \
    --compute-norm-stats
"""
SCRAMBLE = r"""python scripts/scramble_dataset.py \
    --input-dir /path/to/original/dataset \
    --output-dir /path/to/scrambled/dataset \
    --seed 42 # Optional seed for reproducibility
"""
ALL_FLAGS = shlex.split("""--model-name gpt2 --mlp-input-template transformer.h.{}.ln_2.input
    --mlp-output-template transformer.h.{}.mlp.output --dataset-path monology/pile-uncopyrighted --model-dtype float32
    --dataset-split train --dataset-text-column text --context-size 16 --inference-batch-size 4
    --no-exclude-special-tokens --prepend-bos --no-streaming --trust-remote-code --cache_path cache
    --target-total-tokens 300 --max_samples 50 --activation-dir ./all --output-format hdf5 --compression None
    --chunk-token-threshold 100 --activation-dtype float16 --no-delete-after-upload --upload-max-retries 5
    --upload-initial-backoff 1.0 --upload-max-backoff 30.0 --no-compute-norm-stats --device cpu --storage-type local
    --enable-profiling --nnsight-tracer-kwargs-json '{"scan":false}' --nnsight-invoker-args-json {}""")
CORPUS = "pile-uncopyrighted"
FOLDER = f"tutorial_activations/gpt2/{CORPUS}_train"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a tiny `gpt2` and a corpus in it."""
    monkeypatch.chdir(tmp_path)
    from_config(TEXT_CONFIGS["gpt2"]()).save_pretrained("gpt2")
    tiny_tokenizer().save_pretrained("gpt2")
    lines = (json.dumps({"text": f"a word and another {i} " * 4}) + "\n" for i in range(40))
    (tmp_path / f"{CORPUS}.jsonl").write_text("".join(lines))
    return tmp_path


def small(command):
    arguments = smaller(
        words(command), dataset_path=f"{CORPUS}.jsonl", target_total_tokens=600, chunk_token_threshold=200
    )
    return [*arguments, "--context-size", "16"]


def all_rows(store):
    batches = list(store.one_pass())
    rows = torch.cat([torch.cat([b.inputs, b.targets]).transpose(0, 1).flatten(1) for b in batches])
    return rows.float()


def sorted_rows(store):
    return sorted(map(tuple, all_rows(store).tolist()))


def test_the_generate_command(here, monkeypatch):
    run_script(monkeypatch, "generate_activations.py", small(GENERATE))
    folder = here / FOLDER
    assert {"index.bin", "metadata.json", "norm_stats.json", "chunk_0.hdf5"} <= {p.name for p in folder.iterdir()}
    store = LocalActivationStore(folder, batch_size_tokens=100)
    assert (store.total_tokens, store.metadata.dtype) == (600, "bfloat16")
    assert store.metadata.info.hookpoints[1][1:] == (
        "transformer.h.1.mlp.c_fc.input",
        "transformer.h.1.mlp.c_proj.output",
    )
    assert (all_rows(store) < 0).float().mean() > 0.3, "negative bfloat16 values survive"


@pytest.mark.parametrize("spelling", ["-", "_"])
def test_every_flag_of_the_seed_is_accepted_and_dead_ones_say_so(here, monkeypatch, capsys, spelling):
    flags = [f"--{w[2:].replace('-', '_') if spelling == '_' else w[2:]}" if w[:2] == "--" else w for w in ALL_FLAGS]
    arguments = smaller(flags, dataset_path=f"{CORPUS}.jsonl")
    run_script(monkeypatch, "generate_activations.py", arguments)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    for name in (
        "--trust-remote-code",
        "--no-compute-norm-stats",
        "--enable-profiling",
        "--nnsight-tracer-kwargs-json",
    ):
        assert any(f"{name} has no effect" in note for note in notes), name
    assert len(notes) == 4
    assert LocalActivationStore(here / f"all/gpt2/{CORPUS}_train").total_tokens == 300


def test_the_scramble_command(here, monkeypatch):
    run_script(monkeypatch, "generate_activations.py", small(GENERATE))
    command = smaller(words(SCRAMBLE), input_dir=FOLDER, output_dir="scrambled")
    run_script(monkeypatch, "scramble_dataset.py", command)
    before, after = LocalActivationStore(here / FOLDER), LocalActivationStore(here / "scrambled")
    assert sorted_rows(before) == sorted_rows(after)
    assert not torch.equal(all_rows(before), all_rows(after))


def test_generate_upload_and_train_remotely(here, monkeypatch):
    run_script_of = ["--num-features", "24", "--training-steps", "3", "--train-batch-size-tokens", "64"]
    with serving(here / "served") as address:
        upload = ["--remote_server_url", address, "--storage_type", "remote", "--delete-after-upload"]
        run_script(monkeypatch, "generate_activations.py", [*small(GENERATE), *upload])
        assert not list((here / FOLDER).glob("chunk_*.hdf5")), "the server has them"
        train = ["--activation-source", "remote", "--server-url", address, "--dataset-id", f"gpt2/{CORPUS}_train"]
        arguments = [*train, "--output-dir", "out", "--model-name", "gpt2", *run_script_of]
        run_script(monkeypatch, "train_clt.py", arguments)
    assert CLTConfig.from_json("out/cfg.json").num_layers == 3


def test_the_generator_from_python_uploads_as_it_goes(here):
    with serving(here / "served") as address:
        config = ActivationConfig(
            model_name="gpt2",
            mlp_input_module_path_template="transformer.h.{}.mlp.c_fc",
            mlp_output_module_path_template="transformer.h.{}.mlp.c_proj",
            dataset_path=f"{CORPUS}.jsonl",
            activation_dir="./py",
            context_size=16,
            target_total_tokens=300,
            chunk_token_threshold=100,
            held_out_fraction=0.0,
            remote_server_url=address,
        )
        folder = ActivationGenerator(config).run()
        there = RemoteActivationStore(address, f"gpt2/{CORPUS}_train", batch_size_tokens=300)
        assert sorted_rows(there) == sorted_rows(LocalActivationStore(folder))


def test_clt_train_reads_from_a_server_with_a_token(here, monkeypatch):
    from clt.__main__ import main

    run_script(monkeypatch, "generate_activations.py", small(GENERATE))
    (here / "served").mkdir()
    (here / "tutorial_activations" / "gpt2").rename(here / "served" / "gpt2")
    with serving(here / "served", token="open sesame") as address:
        arguments = ["train", "--server-url", address, "--dataset-id", f"gpt2/{CORPUS}_train", "--output-dir", "run"]
        arguments += ["--num-features", "24", "--training-steps", "3", "--train-batch-size-tokens", "64"]
        monkeypatch.setattr(sys, "argv", ["clt"])
        with pytest.raises(SystemExit):
            main([*arguments, "--remote-max-retries", "0"])
        main([*arguments, "--server-token", "open sesame"])
    assert (here / "run" / "clt.safetensors").exists()
    assert "open sesame" not in (here / "run" / "run.json").read_text()
