"""Answers given again, under nothing, are those that were captured; and are cut in the same way."""

import pytest
import torch

from clt.config import CLTConfig
from clt.discovery.capture import capture
from clt.discovery.layout import Layout
from clt.discovery.session import RunOptions, Session
from clt.discovery.steering import fixed_gains
from clt.models import CrossLayerTranscoder
from clt.types import FeatureId


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """Three scenes of the embedded world with their questions, answered with a random transcoder in place."""
    folder = tmp_path_factory.mktemp("session")
    torch.manual_seed(0)
    config = CLTConfig(num_features=32, num_layers=4, d_model=64, activation_fn="topk", topk_k=4)
    CrossLayerTranscoder(config).save_pretrained(folder / "clt")
    run = RunOptions(model="world:shapes", clt=str(folder / "clt"), max_new_tokens=12)
    session = Session(Layout(folder, "shapes"), run, {"n": 3, "seed": 5})
    how = {"max_new_tokens": session.max_new_tokens, "batch_size": 8, "made_with": session.made_with()}
    capture(session.capturing, session.samples, session.layout, **how)
    return session


def plain(examples):
    return {each.sample.id: (each.answer.tolist(), each.spans, each.task) for each in examples}


def test_asked_again_without_interventions_the_captured_model_gives_the_captured_examples(session):
    again = session.examples_under(session.replacement, None, session.responses, batch_size=4)
    assert plain(again) == plain(session.examples(session.responses))
    assert {each.task for each in again} >= {"mentions"}


def test_other_models_and_gains_give_examples_of_their_own_to_the_same_questions(session):
    chosen = session.responses[::2]
    hosts = session.examples_under(session.host, None, chosen, batch_size=8)
    assert {each.sample.id for each in hosts} <= {row.id for row in chosen}
    assert {each.task for each in hosts} == {"mentions", "whole answer"}
    assert any(span.is_bad for each in hosts for span in each.spans)
    off = fixed_gains({FeatureId(layer, feature): 0.0 for layer in range(4) for feature in range(32)}, [32] * 4)
    # Without features the replacement model is left with biases alone, which is another model than the captured one.
    assert plain(session.examples_under(session.replacement, off, chosen, batch_size=8)) != plain(
        session.examples(chosen)
    )
