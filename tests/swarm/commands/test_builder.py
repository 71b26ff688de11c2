"""Commands that are built from settings: what is given on the command line, in the environment, or not at all."""

from dataclasses import dataclass, field, replace
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from swarm.client.commands.options import Looking, Where
from swarm.client.gateway.settings import GatewaySettings
from swarm.commands.builder import takes_settings
from swarm.network.options import PeerOptions
from swarm.node.settings import FetchSettings, LogFormat, NodeSettings
from swarm.option import LIST, MEGABYTES, PATHS, Only, Option


@dataclass(frozen=True)
class Inner:
    port: Annotated[int, Option("TCP port.", env="TEST_PORT", panel="Network", max=65535)] = 0
    peers: Annotated[tuple[str, ...], Option(env="TEST_PEERS", form=LIST)] = ()
    inside: bool = False


@dataclass(frozen=True)
class Outer:
    model: Annotated[str, Option("A model.", env="TEST_MODEL", positional=True)]
    inner: Inner = field(default_factory=Inner)
    rate: Annotated[float, Option("MB/s.", env="TEST_RATE", form=MEGABYTES)] = 2.5e6
    paths: Annotated[tuple[str, ...], Option(form=PATHS)] = ()
    period: Annotated[float, Option(flags=("--every", "-e"))] = 20.0
    fast: Annotated[bool, Option()] = False
    store: Path | None = None


FAST = Outer("mine", Inner(port=31337, inside=True), fast=True)


def run(hint: Any, argv: list[str], default: Any = Parameter.empty, **env: str) -> Any:
    """The settings that a command gets, or what it prints if it gets none."""
    got: list[Any] = []

    def body(settings: Any) -> None:
        got.append(settings)

    parameter = Parameter("settings", Parameter.KEYWORD_ONLY, annotation=hint, default=default)
    body.__signature__ = Signature([parameter])  # type: ignore[attr-defined]
    app = typer.Typer()
    app.command()(takes_settings(body))
    done = CliRunner().invoke(app, argv, env={"COLUMNS": "200", "TERM": "dumb", **env})
    return got[0] if got else done.output


@pytest.mark.parametrize(
    ("argv", "settings"),
    [
        ([], Outer("m")),
        (["--port", "9", "--fast"], Outer("m", Inner(port=9), fast=True)),
        (["--rate", "1"], Outer("m", rate=1e6)),
        (["--peers", "a,b c", "--peers", "d"], Outer("m", Inner(peers=("a", "b", "c", "d")))),
        (["--paths", "a b,c", "--paths", "d"], Outer("m", paths=("a b", "c", "d"))),
        (["-e", "1"], Outer("m", period=1.0)),
    ],
)
def test_options(argv: list[str], settings: Outer) -> None:
    assert run(Outer, ["m", *argv]) == settings


def test_environment() -> None:
    settings = run(Outer, [], TEST_MODEL="m", TEST_PORT="9", TEST_RATE="1", TEST_PEERS="a,b c")
    assert settings == Outer("m", Inner(port=9, peers=("a", "b", "c")), rate=1e6)
    assert run(Outer, ["n", "--port", "8"], TEST_MODEL="m", TEST_PORT="9") == Outer("n", Inner(port=8))


def test_help_says_what_the_fields_say() -> None:
    text = run(Outer, ["--help"])
    for words in (
        "TCP port. [env var: TEST_PORT] [default: 0]",
        "MB/s. [env var: TEST_RATE] [default: 2.5]",
        "Network",
    ):
        assert words in text
    assert "--fast" in text
    for words in ("--no-fast", "--store", "--inside", "--period"):
        assert words not in text


def test_a_default_of_the_whole_is_the_default_of_its_options() -> None:
    assert run(Outer, [], FAST) == FAST
    assert run(Outer, ["--port", "1"], FAST) == replace(FAST, inner=Inner(port=1, inside=True))
    assert "[default: 31337]" in run(Outer, ["--help"], FAST)


def test_only_some_options() -> None:
    some = Annotated[Outer, Only("period", "port", "model")]
    assert run(some, ["m", "--port", "9"]) == Outer("m", Inner(port=9))
    assert run(some, ["m", "--port", "9"], FAST) == replace(FAST, model="m", inner=Inner(port=9, inside=True))
    assert "No such option" in run(some, ["m", "--fast"])
    text = run(some, ["--help"])
    assert text.index("--every") < text.index("--port")
    with pytest.raises(ValueError, match="no option colour, inside"):
        run(Annotated[Outer, Only("colour", "inside")], [])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["m", "--port", "x"], "Invalid value for '--port'"),
        (["m", "--port", "70000"], "Invalid value for '--port'"),
        (["m", "--prot", "1"], "No such option: --prot"),
        ([], "Missing argument"),
    ],
)
def test_what_cannot_be(argv: list[str], says: str) -> None:
    assert says in run(Outer, argv)


def test_two_options_of_one_name() -> None:
    def body(one: Inner, other: Inner) -> None: ...

    with pytest.raises(ValueError, match="duplicate parameter name"):
        takes_settings(body)


@pytest.mark.parametrize("kind", [NodeSettings, FetchSettings, Where])
def test_defaults_of_the_commands(kind: Any) -> None:
    assert run(kind, ["m"]) == kind(model="m")


def test_settings_of_the_commands(tmp_path: Path) -> None:
    node = run(
        NodeSettings, ["m"], SWARM_UPLOAD_RATE="2", SWARM_ADAPTERS="a,b", SWARM_RELAY="1", SWARM_LOG_FORMAT="json"
    )
    assert node == NodeSettings(
        "m", peer=PeerOptions(relay=True), upload_rate=2e6, adapters=("a", "b"), log_format=LogFormat.json
    )
    looking = run(Looking, ["m", "--initial-peers", "a,b"], SWARM_API="http://x", SWARM_ADAPTER="no option here")
    assert looking == Where("m", ("a", "b"), api="http://x")
    gateway = run(GatewaySettings, ["a", "b", "--cors-origin", "x"], SWARM_KEYS_FILE="~/keys", HOME=str(tmp_path))
    assert gateway == GatewaySettings(("a", "b"), cors_origins=("x",), keys_file=tmp_path / "keys")
