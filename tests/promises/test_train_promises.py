"""crosslayer-coding's training commands and its Python snippet run as printed, on a small data set."""

import json
import shutil
import sys
import warnings

import pytest
import torch
import tyro
from safetensors.torch import load_file

from clt.config import CLTConfig
from clt.data.codecs import Codec
from clt.data.maintenance import convert
from clt.models import CrossLayerTranscoder
from clt.scripts import train_clt
from tests import ranks
from tests.contracts.serving import serving
from tests.promises.commands import run_script, smaller, words
from tests.tiny_data import store_of, write_data
from tests.tiny_hosts import TEXT_CONFIGS, from_config, tiny_tokenizer
from tests.unit.training.test_trackers import FakeService

LOCAL = r"""python scripts/train_clt.py \
    --activation-source local_manifest \
    --activation-path ./tutorial_activations/gpt2/pile-uncopyrighted_train \
    --output-dir ./clt_output_local \
    --model-name gpt2 \
    --num-features 3072 \
    --activation-fn jumprelu \
    --learning-rate 3e-4 \
    --training-steps 50000 \
    --train-batch-size-tokens 4096 \
    --sparsity-lambda 1e-3 \
    --normalization-method auto \
    --log-interval 100 \
    --eval-interval 1000 \
    --checkpoint-interval 1000 \
    --enable-wandb --wandb-project clt-training-local
    # Add other arguments as needed
"""
REMOTE = r"""python scripts/train_clt.py \
    --activation-source remote \
    --server-url http://localhost:8000 \
    --dataset-id gpt2/pile-uncopyrighted_train \
    --output-dir ./clt_output_remote \
    --model-name gpt2 \
    --num-features 3072 \
    --activation-fn jumprelu \
    --learning-rate 3e-4 \
    --training-steps 50000 \
    --train-batch-size-tokens 4096 \
    --sparsity-lambda 1e-3 \
    --normalization-method auto \
    --log-interval 100 \
    --eval-interval 1000 \
    --checkpoint-interval 1000 \
    --enable-wandb --wandb-project clt-training-remote
    # Add other arguments as needed
"""
SNIPPET = """
import torch
from pathlib import Path
# ActivationConfig is used by scripts/generate_activations.py, not directly by TrainingConfig here.
from clt.config import CLTConfig, TrainingConfig
from clt.training.trainer import CLTTrainer

# --- Configuration ---
device = "cuda" if torch.cuda.is_available() else "cpu"
output_dir = Path("clt_programmatic_output")
output_dir.mkdir(exist_ok=True, parents=True)

# Determine base model dimensions (e.g., for GPT-2)
# In a script, you might use get_model_dimensions from train_clt.py
num_layers = 12
d_model = 768

clt_config = CLTConfig(
    num_features=3072,  # Example: 4x expansion
    num_layers=num_layers,
    d_model=d_model,
    activation_fn="jumprelu",
    jumprelu_threshold=0.03,
    model_name="gpt2" # Store base model name for reference
    # clt_dtype="bfloat16", # Optional: Specify CLT model dtype
)

# Configure for using local pre-generated data
# Ensure activations are generated first, e.g., via scripts/generate_activations.py
activation_data_dir = "./tutorial_activations/gpt2/pile-uncopyrighted_train" # Assumes this exists

training_config_local = TrainingConfig(
    # Core training parameters
    learning_rate=3e-4,
    training_steps=20000,
    train_batch_size_tokens=4096,
    # Activation Source: Local Manifest
    activation_source="local_manifest",
    activation_path=activation_data_dir, # Path to directory with index.bin, metadata.json, etc.
    activation_dtype="bfloat16", # Or "float16", "float32" - type for activations from store
    # Normalization: "auto" uses norm_stats.json from activation_path if available
    # Other options: "none"
    normalization_method="auto",
    # Loss coefficients
    sparsity_lambda=1e-3,
    sparsity_c=1.0,
    preactivation_coef=3e-6,
    # Logging and Evaluation
    log_interval=100,
    eval_interval=1000,
    checkpoint_interval=1000,
    # WandB (optional)
    enable_wandb=False,
    # wandb_project="my-clt-project-local",
)

# --- Trainer Initialization ---
trainer = CLTTrainer(
    clt_config=clt_config,
    training_config=training_config_local,
    log_dir=str(output_dir),
    device=device,
)

# --- Run Training ---
print("Starting training...")
trained_clt_model = trainer.train()

print(f"Training complete! Final model saved in {output_dir}")
"""
LOADING = """
from clt.models import CrossLayerTranscoder
loaded_config = CLTConfig.from_json(output_dir / "final" / "cfg.json")
loaded_model = CrossLayerTranscoder(loaded_config, process_group=None, device=torch.device(device))
loaded_model.load_state_dict(torch.load(output_dir / "final" / "clt.pt", map_location=device))
print("Model loaded manually.")
"""
DATA = "tutorial_activations/gpt2/pile-uncopyrighted_train"
SMALL = {"num_features": 24, "training_steps": 4, "train_batch_size_tokens": 64}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with the seed's data set in it, and a wandb that keeps to itself."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / DATA).parent.mkdir(parents=True)
    write_data(tmp_path / DATA)
    monkeypatch.setitem(sys.modules, "wandb", FakeService("wandb"))
    return tmp_path


