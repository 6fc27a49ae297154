"""Every public name is documented and fully annotated, so that the type check covers what users call."""

import importlib
import inspect
import pkgutil

import pytest

import memjax

ROOMS = ["memjax", *(f"memjax.{room.name}" for room in pkgutil.iter_modules(memjax.__path__) if room.ispkg)]


def public_callables():
    for room in ROOMS:
        module = importlib.import_module(room)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if inspect.isfunction(value):
                yield f"{room}.{name}", value
            elif inspect.isclass(value) and value.__module__.startswith("memjax"):
                yield f"{room}.{name}", value
                for attribute, member in vars(value).items():
                    function = getattr(member, "__func__", member)
                    if inspect.isfunction(function) and not attribute.startswith("_"):
                        yield f"{room}.{name}.{attribute}", function


CALLABLES = dict(public_callables())


def inherited(name):
    """Whether a base class of the library documents the method already."""
    owner, _, attribute = name.rpartition(".")
    room, _, class_name = owner.rpartition(".")
    cls = getattr(importlib.import_module(room), class_name, None) if room in ROOMS else None
    return inspect.isclass(cls) and any(hasattr(base, attribute) for base in cls.__mro__[1:])


@pytest.mark.parametrize("room", ROOMS)
def test_room_says_what_is_public(room):
    module = importlib.import_module(room)
    assert module.__doc__ and module.__all__
    assert not [name for name in module.__all__ if not hasattr(module, name)]


@pytest.mark.parametrize("name", CALLABLES)
def test_public_name_is_documented_and_annotated(name):
    function = CALLABLES[name]
    assert inspect.getdoc(function) or inherited(name), "no docstring"
    if inspect.isfunction(function):
        signature = inspect.signature(function)
        bare = [
            p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name not in ("self", "cls")
        ]
        assert not bare, f"no annotation: {bare}"
        assert signature.return_annotation is not signature.empty, "no annotation of the result"
