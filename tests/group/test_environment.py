from __future__ import annotations

import pytest

from computron.errors import ConfigError
from computron.group.environment import Place

VARIABLES = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node-a",
    "MASTER_PORT": "29500",
}


def test_the_place_is_read_from_the_launchers_variables() -> None:
    place = Place.from_environment(VARIABLES, nodes=4)
    assert place == Place(3, 4, 1, 2, "node-a", 29500)
    assert not place.leader
    assert place.control_port == 29500


def test_rank_0_leads() -> None:
    place = Place.from_environment({**VARIABLES, "RANK": "0"})
    assert place is not None
    assert place.leader


def test_a_process_that_nobody_launched_has_no_place() -> None:
    assert Place.from_environment({"MASTER_PORT": "29500"}) is None
    assert Place.from_environment({"RANK": "", "WORLD_SIZE": ""}) is None


def test_the_processs_own_variables_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    assert Place.from_environment() == Place(3, 4, 1, 2, "node-a", 29500)


def test_torchruns_own_store_keeps_its_port() -> None:
    place = Place.from_environment({**VARIABLES, "TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert place is not None
    assert (place.master_port, place.control_port) == (29500, 29501)
    place = Place.from_environment({**VARIABLES, "TORCHELASTIC_USE_AGENT_STORE": "False"})
    assert place is not None
    assert place.control_port == 29500


@pytest.mark.parametrize("name", VARIABLES)
def test_a_missing_variable_is_named(name: str) -> None:
    variables = {key: value for key, value in VARIABLES.items() if key != name}
    with pytest.raises(ConfigError, match=f"^{name} is not set.*computron launch"):
        Place.from_environment(variables)


@pytest.mark.parametrize("name", sorted(VARIABLES.keys() - {"MASTER_ADDR"}))
@pytest.mark.parametrize("value", ["two", "1.5", "²"])
def test_a_variable_that_is_no_number_is_named(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f'^{name} is "{value}"; it must be a whole number'):
        Place.from_environment({**VARIABLES, name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", "4", "RANK is 4; it must be below WORLD_SIZE"),
        ("RANK", "-1", "RANK is -1; it must be at least 0"),
        ("WORLD_SIZE", "0", "WORLD_SIZE is 0; it must be at least 1"),
        ("LOCAL_WORLD_SIZE", "5", "LOCAL_WORLD_SIZE is 5; it must be at most WORLD_SIZE"),
        ("LOCAL_RANK", "2", "LOCAL_RANK is 2; it must be below LOCAL_WORLD_SIZE"),
        ("MASTER_PORT", "0", "MASTER_PORT is 0; it must be at least 1"),
        ("MASTER_PORT", "65536", "MASTER_PORT is 65536; it must be at most 65535"),
        ("MASTER_ADDR", " ", "MASTER_ADDR is not set"),
    ],
)
def test_a_variable_out_of_its_range_is_named(name: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Place.from_environment({**VARIABLES, name: value})


def test_torchruns_port_leaves_room_for_the_control_port() -> None:
    with pytest.raises(ConfigError, match="choose a lower one"):
        Place.from_environment({**VARIABLES, "MASTER_PORT": "65535", "TORCHELASTIC_USE_AGENT_STORE": "True"})


def test_as_many_nodes_must_be_started_as_are_configured() -> None:
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 4, but .* makes 2 nodes") as caught:
        Place.from_environment(VARIABLES, nodes=2)
    assert caught.value.param == "group"
