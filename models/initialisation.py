"""Initialisation of nets: what a constructor leaves in each parameter, recorded so that another net can be compared.

Vectors overwrite all weights, so a vector says nothing about the start of a training. A record of the initialisation
holds, for each parameter of the authors' net by its name, the statistics of its values over several draws, whether
weight decay applies to it, and the net's drop path rates. Our net is compared through the names and layouts that
loading a checkpoint gives: its own fresh values are sorted by the authors' parameter that would be loaded there.

`scripts/record_initialisation.py` makes records; `tests/vectors/initialisation/` holds those of the papers' own code.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.weights import load_weights

# Draws of the authors' net in a record, and of our net in a comparison
RECORDED_DRAWS, COMPARED_DRAWS = 4, 2
# Largest difference of two statistics, in standard errors of the difference. Means and variances of thousands of
# parameters are compared, so that even four standard errors are exceeded by chance.
LIMIT = 5.5
# Smallest number of values whose kurtosis is compared
MIN_FOR_KURTOSIS = 2000
# Distance from the mean, in standard deviations, beyond which values are left out
OUTLIER = 10
# Number of values, at equal distances in ascending order, that a record keeps of a parameter without randomness
RECORDED_VALUES = 16


def record_initialisation(build: Callable[[], nn.Module]) -> dict[str, Any]:
    """Return the record of what a constructor leaves in each parameter.

    Args:
        build: Calls the constructor; each call must return a new module.

    Returns:
        `parameters` maps the names to `shape`, `decay` (whether weight decay applies) and statistics, and `drop_path`
        lists the drop path rates above 0 in the order of the modules, each once where several in a row are equal. The
        statistics are `values` for a parameter without randomness, else `mean`, `std` and `kurtosis`.
    """
    nets = list(_draws(build, RECORDED_DRAWS))
    parameters = [dict(net.named_parameters(remove_duplicate=False)) for net in nets]
    without_decay = _without_decay(nets[0])
    return {
        "parameters": {
            name: {"shape": list(value.shape), "decay": name not in without_decay}
            | _statistics(np.stack([_values(draw[name]) for draw in parameters]))
            for name, value in parameters[0].items()
        },
        "drop_path": drop_path_rates(nets[0]),
    }


def differences(build: Callable[[], nn.Module], record: Mapping[str, Any]) -> list[str]:
    """Return one line for each difference between the initialisation of a net of ours and a record.

    Args:
        build: Builds the net with the arguments of the recorded one; each call must return a new net.
        record: A record, as `record_initialisation` returns it. A parameter without `decay` may have either.
    """
    nets = list(_draws(build, COMPARED_DRAWS))
    parameters = [dict(net.named_parameters()) for net in nets]
    sources = _sources(nets[0], record)
    without_decay = _without_decay(nets[0])
    values: dict[str, list[np.ndarray]] = {}
    decays: dict[str, set[bool]] = {}
    names = list(record["parameters"])
    lines = []
    for ours, source in sources.items():
        found = np.unique(source)
        if not np.isin(found, np.arange(len(names))).all():
            lines.append(f"{ours} is not one of the authors' parameters, or is computed from several")
            continue
        draws = np.stack([_values(draw[ours]) for draw in parameters])
        for name in (names[index] for index in found.astype(int)):
            values.setdefault(name, []).append(draws[:, source == names.index(name)])
            decays.setdefault(name, set()).add(ours not in without_decay)
    for name in values:
        recorded = record["parameters"][name]
        lines += [f"{name}: {line}" for line in _compare(np.concatenate(values[name], 1), recorded)]
        if "decay" in recorded and decays[name] != {recorded["decay"]}:
            lines.append(f"{name}: weight decay {'does not apply' if recorded['decay'] else 'applies'}")
    rates = drop_path_rates(nets[0])
    if len(rates) != len(record["drop_path"]) or not np.allclose(rates, record["drop_path"], atol=1e-6):
        lines.append(f"drop path rates {rates} instead of {record['drop_path']}")
    return lines


def drop_path_rates(net: nn.Module) -> list[float]:
    """Return the drop path rates above 0 in the order of the modules, each once where several in a row are equal."""
    rates = (getattr(module, "drop_prob", None) for module in net.modules() if "DropPath" in type(module).__name__)
    return [rate for rate, _ in itertools.groupby(round(float(rate), 6) for rate in rates if rate)]


def _draws(build: Callable[[], nn.Module], count: int) -> Iterator[nn.Module]:
    for seed in range(count):
        torch.manual_seed(seed)
        yield build()


def _values(parameter: Tensor) -> np.ndarray:
    return parameter.detach().double().flatten().numpy()


def _sources(net: nn.Module, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return, for each value of each parameter of ours, the index of the authors' parameter that is loaded there."""
    state = {
        name: torch.full(recorded["shape"], float(index))
        for index, (name, recorded) in enumerate(record["parameters"].items())
    }
    net = copy.deepcopy(net)
    for parameter in net.parameters():
        nn.init.constant_(parameter, -1.0)
    load_weights(net, state, strict=False)
    return {name: _values(parameter) for name, parameter in net.named_parameters()}


