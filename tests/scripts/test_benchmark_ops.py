from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

import ops.backend
from ops.functional import routed_attention
from retinue.benchmarks import growth as op_costs
from retinue.benchmarks import layers as op_layers
from retinue.benchmarks import nets as op_nets
from retinue.benchmarks import peers as op_peers
from retinue.benchmarks import tuning as tune_kernels
from scripts import benchmark_ops
from scripts.benchmark_ops import Figures, Setting, Timing

PRIMITIVES, Call, Formulation = op_layers.PRIMITIVES, op_peers.Call, op_peers.Formulation
RoutedLayer, WindowLayer = op_layers.RoutedLayer, op_layers.WindowLayer
NeighborhoodLayer = op_layers.NeighborhoodLayer
LAYERS = [
    RoutedLayer("net", 196, (14, 14), 32, 2, 3, (7, 7), 4, True),
    RoutedLayer("net", 200, (12, 20), 32, 1, 3, (4, 4), 2, False),
    WindowLayer("net", 196, (14, 14), 32, 2, 1, (7, 7), (3, 3)),
    WindowLayer("net", 100, (7, 14), 16, 1, 1, (7, 7), (0, 0)),
    NeighborhoodLayer("net", 90, (9, 10), 32, 2, 2, (7, 7), True),
    NeighborhoodLayer("net", 90, (9, 10), 32, 2, 2, (7, 5), False),
]
SETTING = Setting(torch.device("cpu"), "float32", 2)


def able(layer, device="cpu"):
    call = layer.call(2, device)
    return [name for name, formulation in PRIMITIVES[layer.primitive].items() if not formulation.obstacle(call)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.describe(2))
