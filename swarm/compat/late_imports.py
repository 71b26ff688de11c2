"""Importing transformers and hivemind without what our commands never use of them, which took half of the time. For the
commands only, which own their process; a program that imports us imports everything as it is.

* ``torch._dynamo``: transformers only marks functions with its decorators. It is imported when something else of it is
  asked for, as ``torch.compile`` does, and gets the marks then.
* ``scipy.optimize``: hivemind averages gradients with it, and transformers computes a loss.
* ``torch.distributed.tensor``: transformers takes it for its tensor parallelism. It is told that this torch is one of
  those built without, like some for macOS.
* transformers reads all its 1,600 files to know what they export; and again, as its cache has room for 128 folders.

The standard library's ``LazyLoader`` would not do: it runs a module when anybody looks at its ``__file__``, as
``inspect.getmodule`` does with all modules, and a package when a submodule is imported.
"""

from __future__ import annotations

import functools
import gc
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import FunctionType, ModuleType
from typing import Any

_DEADLOCK_SECONDS = 10.0  # then a thread goes on with a module that is half there, as Python's own imports do at once
_UTILS = "transformers.utils.import_utils"
_ALONE = {"torch._dynamo._trace_wrapped_higher_order_op"}  # needs nothing of its package

_lock = threading.RLock()
_waiting: dict[str, Loader] = {}  # of modules whose code has not been run to its end
_running: set[str] = set()
_marks: list[tuple[str, str, Any]] = []  # module, decorator and what it was given


def defer_imports() -> None:
    """From now on imports go the short way, unless torch is imported already."""
    if "torch" not in sys.modules:
        sys.meta_path.insert(0, _Finder())


@contextmanager
def importing() -> Iterator[None]:
    """Around the imports of a command: what they make stays, so nobody looks through it for garbage, then or later."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class _Deferred(ModuleType):
    """A module whose code is run when something of it is asked for that has no stand-in."""

    def __getattr__(self, name: str) -> Any:
        if self.__name__ in _waiting and name in _STAND_INS[self.__name__]:
            return _STAND_INS[self.__name__][name](self, name)
        if not name.startswith("__") or name == "__all__":
            _run(self)
        try:
            return self.__dict__[name]
        except KeyError:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}") from None


def _run(module: ModuleType) -> None:
    name = module.__name__
    taken = _lock.acquire(timeout=_DEADLOCK_SECONDS)
    try:
        if name not in _waiting or name in _running:
            return
        _running.add(name)
        try:
            _waiting[name].exec_module(module)
        finally:
            _running.remove(name)
        del _waiting[name]
        for marked, decorator, function in _marks:
            if marked == name:
                getattr(module, decorator)(function)
    finally:
        if taken:
            _lock.release()


def _real(module: ModuleType, name: str) -> Any:
    _run(module)
    return module.__dict__[name]


def _mark(module: ModuleType, name: str) -> Callable[[Any], Any]:
    """For a decorator that returns what it is given."""

    def decorate(function: Any) -> Any:
        _marks.append((module.__name__, name, function))
        return function if module.__name__ in _waiting else _real(module, name)(function)

    return decorate


def _disable(module: ModuleType, name: str) -> Callable[..., Any]:
    """For the decorator of functions that are not to be compiled: as long as the module hasn't been run, nothing is."""

    def disable(fn: Any = None, recursive: bool = True, **options: Any) -> Any:
        if fn is None:
            return functools.partial(disable, recursive=recursive, **options)
        if not isinstance(fn, FunctionType):
            return _real(module, name)(fn, recursive, **options)
        disabled: list[Callable[..., Any]] = []

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            real = module.__dict__.get(name)
            if real is None:
                return fn(*args, **kwargs)
            if not disabled:
                disabled.append(real(fn, recursive, **options))
            return disabled[0](*args, **kwargs)

        call._torchdynamo_disable = True  # type: ignore[attr-defined]
        return call

    return disable


def _call(module: ModuleType, name: str) -> Callable[..., Any]:
    """For a function."""
    return lambda *args, **options: _real(module, name)(*args, **options)


_STAND_INS: dict[str, dict[str, Callable[[ModuleType, str], Any]]] = {
    "torch._dynamo": {"disable": _disable, "assume_constant_result": _mark, "allow_in_graph": _mark},
    "scipy.optimize": {"linear_sum_assignment": _call},
}


def _shorten(utils: ModuleType) -> None:
    """Of ``_UTILS``."""
    if hasattr(utils, "is_torch_distributed_available"):
        utils.is_torch_distributed_available = lambda: False  # type: ignore[attr-defined]
    scan = getattr(getattr(utils, "create_import_structure_from_path", None), "__wrapped__", None)
    if scan is not None:
        utils.create_import_structure_from_path = functools.cache(scan)  # type: ignore[attr-defined]


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        parent = fullname.rpartition(".")[0]
        if parent in _waiting and fullname not in _ALONE:
            _run(sys.modules[parent])
            if fullname in sys.modules:
                return ModuleSpec(fullname, _Present(sys.modules[fullname]))
        around = _Later if fullname in _STAND_INS else _Shortened if fullname == _UTILS else None
        if around is None:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = around(spec.loader)
        return spec


class _Around(Loader):
    """Puts the module's own loader in its place when it has done what there is to do."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader


class _Later(_Around):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Deferred(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _waiting[module.__name__] = self.loader


class _Shortened(_Around):
    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        self.loader.exec_module(module)
        _shorten(module)


class _Present(Loader):
    """For a submodule that its package has imported meanwhile."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec
