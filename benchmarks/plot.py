"""Plots and tables of results files.

    python benchmarks/plot.py                      # of every file in benchmarks/results: SVG files in docs/plots
    python benchmarks/plot.py --table              # and the tables and lists of plots in docs/performance.md
    python benchmarks/plot.py results.csv --plots plots

Log-log plots of time, memory and share of the limit, a line for each candidate, against the number of rows and, from
scaling.py, against whatever grew; bars for training. Where a candidate has no time, a cross at the top of the plot says
why. Of rows that measure the same thing the last one counts. Drawing the same file twice gives the same bytes. Tables
go between `<!-- table: NAME -->` and `<!-- end of table -->`; NAME is one of those in TABLES.
"""

import argparse
import csv
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PLOTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "plots", ROOT / "docs" / "performance.md"
BOTH, FORWARD = "forward + backward", "forward"
Row = dict[str, str]

TITLES = {
    "support_attention": "support attention",
    "sdm": "SDM loss",
    "info_nce": "InfoNCE loss",
    "cmpm": "CMPM loss",
    "tal": "TAL loss",
    "relation_frobenius": "relation loss, Frobenius",
    "relation_kl": "relation loss, KL",
    "retrieval_metrics": "retrieval metrics",
    "topk_similarity": "top-k similarity",
}
COLOURS = {
    "lcr2s_ext cpu": "#0072B2",
    "lcr2s_ext cuda": "#0072B2",
    "lcr2s_ext triton": "#56B4E9",
    "eager": "#D55E00",
    "reference": "#7F7F7F",
}
OTHER_COLOURS = ["#E69F00", "#009E73", "#CC79A7", "#8C564B", "#BCBD22", "#9467BD", "#E377C2", "#17BECF", "#4B4B4B"]
SECTION_COLOURS = ["#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#D55E00", "#8C564B", "#999999", "#BCBD22"]
MARKERS = "osD^vP*Xh<>"


def is_ours(candidate: str) -> bool:
    return candidate.startswith("lcr2s_ext")


class Panel(NamedTuple):
    """One of the plots that stand side by side."""

    label: str
    value: Callable[[Row], str]


PANELS = [
    Panel("time, ms", lambda row: row["device_ms"] or row["ms"]),
    Panel("memory, MiB", lambda row: row["peak_mib"]),
    Panel("share of the limit", lambda row: row["share_of_limit"]),
]


class Curves(NamedTuple):
    """Rows of one figure, by candidate."""

    name: str
    title: str
    axis: str
    rows: dict[str, list[tuple[float, Row]]]
    exponents: dict[str, str]


def read(path: Path) -> list[Row]:
    """The rows of a results file, the last of those that measure the same thing."""
    keys = ("op", "part", "rows", "columns", "width", "dtype", "candidate", "axis", "value", "machine", "threads")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    missing = [key for key in (*keys, "exponent", "peak_mib") if rows and key not in rows[0]]
    if missing:
        raise SystemExit(f"{path}: no column {', '.join(missing)}; it is not a results file of this version")
    latest: dict[tuple[str, ...], Row] = {}
    for row in rows:
        # How many entries random sets happened to have is no part of the question.
        row["detail"] = re.sub(r", \d+ entries", "", row["detail"])
        key = (*(row[name] for name in keys), row["detail"], "fit" if row["exponent"] else "")
        latest.pop(key, None)
        latest[key] = row
    return list(latest.values())


def _trains(row: Row) -> bool:
    return row["op"].startswith("training")


def _number(text: str) -> float:
    return float(text) if text else float("nan")


