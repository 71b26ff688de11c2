"""Commands from settings: what typer is told of an option is what the field of the dataclass says of it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from inspect import Parameter
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

from ..option import Only, Option

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Parameters of a command, and how one argument is made of their values."""

    parameters: list[Parameter]
    read: Callable[[Mapping[str, Any]], Any]


def takes_settings(body: Callable[..., None]) -> Callable[..., None]:
    """``body`` as a function that typer makes a command of.

    A parameter of ``body`` is annotated with an :class:`Option`, or is a dataclass: then the command gets an option for
    each field with an :class:`Option`, also of dataclasses inside. If the parameter has a default, its values are the
    defaults of the options.

    Raises:
        ValueError: :class:`Only` names something that is no option, or two options have the same name.
    """
    parameters = inspect.signature(body, eval_str=True).parameters.values()
    reader = _group(body, [(one.name, one.annotation, one.default) for one in parameters])

    def command(**values: Any) -> None:
        reader.read(values)

    command.__name__, command.__doc__ = body.__name__, body.__doc__
    command.__signature__ = inspect.Signature(reader.parameters)  # type: ignore[attr-defined]
    return command


def _group(make: Callable[..., Any], parts: Iterable[tuple[str, Any, Any]], only: Only | None = None) -> _Reader:
    """For the arguments of ``make``: name, type and default of each."""
    readers = {name: _reader(name, hint, default) for name, hint, default in parts}
    parameters = [parameter for reader in readers.values() for parameter in reader.parameters]
    if only is not None:
        known = {parameter.name: parameter for parameter in parameters}
        if unknown := sorted(set(only.names) - set(known)):
            raise ValueError(f"{make} has no option {', '.join(unknown)}")
        parameters = [known[name] for name in only.names]
    names = {parameter.name for parameter in parameters}

    def read(values: Mapping[str, Any]) -> Any:
        given = {name: value for name, value in values.items() if name in names}
        return make(
            **{
                name: reader.read(given)
                for name, reader in readers.items()
                if any(parameter.name in given for parameter in reader.parameters)
            }
        )

    return _Reader(parameters, read)


def _reader(name: str, hint: Any, default: Any) -> _Reader:
    kind, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        parts = [(field.name, hints[field.name], _default(field, default)) for field in dataclasses.fields(kind)]
        make: Any = kind if default is Parameter.empty else partial(dataclasses.replace, default)
        return _group(make, parts, _first(Only, extras))
    option = _first(Option, extras)
    if option is None:
        return _Reader([], lambda values: default)
    if option.form is not None:
        kind = option.form.type
        default = default if default is Parameter.empty else option.form.write(default)
    told = Annotated[kind, _for_typer(name, kind, option)]  # type: ignore[valid-type]
    read = option.form.read if option.form is not None else lambda value: value
    parameter = Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=told)
    return _Reader([parameter], lambda values: read(values[name]))


def _first(wanted: type[_T], among: Iterable[object]) -> _T | None:
    return next((one for one in among if isinstance(one, wanted)), None)


def _default(field: dataclasses.Field[Any], group: Any) -> Any:
    if group is not Parameter.empty:
        return getattr(group, field.name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return Parameter.empty if field.default is dataclasses.MISSING else field.default


def _for_typer(name: str, kind: Any, option: Option) -> Any:
    said: dict[str, Any] = {"help": option.help, "envvar": option.env, "rich_help_panel": option.panel}
    said |= {"metavar": option.metavar, "min": option.min, "max": option.max}
    if option.positional:
        return typer.Argument(**said)
    flags = option.flags or ((f"--{name.replace('_', '-')}",) if kind is bool else ())  # a bool without its --no-…
    return typer.Option(*flags, **said)
