"""TOML tables to dataclasses, with errors that name the file, the line and the remedy. Knows no particular setting."""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

from computron.errors import ConfigError

KeyPath = tuple[str | int, ...]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)  # by identity, because type hints must be hashable
class Quantity:
    """A number with a unit, written as a string. `units` gives each unit's worth."""

    name: str
    example: str
    units: Mapping[str, float]
    whole: bool = False

    def parse(self, text: str) -> float | int:
        """The quantity in its base unit. Raises ValueError with what is wrong and what would be right."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z/]*)\s*", text)
        if match is None:
            raise ValueError(f'"{text}" is not a {self.name}; write it like "{self.example}"')
        number, unit = match.groups()
        if unit not in self.units:
            if not unit:
                raise ValueError(f'"{text}" has no unit; write it like "{self.example}"')
            raise ValueError(f'unknown unit "{unit}" in "{text}"{suggestion(unit, self.units, "use one of ")}')
        value = float(number) * self.units[unit]
        return round(value) if self.whole else value


@dataclass(frozen=True, slots=True)
class Bounds:
    """`low` and `high` are allowed themselves; `above` is not."""

    low: float | None = None
    high: float | None = None
    above: float | None = None

    def complaint(self, value: float) -> str | None:
        if self.low is not None and value < self.low:
            return f"must be at least {self.low:g}, not {value:g}"
        if self.above is not None and value <= self.above:
            return f"must be more than {self.above:g}, not {value:g}"
        if self.high is not None and value > self.high:
            return f"must be at most {self.high:g}, not {value:g}"
        return None


_BYTES = {
    "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}

Size = Annotated[int, Quantity("size", "300MiB", _BYTES, whole=True)]
Bandwidth = Annotated[float, Quantity("bandwidth", "2GB/s", {f"{unit}/s": worth for unit, worth in _BYTES.items()})]
Duration = Annotated[float, Quantity("duration", "30s", _SECONDS)]


def suggestion(word: str, known: Iterable[str], otherwise: str) -> str:
    """The end of an error message: the near miss among `known`, or all of them after `otherwise`."""
    names = sorted(known)
    by_lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    if near:
        return f'; did you mean "{by_lower[near[0]]}"?'
    return f"; {otherwise}{', '.join(names)}"


class Document:
    """A TOML file as read, and the line of each of its keys."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError if the file cannot be read or is no TOML."""
        self.path = path
        try:
            text = path.read_bytes().decode()
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
        try:
            self.data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(self._syntax_error(text, str(error))) from error
        self._lines = key_lines(text)

    def _syntax_error(self, text: str, message: str) -> str:
        match = re.fullmatch(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", message)
        if match is None:
            return f"{self.path}: {message}"
        line = match[2] or str(text.count("\n") + 1)
        hint = '; strings need quotes, like memory = "300MiB"' if match[1] == "Invalid value" else ""
        return f"{self.path}:{line}: {match[1]}{f' at column {match[3]}' if match[3] else ''}{hint}"

    def error(self, where: KeyPath, message: str) -> ConfigError:
        """An error at this key, or at the nearest table around it that has a line."""
        line = next((self._lines[where[:n]] for n in range(len(where), 0, -1) if where[:n] in self._lines), None)
        return ConfigError(f"{self.path}{f':{line}' if line else ''}: {message}", param=dotted(where))

    def read(self, where: KeyPath, table: object, kind: type[T]) -> T:
        """`table`, found at `where`, as the dataclass `kind`. Raises ConfigError for the first thing wrong with it."""
        title = table_title(where)
        if not isinstance(table, dict):
            raise self.error(where, f"{title} must be a table, not {_type_name(table)}")
        hints = typing.get_type_hints(kind, include_extras=True)
        for key in table:
            if key not in hints:
                known = suggestion(key, hints, "known keys: ")
                raise self.error((*where, key), f'unknown key "{key}" in {title}{known}')
        assert dataclasses.is_dataclass(kind)
        for field in dataclasses.fields(kind):
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and field.name not in table:
                raise self.error(where, f'{title} needs "{field.name}"')
        values = {key: self._convert((*where, key), value, hints[key]) for key, value in table.items()}
        return typing.cast(T, kind(**values))

    def _convert(self, where: KeyPath, value: Any, hint: Any) -> Any:
        try:
            return convert(value, hint)
        except ValueError as error:
            raise self.error(where, f"{where[-1]}: {error}") from error


def convert(value: Any, hint: Any) -> Any:
    """A TOML value as the type of a field. Raises ValueError with what is expected."""
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
        return convert(value, hint)
    if origin is Annotated:
        return _convert_annotated(value, hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ValueError(f'"{value}" is not allowed{suggestion(str(value), choices, "choose from ")}')
        return value
    if origin is not None and issubclass(origin, Mapping):
        hint = dict
    if hint is Path:
        return Path(_expect(value, str))
    if hint is float and type(value) is int:
        return float(value)
    return _expect(value, hint)


def _convert_annotated(value: Any, hint: Any) -> Any:
    base, *notes = typing.get_args(hint)
    for note in notes:
        if isinstance(note, Quantity):
            if not isinstance(value, str):
                raise ValueError(f'must be a {note.name} with its unit in quotes, like "{note.example}", not {value!r}')
            value = note.parse(value)
    value = convert(value, base)
    for note in notes:
        complaint = note.complaint(value) if isinstance(note, Bounds) else None
        if complaint is not None:
            raise ValueError(complaint)
    return value


def _expect(value: Any, kind: type) -> Any:
    # bool is an int to Python, but not to whoever writes `port = true`.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"must be {_TYPE_NAMES[kind]}, not {_type_name(value)}")
    return value


_TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    dict: "a table",
    list: "an array",
}


def _type_name(value: object) -> str:
    return _TYPE_NAMES.get(type(value), type(value).__name__)


def dotted(where: KeyPath) -> str:
    """("models", 1, "id") as models[1].id."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".")


def table_title(where: KeyPath) -> str:
    """A table as it is headed in the file."""
    if not where:
        return "the file"
    return f"[[{where[0]}]]" if isinstance(where[-1], int) else f"[{dotted(where)}]"


_KEY = r"""(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')"""
_DOTTED = rf"{_KEY}(?:\s*\.\s*{_KEY})*"
_HEADER = re.compile(rf"\s*(\[\[?)\s*({_DOTTED})\s*\]\]?\s*(?:#.*)?$")
_ASSIGNMENT = re.compile(rf"\s*({_DOTTED})\s*=(.*)$")
_LONG_STRING = re.compile(r'"""|\'\'\'')
_STRING_OR_COMMENT = re.compile(r'"(?:[^"\\]|\\.)*"|\'[^\']*\'|#.*')


def key_lines(text: str) -> dict[KeyPath, int]:
    """The line, from 1, of each table header and key in a valid TOML document; inline tables count as one key."""
    lines: dict[KeyPath, int] = {}
    table: KeyPath = ()
    counts: dict[KeyPath, int] = {}
    long_string: str | None = None
    open_brackets = 0
    for number, line in enumerate(text.splitlines(), 1):
        if long_string is not None:
            if long_string in line:
                long_string = None
            continue
        if open_brackets == 0:
            if header := _HEADER.match(line):
                table = _keys(header[2])
                if header[1] == "[[":
                    counts[table] = counts.get(table, -1) + 1
                table = _indexed(table, counts)
                lines.setdefault(table, number)
                continue
            assignment = _ASSIGNMENT.match(line)
            if assignment is None:
                continue
            lines.setdefault((*table, *_keys(assignment[1])), number)
            line = assignment[2]
        quotes = _LONG_STRING.findall(line)
        if len(quotes) % 2:
            long_string = quotes[-1]
            continue
        bare = _STRING_OR_COMMENT.sub("", line)
        open_brackets = max(0, open_brackets + bare.count("[") - bare.count("]"))
    return lines


def _keys(name: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in re.findall(_KEY, name))


def _indexed(table: KeyPath, counts: Mapping[KeyPath, int]) -> KeyPath:
    """The path with the number of the current element behind each array of tables in it."""
    path: KeyPath = ()
    for n, part in enumerate(table, 1):
        path = (*path, part)
        if table[:n] in counts:
            path = (*path, counts[table[:n]])
    return path