def curves(rows: Sequence[Row]) -> list[Curves]:
    """What is plotted: forward + backward where an operator has one, at two sizes at least."""
    differentiable = {row["op"] for row in rows if row["part"] == BOTH}
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    exponents: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for row in rows:
        if _trains(row) or (row["part"] != BOTH and row["op"] in differentiable):
            continue
        if row["exponent"]:
            exponents[row["op"], row["axis"]][row["candidate"]] = row["exponent"]
        elif row["axis"]:
            # Another size of the axis is another shape in one of the columns.
            groups[row["op"], row["axis"], "", "", row["dtype"]].append(row)
        else:
            groups[row["op"], "", row["width"], row["detail"], row["dtype"]].append(row)
    result = []
    for (op, axis, width, detail, dtype), members in groups.items():
        grown: dict[str, list[tuple[float, Row]]] = defaultdict(list)
        for row in members:
            grown[row["candidate"]].append((float(row["value"] or row["rows"]), row))
        if len({x for points in grown.values() for x, _ in points}) < 2:
            continue
        words = [TITLES.get(op, op), members[0]["part"], *([f"d = {width}"] if width else [])]
        words += [*([detail] if detail else []), dtype]
        name = "-".join(filter(None, [op, axis or "rows", "scaling" if axis else "", width, detail, dtype]))
        ordered = {candidate: sorted(points, key=lambda p: p[0]) for candidate, points in grown.items()}
        slopes = exponents.get((op, axis), {}) if axis else {}
        result.append(Curves(slug(name), ", ".join(words), axis or "rows of each side", ordered, slopes))
    return result


def slug(name: str) -> str:
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def _colours(candidates: Iterable[str]) -> dict[str, str]:
    rest = iter(OTHER_COLOURS * 9)
    return {name: COLOURS.get(name) or next(rest) for name in candidates}


def short(note: str) -> str:
    return note if len(note) <= 60 else f"{note[:57]}..."


def machine_line(rows: Sequence[Row]) -> str:
    """The machine and the software of the last row."""
    row = rows[-1]
    days = sorted({row["time"][:10] for row in rows if row["time"]})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    words = [row["machine"], *([f"driver {row['driver']}"] if row["driver"] else [])]
    words += [f"torch {row['torch']}", *([f"triton {row['triton']}"] if row["triton"] else [])]
    return ", ".join([*words, f"lcr2s_ext {row['lcr2s_ext']}", f"commit {row['commit']}", when])


def _matplotlib() -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit(f"plots need matplotlib: pip install 'lcr2s-ext[bench]' ({error})") from error
    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "lcr2s_ext",
            "svg.fonttype": "none",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#DDDDDD",
            "grid.linewidth": 0.6,
        }
    )


