"""What every command understands: --dry-run, --json, --config, --debug, and the exit codes."""

import importlib
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

import clt.__main__ as command_line
from clt.errors import ConfigError
from clt.scripts.invoke import instance, options_from_file, plain, take_shared
from clt.scripts.plans import record_options
from tests.tiny_data import write_data

LONG = ("generate", "train", "sweep", "evaluate", "fidelity", "finetune", "discover", "attribute")
SIZES = ["--num-features", "16", "--activation-fn", "topk", "--topk-k", "4", "--training-steps", "3"]


@pytest.fixture
def data(tmp_path):
    for split in ("train", "held_out"):
        write_data(tmp_path / "data" / split)
    return tmp_path / "data"


def clt(capsys, *arguments):
    """A command in this process; what it printed."""
    command_line.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


@pytest.mark.parametrize("name", LONG)
def test_long_commands_can_say_what_they_would_do(name):
    assert callable(importlib.import_module(f"clt.scripts.{name}").plan)


def test_a_dry_run_names_data_length_and_result_and_writes_nothing(data, tmp_path, capsys):
    out = clt(capsys, "train", "--data", data, "--output-dir", tmp_path / "run", *SIZES, "--dry-run")
    assert "3 steps" in out
    assert f"on {data / 'held_out'}" in out
    assert f"{tmp_path / 'run'} (new)" in out
    assert not (tmp_path / "run").exists()


