"""What checks of families have found, kept from start to start in a file that can be lost at any time."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from ...weights.partial import write_json

logger = logging.getLogger(__name__)
SETS = 8
"""Of as many sets of versions verdicts are kept."""
_MOST_BYTES = 1 << 20
_MOST_CHARACTERS = 1000

Verdicts = dict[str, dict[str, str]]


def verdicts_file() -> Path | None:
    """Where they are kept for this user; None: there is no such place."""
    try:
        given = Path(os.environ.get("XDG_CACHE_HOME", ""))
        return (given if given.is_absolute() else Path.home() / ".cache") / "swarm" / "checked.json"
    except RuntimeError:  # a user without a home
        return None


def read_verdict(file: Path | None, versions: str, subject: str) -> str | None:
    """What was found about ``subject`` with these ``versions``: empty for nothing wrong. None: it isn't known."""
    return _read(file).get(versions, {}).get(subject) if file is not None else None


def keep_verdict(file: Path | None, versions: str, subject: str, verdict: str) -> None:
    """Puts a verdict to those that are kept. Where that can't be done, it will be found again."""
    if file is None:
        return
    known = _read(file)
    of_these = {**known.pop(versions, {}), subject: verdict[:_MOST_CHARACTERS]}
    others = list(known.items())[-(SETS - 1) :]
    try:
        write_json(file, {**dict(others), versions: of_these})
    except OSError as error:
        logger.info("can't keep what the check of versions found: %s", error)


def _read(file: Path) -> Verdicts:
    """What is there and of the right form."""
    try:
        if file.stat().st_size > _MOST_BYTES:
            return {}
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {
        versions: {subject: verdict for subject, verdict in each.items() if isinstance(verdict, str)}
        for versions, each in found.items()
        if isinstance(each, dict)
    }
