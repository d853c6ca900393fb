"""Live steering: the numbers of the steered host, on the prompt the graph shows."""

import dataclasses

import pytest
import torch

from clt.attribution.view_files import open_view
from clt.errors import ConfigError, GraphError
from clt.replacement import Intervention, SteeredHost
from clt.serve.dose import Dose
from clt.serve.live_steering import LiveSteering
from tests.synthetic_graphs import write_graph_folder
from tests.tiny_hosts import plain_transcoder, tiny_adapter


@pytest.fixture(scope="module")
def adapter():
    return tiny_adapter("gpt2")


@pytest.fixture(scope="module")
def view(tmp_path_factory):
    return open_view(write_graph_folder(tmp_path_factory.mktemp("g") / "one", n_features=20, n_layers=3, dictionary=12))


def dose(**changes):
    return dataclasses.replace(Dose(layer=1, feature=3, position=None, mode="add", value=3.0), **changes)


def test_a_dose_of_one_changes_nothing(adapter, view):
    answer = LiveSteering(adapter, plain_transcoder(adapter), 4).steer(view, dose(mode="scale", value=1.0))
    assert answer["before"] == answer["after"]


@pytest.mark.parametrize("position", [None, 4])
def test_the_numbers_are_those_of_the_steered_host(adapter, view, position):
    transcoder = plain_transcoder(adapter)
    answer = LiveSteering(adapter, transcoder, 4).steer(view, dose(position=position))
    inputs = adapter.prepare_tokens(torch.tensor([list(view.token_ids)]))
    change = Intervention(1, 3, "add", 3.0, positions="all" if position is None else (position,))
    with torch.no_grad():
        logits = SteeredHost(adapter, transcoder).logits(inputs, interventions=change)[0, -1]
    expected = logits.float().softmax(0).topk(3).values
    found = sorted((each["probability"] for each in answer["after"]["top"]), reverse=True)[:3]
    torch.testing.assert_close(torch.tensor(found), expected)
    assert found != sorted((each["probability"] for each in answer["before"]["top"]), reverse=True)[:3]


def test_what_the_host_or_prompt_does_not_have_is_refused(adapter, view):
    steering = LiveSteering(adapter, plain_transcoder(adapter), 4)
    with pytest.raises(GraphError, match="Position 99"):
        steering.steer(view, dose(position=99))
    with pytest.raises(ConfigError, match="features"):
        steering.steer(view, dose(feature=10**6))
    with pytest.raises(GraphError, match="the graph was made with"):
        steering.steer(dataclasses.replace(view, token_ids=()), dose())
