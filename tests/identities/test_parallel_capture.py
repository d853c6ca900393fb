"""Two processes capture what one does: the same rows, the same statistics, whichever of them is killed on the way."""

import json
import signal
import time
from dataclasses import replace

import pytest
import torch

from clt.activation_generation import ActivationGenerator
from clt.config import ActivationConfig
from clt.data import LocalActivationStore
from clt.data.maintenance import verify
from clt.data.metadata import read_json
from clt.parallel.mesh import open_mesh
from tests.ranks import context_with, printed, run_ranks, start_ranks, wait_for
from tests.tiny_hosts import tiny_adapter, tiny_image


@pytest.fixture(scope="module")
def context():
    return context_with("clt.activation_generation", "tests.tiny_hosts")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i} " * (i % 4 + 1)}) + "\n" for i in range(160)))
    return path


def config_of(path, folder, **options):
    defaults = {
        "model_name": "tiny",
        "dataset_path": str(path),
        "activation_dir": str(path.parent / folder),
        "context_size": 16,
        "inference_batch_size": 3,
        "chunk_token_threshold": 64,
        "activation_dtype": "float32",
    }
    return ActivationConfig(**{**defaults, **options})


def capture(config, family="llama", spoil=None):
    with open_mesh(device="cpu", timeout_seconds=200) as mesh:
        if spoil is not None and mesh.rank == spoil["rank"]:
            config = replace(config, **spoil["options"])
        ActivationGenerator(config, tiny_adapter(family), mesh).run()


def rows_of(folder):
    """Every row's bytes with its sample, position and kind, in an order of their own."""
    batch = next(LocalActivationStore(folder, batch_size_tokens=1_000_000).one_pass())
    batch = batch.select((batch.sample * 100_000 + batch.position).argsort())
    return [t.contiguous() for t in (batch.inputs, batch.targets, batch.sample, batch.position, batch.kind)]


def require_equal(found, expected):
    for mine, theirs in zip(rows_of(found), rows_of(expected), strict=True):
        assert mine.equal(theirs)


def files_of(folder):
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in [name for name in found if name.endswith("metadata.json")]:
        found[name] = json.dumps({**json.loads(found[name]), "created": ""}).encode()
    return found


def folder_of(config):
    return ActivationGenerator(config, tiny_adapter("llama")).folder


@pytest.fixture
def alone(text):
    torch.set_num_threads(1)
    return ActivationGenerator(config_of(text, "alone"), tiny_adapter("llama")).run()


@pytest.mark.parametrize("world", [2, 3])
def test_several_ranks_give_the_rows_and_statistics_of_one(context, tmp_path, text, alone, world):
    config = config_of(text, "shared")
    assert run_ranks(context, world, capture, config, log=tmp_path / "log") == [0] * world
    together = folder_of(config)
    for split in ("train", "held_out"):
        require_equal(together / split, alone / split)
        assert verify(together / split) > 1
        mine, theirs = (json.loads((each / split / "norm_stats.json").read_text()) for each in (together, alone))
        for layer, sides in theirs.items():
            for side, values in sides.items():
                assert mine[layer][side]["count"] == values["count"]
                for name in ("mean", "std", "mean_squared_norm"):
                    torch.testing.assert_close(
                        torch.tensor(mine[layer][side][name]).double(),
                        torch.tensor(values[name]).double(),
                        rtol=1e-6,
                        atol=1e-12,
                    )
        ours, one = read_json(together / split), read_json(alone / split)
        for name in ("shards", "created"):
            del ours[name], one[name]
        assert ours == one
        assert not list((together / split).glob("part-*"))


@pytest.mark.parametrize(
    "options",
    [
        {"target_total_tokens": 500},
        {"activation_dtype": "int8", "held_out_fraction": 0},
        {"output_format": "hdf5", "activation_dtype": "bfloat16", "pack": False},
    ],
    ids=["limited", "int8", "hdf5"],
)
def test_also_with_a_limit_in_other_types_and_formats(context, tmp_path, text, options):
    config = config_of(text, "shared", **options)
    assert run_ranks(context, 2, capture, config, log=tmp_path / "log") == [0, 0]
    together = folder_of(config)
    alone = ActivationGenerator(config_of(text, "alone", **options), tiny_adapter("llama")).run()
    for split in ("train", "held_out") if (alone / "train").exists() else (".",):
        require_equal(together / split, alone / split)
        mine, theirs = (read_json(each / split)["codec"] for each in (together, alone))
        assert mine.keys() == theirs.keys()
        if "mean_cosine" in theirs:
            assert mine["mean_cosine"]["inputs"] == pytest.approx(theirs["mean_cosine"]["inputs"], rel=1e-12)


