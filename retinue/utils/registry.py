"""Registries: classes that users choose by a name, or by a mapping of the name and arguments."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from retinue.utils.suggestions import nearest

# Name of a class, or a mapping of `name` and arguments of the class.
Spec = str | Mapping[str, Any]

Class = TypeVar("Class", bound=type)
Registered = TypeVar("Registered", bound=type)


def _no_more(cls: type) -> Sequence[str]:
    return ()


class Registry(dict[str, Registered]):
    """Classes by the name that users give.

    Args:
        noun: What a class is, for errors: "op".
        given: Parameters of the classes that do not come from the user.
        absence: Name that users may give for none of the classes.
        more: Returns the arguments that a class takes beside its parameters.
    """

    def __init__(
        self,
        noun: str,
        given: Sequence[str],
        *,
        absence: str | None = None,
        more: Callable[[Registered], Sequence[str]] = _no_more,
    ):
        super().__init__()
        self.noun, self.given, self.absence, self.more = noun, given, absence, more

    def register(self, name: str) -> Callable[[Class], Class]:
        """Return a class decorator that makes a class available under `name`.

        Raises:
            ValueError: `name` is already taken, or stands for the absence.
        """

        def add(cls: Any) -> Any:
            if name == self.absence:
                raise ValueError(f"{self.noun} {name!r} is the name for none: {cls.__module__} needs another one")
            if name in self:
                places = f"{self[name].__module__} and {cls.__module__}"
                raise ValueError(f"{self.noun} {name!r} is registered twice: in {places}")
            self[name] = cls
            return cls

        return add

    def names(self) -> list[str]:
        """Return the names of all classes, sorted, without that of the absence."""
        return sorted(self)

    def find(self, name: Any) -> Registered:
        """Return a class.

        Raises:
            ValueError: The name is unknown.
        """
        if not isinstance(name, str) or name not in self:
            names = self.names() if self.absence is None else [*self.names(), self.absence]
            hint = f"{nearest(str(name), names)} There are: {', '.join(names)}"
            raise ValueError(f"no {self.noun} is called {name!r}.{hint}")
        return self[name]

    def resolve(self, spec: Spec, **arguments) -> tuple[Registered, dict[str, Any]]:
        """Return the class that a spec names, and its arguments.

        Args:
            spec: Name of the class, or a mapping of `name` and arguments.
            **arguments: Arguments that take precedence over those in `spec`.

        Raises:
            ValueError: The name or an argument is unknown.
        """
        if isinstance(spec, str):
            spec = {"name": spec}
        if not (isinstance(spec, Mapping) and "name" in spec):
            raise ValueError(f"{self.noun} must be a name or a mapping with a 'name', not {spec!r}")
        name = spec["name"]
        cls = self.find(name)
        arguments = {key: value for key, value in spec.items() if key != "name"} | arguments
        parameters = [key for key in inspect.signature(cls).parameters if key not in self.given] + [*self.more(cls)]
        for argument in arguments:
            if argument not in parameters:
                hint = f"{nearest(argument, parameters)} It takes: {', '.join(parameters)}"
                raise ValueError(f"{self.noun} {name!r} takes no {argument!r}.{hint}")
        return cls, arguments
