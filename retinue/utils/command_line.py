"""The command line of the scripts: `key=value` with types, ranges, suggestions and `--help`, as `train.py` has it.

A script declares its options as a subclass of `Options`, one field for each key, with a description:

    class Options(command_line.Options):
        folder: Path = Field(Path("outputs"), description="folder of the runs")
        rounds: int = Field(7, ge=1, description="how often each candidate is timed")
        seeds: list[int] = Field([0, 1, 2], description="seeds of the runs")
        where: dict[str, str] = Field({}, description="only runs with this value")

A list takes `seeds=[0,1]`, or `seeds=0` for a single entry. A mapping takes `where.model=swin`, once for each entry;
the values of a `dict[str, Any]` are read as YAML. `null` is None where the type permits None.
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
TYPE_NAMES = {str: "TEXT", int: "INT", float: "FLOAT", bool: "true|false", Path: "PATH"}


class Options(BaseModel):
    """Base class of a script's options."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def parse(cls, arguments: Sequence[str] | None = None) -> Self:
        """Read the options from the command line; with `--help` print them and exit.

        Args:
            arguments: The command line without the program's name. Default: that of this process.

        Raises:
            ValueError: A key is unknown or missing, or a value has another type or is out of range.
        """
        values, others = cls._read_values(arguments)
        if others:
            raise ValueError(cls._unknown(others[0]))
        return cls._validate(values)

    @classmethod
    def parse_some(cls, arguments: Sequence[str] | None = None) -> tuple[Self, list[str]]:
        """Read the options, and return them with the arguments for other keys, such as overrides of `train.py`.

        Args:
            arguments: As in `parse`.

        Raises:
            ValueError: An argument is not `key=value`, a key is missing, or a value has another type or is out of
                range.
        """
        values, others = cls._read_values(arguments)
        return cls._validate(values), others

    @classmethod
    def _read_values(cls, arguments: Sequence[str] | None) -> tuple[dict[str, Any], list[str]]:
        """Return the values of the options as pydantic takes them, and the arguments for other keys."""
        arguments = sys.argv[1:] if arguments is None else arguments
        if any(argument in HELP for argument in arguments):
            # A closed pipe (`--help | head -1`) must fail here, within `user_errors`, not when Python exits.
            print(cls.help(), flush=True)
            sys.exit()
        values: dict[str, Any] = {}
        others: list[str] = []
        for argument in arguments:
            key, equals, text = argument.partition("=")
            name, dot, entry = key.partition(".")
            field = cls.model_fields.get(name)
            if not equals or key.startswith("-"):
                raise ValueError(cls._unknown(argument))
            if field is not None and _is_mapping(field):
                if not entry:
                    expected = describe_type(field.annotation)
                    raise ValueError(f"{name} takes {name}.<name>={expected}, not {argument}")
                values.setdefault(name, {})[entry] = _read_entry(text, field)
            elif field is None or dot:
                others.append(argument)
            else:
                values[name] = _read(text, field)
        return values, others

    @classmethod
    def _validate(cls, values: dict[str, Any]) -> Self:
        """Return the options with these values; a ValueError in one line if a value is missing or wrong."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise ValueError(_one_line(error, cls.model_fields)) from None

    @classmethod
    def _unknown(cls, argument: str) -> str:
        """Return the message for an argument whose key is no option."""
        names = list(cls.model_fields)
        key = argument.partition("=")[0].lstrip("-").replace("-", "_")
        listed = f"There are, as key=value: {', '.join(names)}" if names else "The command takes no options"
        return f"there is no option {argument!r}.{nearest(key, names)} {listed}"

    @classmethod
    def help(cls) -> str:
        """Return what `--help` prints: the script's docstring, and each option with its meaning and default."""
        rows = []
        for name, field in cls.model_fields.items():
            key = f"{name}.<name>" if _is_mapping(field) else name
            default = ""
            if not field.is_required() and not _is_mapping(field):
                default = f" ({to_text(field.get_default(call_default_factory=True))})"
            rows.append((f"{key}={describe_type(field.annotation)}", f"{field.description}{default}"))
        width = max((len(left) for left, _ in rows), default=0)
        lines = [f"  {left:{width}}  {right}" for left, right in rows]
        heading = ["Options, with their defaults in parentheses:"] if rows else []
        docstring = sys.modules[cls.__module__].__doc__ or ""
        return "\n".join([docstring.strip(), "", *heading, *lines])


def describe_type(annotation: Any) -> str:
    """Return a type as a user reads it: `INT`, `a|b` for the choices, `[PATH,...]` for a list."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return "|".join(describe_type(argument) for argument in arguments if argument is not type(None))
    if origin in (list, tuple):
        return f"[{describe_type(arguments[0])},...]"
    if origin is dict:
        return describe_type(arguments[1])
    return TYPE_NAMES.get(annotation, "VALUE")


def to_text(value: Any) -> str:
    """Return a value as it is typed on the command line: `null`, `true`, `0.001`, `[a,b]`, `{a: b}`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(to_text, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}: {to_text(entry)}' for key, entry in value.items())}}}"
    return str(value)


def check_suffixes(name: str, paths: Sequence[Path], suffixes: Sequence[str]) -> None:
    """Raise a ValueError if one of the files that the option `name` takes has another suffix."""
    for path in paths:
        if path.suffix not in suffixes:
            raise ValueError(f"{name} takes files that end in {', '.join(suffixes)}, not {path}")


def _is_mapping(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is dict


def _read_entry(text: str, field: FieldInfo) -> Any:
    """Return the value of one entry of a mapping: text, or read as YAML where the mapping takes any value."""
    if get_args(field.annotation)[1] is not Any:
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _read(text: str, field: FieldInfo) -> Any:
    """Return a value as pydantic takes it: text stays text, so that `name=1e5` or `out=no` keep their letters."""
    annotation = field.annotation
    allowed = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    if text == "null" and type(None) in allowed:
        return None
    if any(get_origin(type_) in (list, tuple) for type_ in allowed):
        if not text.startswith("["):
            return [text]
        try:
            # BaseLoader keeps every entry a string.
            return yaml.load(text, yaml.BaseLoader)
        except yaml.YAMLError:
            return text
    return text


def _one_line(error: ValidationError, fields: Mapping[str, FieldInfo]) -> str:
    """Return the first fault: what was expected, what was given, and the nearest choice."""
    fault = error.errors()[0]
    message = fault["msg"].removeprefix("Value error, ")
    if not fault["loc"]:
        # A validator of several options together words its own message.
        return message
    name = str(fault["loc"][0])
    annotation, given = fields[name].annotation, fault["input"]
    if fault["type"] == "missing":
        return f"{name}={describe_type(annotation)} is missing: {fields[name].description}"
    if fault["type"] == "too_short":
        return f"{name} needs at least {fault.get('ctx', {}).get('min_length')} entry"
    expected = message.removeprefix("Input should be ").partition(", unable")[0]
    expected = expected.replace("a valid integer", "an integer").replace("a valid ", "a ")
    hint = nearest(str(given), map(str, get_args(annotation))) if fault["type"] == "literal_error" else ""
    return f"{name} must be {expected}, not {to_text(given)}.{hint}".removesuffix(".")
