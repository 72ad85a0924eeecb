"""Tests of the command that measures attention."""

import pytest

from scripts import benchmark_ops


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["resolutions=[224]"], r"no option 'resolutions=.224.'"),
        (["image_size=224"], r"no option 'image_size=224'. Did you mean 'image_sizes'\?"),
        (["--csv"], "no option '--csv'"),
        (["image_sizes=[224,big]"], "image_sizes must be .*, not big"),
        (["image_sizes=16"], "at least 32 pixels, not 16"),
        (["ops=widow"], r"no op 'widow'. Did you mean 'window'\?"),
        (["models=biformer_tin"], r"no net 'biformer_tin'. Did you mean 'biformer_tiny'\?"),
        (["batch_size=0"], "batch_size must be greater than or equal to 1, not 0"),
        (["dtype=int8"], "dtype must be 'float32', 'bfloat16' or 'float16', not int8"),
        (["device=tpu"], "device must be auto, cpu"),
        (["tune=true", "device=cpu"], "tune=true needs a CUDA device"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as raised:
        benchmark_ops.main(arguments)
    assert "\n" not in str(raised.value)


def test_the_command_prints_tables_and_writes_csv_and_plot(tmp_path, capsys):
    csv, plot = tmp_path / "ops.csv", tmp_path / "ops.png"
    arguments = ["ops=[routed_attention,window]", "image_sizes=[32x64]", "rounds=1", "threads=1", "device=cpu"]
    benchmark_ops.main([*arguments, f"out={csv}", f"plot={plot}"])
    printed = capsys.readouterr().out
    assert "window, cut, matmul, softmax" in printed and "summed over the layers of a net" in printed
    header, *lines = csv.read_text().splitlines()
    assert header.startswith("what,against,ratio,shape,dtype,device,median_ms,p20_ms,p80_ms,peak_mb,direction")
    assert header.endswith("versions") and len(lines) > 20 and plot.stat().st_size > 1000
