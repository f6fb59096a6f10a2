"""Ablations: the runs of a grid of configurations over seeds, and the table that compares them."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lcr2s_ext._files import write_text
from lcr2s_ext.training import distributed
from lcr2s_ext.training.config import ConfigError, TrainConfig, load_config
from lcr2s_ext.training.prepare import TrainingData, prepare_data
from lcr2s_ext.training.run import finished, train
from lcr2s_ext.training.summary import METRICS, format_table, mean_sd, paired_difference, percent

__all__ = ["Ablation", "Grid", "ablate", "parse_axis", "read_grid"]

VERDICTS = {"higher": "higher", "lower": "lower", "unresolved": "not resolved"}


@dataclass
class Grid:
    """Named points times the product of axes, over seeds.

    Attributes:
        points: name -> keys of the configuration and their values.
        axes: key -> its values; every point is run with every combination.
        seeds: of the runs.
        config: base configuration that the grid names, if any.
    """

    points: dict[str, dict[str, Any]] = field(default_factory=dict)
    axes: dict[str, list[Any]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    config: Path | None = None

    def cells(self) -> dict[str, dict[str, Any]]:
        """Name -> changes of every point of the grid, in order; the first one is what others are compared with.

        Raises:
            ConfigError: an empty grid.
        """
        if not self.points and not self.axes:
            raise ConfigError("grid: expected at least one point or axis, got none")
        cells = {}
        for (name, changes), values in itertools.product(
            (self.points or {"": {}}).items(), itertools.product(*self.axes.values())
        ):
            chosen = dict(zip(self.axes, values, strict=True))
            words = [name] if name else []
            words += [f"{key}={_text(value)}" for key, value in chosen.items()]
            cells[", ".join(words)] = changes | chosen
        return cells


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """``key=value,value`` of the command line; the values are read as the entries of a YAML list.

    Raises:
        ConfigError: another form.
    """
    import yaml

    key, separator, raw = text.partition("=")
    try:
        values = yaml.safe_load(f"[{raw}]")
    except yaml.YAMLError as error:
        raise ConfigError(f"grid {key}: {raw!r} is not a list of values") from error
    if not separator or not key or not values:
        raise ConfigError(f"grid {text!r}: expected key=value,value,... or a YAML file")
    return key.strip(), values


def read_grid(path: str | Path) -> Grid:
    """A grid from a YAML file with any of ``config`` (relative to the file), ``seeds``, ``points`` and ``grid``.

    Raises:
        ConfigError: an unknown entry, or one of the wrong kind.
        FileNotFoundError: there is no such file.
    """
    import yaml

    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"grid: no file {file}")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from error
    known = {"config": str, "seeds": list, "points": dict, "grid": dict}
    if not isinstance(values, dict) or not values or set(values) - set(known):
        raise ConfigError(f"{file}: expected a mapping with entries of {', '.join(known)}")
    for key, kind in known.items():
        if not isinstance(values.get(key, kind()), kind):
            raise ConfigError(f"{file}: {key}: expected a {kind.__name__}, got {values[key]!r}")
    points, axes = values.get("points", {}), values.get("grid", {})
    for name, changes in points.items():
        if not isinstance(changes, dict):
            raise ConfigError(f"{file}: points.{name}: expected a mapping of keys, got {changes!r}")
    for key, chosen in axes.items():
        if not isinstance(chosen, list) or not chosen:
            raise ConfigError(f"{file}: grid.{key}: expected a list of values, got {chosen!r}")
    return Grid(
        {str(name): changes for name, changes in points.items()},
        axes,
        check_seeds(values.get("seeds", [])),
        file.parent / values["config"] if values.get("config") else None,
    )


def check_seeds(seeds: Iterable[Any]) -> list[int]:
    """The seeds, each once; ConfigError for anything but ints of at least 0."""
    listed = list(seeds)
    if any(isinstance(seed, bool) or not isinstance(seed, int) or seed < 0 for seed in listed):
        raise ConfigError(f"seeds: expected ints of at least 0, got {listed}")
    return list(dict.fromkeys(listed))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _slug(name: str, taken: Iterable[str]) -> str:
    """A folder's name for a point."""
    base = re.sub(r"[^A-Za-z0-9._=+-]+", "_", name).strip("_.")[:80] or "point"
    slug, number = base, 2
    while slug.lower() in {other.lower() for other in taken}:
        slug, number = f"{base}-{number}", number + 1
    return slug


