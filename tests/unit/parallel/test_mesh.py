"""Which ranks form which groups; several processes are in tests/identities/test_parallel.py."""

import pytest
import torch

from clt.errors import ConfigError
from clt.parallel.mesh import is_launched, open_mesh, shape_of


@pytest.mark.parametrize(
    ("world", "tp", "dp", "shape"),
    [(4, None, None, (1, 4)), (4, 2, None, (2, 2)), (4, None, 4, (4, 1)), (6, 3, 2, (2, 3)), (1, None, None, (1, 1))],
)
def test_what_is_not_given_follows_from_the_number_of_ranks(world, tp, dp, shape):
    assert shape_of(world, tp, dp) == shape


@pytest.mark.parametrize(("world", "tp", "dp"), [(4, 3, None), (4, 2, 4), (1, 2, None), (4, 0, None)])
def test_a_table_that_is_not_all_ranks_is_refused_with_both_numbers(world, tp, dp):
    with pytest.raises(ConfigError, match=f"there are {world} ranks"):
        shape_of(world, tp, dp)


def test_alone_every_operation_is_the_identity_and_sends_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not is_launched()
    with open_mesh(device="cpu") as mesh:
        values = torch.arange(3.0)
        assert mesh.is_main
        assert mesh.is_alone
        assert mesh.tp.sum_(values.clone(), "values").equal(values)
        assert mesh.dp.gather(values, "values").equal(values[None])
        assert mesh.world.any(True, "flag")
        assert mesh.world.collect({"a": 1}, "object") == [{"a": 1}]
        assert not mesh.traffic.calls
