"""Comparison of nets on the same test images: differences, their intervals and tests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from retinue.evaluation.contributions import BIASED, Contributions
from retinue.evaluation.statistics import (
    Difference,
    bootstrap_difference,
    correct_bias,
    draw_halves,
    draw_images,
    holm,
    mcnemar,
)
from retinue.results.collection import Group, Run, find_runs, group_runs
from retinue.results.report import net_name
from retinue.utils.suggestions import nearest


@dataclass
class Net:
    """Net of a comparison, with the tests of its runs.

    Attributes:
        name: Name of the net.
        tests: Contributions of the test images in each run, by seed.
        resamples: Number of resamples of the images: half-samples for average precision, else of the bootstrap.
        resampled: Figures (R,) of each resample, by figure and seed, as far as they have been needed.
    """

    name: str
    tests: dict[int | None, Contributions]
    resamples: int = 1000
    resampled: dict[tuple[str, int | None], np.ndarray] = field(default_factory=dict)

    @cached_property
    def observed(self) -> dict[int | None, dict[str, float]]:
        """Figures of the test, by seed."""
        return {seed: test.observed() for seed, test in self.tests.items()}

    def resample(self, figure: str, seed: int | None) -> np.ndarray:
        """Return a figure of one run in each resample of the images, which is the same for all nets: (R,)."""
        if (figure, seed) not in self.resampled:
            test = self.tests[seed]
            draw = draw_halves if figure in BIASED else draw_images
            values = [test.figures(counts) for counts in draw(len(test.images), self.resamples, 0)]
            names = [name for name in self.observed[seed] if (name in BIASED) == (figure in BIASED)]
            self.resampled |= {(name, seed): np.array([value[name] for value in values]) for name in names}
        return self.resampled[figure, seed]

    def value(self, figure: str) -> Difference:
        """Return the mean of a figure over the runs, with its interval, as the difference from 0."""
        seeds = list(self.tests)
        columns = np.stack([self.resample(figure, seed) for seed in seeds], 1)
        return difference_of(figure, [self.observed[seed][figure] for seed in seeds], columns)


def read_nets(folders: Sequence[Path], resamples: int) -> list[Net]:
    """Return the nets of the finished runs in or below the folders; runs that differ only in the seed are one net.

    Evaluations count only if a folder holds no training.

    Raises:
        ValueError: A folder holds no finished run, a run has no contributions, or a seed of a net occurs twice.
    """
    runs: list[Run] = []
    for folder in folders:
        finished = [run for run in find_runs(folder) if run.status == "finished"]
        if not finished:
            raise ValueError(f"no run in {folder} is finished")
        kind = "training" if any(run.kind == "training" for run in finished) else "evaluation"
        known = {run.folder.resolve() for run in runs}
        runs += [run for run in finished if run.kind == kind and run.folder.resolve() not in known]
    return [read_net(group, resamples) for group in group_runs(runs)]


def read_net(group: Group, resamples: int) -> Net:
    """Return the net of a group of runs, with the tests of those that are finished.

    Raises:
        ValueError: No run is finished, a run has no contributions, or a seed occurs twice.
    """
    name, tests, folder_of = net_name(group), {}, {}
    for run in group.runs:
        if run.status != "finished":
            continue
        seed = run.values.get("seed")
        if seed in tests:
            raise ValueError(f"{run.folder} and {folder_of[seed]} are the same run of {name}: name one of them")
        tests[seed], folder_of[seed] = Contributions.read(run.folder), run.folder
    if not tests:
        raise ValueError(f"no run of {name} is finished")
    return Net(name, tests, resamples)


def check_nets(nets: Sequence[Net], figure: str | None) -> str:
    """Return the name of the figure to compare, by default the first of the task.

    Raises:
        ValueError: There are less than two nets, they have no such figure, or they were tested on different images.
    """
    if len(nets) < 2:
        raise ValueError(f"a comparison needs two nets, but all runs are of {nets[0].name}")
    [first, *_] = nets[0].tests.values()
    for net in nets:
        for test in net.tests.values():
            if test.task != first.task or not np.array_equal(test.images, first.images):
                raise ValueError(
                    f"{nets[0].name} and {net.name} were not tested on the same images: {first.task} on "
                    f"{len(first.images)} images, and {test.task} on {len(test.images)}"
                )
    known = [name for name, value in first.observed().items() if np.isfinite(value)]
    if figure is not None and figure not in known:
        raise ValueError(
            f"there is no figure {figure!r} to compare.{nearest(figure, known)} There are: {', '.join(known)}"
        )
    return known[0] if figure is None else figure


def difference_of(figure: str, observed: Sequence[float], resampled: np.ndarray) -> Difference:
    """Return the mean of a figure's differences with its interval and test, without the bias of average precision.

    Args:
        figure: Name of the figure.
        observed: (n,), the difference in each pair of runs.
        resampled: (R, n), the differences in each resample of `Net.resample`.
    """
    if figure not in BIASED:
        return bootstrap_difference(observed, resampled)
    corrected, resampled = correct_bias(np.array(observed), resampled)
    return bootstrap_difference(corrected.tolist(), resampled)._replace(mean=float(np.mean(observed)))


def compare_pair(net: Net, baseline: Net, figure: str) -> Difference:
    """Return the difference of a figure between a net and the baseline, paired by image and by seed.

    Nets without a common seed are compared if each has one run.

    Raises:
        ValueError: The nets have no seed in common.
    """
    pairs = [(seed, seed) for seed in net.tests if seed in baseline.tests]
    if not pairs and len(net.tests) == len(baseline.tests) == 1:
        pairs = [(*net.tests, *baseline.tests)]
    if not pairs:
        raise ValueError(
            f"{net.name} has the seeds {list(net.tests)}, and {baseline.name} {list(baseline.tests)}: train both nets "
            "with the same seeds"
        )
    observed = [net.observed[a][figure] - baseline.observed[b][figure] for a, b in pairs]
    resampled = np.stack([net.resample(figure, a) - baseline.resample(figure, b) for a, b in pairs], 1)
    difference = difference_of(figure, observed, resampled)
    [a, b] = pairs[0]
    right = net.tests[a].arrays.get(figure), baseline.tests[b].arrays.get(figure)
    if len(pairs) == 1 and figure in ("top1", "top5") and right[0] is not None and right[1] is not None:
        difference = difference._replace(p=mcnemar(right[0], right[1]))
    return difference


def compare_nets(nets: Sequence[Net], baseline: Net, figure: str) -> Mapping[str, Difference]:
    """Return the difference of each other net from the baseline by the net's name, with p after Holm's correction.

    Raises:
        ValueError: A net has no seed in common with the baseline.
    """
    differences = {net.name: compare_pair(net, baseline, figure) for net in nets if net is not baseline}
    adjusted = holm([difference.p for difference in differences.values()])
    return {name: difference._replace(p=p) for (name, difference), p in zip(differences.items(), adjusted, strict=True)}
