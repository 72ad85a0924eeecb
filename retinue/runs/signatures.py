"""Arguments of ops and nets with their defaults and meanings, read from the source files without importing torch."""

import ast
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from inspect import cleandoc
from pathlib import Path

from retinue.utils.paths import PROJECT


@dataclass(frozen=True)
class Argument:
    """One argument of a constructor.

    Attributes:
        name: its name.
        default: the default as Python source, or "" if it has none.
        meaning: what the docstring's section `Args:` says about it, on one line; may be empty.
    """

    name: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Class:
    """A class in a source file."""

    node: ast.ClassDef
    path: Path

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (ast.get_docstring(self.node) or "").partition("\n")[0]

    @property
    def description(self) -> str:
        """Docstring up to its first section."""
        return re.split(r"^[A-Z]\w+:$", ast.get_docstring(self.node) or "", maxsplit=1, flags=re.MULTILINE)[0].strip()


def find_ops() -> dict[str, Class]:
    """Return the class of every op that is registered with `@register_op("name")`, by name."""
    return _find_registered("register_op")


def find_gates() -> dict[str, Class]:
    """Return the class of every gate that is registered with `@register_gate("name")`, by name."""
    return _find_registered("register_gate")


def find_reductions() -> dict[str, Class]:
    """Return the class of every token reduction that is registered with `@register_reduction("name")`, by name."""
    return _find_registered("register_reduction")


def list_gate_places() -> dict[str, str]:
    """Return the meaning of each value of a gate's `at`, from `ops.gate_registry.PLACES`."""
    assignments = (node for node in _module(PROJECT / "ops" / "gate_registry.py").body if isinstance(node, ast.Assign))
    return next(ast.literal_eval(node.value) for node in assignments if ast.unparse(node.targets[0]) == "PLACES")


@cache
def _find_registered(decorator_name: str) -> dict[str, Class]:
    """Return the classes below `ops/` and `models/reduction/` that a decorator registers, by name."""
    classes = {}
    for path in sorted(path for folder in ("ops", "models/reduction") for path in (PROJECT / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if f"@{decorator_name}(" not in text:
            continue
        for node in ast.parse(text).body:
            if not isinstance(node, ast.ClassDef):
                continue
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == decorator_name:
                    classes[ast.literal_eval(decorator.args[0])] = Class(node, path)
    return dict(sorted(classes.items()))


def _timm_folder() -> Path:
    spec = find_spec("timm")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def find_net(name: str) -> Class | None:
    """Return the class of the net that is registered as `name`, ours or timm's; None if its source does not tell."""
    definition = re.compile(rf"^def {re.escape(name.partition('.')[0])}\(", re.MULTILINE)
    for folder in (PROJECT / "models" / "backbones", _timm_folder() / "models"):
        for path in sorted(folder.glob("*.py")):
            if definition.search(path.read_text(encoding="utf-8")):
                return _returned_class(name.partition(".")[0], path)
    return None


def _returned_class(function: str, path: Path) -> Class | None:
    for node in _module(path).body:
        if isinstance(node, ast.FunctionDef) and node.name == function and node.returns is not None:
            return _find_class(ast.unparse(node.returns), path)
    # Some of timm's entry points have no annotation; then the file builds nets of one class.
    built = re.search(r"build_model_with_cfg\(\s*(\w+)", path.read_text(encoding="utf-8"))
    return _find_class(built[1], path) if built else None


def list_arguments(cls: Class, given: Collection[str] = ()) -> list[Argument]:
    """Return the arguments of a class's constructor, those of its base classes last.

    Args:
        cls: the class.
        given: names of arguments to leave out, since the user does not choose them.
    """
    arguments: dict[str, Argument] = {}
    for ancestor in _ancestors(cls):
        constructor = _constructor(ancestor)
        if constructor is None:
            continue
        meanings = {**_meanings(ast.get_docstring(ancestor.node)), **_meanings(ast.get_docstring(constructor))}
        for name, default in _signature(constructor):
            # A base class's required arguments are given by the class itself.
            if name not in ("self", *given) and name not in arguments and (default or ancestor is cls):
                arguments[name] = Argument(name, default, meanings.get(name, ""))
        if constructor.args.kwarg is None:
            break
    return list(arguments.values())


def list_softmax_options(op: Class) -> list[Argument]:
    """Return the options of an op's softmax, the arguments of `ops.softmax.SoftmaxOptions.configure`, if it has any."""
    takes = [
        ast.literal_eval(node.value)
        for ancestor in _ancestors(op)
        for node in ancestor.node.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "softmax_options"
    ]
    options = _find_class("SoftmaxOptions", PROJECT / "ops" / "softmax.py")
    if not takes or not takes[0] or options is None:
        return []
    configure = next(
        node for node in options.node.body if isinstance(node, ast.FunctionDef) and node.name == "configure"
    )
    meanings = _meanings(ast.get_docstring(configure))
    return [Argument(name, default, meanings[name]) for name, default in _signature(configure) if name != "self"]


def _ancestors(cls: Class) -> Iterator[Class]:
    yield cls
    for base in cls.node.bases:
        found = _find_class(ast.unparse(base), cls.path)
        if found is not None:
            yield from _ancestors(found)


def _constructor(cls: Class) -> ast.FunctionDef | None:
    for node in cls.node.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return node
    return None


def _signature(constructor: ast.FunctionDef) -> list[tuple[str, str]]:
    """Return names and defaults; the default of a required argument is ""."""
    positional, keyword_only = constructor.args.args, constructor.args.kwonlyargs
    required = [""] * (len(positional) - len(constructor.args.defaults))
    defaults = [*required, *map(ast.unparse, constructor.args.defaults)]
    defaults += ["" if default is None else ast.unparse(default) for default in constructor.args.kw_defaults]
    return list(zip([argument.arg for argument in (*positional, *keyword_only)], defaults, strict=True))


def _meanings(docstring: str | None) -> dict[str, str]:
    """Return what a docstring's section `Args:` says about each argument; `a, b: ...` describes both."""
    lines = cleandoc(docstring or "").splitlines()
    if "Args:" not in lines:
        return {}
    meanings: dict[str, str] = {}
    names: list[str] = []
    section = lines[lines.index("Args:") + 1 :]
    indent = len(section[0]) - len(section[0].lstrip()) if section else 0
    for line in section:
        depth = len(line) - len(line.lstrip())
        if not line.strip() or depth < indent:
            break
        entry = re.match(r"(\*{0,2}\w+(?:, \w+)*)(?: \(.*?\))?: *(.*)", line.strip()) if depth == indent else None
        if entry:
            names = entry[1].split(", ")
            meanings |= dict.fromkeys(names, entry[2])
        else:
            meanings |= {name: f"{meanings[name]} {line.strip()}" for name in names}
    return meanings


def _find_class(name: str, path: Path) -> Class | None:
    """Return the class called `name` in the module at `path`, defined there or imported from the project or timm."""
    for node in _module(path).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return Class(node, path)
        if isinstance(node, ast.ImportFrom) and node.module and name in {alias.name for alias in node.names}:
            root = _timm_folder().parent if node.module.startswith("timm.") else PROJECT
            source = root / f"{node.module.replace('.', '/')}.py"
            return _find_class(name, source) if not node.level and source.is_file() else None
    return None


@cache
def _module(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))