def test_the_printed_values_arrive():
    options = tyro.cli(train_clt.Options, args=words(LOCAL))
    training, clt = train_clt.training_config(options), train_clt.clt_config(options)
    assert (training.training_steps, training.train_batch_size_tokens) == (50_000, 4096)
    assert (training.learning_rate, training.sparsity_lambda, training.sparsity_c) == (3e-4, 1e-3, 1.0)
    assert (training.enable_wandb, training.wandb_project) == (True, "clt-training-local")
    assert (clt.num_features, clt.normalization_method, clt.jumprelu_threshold) == (3072, "mean_std", 0.03)
    assert training.dead_feature_window == 1000 * 4096, "steps there, tokens here"


def test_training_from_local_activations(here, monkeypatch):
    run_script(monkeypatch, "train_clt.py", smaller(words(LOCAL), **SMALL))
    run = here / "clt_output_local"
    model = CrossLayerTranscoder.from_pretrained(run)
    assert (model.config.num_layers, model.config.d_model, model.config.model_name) == (3, 8, "gpt2")
    assert (run / "final" / "clt.pt").exists()
    (started,) = sys.modules["wandb"].started
    assert started["project"] == "clt-training-local"


def test_training_from_a_server(here, monkeypatch):
    root = here / "served"
    shutil.move(here / "tutorial_activations", root)
    command = [*smaller(words(REMOTE), **SMALL), "--remote-timeout", "20"]
    as_hdf5(root / "gpt2" / "pile-uncopyrighted_train")
    with serving(root) as address:
        run_script(monkeypatch, "train_clt.py", smaller(command, server_url=address))
    assert (here / "clt_output_remote" / "clt.safetensors").exists()


def as_hdf5(folder):
    """What a server of the seed holds."""
    copy = folder.with_name("copy")
    convert(folder, copy, codec=Codec("hdf5"))
    shutil.rmtree(folder)
    copy.rename(folder)


@pytest.mark.parametrize("resume_flag", ["--resume_from_checkpoint_dir", "--resume-from-checkpoint-dir"])
def test_resuming_a_run(here, monkeypatch, resume_flag):
    command = [*smaller(words(LOCAL), **SMALL, checkpoint_interval=1)]
    run_script(monkeypatch, "train_clt.py", command)
    run = here / "clt_output_local"
    whole = torch.load(run / "final" / "clt.pt")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "finished": False}))
    (run / "clt.safetensors").unlink()
    run_script(monkeypatch, "train_clt.py", [*command, resume_flag, str(run), "--resume_step", "2"])
    again = torch.load(run / "final" / "clt.pt")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_every_flag_of_the_seed_is_accepted_and_dead_ones_say_so(here, monkeypatch, capsys):
    command = smaller(words(LOCAL), **SMALL)
    flags = """--device cpu --remote-timeout 120 --remote-max-retries 3 --remote-prefetch-batches 16
        --jumprelu-threshold 0.03 --disable-batchtopk-straight-through --topk-mode global
        --disable-topk-straight-through --clt-dtype float32 --decoder-tying none --precision fp32
        --fp16-convert-weights --debug-anomaly --sparsity-lambda-schedule delayed_linear
        --sparsity-lambda-delay-frac 0.2 --sparsity-c 1.0 --preactivation-coef 3e-6 --aux-loss-factor 0.03
        --no-apply-sparsity-penalty-to-batchtopk --optimizer adamw --optimizer-beta1 0.9 --optimizer-beta2 0.98
        --lr-scheduler none --gradient-clip-val 1.0 --seed 7 --activation-dtype float32 --dead-feature-window 200
        --compute-sparsity-diagnostics --enable-profiling --sampling-strategy random_chunk --wandb-entity us
        --wandb-run-name first --wandb-tags a b"""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Anomaly Detection has been enabled")
        run_script(monkeypatch, "train_clt.py", [*command, *flags.split()])
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert len(notes) == 5
    assert any("--enable-profiling has no effect" in note for note in notes)


