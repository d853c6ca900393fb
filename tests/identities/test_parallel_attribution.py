"""Several processes compute the graph of one, bit by bit, also after a kill."""

import signal
import time

import pytest
import torch

from clt.attribution import attribute, attribute_on
from clt.parallel.mesh import open_mesh
from tests.attribution_hosts import random_replacement
from tests.ranks import context_with, printed, run_ranks, start_ranks, wait_for

OPTIONS = {"max_feature_nodes": 40, "batch_size": 4, "update_interval": 3}


@pytest.fixture(scope="module")
def context():
    return context_with("clt.attribution", "tests.attribution_hosts")


def explain(folder, options, seed_of_rank_1=0, work_dir=None):
    with open_mesh(device="cpu", timeout_seconds=200) as mesh:
        model, inputs = random_replacement("llama", seed=seed_of_rank_1 if mesh.rank == 1 else 0)
        graph = attribute_on(mesh, model, inputs, work_dir=work_dir, **options)
        assert (graph is not None) == mesh.is_main
        if graph is not None:
            graph.save(folder)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    torch.set_num_threads(1)
    model, inputs = random_replacement("llama")
    folder = tmp_path_factory.mktemp("alone")
    graph = attribute(model, inputs, **OPTIONS)
    assert len(graph.active_features) > 60, "there is nothing to select"
    graph.save(folder)
    return files_of(folder)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_give_the_graph_of_one(context, tmp_path, alone, world):
    assert run_ranks(context, world, explain, tmp_path / "graph", OPTIONS, log=tmp_path / "log") == [0] * world
    assert files_of(tmp_path / "graph") == alone


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_changes_nothing(context, tmp_path, alone, killed):
    work_dir = tmp_path / "rows"
    arguments = (tmp_path / "graph", OPTIONS, 0, work_dir)
    processes = start_ranks(context, 2, explain, *arguments, log=tmp_path / "log")
    while processes[0].is_alive() and not (work_dir / "queue.json").exists():
        time.sleep(0.001)
    processes[killed].kill()
    assert wait_for(processes)[killed] in (-signal.SIGKILL, 0)
    assert run_ranks(context, 2, explain, *arguments, log=tmp_path / "log") == [0, 0]
    assert files_of(tmp_path / "graph") == alone


def test_ranks_that_see_something_else_are_refused(context, tmp_path):
    assert 0 not in run_ranks(context, 2, explain, tmp_path / "graph", OPTIONS, 1, log=tmp_path / "log")
    assert "Rank 1 is to explain something else than rank 0: data differ" in printed(tmp_path / "log", 0)
