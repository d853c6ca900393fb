"""The flags that a configuration is written as are the flags that give it again."""

import dataclasses
import typing

import pytest
import tyro

from clt.config import CLTConfig, TrainingConfig
from clt.config.flags import flags_of
from clt.scripts.train import Options

SIZES = {"num_features": 8, "num_layers": 3, "d_model": 4}
NO_FLAG = {"num_layers", "d_model", "remote_config", "normalization_method"}
# Values that go together, or that fit within a range.
CHOSEN = {
    "num_features": 9,
    "first_target": 1,
    "ema_decay": 0.5,
    "activation_source": "remote",
    "wandb_tags": ("one", "two words"),
}
ALONE = {"decoder_rank", "decoder_tying", "enable_feature_offset", "enable_feature_scale", "optimizer"}


def another(kind, field):
    """A value that is not the field's default."""
    if field.name in CHOSEN:
        return CHOSEN[field.name]
    for choice in (hint := typing.get_type_hints(kind)[field.name], *typing.get_args(hint)):
        if typing.get_origin(choice) is typing.Literal:
            return next(each for each in typing.get_args(choice) if each != field.default)
        if choice is bool:
            return not field.default
        if choice in (int, float):
            return (field.default or 0) + choice(1)
        if choice is str:
            return "some words"
    raise AssertionError(field.name)


def fields_of(kind, alone):
    fields = [field for field in dataclasses.fields(kind) if field.name not in NO_FLAG]
    return {field.name: another(kind, field) for field in fields if (field.name in ALONE) == alone}


@pytest.mark.parametrize(
    "changes", [fields_of(CLTConfig, False), *({k: v} for k, v in fields_of(CLTConfig, True).items())]
)
def test_every_option_of_a_transcoder_survives_the_command_line(changes):
    config = CLTConfig(**{**SIZES, **changes})
    given = tyro.cli(Options, args=flags_of(config, NO_FLAG))
    assert given.clt.replace(num_layers=3, d_model=4) == config


@pytest.mark.parametrize("changes", [fields_of(TrainingConfig, False), fields_of(TrainingConfig, True)])
def test_every_option_of_a_training_survives_the_command_line(changes):
    config = TrainingConfig(**changes)
    given = tyro.cli(Options, args=["--num-features", "8", *flags_of(config, NO_FLAG)])
    assert given.training == config


def test_none_is_a_value_and_defaults_are_left_out():
    assert flags_of(TrainingConfig(gradient_clip_val=None)) == ["--gradient-clip-val", "None"]
    assert flags_of(TrainingConfig(write_final_folder=False)) == ["--no-write-final-folder"]
    assert flags_of(TrainingConfig()) == []
