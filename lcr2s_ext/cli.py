"""The ``lcr2s`` command. Exit codes: 0 done, 1 a problem was found or the command failed, 2 wrong usage."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

from lcr2s_ext.data.layouts import DATASETS, LAYOUTS

__all__ = ["main"]

_SPLITS = ("train", "val", "test")


class UsageError(Exception):
    """Arguments that cannot be used together; exit code 2."""


def _info(args: argparse.Namespace) -> int:
    from lcr2s_ext import info

    return info.main()


def _synth(args: argparse.Namespace) -> int:
    from lcr2s_ext.data import generate_corpus

    folder = generate_corpus(
        args.root,
        identities=tuple(args.identities) if args.identities else None,
        views=args.views,
        captions_per_image=args.captions,
        seed=args.seed,
        size=tuple(args.size),
        single_view_fraction=args.single_view_fraction,
        layout=args.layout,
        workers=args.workers,
    )
    print(f"generated corpus written to {folder}")
    return 0


def _check(args: argparse.Namespace) -> int:
    from lcr2s_ext.data import check_dataset

    report = check_dataset(args.dataset, args.root)
    print(report.format())
    return report.exit_code


def _convert(args: argparse.Namespace) -> int:
    from lcr2s_ext.data import convert_dataset

    folder = convert_dataset(args.dataset, args.root, args.to, args.out, images=args.images)
    print(f"{args.to} written to {folder}")
    return 0


def _convert_clip(args: argparse.Namespace) -> int:
    from lcr2s_ext.models.convert import convert_clip

    difference = convert_clip(args.file, args.out, activation=args.activation)
    print(f"written to {args.out}; features differ from the original's by {difference:.1e}")
    return 0


def _train(args: argparse.Namespace) -> int:
    from lcr2s_ext.training.config import ConfigError, load_config

    given: dict[str, Any] = {}
    for key, value in (
        ("method", args.method),
        ("epochs", args.epochs),
        ("seed", args.seed),
        ("out", args.out),
        ("progress", args.progress),
        ("device", args.device),
        ("threads", args.threads),
        ("data.dataset", args.dataset),
        ("data.root", args.root),
        ("data.batch_size", args.batch_size),
        ("model.preset", args.preset),
    ):
        if value is not None:
            section, _, name = key.rpartition(".")
            (given.setdefault(section, {}) if section else given)[name] = value
    source = args.config
    if args.resume and source is None and args.out is not None and Path(args.out, "train.yaml").is_file():
        # A resumed run is its own configuration; what is given besides must agree with it.
        source = str(Path(args.out, "train.yaml"))
    try:
        config = load_config(source, args.overrides, base=given)
    except ConfigError as error:
        raise UsageError(str(error)) from error
    if not config.data.root:
        raise UsageError(
            "no data: give --root DIR (the folder that holds the dataset's, such as CUHK-PEDES/) or data.root=DIR"
        )
    if not config.out:
        raise UsageError("no output folder: give --out OUT or out=OUT")

    from lcr2s_ext.training import distributed, train

    result = train(config, resume=args.resume, say=lambda line: print(line, file=sys.stderr, flush=True))
    if not distributed.first():
        return 0
    for title, metrics in (("val", result.val), ("test", result.test)):
        if metrics is not None:
            print(_table(title, metrics))
    for key, metrics in result.teacher_test.items():
        words = "labelled oracle: support sets drawn by identity" if key == "oracle" else "its support removed"
        print(_table(f"test, teacher, {words}", metrics))
    print(f"written to {config.out}: model/ (the student), results.json, train.yaml, a folder a stage")
    return 0


def _ablate(args: argparse.Namespace) -> int:
    from lcr2s_ext.training import distributed
    from lcr2s_ext.training.ablate import Grid, ablate, check_seeds, parse_axis, read_grid
    from lcr2s_ext.training.config import ConfigError, load_config

    given: dict[str, Any] = {"data": {}}
    for key, value in (("device", args.device), ("threads", args.threads), ("progress", args.progress)):
        if value is not None:
            given[key] = value
    for key, value in (("dataset", args.dataset), ("root", args.root)):
        if value is not None:
            given["data"][key] = value
    try:
        files = [text for text in args.grid if "=" not in text]
        if len(files) > 1:
            raise UsageError(f"--grid: expected one YAML file at most, got {', '.join(files)}")
        grid = read_grid(files[0]) if files else Grid()
        for text in args.grid:
            if text not in files:
                key, values = parse_axis(text)
                grid.axes[key] = values
        if args.seeds is not None:
            grid.seeds = check_seeds(parse_axis(f"seeds={args.seeds}")[1])
        grid.cells()
        source = args.config if args.config is not None else grid.config
        if not load_config(source, args.overrides, base=given).data.root:
            raise UsageError("no data: give --root DIR (the folder that holds the dataset's) or data.root=DIR")
        result = ablate(
            grid,
            args.out,
            config=args.config,
            overrides=args.overrides,
            base=given,
            say=(lambda line: print(line, file=sys.stderr, flush=True)) if _speaks(None) else None,
        )
    except ConfigError as error:
        raise UsageError(str(error)) from error
    if not distributed.first():
        return 1 if result.failures else 0
    print(result.report())
    print(f"written to {args.out}: ablation.md, ablation.csv, ablation.json, runs/, stages/")
    return 1 if result.failures else 0


def _rerank(values: Sequence[float] | None) -> Any:
    """The settings of ``--rerank``, None where it was not given."""
    from lcr2s_ext.retrieval import Rerank

    if values is None:
        return None
    if len(values) not in (0, 3) or any(value != int(value) for value in values[:2]):
        raise UsageError(f"--rerank: expected nothing, or k1 k2 lambda, got {' '.join(f'{v:g}' for v in values)}")
    try:
        return Rerank(int(values[0]), int(values[1]), values[2]) if values else Rerank()
    except ValueError as error:
        raise UsageError(f"--rerank: {error}") from error


def _evaluate(args: argparse.Namespace) -> int:
    from lcr2s_ext.data import ImageStore, load_dataset
    from lcr2s_ext.models import LCR2S
    from lcr2s_ext.retrieval import evaluate_model

    rerank = _rerank(args.rerank)
    folder = Path(args.model)
    if (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    model = LCR2S.from_pretrained(folder)
    if model.tokenizer is None:
        raise ValueError(f"model: {folder} has no tokenizer.json, captions cannot be encoded")
    model.to(_device(args.device))
    split = load_dataset(args.dataset, args.root)[args.split]
    if not split.captions:
        raise ValueError(f"split: {args.split} of {args.dataset} in {args.root} has no captions")
    store = ImageStore(split.image_paths, model.image_size, cache=False)
    metrics = evaluate_model(model, split, store, batch_size=args.batch_size, rerank=rerank)
    again = {name.removesuffix("_reranked"): metrics.pop(name) for name in list(metrics) if name.endswith("_reranked")}
    if args.json:
        record: dict[str, Any] = dict(_finite(metrics["text_to_image"]))
        if again:
            settings = {"k1": rerank.k1, "k2": rerank.k2, "lambda": rerank.weight}
            record["reranked"] = settings | _finite(again["text_to_image"])
        print(json.dumps(record))
    else:
        print(_table(args.split, metrics))
        if again:
            print(_table(f"{args.split}, {rerank.describe()}", again))
    return 0


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    # JSON has no NaN: a metric without any query is null.
    return {key: None if math.isnan(value) else value for key, value in metrics.items()}


def _table(title: str, metrics: Mapping[str, Mapping[str, float]]) -> str:
    directions = list(metrics)
    keys = [key for key in metrics[directions[0]] if not key.startswith("queries")]
    rows = [["", *keys, "queries", "without positive"]]
    for direction in directions:
        values = metrics[direction]
        rows.append(
            [
                direction.replace("_", " "),
                *(f"{100 * values[key]:.2f}" for key in keys),
                f"{values['queries']:.0f}",
                f"{values['queries_without_positive']:.0f}",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(line))
        for line in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    return "\n".join([f"{title} (%)", *lines])


def _demo(args: argparse.Namespace) -> int:
    from lcr2s_ext.training import demo

    return demo.run(args)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive int, got {text}")
    return value


def _parser(with_demo: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lcr2s",
        description="Fused kernels for cross-modal retrieval and distillation, and LCR²S trained on them.",
        epilog="Exit codes: 0 done, 1 a problem was found or the command failed, 2 wrong usage, 130 interrupted.",
    )
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(
        into: Any, name: str, function: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = into.add_parser(name, help=text, description=text, parents=[debug])
        added.set_defaults(function=function)
        return added

    def where(added: argparse.ArgumentParser, required: bool) -> None:
        added.add_argument("--dataset", choices=DATASETS, required=required, help="the dataset's layout on disk")
        added.add_argument(
            "--root",
            metavar="DIR",
            required=required,
            help="folder that holds the dataset's own, such as CUHK-PEDES/; of a custom one its folder or table",
        )

    demo = command(
        commands, "demo", _demo, "generate a corpus, train every arm, write table, results and a report page"
    )
    if with_demo:
        from lcr2s_ext.training import demo as demo_module

        demo_module.add_arguments(demo)
    command(commands, "info", _info, "print versions, what was compiled, and which backends can run here")

    data = commands.add_parser(
        "data", help="generate, check or convert a corpus", description="Generate, check or convert a corpus."
    )
    data_commands = data.add_subparsers(dest="data_command", required=True, metavar="command")
    synth = command(data_commands, "synth", _synth, "draw a generated corpus in a dataset's layout")
    synth.add_argument("--root", metavar="DIR", required=True, help="folder to hold the dataset's own")
    synth.add_argument(
        "--layout", choices=tuple(LAYOUTS), default="cuhk-pedes", help="layout on disk (default: cuhk-pedes)"
    )
    synth.add_argument(
        "--identities",
        type=int,
        nargs=3,
        metavar=("TRAIN", "VAL", "TEST"),
        help="identities of each split (default: 300 100 150; icfg-pedes has no val: 300 0 150)",
    )
    synth.add_argument("--views", type=_positive, default=4, help="pictures of an identity (default: 4)")
    synth.add_argument("--captions", type=_positive, help="sentences of a picture (default: 2; icfg-pedes: 1)")
    synth.add_argument("--seed", type=int, default=0, help="the same seed draws the same corpus (default: 0)")
    synth.add_argument(
        "--size", type=_positive, nargs=2, default=[64, 32], metavar=("H", "W"), help="pixels (default: 64 32)"
    )
    synth.add_argument(
        "--single-view-fraction", type=float, default=0.05, help="identities with one picture (default: 0.05)"
    )
    synth.add_argument("--workers", type=_positive, default=1, help="processes (default: 1)")
    check = command(
        data_commands,
        "check",
        _check,
        "print identities, images and captions of each split and every problem; exit 1 where there is an error",
    )
    where(check, required=True)
    convert = command(data_commands, "convert", _convert, "write a dataset in another dataset's layout, or as a table")
    where(convert, required=True)
    convert.add_argument("--to", choices=DATASETS, required=True, help="layout that is written")
    convert.add_argument("--out", metavar="DIR", required=True, help="folder to hold the new dataset's")
    convert.add_argument("--images", choices=("link", "copy"), default="link", help="symbolic links or copies")

    weights = commands.add_parser("weights", help="convert pretrained weights", description="Convert weights.")
    weights_commands = weights.add_subparsers(dest="weights_command", required=True, metavar="command")
    convert_clip = command(
        weights_commands,
        "convert-clip",
        _convert_clip,
        "write a CLIP checkpoint of OpenAI or open_clip as a Hugging Face folder, and compare features",
    )
    convert_clip.add_argument("file", metavar="FILE", help="TorchScript archive or state dict")
    convert_clip.add_argument("--out", metavar="DIR", required=True, help="folder that is written")
    convert_clip.add_argument(
        "--activation",
        choices=("quick_gelu", "gelu"),
        default="quick_gelu",
        help="quick_gelu: OpenAI's weights; gelu: most of open_clip's (default: quick_gelu)",
    )

    train = command(
        commands,
        "train",
        _train,
        "train a student (and its teacher); any key of the configuration can be given as key=value",
    )
    train.usage = "lcr2s train [options] [key=value ...]"
    train.epilog = "Keys of the configuration: docs/training.md, or the train.yaml of any run. optim.lr=1e-3 sets one."
    train.add_argument(
        "--config", metavar="FILE", help="YAML configuration; the options below and key=value win over it"
    )
    where(train, required=False)
    train.add_argument("--preset", help="model preset: tiny or small")
    train.add_argument("--method", choices=("lcr2s", "one_stage", "plain"), help="two stages, both at once, no teacher")
    train.add_argument("--epochs", type=_positive, metavar="N", help="epochs of each stage")
    train.add_argument("--batch-size", type=_positive, metavar="N", help="captions in a batch")
    train.add_argument("--seed", type=int, help="seed of weights, batches, draws and augmentation")
    train.add_argument(
        "--out", metavar="OUT", help="folder for model, logs, checkpoints and the resolved configuration"
    )
    train.add_argument("--resume", action="store_true", help="go on with the run in OUT")
    train.add_argument("--device", help="auto, cpu or gpu")
    train.add_argument("--threads", type=int, help="CPU threads")
    train.add_argument("--progress", choices=("auto", "rich", "tqdm", "none"), help="progress bar")

    ablate = command(
        commands, "ablate", _ablate, "run a grid of configurations over seeds and print the table that compares them"
    )
    ablate.usage = "lcr2s ablate --grid GRID --out OUT [options] [key=value ...]"
    ablate.epilog = "Finished runs are skipped, interrupted ones go on, stages that points share are trained once."
    ablate.add_argument("--config", metavar="FILE", help="base configuration; wins over the grid file's own")
    ablate.add_argument(
        "--grid",
        action="append",
        required=True,
        metavar="GRID",
        help="a YAML file such as configs/ablations/distillation.yaml, or key=value,value,...; may be repeated",
    )
    ablate.add_argument("--seeds", metavar="N,N,...", help="seeds of the runs (default: the grid's, else the config's)")
    ablate.add_argument("--out", metavar="OUT", required=True, help="folder for runs, shared stages and the table")
    where(ablate, required=False)
    ablate.add_argument("--device", help="auto, cpu or gpu")
    ablate.add_argument("--threads", type=int, help="CPU threads")
    ablate.add_argument("--progress", choices=("auto", "rich", "tqdm", "none"), help="progress bar")

    evaluate = command(commands, "evaluate", _evaluate, "retrieval metrics of a trained model on a split")
    evaluate.add_argument("--model", metavar="OUT", required=True, help="output folder of train, or of save_pretrained")
    where(evaluate, required=True)
    evaluate.add_argument("--split", choices=_SPLITS, default="test", help="default: test")
    evaluate.add_argument("--batch-size", type=_positive, default=256, help="rows encoded at a time (default: 256)")
    evaluate.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    evaluate.add_argument("--json", action="store_true", help="print the text-to-image metrics as one JSON object")
    evaluate.add_argument(
        "--rerank",
        type=float,
        nargs="*",
        metavar="X",
        help="metrics after k-reciprocal re-ranking as well, labelled as such; K1 K2 LAMBDA (default: 20 6 0.3)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; wrong usage exits with 2 through SystemExit as argparse does."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(with_demo=bool(arguments) and arguments[0] == "demo")
    # key=value may stand anywhere between the options, which argparse's own positionals do not allow.
    with nullcontext() if _speaks(None) else redirect_stderr(io.StringIO()):
        args, rest = parser.parse_known_args(arguments)
        args.overrides = rest
        wrong = [
            word for word in rest if args.command not in ("train", "ablate") or word.startswith("-") or "=" not in word
        ]
        if wrong:
            parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    name = " ".join(
        filter(
            None, ["lcr2s", args.command, getattr(args, "data_command", None) or getattr(args, "weights_command", None)]
        )
    )
    try:
        return int(args.function(args))
    except UsageError as error:
        if _speaks(error):
            print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = f"; {name} --out OUT --resume goes on after the last whole epoch" if args.command == "train" else ""
        hint = "; the same command goes on" if args.command == "ablate" else hint
        if _speaks(None):
            print(f"{name}: interrupted{hint}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): nothing is wrong, and nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        words = " ".join(str(error).split()) or type(error).__name__
        hint = "" if args.debug else " (--debug shows the traceback)"
        if _speaks(error):
            print(f"{name}: error: {words}{hint}", file=sys.stderr)
        return 1


def _speaks(error: Exception | None) -> bool:
    """Whether this process tells the user, rather than another one of the same run."""
    if not any(key in os.environ for key in ("WORLD_SIZE", "SLURM_STEP_ID")):
        return True
    from lcr2s_ext.training import distributed

    return distributed.speaks(error)


if __name__ == "__main__":
    sys.exit(main())
