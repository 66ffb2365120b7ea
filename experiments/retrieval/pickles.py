"""Plain values in a pickle, read without running it.

A pickle is a program. This reads its instructions and carries out only those that build dictionaries, lists, tuples,
text, numbers and numpy's arrays of numbers; any other ends it. Arrays are built here, from bytes that are in the file.
"""

import io
import math
import pickletools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from dinojax.errors import UserError

_LARGEST = 2**26  # bytes; the files of revisited Oxford and Paris have less than 2 MB
_MARK = object()
_ARRAY, _BUFFER, _KIND, _NUMBER, _ENCODE, _BYTES_OF = "array", "buffer", "dtype", "scalar", "encode", "bytes"
# What a pickle may name, and what stands for it here; numpy 2 writes `_core`.
_NAMED: Mapping[str, str] = MappingProxyType(
    {
        f"numpy.{core}.{place}": kind
        for core in ("core", "_core")
        for place, kind in (
            ("multiarray _reconstruct", _ARRAY),
            ("multiarray scalar", _NUMBER),
            ("numeric _frombuffer", _BUFFER),
        )
    }
    | {"numpy ndarray": "ndarray", "numpy dtype": _KIND, "_codecs encode": _ENCODE}
    | {"__builtin__ bytes": _BYTES_OF, "builtins bytes": _BYTES_OF}
)
_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_TEXTS = ("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_BYTES = ("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8")
_CONSTANTS = MappingProxyType({"NONE": None, "NEWTRUE": True, "NEWFALSE": False})
_EMPTY: Mapping[str, Callable[[], Any]] = MappingProxyType(
    {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
)
_IGNORED = frozenset(("PROTO", "FRAME"))


class _Array:
    """An array that is being built: its values arrive after it was made."""

    def __init__(self) -> None:
        self.values: np.ndarray | None = None


class _Dtype:
    """A type of numbers, as a code such as "i8", and its byte order."""

    def __init__(self, code: str):
        self.code, self.order = code, "="

    def numpy(self) -> np.dtype:
        kind = np.dtype(f"{self.order}{self.code}")
        if kind.kind not in "biuf":
            raise ValueError(f"numbers of {self.code}")
        return kind


def read_plain_pickle(path: Path) -> Any:
    """The values in a pickle of dictionaries, lists, tuples, text, numbers and arrays of numbers.

    Raises:
        UserError: there is no such file; it is larger than 64 MiB or damaged; or it holds anything else, such as a call
            of a function.
    """
    try:
        size = path.stat().st_size
        if size > _LARGEST:
            raise UserError(f"{path} has {size:,} bytes, and a ground truth has less than {_LARGEST:,}")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    try:
        return _finished(_Machine().run(content))
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError, MemoryError) as error:
        raise UserError(
            f"{path} is damaged or no pickle of plain values ({str(error)[:80]}); download it again"
        ) from error


class _Machine:
    """The stack and the memory of a pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, content: bytes) -> Any:
        """The value that is left when the pickle stops."""
        for instruction, argument, _ in pickletools.genops(io.BytesIO(content)):
            name = instruction.name
            if name == "STOP":
                (value,) = self.stack
                return value
            if name in _IGNORED:
                continue
            if name in (*_NUMBERS, *_TEXTS, *_BYTES):
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _EMPTY:
                self.stack.append(_EMPTY[name]())
            elif step := getattr(self, f"_{name.lower()}", None):
                step(argument)
            else:
                raise UserError(f"holds the instruction {name}, which plain values do not need, and is refused")
        raise ValueError("it does not stop")

    def _since_mark(self) -> list[Any]:
        place = len(self.stack) - 1 - self.stack[::-1].index(_MARK)
        taken = self.stack[place + 1 :]
        del self.stack[place:]
        return taken

    def _mark(self, _: Any) -> None:
        self.stack.append(_MARK)

    def _pop(self, _: Any) -> None:
        self.stack.pop()

    def _tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._since_mark()))

    def _take(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("its stack is empty")
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def _tuple1(self, _: Any) -> None:
        self.stack.append(tuple(self._take(1)))

    def _tuple2(self, _: Any) -> None:
        self.stack.append(tuple(self._take(2)))

    def _tuple3(self, _: Any) -> None:
        self.stack.append(tuple(self._take(3)))

    def _list(self, _: Any) -> None:
        self.stack.append(self._since_mark())

    def _dict(self, _: Any) -> None:
        items = self._since_mark()
        self.stack.append(dict(zip(items[::2], items[1::2], strict=True)))

    def _append(self, _: Any) -> None:
        value = self.stack.pop()
        list.append(self.stack[-1], value)

    def _appends(self, _: Any) -> None:
        values = self._since_mark()
        list.extend(self.stack[-1], values)

    def _setitem(self, _: Any) -> None:
        key, value = self._take(2)
        dict.__setitem__(self.stack[-1], key, value)

    def _setitems(self, _: Any) -> None:
        items = self._since_mark()
        dict.update(self.stack[-1], zip(items[::2], items[1::2], strict=True))

    def _memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _put(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    _binput = _long_binput = _put

    def _get(self, place: int) -> None:
        self.stack.append(self.memo[place])

    _binget = _long_binget = _get

    def _global(self, named: str) -> None:
        if named not in _NAMED:
            raise UserError(f"names {named.replace(' ', '.', 1)!r:.80}, which could run anything, and is refused")
        self.stack.append(_Name(_NAMED[named]))

    def _stack_global(self, _: Any) -> None:
        module, name = self._take(2)
        self._global(f"{module} {name}")

    def _reduce(self, _: Any) -> None:
        called, given = self._take(2)
        if not isinstance(called, _Name):
            raise TypeError("it calls a value")
        if called == _ARRAY:
            self.stack.append(_Array())
        elif called == _KIND:
            self.stack.append(_Dtype(str(given[0])))
        elif called == _ENCODE and given[1] == "latin1":
            self.stack.append(given[0].encode("latin1"))
        elif called == _BYTES_OF and given == ():
            self.stack.append(b"")
        elif called == _BUFFER:
            data, dtype, shape, order = given
            self.stack.append(_array(data, dtype, shape, columns_first=order == "F"))
        elif called == _NUMBER:
            self.stack.append(np.frombuffer(_bytes(given[1]), given[0].numpy(), count=1)[0].item())
        else:
            raise TypeError(f"it calls {called}")

    def _build(self, _: Any) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, _Dtype):
            made.order = {"|": "="}.get(state[1], state[1])
        elif isinstance(made, _Array):
            _, shape, dtype, columns_first, data = state
            made.values = _array(data, dtype, shape, columns_first=columns_first).values
        else:
            raise TypeError("it sets the state of a value")


class _Name(str):
    """What stands for something that a pickle names; no text of the pickle is one."""

    __slots__ = ()


def _array(data: Any, dtype: _Dtype, shape: tuple[int, ...], *, columns_first: bool) -> _Array:
    """An array of the numbers in `data`, which must be as many as its shape says."""
    kind, data = dtype.numpy(), _bytes(data)
    if math.prod(shape) * kind.itemsize != len(data) or min(shape, default=1) < 0:
        raise ValueError(f"an array of shape {shape} is of {len(data)} bytes")
    made = _Array()
    made.values = np.frombuffer(data, kind).reshape(shape, order="F" if columns_first else "C")
    return made


def _bytes(data: Any) -> bytes:
    """The bytes of numbers; Python 2 wrote them as text."""
    return data.encode("latin1") if isinstance(data, str) else bytes(memoryview(data))


def _finished(value: Any, levels: int = 4, known: dict[tuple[int, int], Any] | None = None) -> Any:
    """The value with lists for tuples and with its arrays, at most `levels` deep, as a ground truth is.

    What is in several places is finished once: a small file may name a long list a million times.
    """
    known = {} if known is None else known
    place = (id(value), levels)
    if place in known:
        return known[place]
    if isinstance(value, _Array):
        if value.values is None:
            raise ValueError("an array has no values")
        return value.values
    if isinstance(value, _Name | _Dtype) or value is _MARK:
        raise ValueError("a value is none of data")
    if not isinstance(value, dict | list | tuple):
        return value
    if not levels:
        raise ValueError("its values are nested too deeply")
    if isinstance(value, dict):
        known[place] = {key: _finished(inner, levels - 1, known) for key, inner in value.items()}
    else:
        known[place] = [_finished(inner, levels - 1, known) for inner in value]
    return known[place]