def test_every_formulation_means_the_same(layer, dtype):
    names = able(layer)
    assert len(names) > 2
    errors = op_layers.check(layer, names, op_layers.make_inputs(layer, 2, dtype, "cpu"))
    assert list(errors) == names and all(0 < error < 2 for error in errors.values())


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.describe(2))
def test_truth_by_head_is_that_of_the_whole(layer):
    inputs = op_layers.make_inputs(layer, 2, torch.float64, "cpu")
    qkv, bias, index, dout = inputs
    with op_peers.backend("torch"):
        out = layer.attend(op_layers.PLAIN[layer.primitive], qkv, bias, index)
    grads = torch.autograd.grad(out, [t for t in (qkv, bias) if t is not None], dout)
    for ours, theirs in zip(op_layers.truth(layer, inputs), [out, *grads], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_what_flex_attention_is_told_is_what_is_meant():
    layer = RoutedLayer("net", 64, (8, 8), 16, 1, 1, (4, 4), 3, True)
    index = layer.index(2)
    mask = op_peers.routing_blocks(index, 4)
    assert isinstance(mask, BlockMask) and mask.full_kv_indices is not None
    blocks = torch.zeros(2, 16, 16).scatter(2, index, 1.0)
    assert torch.equal(mask.to_dense()[:, 0].float(), blocks)
    assert torch.equal(mask.full_kv_indices[..., :3].squeeze(1).long().sort().values, index.sort().values)
    with torch.no_grad():  # it has no backward on the CPU
        for layer in LAYERS[2:]:
            qkv, bias, _, _ = op_layers.make_inputs(layer, 1, torch.float32, "cpu")
            flex = {"window_attention": op_peers.flex_window, "neighborhood_attention": op_peers.flex_neighborhood}
            given = (qkv.detach(), None if bias is None else bias.detach(), None)
            ours = layer.attend(flex[layer.primitive], *given)
            assert torch.allclose(ours, layer.attend(op_layers.PLAIN[layer.primitive], *given), atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_dilated_peers():
    qkv, bias = torch.randn(2, 12, 18, 24), torch.randn(2, 5, 7)
    plain = op_layers.PLAIN["neighborhood_attention"](qkv, bias, 2, (3, 4), (3, 4))
    for peer in (op_peers.gathered_neighborhood, op_peers.masked_neighborhood, op_peers.flex_neighborhood):
        assert torch.allclose(peer(qkv, bias, 2, (3, 4), (3, 4)), plain, atol=1e-5)


def wrong(qkv, index, grid, num_heads, scale):
    return routed_attention(qkv, index, grid, num_heads, 1.001 * scale)


def test_no_figure_comes_of_a_broken_form_of_ours(monkeypatch):
    monkeypatch.setitem(PRIMITIVES["routed_attention"], "routed_attention", Formulation(wrong))
    message = r"routed_attention errs \S+ times as much as plain PyTorch in the .*, more than 2: 2 x 14 x 14 x 32"
    with pytest.raises(ValueError, match=message):
        benchmark_ops.bench_layer(LAYERS[0], 2, SETTING, compiling=False)


def test_no_figure_comes_of_a_broken_gradient(monkeypatch):
    def right_forward(qkv, *rest):
        return routed_attention(qkv + (qkv * 1e-3 - (qkv * 1e-3).detach()), *rest)

    monkeypatch.setitem(PRIMITIVES["routed_attention"], "routed_attention", Formulation(right_forward))
    with pytest.raises(ValueError, match="in the gradient of q, k and v"):
        benchmark_ops.bench_layer(LAYERS[0], 2, SETTING, compiling=False)


def test_a_broken_peer_is_left_out(monkeypatch, capsys):
    def fails(*args):
        raise RuntimeError("no such luck\nand more")

    monkeypatch.setitem(PRIMITIVES["routed_attention"], "masked SDPA", Formulation(wrong))
    monkeypatch.setitem(PRIMITIVES["routed_attention"], "FlexAttention", Formulation(fails, foreign=True))
    found = benchmark_ops.bench_layer(LAYERS[0], 1, SETTING, compiling=False)
    assert {name for name, _ in found} == {"routed_attention", "gather, matmul, softmax", "index_select + SDPA"}
    told = capsys.readouterr().out
    assert "masked SDPA is left out" in told and "FlexAttention is left out" in told and "and more" not in told


def test_rows_are_told_over_the_authors_formulation():
    found = benchmark_ops.bench_layer(LAYERS[0], 1, SETTING, compiling=False)
    rows = benchmark_ops.make_rows(found, SETTING, "shape", "series", 1, 56**2)
    names = able(LAYERS[0])
    assert [(row["what"], row["direction"]) for row in rows] == [
        (name, direction) for direction in ("forward", "forward + backward") for name in names
    ]
    assert all(row["against"] == (None if row["what"] == names[1] else names[1]) for row in rows)
    assert isinstance(rows[0]["ratio"], float) and rows[0]["error"] == found[names[0], False].error


def test_sums_count_layers_and_leave_out_what_did_not_run_everywhere():
    def figures(*seconds, peak=None):
        return Figures(Timing(seconds), peak, 0.5, 1.0)

    both = ("ours", False), ("peer", False)
    first = dict(zip(both, (figures(1.0, 2.0, peak=7.0), figures(5.0, 5.0)), strict=True))
    layers = (LAYERS[0], first), (replace(LAYERS[0], count=2), {both[0]: figures(10.0, 20.0, peak=3.0)})
    [(key, total)] = benchmark_ops.total(layers).items()
    assert key == both[0] and total == Figures(Timing((23.0, 46.0)), 7.0, 0.5, 5.0)


def test_cost_is_fitted_from_512_pixels_on():
    def row(side, ms, peak):
        return {"series": "s", "what": "w", "direction": "d", "batch": 1, "pixels": side**2,
                "median_ms": ms, "peak_mb": peak}  # fmt: skip

    rows = [row(224, 50.0, 50.0), *(row(n, 1e-3 * n**2.0, 1e-6 * n**4.0) for n in (512, 1024, 2048))]
    [fitted] = op_costs.exponents(rows)
    assert fitted["time"] == pytest.approx(1.0) and fitted["memory"] == pytest.approx(2.0)
    [fitted] = op_costs.exponents([{**r, "peak_mb": None} for r in rows])
    assert fitted["memory"] is None
    assert not op_costs.exponents(rows[:2])


def test_windows_follow_the_size_by_the_papers_law():
    def keys(pixels, fixed):
        layers = op_layers.layers("routed_attention", pixels)
        return next(layer.keys for layer in layers if (layer.variant == "7 x 7 windows") == fixed)

    assert keys((2048, 2048), True) / keys((512, 512), True) == pytest.approx(16, rel=0.1)
    assert keys((2048, 2048), False) / keys((512, 512), False) == pytest.approx(16 ** (1 / 3), rel=0.2)
    assert all(layer.variant == "7 x 7 windows" for layer in op_layers.layers("routed_attention", (224, 224)))


def test_layers_are_those_of_the_nets():
    for primitive, depths in (("routed_attention", 26), ("window_attention", 12), ("neighborhood_attention", 18)):
        for size in ((224, 224), (800, 1333)):
            layers = [la for la in op_layers.layers(primitive, size) if la.variant != "windows follow the size"]
            assert sum(layer.count for layer in layers) == depths
            assert layers[0].tokens == -(-size[0] // 4) * -(-size[1] // 4)


def test_ops_and_what_they_call():
    net = op_nets.make_subject("bilevel_routing", (56, 56), 1, "cpu", "float32")
    assert net.formulations() == ["", "gather, matmul, softmax"] and net.shape == (1, 14, 14, 64)
    assert op_nets.check(net, net.formulations())[""] < 2
    assert op_nets.make_subject("agent", (56, 56), 1, "cpu", "float32").formulations() == [""]
    assert {name for _, name in op_nets.primitives(net.build())} == {"routed_attention"}


def test_no_figure_comes_of_a_broken_op(monkeypatch):
    net = op_nets.make_subject("bilevel_routing", (56, 56), 1, "cpu", "float32")
    monkeypatch.setitem(PRIMITIVES["routed_attention"], "wrong", Formulation(wrong))
    with pytest.raises(ValueError, match=r"bilevel_routing errs .* more than 2: 1 x 14 x 14 x 64, float32"):
        op_nets.check(net, ["wrong"])


def test_a_second_net_follows_the_routes_of_the_first():
    routes, seen = [], []
    qkv = torch.zeros(1)

    def attend(qkv, index, *rest):
        seen.append(index)
        return qkv

    for call in ("first", "second"):
        follow = op_nets.following(attend, routes)
        for layer in range(2):
            follow(qkv, f"{call} {layer}")
    assert seen == ["first 0", "first 1"] * 2


def test_the_back_end_is_given_back():
    with pytest.raises(RuntimeError), op_peers.backend("torch"):
        assert ops.backend._state["backend"] == "torch"
        raise RuntimeError
    assert ops.backend._state["backend"] == "auto"


def test_obstacles_say_the_value():
    large = Call(1, (256, 256), "cpu", 49)
    assert "4.3e+09 entries" in str(op_peers.a_mask(large))
    assert "windows of 49 tokens" in str(op_peers.whole_blocks(large))
    assert op_peers.few_pairs(large) and op_peers.cuda(large)
    assert op_peers.cuda(replace(large, device="cuda")) is None


def test_tuning_goes_down_one_number_at_a_time():
    candidates = [(a, b) for a in (1, 2, 4, 8) for b in (1, 2, 3)]
    best, times = tune_kernels.descend((1, 1), candidates, lambda tiles: abs(tiles[0] - 4) + abs(tiles[1] - 3) + 1.0)
    assert best == (4, 3) and 1 < len(times) < len(candidates)
    assert tune_kernels.descend((1, 1), candidates, lambda tiles: sum(tiles))[0] == (1, 1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["resolutions=[224]"], "no argument 'resolutions=.224.'. Did you mean 'resolution'?"),
        (["--csv"], "no argument '--csv'"),
        (["resolution=[224,big]"], "resolution is .* not 'big'"),
        (["resolution=16"], "at least 32, not 16"),
        (["ops=widow"], "no op 'widow'. Did you mean 'window'?"),
        (["models=biformer_tin"], "no net 'biformer_tin'. Did you mean 'biformer_tiny'?"),
        (["batch=0"], "batch must be at least 1, not 0"),
        (["dtype=int8"], "dtype must be float32, float16 or bfloat16, not 'int8'"),
        (["device=tpu"], "device must be auto, cpu"),
        (["tune=true", "device=cpu"], "tune=true needs a CUDA device"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as raised:
        benchmark_ops.main(arguments)
    assert "\n" not in str(raised.value)


def test_command(tmp_path, capsys):
    csv, plot = tmp_path / "ops.csv", tmp_path / "ops.png"
    arguments = ["ops=[routed_attention,window]", "resolution=[32x64]", "rounds=1", "threads=1", "device=cpu"]
    benchmark_ops.main([*arguments, f"csv={csv}", f"plot={plot}"])
    told = capsys.readouterr().out
    assert "window, cut, matmul, softmax" in told and "summed over the layers of a net" in told
    header, *lines = csv.read_text().splitlines()
    assert header.startswith("what,against,ratio,shape,dtype,device,median_ms,p20_ms,p80_ms,peak_mb,direction")
    assert header.endswith("versions") and len(lines) > 20 and plot.stat().st_size > 1000
