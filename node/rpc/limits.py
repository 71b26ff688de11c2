"""What a node takes from one peer. Everything is checked against these before memory is given to it."""

from __future__ import annotations

from dataclasses import dataclass

from swarm.wire.limits import MAX_ROWS, MAX_STEP_TOKENS


@dataclass(frozen=True)
class Limits:
    """Bounds of requests.

    Attributes:
        max_length: columns of a session, at most the model's positions and the KV cache.
        max_rows: rows of a session or a request.
        max_step_tokens: rows × columns of one message.
        max_waiting_steps: steps of one session that wait.
        opening_timeout: seconds that a stream may be open before it says what it is for.
        step_timeout: seconds that a session may be idle.
        idle_seconds: after so many a session loses its cache if another one waits for cache.
        max_waiting_sessions: sessions that wait for cache; more are refused at once.
        admission_timeout: seconds that one of them waits at most.
        request_timeout: seconds for one forward or backward.
        handover_timeout: seconds for fetching a session's cache from another node.
    """

    max_length: int
    max_rows: int = MAX_ROWS
    max_step_tokens: int = MAX_STEP_TOKENS
    max_waiting_steps: int = 64
    opening_timeout: float = 30.0
    step_timeout: float = 15 * 60.0
    idle_seconds: float = 60.0
    max_waiting_sessions: int = 256
    admission_timeout: float = 60.0
    request_timeout: float = 3 * 60.0
    handover_timeout: float = 60.0

    def message_bytes(self, hidden_size: int) -> int:
        """Bytes of the largest message of a session: hidden states as float32, and a little for the rest."""
        return self.max_step_tokens * hidden_size * 4 + 2**20
