"""Which of the swarms on a local network is meant."""

from __future__ import annotations

import pytest

from swarm.errors import ConnectError, UsageError
from swarm.network.lan.choice import LanSwarm, check_name, for_client, for_node, swarms_of
from swarm.network.lan.record import LanRecord, model_label

LLAMA, QWEN = ["llama", "llama-hf"], ["qwen"]
HOME = ("default", "llama-hf")
LAB = ("lab", "llama-hf")
OTHER = ("my lab", "qwen")


def there(*served: tuple[str, str]) -> list[LanSwarm]:
    return swarms_of(
        LanRecord(f"peer{number}", name, model, "", ("/ip4/10.0.0.1/tcp/1",))
        for number, (name, model) in enumerate(served)
    )


def test_nodes_by_swarm() -> None:
    found = there(LAB, HOME, HOME, ("default", ""), OTHER)
    assert [(one.name, len(one.nodes), one.models) for one in found] == [
        ("default", 3, ("llama-hf",)),
        ("lab", 1, ("llama-hf",)),
        ("my lab", 1, ("qwen",)),
    ]
    assert str(found[0]) == "'default' (llama-hf; 3 nodes)"


def test_long_names_of_models() -> None:
    name = "x" * 300
    assert there(("lab", model_label(name)))[0].serves([[name]])
    assert not there(("lab", model_label(name)))[0].serves([[name + "x"]])


@pytest.mark.parametrize(
    ("served", "name", "chosen"),
    [
        ([], None, "default"),
        ([], "lab", "lab"),
        ([LAB], None, "lab"),
        ([LAB], "other", "other"),
        ([OTHER], None, "default"),  # nobody's swarm of another model gets nodes that it hasn't asked for
        ([LAB, HOME], None, "default"),
        ([LAB, HOME], "lab", "lab"),
    ],
)
def test_a_node_joins_or_starts(served: list[tuple[str, str]], name: str | None, chosen: str) -> None:
    assert for_node(there(*served), name, [LLAMA]) == chosen


def test_a_node_without_a_model() -> None:
    assert for_node(there(LAB, OTHER), None, []) == "default"


def test_a_node_among_several() -> None:
    with pytest.raises(UsageError, match=r"'lab'.*'lab2'.*--lan-name lab"):
        for_node(there(LAB, ("lab2", "llama-hf")), None, [LLAMA])


@pytest.mark.parametrize(
    ("served", "name", "models", "chosen"),
    [
        ([HOME], None, [LLAMA], "default"),
        ([OTHER, LAB], None, [LLAMA], "lab"),
        ([HOME, LAB], "lab", [LLAMA], "lab"),
        ([HOME, LAB], "lab", [QWEN], "lab"),  # its nodes need not all be in this network
        ([OTHER], None, [LLAMA], "my lab"),
        ([HOME, ("lab", "llama"), ("lab", "qwen")], None, [LLAMA, QWEN], "lab"),
    ],
)
def test_a_client_joins(served: list[tuple[str, str]], name: str | None, models: list[list[str]], chosen: str) -> None:
    assert for_client(there(*served), name, models).name == chosen


@pytest.mark.parametrize(
    ("served", "name", "error", "says"),
    [
        ([], None, ConnectError, "UDP port 5353"),
        ([], "lab", ConnectError, "swarm-node serve MODEL --lan"),
        ([HOME, OTHER], "lab", ConnectError, "called 'lab'; there are 'default' .*, 'my lab' "),
        ([HOME, LAB], None, UsageError, "several .* with this model, .*'lab' .*--lan-name default"),
        ([OTHER, ("z", "qwen")], None, UsageError, "none with this model, .*--lan-name 'my lab'"),
    ],
)
def test_what_a_client_is_told(
    served: list[tuple[str, str]], name: str | None, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        for_client(there(*served), name, [LLAMA])


@pytest.mark.parametrize("name", ["", " lab", "a\nb", "x" * 61])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(UsageError, match="name"):
        check_name(name)


def test_names() -> None:
    for name in (None, "lab", "Our büro"):
        check_name(name)
