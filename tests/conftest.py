"""Shared by all tests: one thread (xdist runs files side by side), hypothesis without deadlines."""

import os

import matplotlib as mpl
import pytest
import torch
from hypothesis import settings

mpl.use("Agg")
os.environ["HF_HUB_OFFLINE"] = "1"
settings.register_profile("local", deadline=None, max_examples=25)
settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    """The same numbers on every machine, and no oversubscription under xdist."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
