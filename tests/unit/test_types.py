"""The checks at the door."""

import pytest
import torch

from clt.errors import ConfigError
from clt.types import ActivationBatch, choose_device


def test_the_device_asked_for_is_the_one_given():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device(torch.device("meta")).type == "meta"


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"sees .* CUDA devices"):
        choose_device("cuda:99")
    with pytest.raises(ConfigError, match="'gpu' is no torch device"):
        choose_device("gpu")


def test_a_batch_whose_parts_disagree_is_refused():
    x = torch.zeros(2, 3, 4)
    tokens = torch.zeros(3, dtype=torch.int64)
    kind = torch.zeros(3, dtype=torch.uint8)
    ActivationBatch(x, x, kind, tokens, tokens)
    for wrong in ((x, x[:, :2], kind, tokens), (x, x, kind[:2], tokens), (x[0], x[0], kind, tokens)):
        with pytest.raises(Exception, match=r"must both be|entries for|type|shape"):
            ActivationBatch(*wrong, tokens)