def test_pictures_are_shared_too(context, tmp_path):
    lines = []
    for i in range(12):
        tiny_image(i).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"prompt": f"<image>\nwhat {i}", "image": f"{i}.png", "answer": "noise"}))
    (tmp_path / "pictures.jsonl").write_text("\n".join(lines))
    config = config_of(tmp_path / "pictures.jsonl", "shared", inference_batch_size=2)
    assert run_ranks(context, 2, capture, config, "llava", log=tmp_path / "log") == [0, 0]
    alone = ActivationGenerator(
        config_of(tmp_path / "pictures.jsonl", "alone", inference_batch_size=2), tiny_adapter("llava")
    )
    require_equal(folder_of(config) / "train", alone.run() / "train")


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_killed_at_any_moment_changes_no_byte(context, tmp_path, text, killed):
    whole, parts = config_of(text, "whole"), config_of(text, "parts")
    assert run_ranks(context, 2, capture, whole, log=tmp_path / "log") == [0, 0]
    for n_shards in (1, 4, 9):
        processes = start_ranks(context, 2, capture, parts, log=tmp_path / "log")
        while processes[killed].is_alive() and len(list((tmp_path / "parts").rglob("shard_*"))) < n_shards:
            time.sleep(0.001)
        processes[killed].kill()
        codes = wait_for(processes)
        assert codes[killed] in (-signal.SIGKILL, 0)
    assert run_ranks(context, 2, capture, parts, log=tmp_path / "log") == [0, 0]
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


def test_a_merge_that_was_interrupted_is_finished(context, tmp_path, text, monkeypatch):
    config = config_of(text, "whole")
    assert run_ranks(context, 2, capture, config, log=tmp_path / "log") == [0, 0]
    whole = files_of(tmp_path / "whole")
    for moves in (0, 1, 3):
        config = config_of(text, f"parts{moves}")
        assert run_ranks(context, 2, capture_and_stop, config, moves, log=tmp_path / "log") != [0, 0]
        assert list((tmp_path / f"parts{moves}").rglob("part-*"))
        assert run_ranks(context, 2, capture, config, log=tmp_path / "log") == [0, 0]
        assert files_of(tmp_path / f"parts{moves}") == whole


def capture_and_stop(config, moves):
    """Capture, and be gone after a few shards were moved to their place."""
    import os

    from clt.data import parts

    count, move = [0], parts._move

    def stopping(*arguments):
        count[0] += 1
        if count[0] > moves:
            os._exit(1)
        return move(*arguments)

    parts._move = stopping
    capture(config)


def test_another_number_of_ranks_does_not_go_on(context, tmp_path, text):
    config = config_of(text, "parts")
    run_ranks(context, 2, capture_and_stop, config, 0, log=tmp_path / "log")
    assert 0 not in run_ranks(context, 3, capture, config, log=tmp_path / "log")
    assert "was begun by 2 processes, now there are 3" in printed(tmp_path / "log", 1)
    with pytest.raises(Exception, match="was begun by 2 processes, now there is 1"):
        ActivationGenerator(config, tiny_adapter("llama")).run()


def test_ranks_with_other_options_are_refused_by_name(context, tmp_path, text):
    spoil = {"rank": 1, "options": {"context_size": 8}}
    assert 0 not in run_ranks(context, 2, capture, config_of(text, "x"), "llama", spoil, log=tmp_path / "log")
    assert "context_size: 16 on rank 0, 8 there" in printed(tmp_path / "log", 1)
    assert not (tmp_path / "x").exists()


def test_a_rank_whose_disk_is_full_says_so_and_the_run_goes_on_later(context, tmp_path, text):
    whole, parts = config_of(text, "whole"), config_of(text, "parts")
    assert run_ranks(context, 2, capture, whole, log=tmp_path / "log") == [0, 0]
    assert 0 not in run_ranks(context, 2, capture_on_a_small_disk, parts, log=tmp_path / "log")
    assert "has no room" in printed(tmp_path / "log", 1)
    assert run_ranks(context, 2, capture, parts, log=tmp_path / "log") == [0, 0]
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


def capture_on_a_small_disk(config):
    """Capture, with room for two shards where rank 1 writes."""
    import errno
    import os

    from clt.data.rows import RowFileWriter

    finish, count = RowFileWriter.finish, [0]

    def finish_if_there_is_room(self):
        count[0] += 1
        if os.environ["RANK"] == "1" and count[0] > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        finish(self)

    RowFileWriter.finish = finish_if_there_is_room
    capture(config)
