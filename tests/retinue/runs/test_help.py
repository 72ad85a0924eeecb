import subprocess
import sys

from ops import list_ops
from retinue.utils.paths import PROJECT


def test_help_lists_what_there_is(cli):
    for program in ("train", "eval"):
        text = cli(program, "--help").out
        for word in (
            "biformer (size=",
            "swin",
            "timm",
            "digits",
            "imagenet",
            "webdataset",
            "small_data",
            "wandb",
            *list_ops(),
        ):
            assert word in text, word
        assert "default_classification" not in text


def test_help_imports_no_torch():
    code = (
        "import sys, runpy; sys.argv = ['train.py', '--help']; "
        "runpy.run_path('train.py', run_name='__main__'); print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "False"