@dataclass
class Ablation:
    """What is known of a grid's runs.

    Attributes:
        cells: name -> changes of each point; the first one is what the others are compared with.
        seeds: of the runs.
        results: ``{point: {seed: results.json of the run}}`` of finished runs.
        failures: ``{point: {seed: message}}``.
    """

    cells: dict[str, dict[str, Any]]
    seeds: list[int]
    results: dict[str, dict[int, dict[str, Any]]]
    failures: dict[str, dict[int, str]] = field(default_factory=dict)

    def splits(self) -> list[str]:
        """Splits that every finished run has metrics of."""
        runs = [run for seeds in self.results.values() for run in seeds.values()]
        return [split for split in ("test", "val") if runs and all(run.get(split) for run in runs)]

    def summary(self, split: str) -> dict[str, dict[str, Any]]:
        """For each point with a finished run: its seeds, mean and deviation of each metric (text to image), and the
        paired difference to the first point over the seeds that both have.
        """
        first = next(iter(self.cells))
        summary = {}
        for name in self.cells:
            runs = self.results.get(name, {})
            if not runs:
                continue
            both = [seed for seed in runs if seed in self.results.get(first, {})]
            pairs = [
                {"arms": {key: {"test": self.results[key][seed][split]} for key in (name, first)}} for seed in both
            ]
            entry: dict[str, Any] = {"seeds": list(runs)}
            for metric in METRICS:
                values = [float(run[split]["text_to_image"][metric]) for run in runs.values()]
                mean, sd = mean_sd(values)
                entry[metric] = {"mean": mean, "sd": sd, "values": values}
                if name != first and pairs:
                    entry[metric]["difference"] = paired_difference(pairs, name, first, metric)
            summary[name] = entry
        return summary

    def rows(self, split: str) -> list[dict[str, str]]:
        """The table of a split, in percent."""
        first = next(iter(self.cells))
        rows = []
        for name, entry in self.summary(split).items():
            row = {"point": name}
            row |= {metric: percent(entry[metric]["mean"], entry[metric]["sd"]) for metric in METRICS}
            row["seeds"] = str(len(entry["seeds"]))
            for metric in ("R@1", "mAP"):
                found = entry[metric].get("difference")
                row[f"{metric} - first"] = percent(found["mean"], found["sd"], sign=True) if found else "-"
            found = entry["R@1"].get("difference")
            row["R@1 against first"] = VERDICTS[found["verdict"]] if found else ("first" if name == first else "-")
            rows.append(row)
        return rows

    def report(self, *, markdown: bool = False) -> str:
        """Tables of all splits, what the differences are worth, and what failed."""
        first, parts = next(iter(self.cells)), []
        for split in self.splits():
            title = f"{split}, text to image, percent; differences in points, paired by seed, to: {first}"
            table = format_table(self.rows(split), markdown=markdown)
            parts.append(f"{title}\n\n{table}" if markdown else f"{title}\n{table}")
        for name, entry in self.summary("test").items() if "test" in self.splits() else ():
            found = entry["R@1"].get("difference")
            if found:
                parts.append(
                    f"{name}: {100 * found['mean']:+.1f} points of R@1 on test, 95 % interval "
                    f"± {100 * found['margin']:.1f}, {len(found['values'])} seed(s): {VERDICTS[found['verdict']]}."
                )
        if len(self.seeds) == 1 and parts:
            parts.append("One seed: the intervals hold the uncertainty of the queries alone, not that of another seed.")
        parts += [
            f"FAILED {name}, seed {seed}: {message}"
            for name, messages in self.failures.items()
            for seed, message in messages.items()
        ]
        return ("\n\n" if markdown else "\n").join(parts)

    def csv(self) -> str:
        """One line a point, split and metric."""
        keys = ["point", "split", "metric", "seeds", "mean", "sd", "difference", "difference_sd", "margin", "verdict"]
        text = io.StringIO()
        writer = csv.DictWriter(text, keys, lineterminator="\n")
        writer.writeheader()
        for split in self.splits():
            for name, entry in self.summary(split).items():
                for metric in METRICS:
                    values = entry[metric]
                    found = values.get("difference", {})
                    writer.writerow(
                        {
                            "point": name,
                            "split": split,
                            "metric": metric,
                            "seeds": " ".join(map(str, entry["seeds"])),
                            "mean": values["mean"],
                            "sd": values["sd"],
                            "difference": found.get("mean"),
                            "difference_sd": found.get("sd"),
                            "margin": found.get("margin"),
                            "verdict": found.get("verdict"),
                        }
                    )
        return text.getvalue()

    def write(self, folder: Path) -> None:
        """``ablation.json``, ``.csv`` and ``.md``."""
        record = {
            "points": self.cells,
            "seeds": self.seeds,
            "summary": {split: self.summary(split) for split in self.splits()},
            "results": self.results,
            "failures": self.failures,
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "ablation.json", json.dumps(record, indent=2) + "\n")
        write_text(folder / "ablation.csv", self.csv())
        write_text(folder / "ablation.md", self.report(markdown=True) + "\n")


