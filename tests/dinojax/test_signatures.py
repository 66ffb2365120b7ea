"""Editors, `help` and the documentation read signatures through `inspect`."""

import importlib
import inspect

import pytest

ROOMS = ("dinojax", "dinojax.models", "dinojax.pretraining", "dinojax.probes", "converters")


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_tells_its_arguments(room):
    module = importlib.import_module(room)
    public = {name: getattr(module, name) for name in module.__all__}
    called = {name: one for name, one in public.items() if callable(one) and not _is_exception(one)}
    assert called
    for name, one in called.items():
        kinds = {parameter.kind for parameter in inspect.signature(one).parameters.values()}
        assert not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}, name


def test_a_network_s_constructor_is_read_whole():
    head = inspect.signature(importlib.import_module("dinojax").DINOHead).parameters
    assert list(head)[:2] == ["in_dim", "out_dim"] and "self" not in head
    assert head["nlayers"].default == 3 and head["rngs"].kind is inspect.Parameter.KEYWORD_ONLY


def _is_exception(one):
    return isinstance(one, type) and issubclass(one, Exception)
