"""What the user asked of a node."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from swarm.network.peer import PeerOptions


@dataclass(frozen=True)
class NodeSettings:
    """All settings of ``swarm-node serve``; ``None`` and ``"auto"`` leave the choice to the node.

    Attributes:
        blocks: ``"START:END"``.
        num_blocks: how many blocks, where the swarm is thinnest.
        quantization: of the weights: ``"checkpoint"``, ``"packed"``, ``"none"``, ``"int8"``, ``"nf4"``, ``"int4"``, or
            ``"auto"``.
        cache_tokens: size of the KV cache in tokens, over all sessions.
        max_batch_tokens: tokens computed in one turn; a longer prompt is cut into chunks.
        deterministic: a session's results don't depend on who else uses the node, to the last bit.
        idle_timeout: seconds after which an idle session ends.
        idle_seconds: seconds after which it gives its cache to sessions that wait for some.
        adapters: LoRA adapters that are served beside the base weights: ``[NAME=]DIR`` or ``[NAME=]ID[@REVISION]``.
        update_period: seconds between two announcements.
        balance_quality: a node that chose its blocks moves to others if the swarm's weakest ones have less than this
            share, 0 to 1, of what they would have then; 0: never.
        balance_period: seconds between two looks at that, on average.
        weights: where they come from: ``"hub"`` (a directory here, or else the Hub), ``"peers"``, or ``"auto"``: what
            is here whole, else peers, else the Hub.
        manifest: the root that the weights must have, 64 hex digits.
        seed: hand them out to other nodes.
        upload_rate: bytes per second for that; 0 for no limit.
        store: the directory into which weights from peers go; default: one in the cache.
    """

    model: str
    peer: PeerOptions = field(default_factory=PeerOptions)
    blocks: str | None = None
    num_blocks: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantization: str = "checkpoint"
    cache_tokens: int | None = None
    max_batch_tokens: int = 512
    deterministic: bool = False
    dht_prefix: str | None = None
    name: str | None = None
    revision: str | None = None
    token: str | None = None
    cache_dir: Path | None = None
    metrics_port: int | None = None
    idle_timeout: float = 15 * 60.0
    idle_seconds: float = 60.0
    update_period: float = 20.0
    balance_quality: float = 0.75
    balance_period: float = 120.0
    weights: str = "hub"
    manifest: str | None = None
    seed: bool = False
    upload_rate: float = 0.0
    store: Path | None = None
    adapters: tuple[str, ...] = ()
