"""How a client behaves in a swarm."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ClientSettings:
    """Times are in seconds.

    Attributes:
        wait_timeout: how long to wait for blocks that nobody serves at the moment (a node may be restarting).
        connect_timeout: to open a session at a hop.
        step_timeout: for one step at one hop, as long as the hop shows that it is alive.
        silence: a hop that says nothing for this long is asked whether it is alive.
        update_period: between two looks at who serves what.
        ban_seconds: how long a peer that failed is left out; doubles with each failure in a row.
        prefill_tokens: rows × columns of a step; longer prompts go as several, one behind the other along the route.
        startup_timeout: to join the swarm.
        deterministic: use only nodes whose results don't depend on who else uses them (``swarm-node serve
            --deterministic``), and compute the output head that way too.
    """

    wait_timeout: float = 60.0
    connect_timeout: float = 10.0
    step_timeout: float = 300.0
    silence: float = 5.0
    update_period: float = 20.0
    ban_seconds: float = 3.0
    prefill_tokens: int = 512
    startup_timeout: float = 30.0
    deterministic: bool = False
