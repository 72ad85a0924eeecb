"""Differences of many nets to a baseline, for compare_ops.py, the table of collect.py and the page of report.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from retinue.evaluation.contributions import Contributions
from retinue.evaluation.statistics import Difference, holm, paired_difference
from retinue.results.collection import Group
from retinue.results.compare import Net, check_nets, compare_pair, read_net
from retinue.results.figures import main_figures
from retinue.results.report import data_set, net_name
from retinue.runs.result_file import read_result
from retinue.utils.suggestions import nearest


@dataclass
class Differences:
    """Differences of groups of runs to a baseline.

    Attributes:
        baseline: Name of the baseline.
        figures: Name of the compared figure of each group that is compared, such as `top1`, by the group's position.
        values: The group's difference to the baseline with the p-value after Holm's correction, or "baseline".
        notes: Reason why a group is not compared, a line for each.
    """

    baseline: str
    figures: dict[int, str] = field(default_factory=dict)
    values: dict[int, Difference | Literal["baseline"]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def compare_groups(groups: Sequence[Group], baseline: str, resamples: int = 1000) -> Differences:
    """Compare each group with the baseline on the same data by the main figure of the task, as compare.py does.

    Args:
        groups: Groups of runs.
        baseline: Name of a net among the groups, as compare.py and the page show it.
        resamples: Number of resamples of the test images.

    Raises:
        ValueError: No group has the name of the baseline.
    """
    names = [net_name(group) for group in groups]
    if baseline not in names:
        known = dict.fromkeys(names)
        raise ValueError(f"there is no net {baseline!r}.{nearest(baseline, known)} There are: {', '.join(known)}")
    result = Differences(baseline)
    for data in dict.fromkeys(map(data_set, groups)):
        positions = [i for i, group in enumerate(groups) if data_set(group) == data]
        first = next((i for i in positions if names[i] == baseline), None)
        if first is None:
            result.notes.append(f"{data}: no difference, since {baseline} has no run")
            continue
        _compare_set(result, groups, names, first, [i for i in positions if i != first], resamples)
    return result


def _compare_set(
    result: Differences,
    groups: Sequence[Group],
    names: Sequence[str],
    first: int,
    others: Sequence[int],
    resamples: int,
) -> None:
    """Add the differences of groups on the same data to the one at the position `first`."""
    [figure, *_] = [name.removeprefix("test/") for name in main_figures(groups[first].runs)] or [None]
    try:
        base = read_net(groups[first], resamples)
    except ValueError as error:
        result.notes.append(f"{names[first]}: no difference: {error}")
        return
    found: dict[int, Difference] = {}
    for i in others:
        try:
            net = read_net(groups[i], resamples)
            found[i] = compare_pair(net, base, check_nets([base, net], figure))
        except ValueError as error:
            result.notes.append(f"{names[i]}: no difference: {error}")
    adjusted = holm([difference.p for difference in found.values()])
    result.values[first] = "baseline"
    for (i, difference), p in zip(found.items(), adjusted, strict=True):
        result.values[i] = difference._replace(p=p)
    result.figures |= dict.fromkeys([first, *found], str(figure))


def compare_runs(own: Mapping[int, Path], base: Mapping[int, Path], figure: str) -> Difference | None:
    """Compare the finished runs of a net with those of a baseline, image by image and seed by seed.

    Runs that do not tell what each test image adds to the figure are compared by a t-test, paired by seed.

    Args:
        own: Folders of the net's runs by seed.
        base: Folders of the baseline's runs by seed.
        figure: Name of the figure, such as `top1`.

    Returns:
        The difference; None without a common seed, and with a single one that has no figures of images.
    """
    seeds = sorted(own.keys() & base.keys())
    if not seeds:
        return None
    try:
        nets = [
            Net(name, {seed: Contributions.read(runs[seed]) for seed in seeds})
            for name, runs in (("net", own), ("baseline", base))
        ]
        return compare_pair(nets[0], nets[1], check_nets(nets, figure))
    except ValueError:
        if len(seeds) == 1:
            return None
        values = [
            [(read_result(runs[seed]) or {})["metrics"][f"test/{figure}"] for seed in seeds] for runs in (own, base)
        ]
        return paired_difference(*values)