@pytest.mark.parametrize(
    "choice", ["--activation-fn batchtopk --batchtopk-k 6", "--activation-fn batchtopk --batchtopk-frac 0.1",
               "--activation-fn topk --topk-k 6"]
)  # fmt: skip
def test_families_by_the_seeds_flags(here, monkeypatch, choice):
    arguments = smaller(words(LOCAL), **SMALL)
    place = arguments.index("--activation-fn")
    run_script(monkeypatch, "train_clt.py", [*arguments[:place], *arguments[place + 2 :], *choice.split()])
    config = CLTConfig.from_json(here / "clt_output_local" / "cfg.json")
    kept = config.batchtopk_k if config.activation_fn == "batchtopk" else config.topk_k
    assert kept == pytest.approx(7.2 if "frac" in choice else 6)


def test_a_distributed_run_needs_torchrun_and_a_folder(here, monkeypatch, capsys):
    command = [*smaller(words(LOCAL), **SMALL), "--distributed"]
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit):
        run_script(monkeypatch, "train_clt.py", command)
    assert "torchrun --nproc-per-node" in capsys.readouterr().err
    place = command.index("--output-dir")
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        run_script(monkeypatch, "train_clt.py", command[:place] + command[place + 2 :])
    assert "2 ranks need one folder" in capsys.readouterr().err


def distributed_command(arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", FakeService("wandb"))
        run_script(patch, "train_clt.py", arguments)


def test_a_distributed_run_gives_one_process_s_weights(here, monkeypatch):
    arguments = smaller(words(LOCAL), **SMALL)
    run_script(monkeypatch, "train_clt.py", arguments)
    shared = [*smaller(arguments, output_dir="of-two"), "--distributed"]
    context = ranks.context_with("clt.scripts.train_clt")
    assert ranks.run_ranks(context, 2, distributed_command, shared, log=here / "log") == [0, 0]
    alone, together = (load_file(here / name / "clt.safetensors") for name in ("clt_output_local", "of-two"))
    assert alone.keys() == together.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-3, atol=1e-5)


def small_snippet(text):
    for big, small in (("num_layers = 12", "num_layers = 3"), ("d_model = 768", "d_model = 8"), ("=3072", "=24"),
                       ("=20000", "=4"), ("=4096", "=64")):  # fmt: skip
        assert big in text
        text = text.replace(big, small)
    return text


def test_the_python_snippet(here):
    names = {}
    exec(small_snippet(SNIPPET) + LOADING, names)
    batch = next(store_of(here / DATA).one_pass())
    loaded, trained = names["loaded_model"], names["trained_clt_model"]
    assert torch.equal(loaded(batch.inputs.float()), trained(batch.inputs.float()))


def test_from_a_gpt2_to_a_transcoder_with_the_seeds_two_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", FakeService("wandb"))
    from_config(TEXT_CONFIGS["gpt2"]()).save_pretrained("gpt2")
    tiny_tokenizer().save_pretrained("gpt2")
    text = tmp_path / "pile-uncopyrighted.jsonl"
    text.write_text("".join(json.dumps({"text": f"a word and another {i} " * 8}) + "\n" for i in range(60)))
    run_script(
        monkeypatch,
        "generate_activations.py",
        ["--model-name", "gpt2", "--dataset-path", str(text), "--activation-dir", "./tutorial_activations",
         "--target-total-tokens", "600", "--activation_dtype", "bfloat16", "--context-size", "16",
         "--compute-norm-stats"],
    )  # fmt: skip
    run_script(monkeypatch, "train_clt.py", smaller(words(LOCAL), **SMALL))
    assert CLTConfig.from_json("clt_output_local/cfg.json").model_name == "gpt2"
