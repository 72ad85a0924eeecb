"""The command line of the scripts: `key=value` with types, ranges, suggestions and `--help`, as `train.py` has it.

A script declares its options as a subclass of `Options`, one field each with a description:

    class Options(command_line.Options):
        '''Table of all runs below a folder.'''

        folder: Path = Field(Path("outputs"), description="folder of the runs")
        rounds: int = Field(7, ge=1, description="how often each candidate is timed")

A list takes `key=[a,b]` or one entry; a mapping takes `key.name=value`, once for each entry; `null` is None.
"""

import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from retinue.utils.suggestions import nearest

HELP = ("--help", "-h")


class Options(BaseModel):
    """Base class of a script's options."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls, arguments: Sequence[str] | None = None) -> Self:
        """Read the options from the command line; with `--help` print them and exit.

        Args:
            arguments: the command line without the program's name; by default that of this process.

        Raises:
            ValueError: an option is unknown or lacking, or has a value of another type or out of range.
        """
        options, others = cls.parse_some(arguments)
        if others:
            raise ValueError(cls._unknown(others[0]))
        return options

    @classmethod
    def parse_some(cls, arguments: Sequence[str] | None = None) -> tuple[Self, list[str]]:
        """Read the options, and return them with the arguments for other keys, such as overrides of `train.py`."""
        arguments = sys.argv[1:] if arguments is None else arguments
        if any(argument in HELP for argument in arguments):
            print(cls.help())
            sys.exit()
        values: dict[str, Any] = {}
        others: list[str] = []
        for argument in arguments:
            key, equals, text = argument.partition("=")
            name, dot, entry = key.partition(".")
            field = cls.model_fields.get(name)
            if not equals:
                raise ValueError(cls._unknown(argument))
            if field is not None and _is_mapping(field):
                if not entry:
                    raise ValueError(f"{name} takes {name}.<name>=<value>, not {argument}")
                values.setdefault(name, {})[entry] = text
            elif field is None or dot:
                others.append(argument)
            else:
                values[name] = _read(text, field)
        try:
            return cls(**values), others
        except ValidationError as error:
            raise ValueError(_one_line(error, cls.model_fields)) from None

    @classmethod
    def _unknown(cls, argument: str) -> str:
        known = list(cls.model_fields)
        hint = nearest(argument.partition("=")[0].lstrip("-").replace("-", "_"), known)
        return f"there is no option {argument!r}.{hint} There are, as key=value: {', '.join(known)}"

    @classmethod
    def help(cls) -> str:
        """Return what `--help` prints: the script's docstring, and each option with its meaning and default."""
        rows = []
        for name, field in cls.model_fields.items():
            key = f"{name}.<name>" if _is_mapping(field) else name
            silent = field.is_required() or _is_mapping(field)
            default = "" if silent else f" [{_show(field.get_default(call_default_factory=True))}]"
            rows.append((f"{key}={describe_type(field.annotation)}", f"{field.description}{default}"))
        width = max(len(left) for left, _ in rows)
        lines = [f"  {left:{width}}  {right}" for left, right in rows]
        module = sys.modules[cls.__module__]
        return "\n".join([(module.__doc__ or "").strip(), "", "Options, with their defaults in brackets:", *lines])


def describe_type(annotation: Any) -> str:
    """Return a type as a user reads it: `INT`, `a|b` for the choices, `[PATH,...]` for a list."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return "|".join(describe_type(each) for each in arguments if each is not type(None))
    if origin in (list, tuple):
        return f"[{describe_type(arguments[0])},...]"
    if origin is dict:
        return describe_type(arguments[1])
    names = {str: "TEXT", int: "INT", float: "FLOAT", bool: "true|false", Path: "PATH"}
    return names.get(annotation, "VALUE")


def _is_mapping(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is dict


def _read(text: str, field: FieldInfo) -> Any:
    """Return a value as pydantic takes it: text stays text, so that `name=1e5` or `out=no` keep their letters."""
    annotation = field.annotation
    allowed = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    if text == "null" and type(None) in allowed:
        return None
    if any(get_origin(each) in (list, tuple) for each in allowed):
        if not text.startswith("["):
            return [text]
        try:
            entries = yaml.load(text, yaml.BaseLoader)  # BaseLoader keeps every entry a string
        except yaml.YAMLError:
            return text
        return entries
    return text


def _one_line(error: ValidationError, fields: Mapping[str, FieldInfo]) -> str:
    """Return the first thing that is wrong: what was expected, what came, and the nearest choice."""
    first = error.errors()[0]
    if not first["loc"]:  # a check of several options together, which words its own message
        return first["msg"].removeprefix("Value error, ")
    name = str(first["loc"][0])
    annotation, given = fields[name].annotation, first["input"]
    if first["type"] == "missing":
        return f"{name}={describe_type(annotation)} is missing: {fields[name].description}"
    expected = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    expected = expected.partition(", unable")[0].replace("a valid integer", "an integer").replace("a valid ", "a ")
    hint = nearest(str(given), map(str, get_args(annotation))) if first["type"] == "literal_error" else ""
    return f"{name} must be {expected}, not {_show(given)}.{hint}".removesuffix(".")


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_show, value))}]"
    return str(value)
