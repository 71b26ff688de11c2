"""The library that the Hub's client makes its connections with: httpx, and httpx2 since huggingface-hub 2."""

from __future__ import annotations

import functools
import sys

from huggingface_hub import get_session


@functools.cache
def transport_error() -> type[Exception]:
    """What that library raises when a server can't be reached or a connection breaks."""
    libraries = [sys.modules[kind.__module__.partition(".")[0]] for kind in type(get_session()).__mro__]
    error: type[Exception] = next(library.TransportError for library in libraries if hasattr(library, "TransportError"))
    return error