def _without_decay(net: nn.Module) -> set[str]:
    """Return the names of the parameters that take no weight decay, as timm's rule and the net's own methods say."""
    listed = set(net.no_weight_decay()) if hasattr(net, "no_weight_decay") else set()  # pyright: ignore[reportCallIssue]
    words = net.no_weight_decay_keywords() if hasattr(net, "no_weight_decay_keywords") else ()  # pyright: ignore[reportCallIssue]
    return {
        name
        for name, parameter in net.named_parameters(remove_duplicate=False)
        if parameter.ndim <= 1 or name.endswith(".bias") or name in listed or any(word in name for word in words)
    }


def _statistics(draws: np.ndarray) -> dict[str, Any]:
    """Return the statistics of draws of a parameter (draws, values)."""
    if (draws == draws[0]).all():
        return {"values": _ascending(draws[0])}
    # PyTorch's trunc_normal_ leaves about one value of ten million at its limit, a hundred deviations away.
    draws = draws[np.abs(draws - draws.mean()) <= OUTLIER * draws.std()]
    mean, std = draws.mean(), draws.std()
    return {
        "mean": _rounded(mean),
        "std": _rounded(std),
        "kurtosis": _rounded(((draws - mean) ** 4).mean() / std**4),
    }


def _ascending(values: np.ndarray) -> list[float]:
    """Return values at equal distances in ascending order, or the one value of a constant."""
    if (values == values[0]).all():
        return [_rounded(values[0])]
    return [_rounded(value) for value in np.sort(values)[np.linspace(0, len(values) - 1, RECORDED_VALUES).astype(int)]]


def _rounded(value: float) -> float:
    return float(f"{value:.7g}")


def _compare(draws: np.ndarray, recorded: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each statistic of our draws (draws, values) that differs from the recorded one."""
    ours = _statistics(draws)
    if ("values" in ours) != ("values" in recorded):
        yield f"{_described(ours)} instead of {_described(recorded)}"
        return
    if "values" in ours:
        if len(ours["values"]) != len(recorded["values"]) or not np.allclose(
            ours["values"], recorded["values"], rtol=1e-5, atol=1e-7
        ):
            yield f"{_described(ours)} instead of {_described(recorded)}"
        return
    size = draws.shape[1]
    # Variance of a mean over one value, relative to the variance over all
    share = 1 / (size * COMPARED_DRAWS) + 1 / (size * RECORDED_DRAWS)
    variance, kurtosis = recorded["std"] ** 2, max(recorded["kurtosis"], ours["kurtosis"])
    errors = {
        "mean": (ours["mean"] - recorded["mean"], (variance * share) ** 0.5),
        "variance": (ours["std"] ** 2 - variance, variance * (max(kurtosis - 1, 0.1) * share) ** 0.5),
    }
    if draws.size >= MIN_FOR_KURTOSIS:
        errors["kurtosis"] = (ours["kurtosis"] - recorded["kurtosis"], (24 * share) ** 0.5 * max(1, kurtosis / 3) ** 2)
    if wrong := [name for name, (difference, error) in errors.items() if abs(difference) > LIMIT * error]:
        yield f"{_described(ours)} instead of {_described(recorded)} ({', '.join(wrong)})"


def _described(statistics: Mapping[str, Any]) -> str:
    if "values" not in statistics:
        return ", ".join(
            f"{name} {value:.4g}" for name, value in statistics.items() if name in ("mean", "std", "kurtosis")
        )
    values = statistics["values"]
    return f"{values[0]:.6g}" if len(values) == 1 else f"{values[0]:.6g} to {values[-1]:.6g}"
