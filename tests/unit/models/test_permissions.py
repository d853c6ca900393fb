"""Others may read what a user's umask lets them read: safetensors by itself writes for its owner alone."""

import os

import pytest
import torch

from clt.models.checkpoint import save_tensors


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_weights_have_the_mode_of_new_files(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        for _ in range(2):  # new, and over an old one
            save_tensors({"x": torch.ones(2)}, tmp_path / "x.safetensors")
            assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)
