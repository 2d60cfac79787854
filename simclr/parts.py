"""Your own parts of a run, from a file of yours: an encoder, a projector, an objective, views. See docs/own_parts.md.

    python train_simclr.py cpu-simclr --parts my_parts.py --loss.name alignment

``my_parts.py`` registers functions, and the configuration names them. An encoder is registered with timm
(``timm.models.register_model``), which knows encoders already; the other kinds are registered here.

A file is executed because somebody names it, and never because a checkpoint does: whoever loads a run with parts of its
own names the file again.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

Function = TypeVar("Function", bound=Callable[..., Any])


class Registry(Generic[Function]):
    """The parts of one kind, by name.

    Args:
        kind: What they are, for messages.
        built_in: Names of those that this project has itself.
    """

    def __init__(self, kind: str, built_in: Iterable[str]) -> None:
        self.kind, self.built_in = kind, tuple(built_in)
        self._own: dict[str, Function] = {}

    def register(self, function: Function) -> Function:
        """Make a function known by its name; a decorator.

        Raises:
            ValueError: If there is another part of this kind and name.
        """
        name = function.__name__
        if name in self.built_in or self._own.get(name, function).__module__ != function.__module__:
            raise ValueError(f"there is another {self.kind} named {name}; give yours another name")
        self._own[name] = function
        return function

    def require(self, name: str, field: str) -> None:
        """Raise ValueError, with all known names, unless there is a part of this name."""
        known = (*self.built_in, *self._own)
        if name not in known:
            raise ValueError(f"{field} is {name!r}, expected one of {', '.join(known)}, or one that --parts registers")

    def __contains__(self, name: str) -> bool:
        """Whether there is a part of this name that is not built in."""
        return name in self._own

    def __getitem__(self, name: str) -> Function:
        return self._own[name]


# What each takes is typed where it is called, in rooms above this one.
PROJECTORS: Registry[Callable[[int, Any], nn.Module]] = Registry("projector", ("simclr2", "simclr3", "barlow3", "none"))
OBJECTIVES: Registry[Callable[..., Tensor]] = Registry("objective", ("nt_xent", "barlow_twins"))
VIEWS: Registry[Callable[[Tensor, Any], Tensor]] = Registry("views", ("standard",))

register_projector = PROJECTORS.register
"""Decorates ``(representation_dim, config) -> module``; see :func:`simclr.models.make_projector`."""
register_objective = OBJECTIVES.register
"""Decorates ``(z1, z2, **settings) -> loss``; see :func:`simclr.losses.own_objective`."""
register_views = VIEWS.register
"""Decorates ``(image, view) -> pixels``; see :func:`simclr.views.own_view`."""

_loaded: set[str] = set()  # SHA-256 of contents


def load(path: str | os.PathLike[str]) -> None:
    """Execute a file that registers parts, unless one with this content was executed in this process already.

    Raises:
        ValueError: If it is missing, or raises an error; the message names the line.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"parts: {path} cannot be read: {error.strerror}; name a Python file that is there") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest in _loaded:
        return
    module = types.ModuleType(f"own_parts_{digest[:12]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where timm looks for it
    try:
        with warnings.catch_warnings():
            # What timm says of a name that it has already: a run must not mean another encoder by it.
            warnings.filterwarnings("error", "Overwriting", UserWarning)
            exec(compile(content, str(path), "exec"), module.__dict__)
    except Exception as error:
        del sys.modules[module.__name__]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"line {lines[-1]}, " if lines else ""
        raise ValueError(f"{path} cannot be loaded: {where}{type(error).__name__}: {error}") from error
    _loaded.add(digest)


def require_settings(name: str, settings: Iterable[str]) -> None:
    """Raise ValueError unless the objective ``name`` takes these settings, as keyword arguments."""
    taken = list(inspect.signature(OBJECTIVES[name]).parameters)[2:] if name in OBJECTIVES else []
    for setting in settings:
        if setting not in taken:
            has = f"has {', '.join(taken)}" if taken else "has none"
            raise ValueError(f"loss.settings names {setting!r}, but the objective {name} {has}")
