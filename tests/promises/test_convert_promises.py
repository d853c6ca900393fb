"""crosslayer-coding's conversion command, its lines in the README's snippet, and analyze_theta run as printed."""

import pytest
import torch

from clt.config import CLTConfig, TrainingConfig
from clt.models import CrossLayerTranscoder
from clt.training.trainer import CLTTrainer
from tests.promises.commands import run_script, words
from tests.tiny_data import store_of, write_data

CONVERT = r"""python scripts/convert_batchtopk_to_jumprelu.py \
  --batchtopk-checkpoint-path /path/to/your/batchtopk_model_dir/final \
  --config-path /path/to/your/batchtopk_model_dir/cfg.json \
  --activation-data-path /path/to/your/activation_dataset \
  --output-model-path /path/to/your/batchtopk_model_dir/final_jumprelu/clt_model_jumprelu.pt \
  --output-config-path /path/to/your/batchtopk_model_dir/final_jumprelu/cfg_jumprelu.json \
  --num-batches-for-theta-estimation 100 \
  --scale-factor 1.0
"""
SNIPPET = """
from clt.scripts.convert_batchtopk_to_jumprelu import convert_model_to_jumprelu
clt_final_path = output_dir / "final" / "clt.pt" # Path to saved model
config_path = output_dir / "final" / "cfg.json"
converted_model_path = output_dir / "final" / "clt_jumprelu.pt"
if clt_final_path.exists() and config_path.exists():
    convert_model_to_jumprelu(str(clt_final_path), str(config_path), str(converted_model_path), default_theta_value=1e6)
    print(f"Converted model to JumpReLU and saved to {converted_model_path}")
"""


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("your")
    data = write_data(root / "activation_dataset", tokens=3000)
    training = TrainingConfig(
        training_steps=60, train_batch_size_tokens=128, activation_path=str(data), learning_rate=1e-2
    )
    config = CLTConfig(num_features=24, num_layers=3, d_model=8, activation_fn="batchtopk", batchtopk_k=12)
    CLTTrainer(config, training, root / "batchtopk_model_dir", "cpu").train()
    return root


def test_the_conversion_command(paths, monkeypatch):
    command = words(CONVERT.replace("/path/to/your", str(paths)))
    run_script(monkeypatch, "convert_batchtopk_to_jumprelu.py", [*command, "--estimation-batch-size-tokens", "128"])
    folder = paths / "batchtopk_model_dir" / "final_jumprelu"
    config = CLTConfig.from_json(folder / "cfg_jumprelu.json")
    assert config.activation_fn == "jumprelu"
    CrossLayerTranscoder(config).load_state_dict(torch.load(folder / "clt_model_jumprelu.pt"))


def test_the_conversion_lines_of_the_snippet(paths):
    run = paths / "batchtopk_model_dir"
    exec(SNIPPET, {"output_dir": run})
    config = CLTConfig.from_json(run / "final" / "cfg_jumprelu.json")
    converted = CrossLayerTranscoder(config)
    converted.load_state_dict(torch.load(run / "final" / "clt_jumprelu.pt"))
    inputs = next(store_of(paths / "activation_dataset").one_pass()).inputs.float()
    torch.testing.assert_close(converted(inputs), CrossLayerTranscoder.from_pretrained(run)(inputs))


def test_analyze_theta(paths, monkeypatch, capsys):
    run_script(monkeypatch, "analyze_theta.py", [str(paths / "batchtopk_model_dir")])
    assert "median" in capsys.readouterr().out
