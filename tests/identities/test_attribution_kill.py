"""A process killed outright in the middle of a graph leaves rows from which another ends in the same graph."""

import signal
import subprocess
import sys

import pytest
import torch

from clt.attribution import attribute
from tests.attribution_hosts import random_replacement

OPTIONS = {"max_feature_nodes": 20, "batch_size": 3, "update_interval": 2}
DRIVER = """
import os, signal, sys, torch
from clt.attribution import attribute, rows
from tests.attribution_hosts import random_replacement
from tests.identities.test_attribution_kill import OPTIONS

append, calls, at, half = rows.RowStore.append, [], int(sys.argv[2]), sys.argv[3] == "half"

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def killed(self, ids, *rest):
    calls.append(1)
    if len(calls) == at:
        if half:
            # Entries are there, the index that lists them is not yet.
            rows.open = lambda path, mode: open(path, mode) if "rows.bin" not in str(path) else die()
        else:
            die()
    append(self, ids, *rest)

rows.RowStore.append = killed
torch.set_num_threads(int(sys.argv[4]))  # rows of other rounding are refused
model, inputs = random_replacement("llama")
attribute(model, inputs, work_dir=sys.argv[1], **OPTIONS)
"""


@pytest.mark.parametrize(("at", "how"), [(1, "clean"), (4, "half")])
def test_a_graph_goes_on_after_sigkill(tmp_path, at, how):
    command = [sys.executable, "-c", DRIVER, str(tmp_path), str(at), how, str(torch.get_num_threads())]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    model, inputs = random_replacement("llama")
    resumed = attribute(model, inputs, work_dir=tmp_path, **OPTIONS)
    whole = attribute(model, inputs, **OPTIONS)
    assert torch.equal(resumed.features, whole.features)
    assert torch.equal(resumed.to_dense(), whole.to_dense())
