"""Router types by name: those of :mod:`.types`, those that installed packages bring, and ``module:Class``."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rmoe_megablocks.routing.arguments import Argument
from rmoe_megablocks.routing.config import RoutingConfig
from rmoe_megablocks.routing.layer import RECURRENCE, RESIDUAL, RouterLayer
from rmoe_megablocks.routing.parts.initialisation import INIT
from rmoe_megablocks.routing.parts.shared import SharedRouting

#: packages name their router classes in this entry-point group
ENTRY_POINTS = "rmoe_megablocks.routers"
LINEAR = "linear"


@dataclass(frozen=True)
class RouterType:
    """One choice of ``--moe-router-type``; hosts ask this and nothing else about a type.

    Attributes:
        name: the spelling users type.
        layer: the class of what a layer owns; None for the host's own router, one matrix a layer.
    """

    name: str
    layer: type[RouterLayer] | None

    @property
    def summary(self) -> str:
        """One line for help texts: the first of the class's docstring."""
        if self.layer is None:
            return "the host's own router, one matrix a layer"
        return (inspect.getdoc(self.layer) or self.name).partition("\n")[0].rstrip(".")

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """What its user may choose, those of the base classes first."""
        if self.layer is None:
            return (INIT,)
        classes = [cls for cls in reversed(self.layer.__mro__) if issubclass(cls, RouterLayer)]
        found = dict.fromkeys(argument for cls in classes for argument in vars(cls).get("arguments", ()))
        return tuple(found)

    @property
    def replaces_hosts(self) -> bool:
        """Whether the host's own router gives way to this type's."""
        return self.layer is not None

    def shares(self, config: RoutingConfig) -> bool:
        """Whether layers share anything."""
        with torch.device("meta"):
            return self.build_shared(config) is not None

    def state_size(self, config: RoutingConfig) -> int:
        """Width of the state handed from layer to layer, 0 for none. Hosts size their pipeline messages by it."""
        return 0 if self.layer is None else self.layer.state_size(config)

    def check(self, config: RoutingConfig) -> None:
        """Raises ValueError, one line, for sizes and options that do not go together."""
        if self.layer is not None:
            self.layer.check(config)

    def build_layer(self, config: RoutingConfig) -> RouterLayer:
        """What one layer owns. Raises ValueError as :meth:`check`."""
        layer = self.layer(config)
        layer.reset_parameters()
        return layer

    def build_shared(self, config: RoutingConfig) -> SharedRouting | None:
        """What all layers share, None for nothing."""
        return None if self.layer is None or self.layer.shared is None else self.layer.shared(config)


_ROUTER_TYPES: dict[str, RouterType] = {LINEAR: RouterType(LINEAR, None)}


def register(name: str) -> Callable[[type[RouterLayer]], type[RouterLayer]]:
    """Decorator that makes a class the type ``name``. Raises ValueError for a name that is taken, or an unfit class."""

    def registered(layer: type[RouterLayer]) -> type[RouterLayer]:
        if name in _ROUTER_TYPES:
            raise ValueError(f"router type {name!r} is already registered")
        _ROUTER_TYPES[name] = _fit(name, layer)
        return layer

    return registered


def unregister(name: str) -> None:
    """Takes a type back, for tests."""
    del _ROUTER_TYPES[name]


def router_types() -> tuple[str, ...]:
    """Names of all types of this package and of installed ones, ``linear`` first, the others by name."""
    return (LINEAR, *sorted({*_ROUTER_TYPES, *_installed()} - {LINEAR}))


def get_router_type(name: str) -> RouterType:
    """The type called ``name``; ``module:Class`` and names of installed packages are imported.

    Raises:
        ValueError: one line: no such type (with the nearest name), a module that cannot be imported, an unfit class.
    """
    if name not in _ROUTER_TYPES:
        if ":" in name:
            _ROUTER_TYPES[name] = _fit(name, _imported(name, name))
        elif name in _installed():
            _ROUTER_TYPES[name] = _fit(name, _imported(name, _installed()[name]))
        else:
            close = difflib.get_close_matches(name, router_types(), 1)
            meant = f", did you mean {close[0]}?" if close else ""
            raise ValueError(
                f"unknown router type {name!r}{meant} (known: {', '.join(router_types())}; one of yours is "
                "module:Class)"
            )
    return _ROUTER_TYPES[name]


def owners(argument: Argument) -> list[str]:
    """The known types that take ``argument``."""
    return [name for name in router_types() if name in _ROUTER_TYPES and argument in _ROUTER_TYPES[name].arguments]


def all_arguments() -> tuple[Argument, ...]:
    """Of all known types: a type of yours is known once :func:`get_router_type` has had its name."""
    kinds = (_ROUTER_TYPES[name] for name in sorted(_ROUTER_TYPES, key=lambda name: (name != LINEAR, name)))
    return tuple(dict.fromkeys(argument for kind in kinds for argument in kind.arguments))


def _installed() -> dict[str, str]:
    return _installed_on(tuple(sys.path))


@functools.cache
def _installed_on(path: tuple[str, ...]) -> dict[str, str]:
    """Read once for each ``path``: it takes hundredths of a second, and a parser asks hundreds of times."""
    return {entry.name: entry.value for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def _imported(name: str, place: str) -> object:
    module, _, attribute = place.partition(":")
    if os.getcwd() not in sys.path:  # python -m has it, a script under torchrun has not: both find the same modules
        sys.path.append(os.getcwd())
    try:
        found: object = importlib.import_module(module)
    except Exception as error:  # whatever somebody's module raises; it is raised again, in one line with its place
        *_, last = traceback.extract_tb(error.__traceback__)
        inside = f" at {last.filename}:{last.lineno}" if not last.filename.startswith("<") else ""
        reason = f"{type(error).__name__}: {error}".splitlines()[0] + inside
        ask = "; is it on PYTHONPATH?" if isinstance(error, ModuleNotFoundError) else ""
        raise ValueError(f"router type {name!r}: cannot import {module!r} ({reason}){ask}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"router type {name!r}: {module} has no {attribute}")
        found = getattr(found, part)
    return found


def _fit(name: str, layer: object) -> RouterType:
    """A type of ``layer``. Raises ValueError for what the seam cannot use."""
    if not isinstance(layer, type) or not issubclass(layer, RouterLayer):
        raise ValueError(f"router type {name!r}: {layer!r} is no subclass of rmoe_megablocks.routing.RouterLayer")
    if layer.route is RouterLayer.route:
        raise ValueError(f"router type {name!r}: {layer.__name__} has no method route(x_TH, h_TP, shared, dtype)")
    shared = layer.shared
    if shared is not None and not (isinstance(shared, type) and issubclass(shared, SharedRouting)):
        raise ValueError(f"router type {name!r}: {layer.__name__}.shared is no subclass of SharedRouting")
    found = RouterType(name, layer)
    taken = {argument.dest: argument for argument in (*all_arguments(), RECURRENCE, RESIDUAL)}
    for argument in found.arguments:
        if not isinstance(argument, Argument):
            raise ValueError(f"router type {name!r}: {argument!r} in {layer.__name__}.arguments is no Argument")
        if not argument.option.startswith("--moe-router-"):
            raise ValueError(f"router type {name!r}: {argument.option} must begin with --moe-router-")
        if taken.setdefault(argument.dest, argument) != argument:
            raise ValueError(f"router type {name!r}: {argument.option} is another type's argument already")
    return found
