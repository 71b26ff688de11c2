"""Lets Petals 2.2 run on a newer hivemind: gives the package ``hivemind`` back names that have moved into its parts.

Stands in the site-packages of Petals' own environment. Costs nothing until ``hivemind`` is imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys

_MOVED = {
    "hivemind.p2p": ("P2P", "P2PContext", "PeerID"),
    "hivemind.compression": ("deserialize_tensor_stream", "deserialize_torch_tensor", "serialize_torch_tensor"),
    "hivemind.utils.asyncio": ("anext",),
    "hivemind.utils.nested": ("nested_compare", "nested_flatten", "nested_pack"),
    "hivemind.utils.tensor_descr": ("BatchTensorDescriptor", "TensorDescriptor"),
    "hivemind.utils.serializer": ("MSGPackSerializer",),
    "hivemind.utils.logging": ("get_logger",),
    "hivemind.utils.mpfuture": ("MPFuture",),
    "hivemind.utils.timed_storage": (
        "DHTExpiration",
        "MAX_DHT_TIME_DISCREPANCY_SECONDS",
        "TimedStorage",
        "get_dht_time",
    ),
}
_HOME = {name: module for module, names in _MOVED.items() for name in names}


def _getattr(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'hivemind' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        if fullname != "hivemind":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module) -> None:  # type: ignore[no-untyped-def]
                module.__getattr__ = _getattr
                run(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder())
