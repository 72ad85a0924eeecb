"""A paper's table with our figures beside the paper's: its rows, and what they say as text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retinue.benchmarks.timing import Row, write_csv
from retinue.results.experiments import dense_experiments, experiments, head_of_experiment
from retinue.results.papers import DENSE_DATA, model_choice
from retinue.results.table import to_markdown
from retinue.utils.files import write_text
from retinue.utils.paths import CONF

SUFFIXES = (".csv", ".md")
# Figures of each table: key in papers/*.yaml -> heading and, if a run measures the figure, the run's metric.
FIGURES = {
    "variants": {"params_m": ("params (M)", ""), "macs_g": ("MACs (G)", ""), "top1": ("top-1 (%)", "test/top1")},
    "detection": {"box_ap": ("box AP", "test/box_ap"), "mask_ap": ("mask AP", "test/mask_ap")},
    "segmentation": {"miou_ss": ("mIoU (%)", "test/miou")},
}
# Headings of the figures that are measured on request.
SPEED_HEADINGS = {"images_per_s": "images/s", "peak_mb": "peak (MB)"}
# Name in conf/data of each table's data.
DATA = {"variants": "imagenet", **DENSE_DATA}
NO_FIGURE = "–"


@dataclass
class Figure:
    """A figure of the paper and ours.

    Attributes:
        paper: The paper's figure; None if its table has none.
        ours: Our figure; None if it is not known.
        differs: Whether ours differs from the paper's by more than the tolerance.
        reason: Why it differs, if that is known.
    """

    paper: float | None
    ours: float | None = None
    differs: bool = False
    reason: str = ""

    def __str__(self) -> str:
        mark = ""
        if self.differs:
            mark = "*" if self.reason else " ✗"
        is_small = self.ours is not None and self.ours < 1
        return f"{_format(self.paper, 'g')} / {_format(self.ours, '.3f' if is_small else '.2f')}{mark}"


@dataclass
class PaperRow:
    """A row of a paper's table, with our figures.

    Attributes:
        facts: The row in papers/*.yaml.
        label: Label of the row's net, as `weights.<label>=` takes it; "" if there is no net.
        figures: Figures by their keys in papers/*.yaml.
        complexity: Parameters and MACs that were counted; None before that.
    """

    facts: Mapping[str, Any]
    label: str
    figures: dict[str, Figure]
    complexity: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """The paper's name of the row: its net or its detector, with the schedule and the data."""
        keys = ("name", "detector", "head", "backbone", "neck", "schedule", "dataset")
        return ", ".join(str(self.facts[key]) for key in keys if self.facts.get(key))

    @property
    def name_with_size(self) -> str:
        """The name with the size of the images, which often distinguishes two rows."""
        return f"{self.name} at {self.facts['input']} px" if self.facts.get("input") else self.name


def read_rows(paper: Mapping[str, Any], table: str) -> list[PaperRow]:
    """Return the rows of a paper's table without figures of ours.

    Args:
        paper: The paper's facts, from `read_paper`.
        table: `variants`, `detection` or `segmentation`.
    """
    rows = paper[table]
    if table == "variants":
        labels = _label_variants(rows)
    else:
        # Reversed, so that the first of several variants with one name counts.
        nets = {normalise(row["name"]): row["net"] for row in reversed(paper["variants"]) if "net" in row}
        labels = [nets.get(normalise(str(row.get("backbone"))), "") for row in rows]
    return [
        PaperRow(row, label, {key: Figure(row.get(key)) for key in FIGURES[table]})
        for row, label in zip(rows, labels, strict=True)
    ]


def _label_variants(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a unique label for each row with a net: `net`, `net_size`, or `net_size_n` as far as is necessary."""
    nets = [row.get("net") for row in rows]
    with_size = [f"{row.get('net')}_{row['input']}" for row in rows]
    labels = []
    for i, net in enumerate(nets):
        if net is None:
            labels.append("")
        elif nets.count(net) == 1:
            labels.append(net)
        elif with_size.count(with_size[i]) == 1:
            labels.append(with_size[i])
        else:
            number = with_size[: i + 1].count(with_size[i])
            labels.append(f"{with_size[i]}_{number}")
    return labels


def normalise(name: str) -> str:
    """Return the lower-case letters and digits of a name; papers differ in the other characters."""
    return "".join(character for character in name if character.isalnum()).lower()


def head_of(facts: Mapping[str, Any]) -> str | None:
    """Return the choice in conf/head for a row of a detector or segmentor; None if the project has no such head."""
    if "train" in facts:
        return head_of_experiment(facts)
    heads = {normalise(path.stem): path.stem for path in (CONF / "head").glob("*.yaml")}
    return heads.get(normalise(facts.get("detector") or facts["head"]))


def list_missing(paper: str, table: str, rows: Sequence[PaperRow]) -> Iterator[str]:
    """Yield what the table lacks, and the commands that would produce it.

    Args:
        paper: Name of the paper.
        table: `variants`, `detection` or `segmentation`.
        rows: All rows of the table.
    """
    if not rows:
        yield f"the files that were read of this paper have no table of {table}"
    names = [row.facts.get("name") or str(row.facts.get("backbone")) for row in rows if not row.label]
    if names:
        yield f"missing, no net here: {', '.join(dict.fromkeys(names))}"
    incomplete = [row for row in rows if row.label and any(figure.ours is None for figure in row.figures.values())]
    if table == "variants":
        yield from _missing_accuracy(paper, incomplete)
    else:
        yield from _missing_dense(paper, table, incomplete)


def _missing_accuracy(paper: str, rows: Sequence[PaperRow]) -> Iterator[str]:
    # The rows of `experiments` are the same objects as those of the table, since a paper is read once.
    names = {id(facts): name for name, facts in experiments(paper).items()}
    without_accuracy = [row for row in rows if row.figures["top1"].ours is None]
    for row in without_accuracy:
        if id(row.facts) in names:
            command = f"python train.py experiment={names[id(row.facts)]} data.root=DIR"
        else:
            command = f"python scripts/reproduce.py paper={paper} weights.{row.label}=FILE data.root=DIR"
        yield f"missing, top-1 of {row.name_with_size}: {command}"
    if without_accuracy:
        yield f"or from the authors' checkpoints (papers/{paper}.yaml): weights.<net>=FILE data.root=DIR"


def _missing_dense(paper: str, table: str, rows: Sequence[PaperRow]) -> Iterator[str]:
    names = {id(facts["train"]): name for name, (_, facts) in dense_experiments(paper).items()}
    for row in rows:
        head = head_of(row.facts)
        if head is None:
            yield f"missing, {row.name}: its head is not here"
            continue
        if "train" in row.facts:
            choice = f"experiment={names[id(row.facts['train'])]}"
        else:
            choice = f"head={head} {' '.join(model_choice(row.label, {}, None))} data={DATA[table]}"
        yield f"missing, {row.name}: python train.py {choice} weights=CLASSIFIER.pth data.root=DIR"


def list_reasons(rows: Sequence[PaperRow]) -> list[str]:
    """Return the known reasons of the figures that are marked with *."""
    return [
        f"* {row.name_with_size}: {figure.reason}" for row in rows for figure in row.figures.values() if figure.reason
    ]


def format_rows(rows: Sequence[PaperRow], table: str) -> list[list[str]]:
    """Return the table as text, its headings first; a cell is the paper's figure / ours."""
    headings = {key: heading for key, (heading, _) in FIGURES[table].items()}
    headings |= {key: heading for key, heading in SPEED_HEADINGS.items() if any(key in row.figures for row in rows)}
    lines = [[table, *headings.values()]]
    lines += [[row.name, *[str(row.figures.get(key, Figure(None))) for key in headings]] for row in rows]
    if table == "variants":
        lines[0].insert(1, "px")
        for row, line in zip(rows, lines[1:], strict=True):
            line.insert(1, _format(row.facts["input"], "g"))
    return lines


def write_rows(path: Path, rows: Sequence[PaperRow], title: str, table: str, remarks: Sequence[str]) -> None:
    """Write the table as CSV or Markdown, by the suffix of the file.

    Args:
        path: A .csv or .md file.
        rows: All rows of the table.
        title: Heading of the Markdown file.
        table: `variants`, `detection` or `segmentation`.
        remarks: List below the table in the Markdown file.
    """
    if path.suffix == ".csv":
        write_csv(path, [_csv_row(row) for row in rows])
        return
    lines = format_rows(rows, table)
    text = to_markdown(lines, text_columns=1)
    write_text(path, f"# {title}\n\n{text}\n" + "".join(f"- {remark}\n" for remark in remarks))


def _csv_row(row: PaperRow) -> Row:
    facts = row.facts
    csv_row: Row = {"what": row.name, "net": facts.get("net", row.label) or None, "input": facts.get("input")}
    for key, figure in row.figures.items():
        csv_row |= {key: figure.paper, f"{key}_ours": figure.ours}
        csv_row[f"{key}_note"] = figure.reason or ("outside the tolerance" if figure.differs else None)
    return csv_row


def _format(value: float | None, spec: str) -> str:
    return NO_FIGURE if value is None else format(value, spec)
