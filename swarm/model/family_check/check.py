"""With versions of transformers and torch that aren't tested, a model's family is checked before it is used.

Each side computes a tiny random model of the family (``tiny.py``) in its own way and compares with transformers'. What
came of it is kept (``verdicts.py``), so that it costs once.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ...compat import versions
from ...errors import ModelError
from .verdicts import keep_verdict, read_verdict, verdicts_file

if TYPE_CHECKING:
    from .table import Case
    from .tiny import TinyModel

logger = logging.getLogger(__name__)
VARIABLE = "SWARM_UNTESTED"
"""Set to 1 in the environment, wrong results are a warning only."""

Check = Callable[["TinyModel"], str]
"""Computes a tiny model; says in what it differs from transformers', or nothing."""

_warned: set[str] = set()


def check_family(model_type: str, side: str, check: Check, say: Callable[[str], None]) -> None:
    """Makes sure that models of this type are computed right with the versions that are installed.

    Args:
        side: what of it is checked, such as ``"blocks"``: verdicts are kept for each by itself.
        say: is told when a check begins, which takes seconds.

    Raises:
        ModelError: they aren't.
    """
    present = versions.installed()
    if present in versions.TESTED:
        return
    begin, instead = f"{present} isn't a tested combination", versions.how_to_get_tested(present)
    from .table import CASES

    cases = [case for case in CASES if case.model_type == model_type]
    if not cases:
        _warn_once(
            f"{begin}, and models of type {model_type!r} are in no list to check them by: nobody knows whether the "
            f"results are right. To be sure: {instead}"
        )
        return
    file, name, subject = verdicts_file(), versions.set_name(present), f"{side} of {model_type}"
    verdict = known = read_verdict(file, name, subject)
    if verdict is None:
        say(f"{begin}: checking a tiny {model_type} model…")
        verdict, lasting = _verdict(cases, check)
        if lasting:
            keep_verdict(file, name, subject, verdict)
    if not verdict:
        return
    text = f"{begin}, and with it the {subject} don't come out as in transformers: {verdict}"
    if os.environ.get(VARIABLE) == "1":
        _warn_once(f"{text}. Used all the same, as {VARIABLE}=1 says")
        return
    again = f". This was found before: without {file} it is checked again" if known else ""
    raise ModelError(f"{text}. Install a tested one ({instead}), or set {VARIABLE}=1 to use it all the same{again}")


def _verdict(cases: list[Case], check: Check) -> tuple[str, bool]:
    """What is wrong, and whether that lies in the versions, and not in the machine at the moment."""
    from .tiny import make_tiny

    for case in cases:
        lasting = True
        try:
            with tempfile.TemporaryDirectory(prefix="swarm-check-") as directory:
                found = check(make_tiny(case, Path(directory)))
        except Exception as error:  # a library that has changed raises all sorts
            found = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
            lasting = not isinstance(error, OSError | MemoryError)
        if found:
            return f"{case.label}: {found}", lasting
    return "", True


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        logger.warning("%s", text)
