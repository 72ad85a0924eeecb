"""Messages of the schema: what a key takes, read from its type, and the one line on the first wrong value."""

import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from retinue.utils.command_line import to_text
from retinue.utils.paths import CONF, list_group
from retinue.utils.suggestions import nearest

# Words that YAML 1.1 reads as a switch, and Hydra's command line as text.
SWITCHES = {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"}
TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}


class Expected(str):
    """Words for the values of a type, as an annotation of the type: `Annotated[str, Expected("a path")]`."""


def describe(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Return what a type takes, such as "a whole number, 1 or more, or null".

    Args:
        annotation: The type.
        metadata: Its constraints, as pydantic and `Annotated` hold them.
    """
    words = next((entry for entry in metadata if isinstance(entry, Expected)), None)
    if words is not None:
        return str(words)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return describe(arguments[0], (*_constraints(arguments[1:]), *metadata))
    if origin is Literal:
        choices = [str(choice) for choice in arguments]
        return f"one of {', '.join(choices)}" if len(choices) > 2 else " or ".join(choices)
    if origin in (Union, types.UnionType):
        parts = [describe(argument) for argument in arguments if argument is not type(None)]
        separator = ", or " if any("," in part for part in parts) else " or "
        return separator.join([*parts, "null"] if type(None) in arguments else parts)
    if origin is list:
        return _list(describe(arguments[0]), metadata)
    if _is_keys(annotation):
        return TYPES[dict]
    return TYPES[annotation] + _range(metadata)


def _constraints(metadata: Sequence[Any]) -> list[Any]:
    """Return constraints such as `Ge(1)`, those within `Field(ge=1)` included."""
    return [entry for each in metadata for entry in (each.metadata if isinstance(each, FieldInfo) else [each])]


def _bound(metadata: Sequence[Any], name: str) -> Any:
    return next((getattr(entry, name) for entry in metadata if hasattr(entry, name)), None)


def _range(metadata: Sequence[Any]) -> str:
    """Return a range in words, with a space or a comma before it; "" without a range."""
    ge, gt, le, lt = (_bound(metadata, name) for name in ("ge", "gt", "le", "lt"))
    if gt is not None:
        return f" above {gt}" if le is None else f" above {gt} and at most {le}"
    if ge is not None and (le is not None or lt is not None):
        return f" from {ge} to {le}" if le is not None else f" from {ge} to below {lt}"
    return f", {ge} or more" if ge is not None else ""


def _list(element: str, metadata: Sequence[Any]) -> str:
    low, high = _bound(metadata, "min_length"), _bound(metadata, "max_length")
    if high:
        return f"a list of {low} to {high} entries, each {element}"
    return f"a list of {low} or more entries, each {element}" if low else f"a list, each entry {element}"


def one_line(error: ValidationError, schema: type[BaseModel], values: Mapping[str, Any]) -> str:
    """Return the first fault in one line: the key, what is expected, what was given, and the nearest choice.

    Args:
        error: The error of `schema`.
        schema: The schema of the whole config.
        values: The config.
    """
    fault = error.errors()[0]
    model: Any = schema
    field: FieldInfo | None = None
    keys: list[str] = []
    value: Any = values
    for part in fault["loc"]:
        model = without_null(model)
        if len(keys) > 1 and get_origin(model) is dict and _is_keys(get_args(model)[1]):
            # An entry of a mapping within a section, such as a view, has the type of all entries.
            keys.append(str(part))
            value, model = value[part], get_args(model)[1]
            continue
        if not (_is_keys(model) and part in model.model_fields):
            break
        entry: FieldInfo = model.model_fields[str(part)]
        keys.append(str(part))
        value = value.get(part) if isinstance(value, Mapping) else value
        field, model = entry, entry.annotation
    of_several_keys = _is_keys(model)
    if field is None or (of_several_keys and fault["type"] == "value_error"):
        # A validator of several keys together words its own message.
        return fault["msg"].removeprefix("Value error, ")
    key = ".".join(keys)
    given = repr(value) if isinstance(value, str) else to_text(value)
    if len(keys) == 1 and (CONF / key).is_dir():
        if not isinstance(value, Mapping):
            return refuse_choice(key, given)
        name = fault["loc"][1]
        return f"{key}.{name} must be a mapping with the key _target_, not {to_text(value[name])}"
    expected = describe(field.annotation, field.metadata)
    if fault["type"] == "missing":
        return f"{key} is missing: it must be {expected}"
    return f"{key} must be {expected}, not {given}.{_hint(value, field.annotation)}".removesuffix(".")


def _is_keys(annotation: Any) -> bool:
    """Tell whether a type is a model of several keys."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def without_null(annotation: Any) -> Any:
    """Return the type T of `Annotated[T, ...]` and of `T | None`; other types as they are."""
    if get_origin(annotation) is Annotated:
        return without_null(get_args(annotation)[0])
    others = [argument for argument in get_args(annotation) if argument is not type(None)]
    is_optional = get_origin(annotation) in (Union, types.UnionType) and len(others) == 1
    return without_null(others[0]) if is_optional else annotation


def _hint(value: Any, annotation: Any) -> str:
    if not isinstance(value, str):
        return ""
    allowed = [annotation, *get_args(annotation)]
    if bool in allowed:
        switch = SWITCHES.get(value.lower())
        return f" Did you mean {switch!r}?" if switch else nearest(value, ("true", "false"))
    choices = [str(choice) for type_ in allowed if get_origin(type_) is Literal for choice in get_args(type_)]
    return nearest(value, choices)


def refuse_choice(group: str, given: str) -> str:
    """Return the line for a config group that is null or no mapping: it lists the choices."""
    none = "; logger=none writes metrics.csv alone" if group == "logger" else ""
    return f"{group} must be one of {', '.join(list_group(group))}, not {given}{none}"