def test_a_dry_run_refuses_what_the_run_would_refuse(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        clt(capsys, "train", "--data", tmp_path / "missing", "--dry-run")
    assert stopped.value.code == 2
    assert "missing" in capsys.readouterr().err


def test_json_alone_stands_on_standard_output(data, tmp_path, capsys):
    result = json.loads(clt(capsys, "train", "--data", data, "--output-dir", tmp_path / "run", *SIZES, "--json"))
    assert result["steps"] == 3
    assert result["held_out"]["nmse"] > 0
    plan = json.loads(clt(capsys, "train", "--config", tmp_path / "run", "--dry-run", "--json"))
    assert plan["options"]["clt"]["num_features"] == 16


def test_a_run_made_again_from_its_run_json_has_the_same_weights(data, tmp_path, capsys):
    clt(capsys, "train", "--data", data, "--output-dir", tmp_path / "a", *SIZES, "--learning-rate", "0.01")
    for name in ("b", "c"):
        flags = ["--seed", "7"] if name == "c" else []
        clt(capsys, "train", "--config", tmp_path / "a" / "run.json", "--output-dir", tmp_path / name, *flags)
    a, b, c = ((tmp_path / name / "clt.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c, "a flag beside --config wins"


def test_evaluation_is_made_again_from_its_own_file(data, tmp_path, capsys):
    clt(capsys, "train", "--data", data, "--output-dir", tmp_path / "run", *SIZES)
    first = clt(capsys, "evaluate", "--clt", tmp_path / "run", "--data", data, "--no-plots", "--json")
    again = clt(capsys, "evaluate", "--config", tmp_path / "run" / "evaluation.json")
    assert json.loads(first) == json.loads(again)


def test_generate_is_repeated_from_the_metadata_of_its_data(tmp_path, capsys):
    host = ["--model", "world:shapes", "--dataset", "world:shapes", "--max-samples", "8"]
    made = json.loads(clt(capsys, "generate", *host, "--activation-dir", tmp_path / "a", "--json"))
    metadata = f"{made['train']['folder']}/metadata.json"
    again = json.loads(clt(capsys, "generate", "--config", metadata, "--activation-dir", tmp_path / "b", "--json"))
    files = [sorted(Path(each["train"]["folder"]).glob("shard_*")) for each in (made, again)]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]


def test_options_of_another_command_are_refused_by_name(tmp_path):
    (tmp_path / "run.json").write_text('{"options": {"temperature_of_the_sun": 1}}')
    with pytest.raises(ConfigError, match=r"does not hold the options of `clt train`.*temperature_of_the_sun"):
        options_from_file(importlib.import_module("clt.scripts.train").Options, tmp_path, "train")


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[1]", "not an object"), (None, "there is no")])
def test_a_config_that_cannot_be_read_is_refused(tmp_path, text, message):
    file = tmp_path / "run.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        options_from_file(importlib.import_module("clt.scripts.train").Options, file, "train")


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = 1


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    paths: tuple[Path, ...] = ()
    out: Path | None = None
    server_token: str | None = None
    chunk_token_threshold: int = 5


def test_options_come_back_from_json_as_they_were_without_tokens(tmp_path):
    options = Outer(inner=Inner(size=3), paths=(Path("a"), Path("b")), out=Path("c"), server_token="secret")
    record_options(tmp_path, options)
    assert "secret" not in (tmp_path / "run.json").read_text()
    again = options_from_file(Outer, tmp_path, "outer")
    assert again == Outer(inner=options.inner, paths=options.paths, out=options.out)
    assert plain(options)["chunk_token_threshold"] == 5


def test_a_missing_option_is_named():
    @dataclass(frozen=True, kw_only=True)
    class Needs:
        model: str

    with pytest.raises(ConfigError, match="'model'"):
        instance(Needs, {})


def test_a_flag_that_the_command_has_itself_stays_with_it():
    @dataclass(frozen=True, kw_only=True)
    class Own:
        json: bool = False
        config: str = ""

    arguments = ["--json", "--config", "a.yaml", "--dry-run"]
    shared = take_shared(arguments, Own)
    assert shared.dry_run
    assert not shared.json
    assert arguments == ["--json", "--config", "a.yaml"]


def test_config_without_a_file_is_refused():
    with pytest.raises(ConfigError, match="--config needs a file"):
        take_shared(["--config"], Inner)


def test_a_command_without_a_result_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        clt(capsys, "apply-neurons", "--model", "m", "--patch", "p", "--output", tmp_path / "o", "--json")
    assert stopped.value.code == 2
    assert "no result to print as JSON" in capsys.readouterr().err


BROKEN = """
import sys, clt.__main__ as m
def fail(name, arguments): {statement}
m.run = fail
m.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("statement", "debug", "code", "shows"),
    [
        ("raise ZeroDivisionError('deep inside')", False, 1, "mistake in crosslayer"),
        ("raise ZeroDivisionError('deep inside')", True, 1, "Traceback"),
        ("raise m.ConfigError('no such flag')", False, 2, "clt train: no such flag"),
        ("raise m.ConfigError('no such flag')", True, 1, "Traceback"),
        ("open('/nowhere/at/all')", False, 2, "No such file or directory: /nowhere/at/all"),
        ("raise KeyboardInterrupt", False, 130, "goes on from the last saved point"),
        ("raise BrokenPipeError", False, 0, ""),
    ],
)
def test_exit_codes_are_those_of_the_help(statement, debug, code, shows):
    program = BROKEN.format(statement=statement)
    arguments = ["train", *(["--debug"] if debug else [])]
    result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    assert shows in result.stderr
    assert ("Traceback" in result.stderr) == debug


def test_running_out_of_memory_gets_its_own_advice(capsys):
    kind = type("OutOfMemoryError", (RuntimeError,), {})
    command_line.report_mistake(kind, kind("CUDA out of memory"), None)
    assert "smaller batch" in capsys.readouterr().err


def test_completion_knows_commands_subcommands_and_flags(monkeypatch, capsys):
    from clt.scripts import completion

    few = {"Some": {"evaluate": "Measure 'it'.", "data": "Look."}}
    monkeypatch.setattr(completion, "COMMANDS", few)
    completion.main(completion.Options(shell="bash"))
    script = capsys.readouterr().out
    ask = 'COMP_WORDS=({words}); COMP_CWORD={place}; _clt; echo "${{COMPREPLY[@]}}"\n'
    asked = [("clt ev", 1), ("clt evaluate --by", 2), ("clt data ver", 2), ("clt data drop-chunk --", 3)]
    script += "".join(ask.format(words=words, place=place) for words, place in asked)
    answer = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert answer[:3] == ["evaluate", "--by-distance", "verify"]
    assert "--dry-run" in answer[3]
    completion.main(completion.Options(shell="fish"))
    assert "complete -c clt -n '__fish_seen_subcommand_from evaluate' -l by-distance" in capsys.readouterr().out
    completion.main(completion.Options(shell="zsh"))
    assert "bashcompinit" in capsys.readouterr().out


def test_the_doctor_reports_machine_disk_features_and_host(tmp_path, capsys):
    report = json.loads(clt(capsys, "doctor", "--folder", tmp_path / "new", "--model", "world:shapes", "--json"))
    assert report["host"]["n_layers"] == 4
    assert report["host"]["is_multimodal"]
    assert report["host"]["bytes_per_token"] == 2 * 2 * 4 * 64
    assert report["disk"]["folder"] == str(tmp_path)
    assert all(feature["is_there"] or feature["remedy"] for feature in report["features"])
    assert list(tmp_path.iterdir()) == [], "the disk probe leaves nothing behind"
    text = clt(capsys, "doctor", "--folder", tmp_path, "--model", "world:shapes")
    assert "mlp.output" in text


def test_the_doctor_refuses_a_model_that_cannot_be_a_host(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(SystemExit) as stopped:
        clt(capsys, "doctor", "--model", tmp_path, "--folder", tmp_path)
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert "neither completes text" in shown.err
    assert "versions" in shown.out


def test_a_full_disk_is_not_probed(tmp_path, monkeypatch):
    from clt.scripts import doctor

    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    assert doctor.disk(tmp_path)["write_mb_s"] is None
