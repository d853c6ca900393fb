"""Two hosts, here two network namespaces: a cut of ten seconds ends in a clear error and is gone on from exactly."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from clt.models import CrossLayerTranscoder
from tests.identities import parallel_driver as driver
from tests.tiny_data import write_data

ROOT = Path(__file__).resolve().parents[2]
NAMES, LINKS, ADDRESSES = ("clt-a", "clt-b"), ("clt-va", "clt-vb"), ("10.77.0.1", "10.77.0.2")

WORKER = """
import sys, time
from pathlib import Path
from clt.parallel.mesh import open_mesh
from tests.identities.parallel_driver import trainer_of
with open_mesh(device="cpu", timeout_seconds=5) as mesh:
    for step in trainer_of(sys.argv[1], Path(sys.argv[2]), "topk", mesh).steps():
        time.sleep(float(sys.argv[3]))
"""


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts():
    """Two namespaces joined by one cable."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    for name in NAMES:
        ip("netns", "add", name)
    try:
        ip("link", "add", LINKS[0], "type", "veth", "peer", "name", LINKS[1])
        for name, link, address in zip(NAMES, LINKS, ADDRESSES, strict=True):
            ip("link", "set", link, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            for each in (link, "lo"):
                ip("-n", name, "link", "set", each, "up")
        yield
    finally:
        for name in NAMES:
            ip("netns", "del", name)


def start(data, folder, pause):
    """One rank in each namespace."""
    processes = []
    for rank, (name, link) in enumerate(zip(NAMES, LINKS, strict=True)):
        environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME=link)
        environment.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        environment.update(MASTER_ADDR=ADDRESSES[0], MASTER_PORT="29655")
        command = ["ip", "netns", "exec", name, sys.executable, "-c", WORKER, str(data), str(folder), str(pause)]
        options = {"cwd": ROOT, "env": environment, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, **options))
    return processes


def wait_for_step(folder, step):
    while True:
        metrics = folder / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.1)


@pytest.mark.slow
def test_a_cut_of_ten_seconds_ends_in_a_clear_error_and_a_clean_resume(hosts, tmp_path):
    data = write_data(tmp_path / "data")
    driver.train(data, tmp_path, "tp1dp1")

    ranks = start(data, tmp_path / "cut", pause=0.5)
    wait_for_step(tmp_path / "cut", 6)
    begin = time.monotonic()
    ip("-n", NAMES[1], "link", "set", LINKS[1], "down")
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    waited = time.monotonic() - begin
    time.sleep(max(0.0, 10 - waited))
    ip("-n", NAMES[1], "link", "set", LINKS[1], "up")
    assert [rank.returncode for rank in ranks] == [1, 1]
    for rank, text in enumerate(said):
        assert f"ParallelError: Rank {rank} lost its peers, rank {1 - rank} of group" in text
    assert waited < 30, "the error comes within the timeout of 5 s and the way out of the process"

    ranks = start(data, tmp_path / "cut", pause=0)
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    one, other = (CrossLayerTranscoder.from_pretrained(tmp_path / p).state_dict() for p in ("tp1dp1/topk", "cut"))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-9)
