import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field, model_validator

from retinue.utils import command_line
from retinue.utils.paths import PROJECT


class Options(command_line.Options):
    folder: Path = Field(Path("outputs"), description="folder of the runs")
    rounds: int = Field(7, ge=1, description="how often each candidate is timed")
    share: float | None = Field(None, gt=0, description="share of the images")
    small: bool = Field(False, description="short runs")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="type of the activations")
    seeds: list[int] = Field([0, 1], description="seeds of the runs")
    ops: list[str] | None = Field(None, min_length=1, description="ops to compare")
    out: list[Path] = Field([], description="files to write")
    where: dict[str, str] = Field({}, description="only runs with this value")
    data: dict[str, Any] = Field({}, description="keys of the data set")

    @model_validator(mode="after")
    def check_rounds(self):
        if self.small and self.rounds > 7:
            raise ValueError("small=true takes at most rounds=7")
        return self


class Required(command_line.Options):
    space: str = Field(description="name of a search space")


class Empty(command_line.Options):
    pass


def test_defaults_hold_without_arguments():
    options = Options.parse([])
    assert (options.folder, options.rounds, options.share, options.seeds) == (Path("outputs"), 7, None, [0, 1])


def test_values_get_their_types():
    options = Options.parse(["folder=a b", "rounds=3", "share=1e-2", "small=true", "dtype=bfloat16"])
    assert (options.folder, options.rounds, options.share) == (Path("a b"), 3, 0.01)
    assert options.small is True and options.dtype == "bfloat16"
    assert Options.parse(["share=null"]).share is None


def test_text_keeps_its_letters():
    assert [Required.parse([f"space={text}"]).space for text in ("1e5", "no", "a=b", "")] == ["1e5", "no", "a=b", ""]


def test_the_last_of_two_values_counts():
    assert Options.parse(["rounds=3", "rounds=4"]).rounds == 4


def test_a_list_takes_brackets_or_a_single_entry():
    assert Options.parse(["seeds=[2, 3]"]).seeds == [2, 3]
    assert Options.parse(["seeds=2"]).seeds == [2]
    assert Options.parse(["out=[a.md,b/1.csv]"]).out == [Path("a.md"), Path("b/1.csv")]
    assert Options.parse(["out=[]"]).out == []


def test_a_mapping_takes_an_entry_at_a_time():
    options = Options.parse(
        ["where.model=swin_*,none", "where.recipe.optimizer.lr=1e-3", "data.root=/data", "data.n=3"]
    )
    assert options.where == {"model": "swin_*,none", "recipe.optimizer.lr": "1e-3"}
    assert options.data == {"root": "/data", "n": 3}


def test_other_keys_are_handed_on():
    options, others = Options.parse_some(["model=swin", "rounds=2", "seeds.size=1", "ops.backend=torch"])
    assert options.rounds == 2
    assert others == ["model=swin", "seeds.size=1", "ops.backend=torch"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rounds=0"], "rounds must be greater than or equal to 1, not 0"),
        (["rounds=many"], "rounds must be an integer, not many"),
        (["share=0"], "share must be greater than 0, not 0"),
        (["small=perhaps"], "small must be a boolean, not perhaps"),
        (["dtype=bfloat"], "dtype must be 'float32' or 'bfloat16', not bfloat. Did you mean 'bfloat16'?"),
        (["seeds=[0,x]"], "seeds must be an integer, not x"),
        (["seeds=[0"], "seeds must be a list, not [0"),
        (["ops=[]"], "ops needs at least 1 entry"),
        (["where=a"], "where takes where.<name>=TEXT, not where=a"),
        (["small=true", "rounds=8"], "small=true takes at most rounds=7"),
        (["round=3"], "there is no option 'round=3'. Did you mean 'rounds'? There are, as key=value: folder, rounds, "),
        (["--rounds=3"], "there is no option '--rounds=3'. Did you mean 'rounds'?"),
        (["--rounds", "3"], "there is no option '--rounds'. Did you mean 'rounds'?"),
        (["outputs"], "there is no option 'outputs'."),
    ],
)
def test_a_mistake_is_answered_in_one_line(arguments, message):
    with pytest.raises(ValueError) as error:
        Options.parse(arguments)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_flags_are_not_handed_on_as_other_keys():
    with pytest.raises(ValueError, match=r"there is no option '--rounds=3'\. Did you mean 'rounds'"):
        Options.parse_some(["--rounds=3"])


def test_a_mistyped_key_is_named_before_a_missing_one():
    with pytest.raises(ValueError, match=r"there is no option 'spase=a'\. Did you mean 'space'"):
        Required.parse(["spase=a"])


def test_a_missing_key_is_named_with_its_meaning():
    with pytest.raises(ValueError, match=r"^space=TEXT is missing: name of a search space$"):
        Required.parse([])


def test_a_command_without_options_says_so():
    assert Empty.parse([]) == Empty()
    with pytest.raises(ValueError, match=r"^there is no option 'a=1'\. The command takes no options$"):
        Empty.parse(["a=1"])


def test_help_lists_every_option_with_its_meaning_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        Options.parse(["rounds=0", "--help"])
    assert not stop.value.code
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    shown = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in lines if "=" in line}
    assert shown == {
        "folder=PATH": "folder of the runs (outputs)",
        "rounds=INT": "how often each candidate is timed (7)",
        "share=FLOAT": "share of the images (null)",
        "small=true|false": "short runs (false)",
        "dtype=float32|bfloat16": "type of the activations (float32)",
        "seeds=[INT,...]": "seeds of the runs ([0,1])",
        "ops=[TEXT,...]": "ops to compare (null)",
        "out=[PATH,...]": "files to write ([])",
        "where.<name>=TEXT": "only runs with this value",
        "data.<name>=VALUE": "keys of the data set",
    }
    assert "space=TEXT  name of a search space" in Required.help()
    assert "Options" not in Empty.help()


def test_a_closed_pipe_ends_help_without_a_traceback():
    code = (
        "from retinue.utils import command_line, errors\n"
        "class Empty(command_line.Options):\n    pass\n"
        "with errors.user_errors():\n    Empty.parse(['--help'])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 128 + 13


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"), (True, "true"), (3, "3"), (1e-05, "1e-05"), ("a b", "a b"),
        (["agent", None], "[agent,null]"), ((1, 2), "[1,2]"), ({"a": [1], "b": False}, "{a: [1],b: false}"),
    ],
)  # fmt: skip
def test_values_are_shown_as_they_are_typed(value, text):
    assert command_line.to_text(value) == text


def test_a_file_of_another_kind_is_refused():
    command_line.check_suffixes("out", [Path("a.md")], (".csv", ".md"))
    with pytest.raises(ValueError, match=r"^out takes files that end in \.csv, \.md, not a\.xls$"):
        command_line.check_suffixes("out", [Path("b.csv"), Path("a.xls")], (".csv", ".md"))