def _draw_panel(axes: "Axes", panel: Panel, figure: Curves, colours: dict[str, str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, ScalarFormatter

    xs = sorted({x for points in figure.rows.values() for x, _ in points})
    failed: dict[float, int] = defaultdict(int)
    for number, (candidate, points) in enumerate(figure.rows.items()):
        found = [(x, _number(panel.value(row))) for x, row in points if panel.value(row)]
        # Zero memory is below what is measured, and has no place on a logarithmic axis.
        found = [(x, y) for x, y in found if y > 0]
        ours = is_ours(candidate)
        if found:
            axes.plot(
                *zip(*found, strict=True),
                color=colours[candidate],
                marker=MARKERS[number % len(MARKERS)],
                markersize=5 if ours else 4,
                linewidth=2.4 if ours else 1.2,
                zorder=3 if ours else 2,
            )
        ran = any(row["ms"] for _, row in points)
        for x, row in points if ran and panel is PANELS[0] else []:
            if not row["ms"]:
                height = 1.0 - 0.06 * failed[x]
                failed[x] += 1
                across = axes.get_xaxis_transform()
                axes.plot(
                    [x], [height], marker="x", color=colours[candidate], transform=across, clip_on=False, markersize=7
                )
                first = next(x for x, row in points if not row["ms"]) == x
                if first:
                    axes.annotate(
                        short(row["note"]),
                        (x, height),
                        xycoords=across,
                        xytext=(-6, 0),
                        textcoords="offset points",
                        ha="right",
                        va="center",
                        fontsize=7,
                        color=colours[candidate],
                    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(xs)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.minorticks_off()
    axes.set_xlabel(figure.axis)
    axes.set_title(panel.label, loc="left", fontsize=9)


def did_not_run(figure: Curves) -> list[str]:
    """Lines that name the candidates without any time and why; reasons that differ in a name alone are shortened."""
    words = []
    for name, points in figure.rows.items():
        note = points[0][1]["note"]
        if not any(row["ms"] for _, row in points):
            words.append(f"{name} ({'not installed' if 'is not installed' in note else short(note)})")
    return textwrap.wrap(f"did not run: {'; '.join(words)}", 60 * len(PANELS)) if words else []


def draw(figure: Curves, machine: str) -> "Figure":
    """The figure of one group of curves."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = [row for points in figure.rows.values() for _, row in points]
    panels = [panel for panel in PANELS if any(panel.value(row) for row in rows)]
    colours = _colours(figure.rows)
    ran = [name for name, points in figure.rows.items() if any(row["ms"] for _, row in points)]
    absent = did_not_run(figure)
    below = 0.2 * ((len(ran) + 2) // 3 + len(absent))
    height = 3.9 + below
    canvas = Figure(figsize=(3.6 * len(panels) + 0.4, height))
    grid = canvas.add_gridspec(
        1, len(panels), left=0.06, right=0.985, top=1 - 0.75 / height, bottom=(0.75 + below) / height, wspace=0.22
    )
    for column, panel in enumerate(panels):
        _draw_panel(canvas.add_subplot(grid[column]), panel, figure, colours)
    canvas.text(0.012, 1 - 0.12 / height, figure.title, fontsize=11, fontweight="bold", va="top")
    canvas.text(0.012, 1 - 0.34 / height, machine, fontsize=7.5, color="#555555", va="top")
    handles = []
    for number, name in enumerate(figure.rows):
        if name in ran:
            slope = figure.exponents.get(name)
            label = f"{name}, ~{figure.axis}^{float(slope):.2f}" if slope else name
            width = 2.4 if is_ours(name) else 1.2
            marker = MARKERS[number % len(MARKERS)]
            handles.append(Line2D([], [], color=colours[name], marker=marker, linewidth=width, label=label))
    canvas.legend(
        handles=handles,
        loc="lower left",
        ncols=3,
        frameon=False,
        fontsize=8,
        bbox_to_anchor=(0.006, 0.2 * len(absent) / height),
        borderaxespad=0.2,
    )
    for line, words in enumerate(reversed(absent)):
        canvas.text(0.012, (0.06 + 0.2 * line) / height, words, fontsize=7, color="#777777")
    return canvas


def training_rows(rows: Sequence[Row], op: str) -> list[Row]:
    return [row for row in rows if row["op"] == op and row["ms"]]


def draw_training(rows: Sequence[Row], machine: str) -> "Figure":
    """Samples per second of every way to train, and where a step's time goes."""
    from matplotlib.figure import Figure

    steps = training_rows(rows, "training step")
    profiles: dict[str, dict[str, float]] = defaultdict(dict)
    for row in training_rows(rows, "training profile"):
        if row["part"] != "lcr2s:: operators":
            profiles[row["candidate"]][row["part"]] = max(_number(row["ms"]), 0.0)
    canvas = Figure(figsize=(11.2, 1.6 + 0.3 * len(steps)))
    left = canvas.add_axes((0.225, 0.12, 0.27, 0.66))
    rates = [1e3 * _number(row["rows"]) / _number(row["ms"]) for row in steps]
    names = [row["candidate"] for row in steps]
    colours = ["#999999" if name.startswith("plain") else "#D55E00" if "naive" in name else "#0072B2" for name in names]
    left.barh(range(len(steps)), rates, color=colours, height=0.7)
    left.set_yticks(range(len(steps)), names, fontsize=8)
    left.invert_yaxis()
    left.grid(axis="y", visible=False)
    left.set_title("samples per second, a step", loc="left", fontsize=9)
    if profiles:
        right = canvas.add_axes((0.64, 0.38, 0.345, 0.40))
        parts = list(dict.fromkeys(part for sections in profiles.values() for part in sections))
        shades = dict(zip(parts, SECTION_COLOURS * len(parts), strict=False))
        for line, sections in enumerate(profiles.values()):
            start = 0.0
            for part, milliseconds in sections.items():
                right.barh(line, milliseconds, left=start, color=shades[part], height=0.6)
                start += milliseconds
        right.set_yticks(range(len(profiles)), [name.replace(", ", ",\n") for name in profiles], fontsize=7)
        right.invert_yaxis()
        right.grid(axis="y", visible=False)
        right.set_title("where a step's time goes, ms", loc="left", fontsize=9)
        for part in parts:
            right.barh(0, 0, color=shades[part], label=part)
        right.legend(loc="upper left", bbox_to_anchor=(-0.3, -0.16), ncols=3, frameon=False, fontsize=7)
    canvas.text(0.012, 0.975, f"training, {steps[0]['detail']}", fontsize=11, fontweight="bold", va="top")
    canvas.text(0.012, 0.905, machine, fontsize=7.5, color="#555555", va="top")
    return canvas


def plot(path: Path, folder: Path) -> list[tuple[str, Path]]:
    """Draw everything a results file holds into `folder`/<name of the file>; titles and files."""
    _matplotlib()
    rows = read(path)
    if not rows:
        return []
    machine = machine_line(rows)
    drawn: list[tuple[str, Path]] = []
    target = folder / path.stem
    target.mkdir(parents=True, exist_ok=True)

    def save(name: str, title: str, figure: "Figure") -> None:
        file = target / f"{name}.svg"
        figure.savefig(file, format="svg", metadata={"Date": None})
        drawn.append((title, file))

    for group in curves(rows):
        save(group.name, group.title, draw(group, machine))
    if training_rows(rows, "training step"):
        save("training", "training", draw_training(rows, machine))
    return drawn


def _cell(row: Row) -> str:
    """Time, ratio and memory in a few characters, or why there is none."""
    if not row["ms"]:
        return short(row["note"]) if len(row["note"]) <= 40 else "did not run"
    time = _number(row["device_ms"] or row["ms"])
    words = f"{time:.3g} ms" if time < 1000 else f"{time:.0f} ms"
    if row["ratio"] and not is_ours(row["candidate"]):
        words += f" ({_number(row['ratio']):.2f}x)"
    return f"{words}, {_number(row['peak_mib']):.0f} MiB" if row["peak_mib"] else words


def _markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    text = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in text)


def operator_tables(rows: Sequence[Row]) -> str:
    """A table for each operator and part: a line for each size, a column for each candidate that ran."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if not _trains(row) and not row["axis"]:
            groups[row["op"], row["part"]].append(row)
    texts = []
    for (op, part), members in groups.items():
        names = list(dict.fromkeys(row["candidate"] for row in members if row["ms"]))
        names.sort(key=lambda name: not is_ours(name))
        shapes: dict[tuple[str, ...], dict[str, Row]] = defaultdict(dict)
        for row in members:
            size = row["rows"] if row["rows"] == row["columns"] else f"{row['rows']} x {row['columns']}"
            shapes[size, row["width"], row["detail"], row["dtype"]][row["candidate"]] = row
        lines = []
        for shape, found in shapes.items():
            first = next((found[name] for name in names if is_ours(name) and name in found), None)
            share = f"{100 * _number(first['share_of_limit']):.0f} %" if first and first["share_of_limit"] else ""
            cells = [_cell(found[name]) if name in found else "" for name in names]
            lines.append([*shape, *cells, share])
        header = ["rows", "width", "", "dtype", *names, "of the limit, ours"]
        texts.append(f"**{TITLES.get(op, op)}, {part}**\n\n{_markdown(header, lines)}")
    return "\n\n".join(texts)


def note_list(rows: Sequence[Row]) -> str:
    """Candidates that did not run, with the reason, and adaptations of those that did; each once."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        if row["note"] and not _trains(row) and not row["exponent"]:
            where = found[row["candidate"], row["note"]]
            if row["op"] not in where:
                where.append(row["op"])
    lines = [f"- {name} ({', '.join(ops)}): {note}" for (name, note), ops in sorted(found.items())]
    return "\n".join(lines) or "None."


CLOSE = 1.1


def not_won(rows: Sequence[Row]) -> str:
    """Candidates that took less than CLOSE times our time."""
    lines = []
    for row in rows:
        if _trains(row) or row["axis"] or is_ours(row["candidate"]) or not row["ratio"]:
            continue
        if _number(row["ratio"]) < CLOSE:
            size = row["rows"] if row["rows"] == row["columns"] else f"{row['rows']} x {row['columns']}"
            operator = f"{TITLES.get(row['op'], row['op'])}, {row['part']}"
            lines.append(
                [operator, size, row["width"], row["dtype"], row["candidate"], f"{_number(row['ratio']):.2f}x"]
            )
    header = ["operator", "rows", "width", "dtype", "candidate", "its time over ours"]
    return _markdown(header, lines) if lines else f"No candidate took less than {CLOSE} times our time."


def training_table(rows: Sequence[Row]) -> str:
    """Steps and epochs: samples per second, ratio to the plain dual encoder, memory of a step."""
    epochs = {row["candidate"]: row for row in training_rows(rows, "training epoch")}
    lines = []
    for row in training_rows(rows, "training step"):
        name = row["candidate"]
        spread = f"{_number(row['ms']):.1f} [{_number(row['ms_p20']):.1f}, {_number(row['ms_p80']):.1f}]"
        rate = f"{1e3 * _number(row['rows']) / _number(row['ms']):.0f}"
        cells = [name, spread, rate, f"{_number(row['ratio']):.2f}x", row["peak_mib"]]
        if name in epochs:
            epoch = epochs[name]
            cells += [
                f"{1e3 * _number(epoch['columns']) / _number(epoch['ms']):.0f}",
                f"{_number(epoch['ratio']):.2f}x",
            ]
        else:
            cells += ["", ""]
        lines.append(cells)
    header = ["", "step, ms [p20, p80]", "samples/s", "of plain", "MiB", "epoch, samples/s", "of plain"]
    return _markdown(header, lines) if lines else "Not measured."


def profile_table(rows: Sequence[Row]) -> str:
    """Milliseconds of a step by section."""
    found = training_rows(rows, "training profile")
    names = list(dict.fromkeys(row["candidate"] for row in found))
    parts = list(dict.fromkeys(row["part"] for row in found))
    values = {(row["part"], row["candidate"]): f"{_number(row['ms']):.2f}" for row in found}
    lines = [[part, *(values.get((part, name), "") for name in names)] for part in parts]
    return _markdown(["ms of a step", *names], lines) if lines else "Not measured."


def scaling_table(rows: Sequence[Row]) -> str:
    """Exponents of the fits, and where memory ran out."""
    lines = []
    for row in rows:
        if row["exponent"]:
            same = [r for r in rows if not r["exponent"] and all(r[k] == row[k] for k in ("op", "axis", "candidate"))]
            ended = [r["value"] for r in same if r["note"] == "out of memory"]
            operator = TITLES.get(row["op"], row["op"])
            lines.append([operator, row["axis"], row["candidate"], row["exponent"], row["note"], ", ".join(ended)])
    header = ["operator", "grows with", "candidate", "exponent", "fitted over", "out of memory at"]
    return _markdown(header, lines) if lines else "Not measured."


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "machine": machine_line,
    "operators": operator_tables,
    "notes": note_list,
    "not won": not_won,
    "training": training_table,
    "profile": profile_table,
    "scaling": scaling_table,
}
"""What may stand in the page; besides these `plots`, the list of what was drawn."""


def fill(page: str, made: dict[str, str]) -> str:
    """The page with the text between each pair of marks replaced."""
    for name in re.findall(r"<!-- table: (.+?) -->", page):
        if name not in made:
            raise SystemExit(f"table: expected one of {', '.join(made)}, got {name!r}")

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n{made[match[2]]}\n{match[3]}"

    return re.sub(r"(<!-- table: (.+?) -->)\n.*?(<!-- end of table -->)", block, page, flags=re.S)


def write_tables(paths: Sequence[Path], drawn: dict[Path, list[tuple[str, Path]]], page: Path) -> None:
    """Put the tables of the results files, one machine after another, into the page."""
    made: dict[str, str] = {}
    tables = {path: read(path) for path in paths}
    for name, build in TABLES.items():
        parts = []
        for rows in tables.values():
            head = f"*{rows[-1]['machine']}*\n\n" if len(tables) > 1 else ""
            parts.append(head + build(rows))
        made[name] = "\n\n".join(parts)
    images = [
        f"![{title}]({file.relative_to(page.parent).as_posix()})" for path in paths for title, file in drawn[path]
    ]
    made["plots"] = "\n\n".join(images)
    page.write_text(fill(page.read_text(encoding="utf-8"), made), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="*", help="default: every file of benchmarks/results")
    parser.add_argument("--plots", type=Path, default=PLOTS, help="folder of the plots")
    parser.add_argument("--table", action="store_true", help="write the tables into the page as well")
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(arguments)
    paths = args.results or sorted(RESULTS.glob("*.csv"))
    if not paths:
        raise SystemExit(f"{RESULTS} holds no results; name a file, or run benchmarks/run.py")
    for path in paths:
        if not path.is_file():
            raise SystemExit(f"results: no file {path}")
    drawn = {path: plot(path, args.plots) for path in paths}
    print(f"{sum(map(len, drawn.values()))} plots in {args.plots}")
    if args.table:
        write_tables([path for path in paths if read(path)], drawn, args.page)
        print(f"tables in {args.page}")


if __name__ == "__main__":
    main()