def ablate(
    grid: Grid,
    out: str | Path,
    *,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    base: Mapping[str, Any] | None = None,
    say: Callable[[str], None] | None = None,
) -> Ablation:
    """Run a grid: seed after seed, point after point.

    A finished run is not run again and an interrupted one goes on, so the same call repeats nothing. Stages whose
    configuration two runs share are trained once and kept in ``out/stages``: one teacher for several settings of its
    student, and one plain student for all that start from it. A point that fails is reported and the others go on.

    Args:
        grid: the points; without seeds, that of the configuration.
        out: folder of the runs (``runs/POINT/seed0`` and so on) and of the table.
        config: base configuration; ``None`` takes the grid's own, or the defaults.
        overrides: ``key=value`` for all points, which a point's own keys win over.
        base: nested dictionary applied before ``overrides``.
        say: called with one line of text at each milestone.

    Raises:
        ConfigError: an empty grid, or no point of it has a configuration that can be used.
    """
    say = say or (lambda line: None)
    out = Path(out)
    source = config if config is not None else grid.config
    cells = grid.cells()
    seeds = grid.seeds or [load_config(source, overrides, base=base).seed]
    ablation = Ablation(cells, seeds, {name: {} for name in cells}, {})
    folders: dict[str, str] = {}
    runs: list[tuple[int, str, TrainConfig]] = []
    for name, changes in cells.items():
        folders[name] = _slug(name, folders.values())
        for seed in seeds:
            own = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
            folder = out / "runs" / folders[name] / f"seed{seed}"
            try:
                runs.append((seed, name, load_config(source, [*overrides, *own, f"seed={seed}"], base=base)))
                runs[-1][2].out = str(folder)
            except ConfigError as error:
                ablation.failures.setdefault(name, {})[seed] = str(error)
                say(f"{name}, seed {seed}: failed: {error}")
    if not runs:
        raise ConfigError(f"grid: no point can be run; {name}: {ablation.failures[name][seeds[0]]}")
    data: TrainingData | None = None
    data_of: tuple[Any, ...] | None = None
    # Seeds outside: after the first one every point has been compared once.
    for number, (seed, name, run) in enumerate(sorted(runs, key=lambda entry: seeds.index(entry[0])), 1):
        label = f"[{number}/{len(runs)}] {name}, seed {seed}"
        try:
            results = finished(run)
            if results is None:
                say(label)
                wanted = _data_keys(run)
                if wanted != data_of:
                    data, data_of = prepare_data(run), wanted
                resume = Path(run.out, "train.yaml").is_file()
                train(run, data, resume=resume, share=out / "stages", say=lambda line: say(f"  {line}"))
                results = finished(run)
            else:
                say(f"{label}: finished before")
            if results is not None:
                ablation.results[name][seed] = results
        except Exception as error:
            message = " ".join(str(error).split()) or type(error).__name__
            ablation.failures.setdefault(name, {})[seed] = message
            say(f"{label}: failed: {message}")
        if distributed.first():
            ablation.write(out)
    return ablation


def _data_keys(config: TrainConfig) -> tuple[Any, ...]:
    """What :func:`prepare_data` reads of a configuration."""
    data, model = config.data, config.model
    return (
        *(data.dataset, data.root, data.vocab_size, data.max_length, data.cache, data.cache_dir),
        *(model.preset, model.image_size, model.text_weights),
    )
