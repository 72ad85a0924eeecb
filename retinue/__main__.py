"""The `retinue` command: `retinue train model=swin` is `python train.py model=swin`, from any folder."""

import ast
import pkgutil
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import scripts
from retinue.utils.command_line import HELP
from retinue.utils.errors import user_errors
from retinue.utils.suggestions import nearest


def list_commands() -> dict[str, str]:
    """Return the module of each command: `train`, `eval`, `predict`, `probe`, and every script."""
    script_modules = {module.name: f"scripts.{module.name}" for module in pkgutil.iter_modules(scripts.__path__)}
    return {name: name for name in ("train", "eval", "predict", "probe")} | script_modules


def summary(module: str) -> str:
    """Return the first line of a command's docstring, without importing what the command needs."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def print_help(commands: dict[str, str]) -> None:
    """Print the usage, and the commands with their summaries."""
    print("retinue COMMAND [key=value] ...        retinue COMMAND --help\n")
    width = max(map(len, commands))
    for command, module in commands.items():
        print(f"  {command:{width}}  {summary(module)}")


def main() -> None:
    commands, arguments = list_commands(), sys.argv[1:]
    name = arguments[0] if arguments else HELP[0]
    with user_errors():
        if name in HELP:
            print_help(commands)
            return
        if name not in commands:
            raise ValueError(f"there is no command {name!r}.{nearest(name, commands)} There are: {', '.join(commands)}")
    sys.argv = [name, *arguments[1:]]
    runpy.run_module(commands[name], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
