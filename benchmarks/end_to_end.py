"""Training end to end: steps and epochs of a plain dual encoder, of our stages, and of LCR²S as it is written first.

    python benchmarks/end_to_end.py --csv results.csv
    python benchmarks/end_to_end.py --preset small --identities 32 --device cuda

A generated corpus, batches of P identities x K captions, for drawn support too. The naive way gathers every support set
into padded slots, encodes the slots beside the anchors, projects keys and values of each copy, and forms its losses'
matrices in plain PyTorch. Before anything is timed its losses and gradients are compared with ours, without dropout,
augmentation and batch statistics, where the two compute the same; in training each copy of the naive way has an
augmentation of its own.

Steps take turns between the variants (side_by_side.compare), each on the next batch of its own loader, loading and
augmentation included. Epochs are those of `fit_student` and `fit_teacher`, Lightning included, in turns as well, the
first one of each run left out. The profile runs the same steps in sections.
"""

import argparse
import dataclasses
import itertools
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from side_by_side import Candidate, Settings, compare, parse_arguments, report, write
from torch import Tensor

from lcr2s_ext.data import PersonBatch
from lcr2s_ext.data.synth import generate_corpus
from lcr2s_ext.models import Teacher
from lcr2s_ext.nn import SupportSetFusion
from lcr2s_ext.ops import SupportIndex
from lcr2s_ext.training import TrainConfig, TrainingData, load_config, prepare_data
from lcr2s_ext.training.fit import fit_student, fit_teacher
from lcr2s_ext.training.prepare import BatchLoader, make_augment, make_loader, make_model, make_teacher, weights_seed
from lcr2s_ext.training.stage import Stage
from lcr2s_ext.training.stages import StudentStage, TeacherStage

PLAIN = "plain dual encoder"
SECTIONS = [
    *("data", "augmentation", "encoders, forward", "frozen teacher's encoders", "rest, forward"),
    *("rest, backward", "encoders, backward", "optimiser"),
]
"""Of a step, in their order; the rest is fusion, losses and what PyTorch does between."""
GOAL = 1.15
"""An epoch of a teacher whose support comes from the batch over one of the plain dual encoder: at most this."""


@dataclasses.dataclass
class PaddedBatch(PersonBatch):
    """Anchors, then every anchor's support set in `max_support` slots; masks say which slots are used."""

    image_mask: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    text_mask: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))


def _slots(support: SupportIndex, slots: int) -> tuple[Tensor, Tensor]:
    """Pool rows (B, slots) of the sets without the rows themselves, which fill what is unused, and the mask."""
    anchors = torch.arange(len(support)).unsqueeze(1)
    lengths = support.indptr.diff() - 1
    mask = torch.arange(slots) < lengths.unsqueeze(1)
    others = torch.ones(len(support.indices), dtype=torch.bool)
    others[support.indptr[:-1]] = False
    return anchors.repeat(1, slots).masked_scatter(mask, support.indices[others]), mask


def padded(batch: PersonBatch, slots: int) -> PaddedBatch:
    """The same anchors and sets as the naive way takes them."""
    if batch.image_support is None or batch.text_support is None:
        raise ValueError("batch: expected one with support sets, got one without")
    images, image_mask = _slots(batch.image_support, slots)
    tokens, text_mask = _slots(batch.text_support, slots)
    anchors = torch.arange(len(batch))
    return PaddedBatch(
        images=batch.images[torch.cat([anchors, images.flatten()])],
        tokens=batch.tokens[torch.cat([anchors, tokens.flatten()])],
        labels=batch.labels,
        item_ids=batch.item_ids,
        image_support=None,
        text_support=None,
        samples=batch.samples,
        epoch=batch.epoch,
        step=batch.step,
        image_mask=image_mask,
        text_mask=text_mask,
    )


class PaddedLoader:
    """The batches of another loader, padded."""

    def __init__(self, loader: BatchLoader, slots: int) -> None:
        self.loader = loader
        self.slots = slots

    def set_epoch(self, epoch: int) -> None:
        self.loader.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[PaddedBatch]:
        for batch in self.loader:
            yield padded(batch, self.slots)


def naive_fusion(fusion: SupportSetFusion, own: Tensor, slots: Tensor, mask: Tensor) -> Tensor:
    """The fusion of (B, d) rows with (B, S, d) support copies: every copy is projected, padding is masked."""
    rows, heads = len(own), fusion.num_heads
    copies = fusion.input_norm(torch.cat([own.unsqueeze(1), slots], 1))
    own = copies[:, 0]
    query = fusion.query(own).view(rows, heads, 1, -1)
    key, value = (
        half.view(rows, copies.shape[1], heads, -1).transpose(1, 2) for half in fusion.key_value(copies).chunk(2, -1)
    )
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    used = torch.cat([torch.ones_like(mask[:, :1]), mask], 1)
    weights = scores.masked_fill(~used[:, None, None], -math.inf).softmax(-1)
    attended = (weights @ value).reshape(rows, -1)
    fused = fusion.output_norm(own + fusion.dropout(fusion.output(attended)))
    if fusion.feed_forward is not None and fusion.feed_forward_norm is not None:
        fused = fusion.feed_forward_norm(fused + fusion.dropout(fusion.feed_forward(fused)))
    return fused


def naive_teacher(teacher: Teacher, images: Tensor, batch: PaddedBatch) -> tuple[Tensor, Tensor]:
    """Fused features: anchors encoded, support copies encoded beside them, then the naive fusion."""
    rows = len(batch)
    fused = []
    for encode, pool, mask, fusion in (
        (teacher.encoders.image_features, images, batch.image_mask, teacher.image_fusion),
        (teacher.encoders.text_features, batch.tokens, batch.text_mask, teacher.text_fusion),
    ):
        own, slots = encode(pool[:rows]), encode(pool[rows:])
        fused.append(naive_fusion(fusion, own, slots.view(*mask.shape, -1), mask))
    return fused[0], fused[1]


def naive_task(stage: Stage, image: Tensor, text: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """SDM as published scripts write it, and a cross entropy for each modality."""
    loss, classifier = stage.config.loss, stage.task.identity.classifier
    logits = loss.logit_scale * F.normalize(text, dim=1) @ F.normalize(image, dim=1).T
    same = (labels[:, None] == labels[None, :]).to(logits.dtype)
    log_target = torch.log(same / same.sum(1, keepdim=True) + 1e-8)
    sdm = logits.new_zeros(())
    for direction in (logits.T, logits):
        sdm = sdm + (F.softmax(direction, 1) * (F.log_softmax(direction, 1) - log_target)).sum(1).mean()
    identity = (F.cross_entropy(classifier(image), labels) + F.cross_entropy(classifier(text), labels)) / 2
    return {"align": loss.align_weight * sdm, "identity": loss.identity_weight * identity}


class NaiveTeacherStage(TeacherStage):
    """The teacher stage the naive way."""

    def losses(self, images: Tensor, batch: PersonBatch) -> dict[str, Tensor]:
        assert_padded(batch)
        return naive_task(self, *naive_teacher(self.model, images, batch), batch.labels)


class NaiveStudentStage(StudentStage):
    """The student stage the naive way: the naive teacher, both relation matrices."""

    def losses(self, images: Tensor, batch: PersonBatch) -> dict[str, Tensor]:
        assert_padded(batch)
        rows, config = len(batch), self.config.distill
        student = self.model(images[:rows], batch.tokens[:rows])
        with torch.no_grad():
            teacher = naive_teacher(self.teacher, images, batch)
        terms = naive_task(self, *student, batch.labels)
        v, t, e, f = (F.normalize(x, dim=1) for x in (*student, *teacher))
        terms["feature"] = config.feature_weight * ((v - e).square().sum(1).mean() + (t - f).square().sum(1).mean())
        terms["relation"] = config.relation_weight * (v @ t.T - e @ f.T).square().mean()
        return terms


def assert_padded(batch: PersonBatch) -> None:
    if not isinstance(batch, PaddedBatch):
        raise TypeError(f"batch: expected a PaddedBatch, got {type(batch).__name__}")


def configuration(root: str, args: argparse.Namespace) -> TrainConfig:
    support = args.max_support
    return load_config(
        overrides=[
            *(f"data.root={root}", "data.sampler=identity", f"data.identities={args.identities}"),
            *(f"data.instances={args.instances}", f"data.max_support={support}", f"model.preset={args.preset}"),
            *("teacher.start=scratch", "progress=none", "loss.align=sdm", "distill.relation=frobenius"),
            *(f"epochs={args.epochs + 1}", f"device={'gpu' if args.device == 'cuda' else 'cpu'}"),
        ]
    )


def train_split(config: TrainConfig) -> TrainingData:
    """The corpus without its val and test splits: nothing is evaluated here."""
    data = prepare_data(config)
    return dataclasses.replace(
        data,
        splits={"train": data.splits["train"]},
        stores={"train": data.stores["train"]},
        tokens={"train": data.tokens["train"]},
    )


def with_support(config: TrainConfig, support: str) -> TrainConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, support=support))


class Variant:
    """One way to train: a stage, its optimiser, and its batches without end.

    Args:
        stage: fresh, moved to the device here.
        loader: of its batches.
        device: to train on.
    """

    def __init__(self, stage: Stage, loader: BatchLoader | PaddedLoader, device: torch.device) -> None:
        self.stage = stage.to(device).train()
        if stage.teacher is not None:
            stage.teacher.to(device)
        self.loader = loader
        self.device = device
        configured = stage.configure_optimizers()
        self.optimizer = configured["optimizer"]
        self.schedule = configured["lr_scheduler"]["scheduler"]
        self._batches = self._endless()

    def _endless(self) -> Iterator[PersonBatch]:
        epoch = 0
        while True:
            self.loader.set_epoch(epoch)
            yield from self.loader
            epoch += 1

    def batch(self) -> PersonBatch:
        return next(self._batches).to(self.device)

    def update(self) -> None:
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> list[Tensor]:
        """One training step; its loss."""
        loss = self.stage.training_step(self.batch(), 0)
        loss.backward()
        self.update()
        return [loss.detach()]


def variants(config: TrainConfig, data: TrainingData, device: torch.device) -> dict[str, Variant]:
    """Every way that is measured, from the same initial weights and with the same anchors."""

    def made(kind: type[Stage], support: str, **options: Any) -> Variant:
        chosen = with_support(config, support)
        loader: BatchLoader | PaddedLoader = make_loader(chosen, data, support)
        steps = len(loader)
        teacher = make_teacher(chosen, data)
        student = issubclass(kind, StudentStage)
        if student and support != "none":
            options["teacher"] = teacher
        with weights_seed(chosen, 12):
            stage = kind(
                chosen,
                kind.__name__,
                make_model(chosen, data).student if student else teacher,
                make_augment(chosen, data),
                num_identities=data.splits["train"].num_identities,
                # A schedule that does not end while steps are counted.
                epochs=10**6,
                steps_per_epoch=steps,
                evaluate=None,
                **options,
            )
        if kind in (NaiveTeacherStage, NaiveStudentStage):
            loader = PaddedLoader(loader, chosen.data.max_support)
        return Variant(stage, loader, device)

    return {
        PLAIN: made(StudentStage, "none"),
        "teacher, support from the batch": made(TeacherStage, "batch"),
        "teacher, support from the batch, naive": made(NaiveTeacherStage, "batch"),
        "teacher, drawn support": made(TeacherStage, "drawn"),
        "teacher, drawn support, naive": made(NaiveTeacherStage, "drawn"),
        "student, support from the batch": made(StudentStage, "batch"),
        "student, support from the batch, naive": made(NaiveStudentStage, "batch"),
        "student, drawn support": made(StudentStage, "drawn"),
        "student, drawn support, naive": made(NaiveStudentStage, "drawn"),
    }


def losses_and_gradients(variant: Variant, batch: PersonBatch) -> tuple[list[Tensor], list[Tensor]]:
    """Of a batch without dropout, augmentation and batch statistics, in float64 but for the identity and the feature
    loss, which the library takes in float32.
    """
    stage = variant.stage
    stage.double().eval()
    if stage.teacher is not None:
        stage.teacher.double()
    augment = stage.__dict__["_augment"]
    images = augment.normalize(batch.images.to(variant.device)).double()
    terms = stage.losses(images, batch.to(variant.device))
    parameters = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(torch.stack(list(terms.values())).sum(), parameters)
    stage.float().train()
    if stage.teacher is not None:
        stage.teacher.float().eval()
    return [value.detach() for value in terms.values()], list(gradients)


def check_naive(found: dict[str, Variant]) -> float:
    """Largest relative difference between the naive variants' losses and gradients and ours; above 1e-5 SystemExit.

    A gradient far smaller than the largest one (a key's bias has none but rounding) is held against a thousandth of
    that.
    """
    worst = 0.0
    for name, variant in found.items():
        naive = found.get(f"{name}, naive")
        if naive is None:
            continue
        variant.loader.set_epoch(0)
        batch = next(iter(variant.loader))
        ours, theirs = (
            losses_and_gradients(variant, batch),
            losses_and_gradients(naive, padded(batch, naive.stage.config.data.max_support)),
        )
        for one, other in zip(ours, theirs, strict=True):
            floor = 1e-3 * max(float(value.norm()) for value in one)
            for a, b in zip(one, other, strict=True):
                worst = max(worst, float((a - b).norm()) / max(float(a.norm()), floor))
        if not worst <= 1e-5:
            raise SystemExit(f"{name}: the naive way differs by {worst:.1e}; nothing is timed")
    return worst


def epoch_seconds(fit: Callable[..., Any], epochs: int, **options: Any) -> list[float]:
    """Wall time of every epoch of a run but the first."""
    ends: list[float] = []
    fit(on_epoch=lambda _: ends.append(time.perf_counter()), epochs=epochs + 1, **options)
    return [end - start for start, end in itertools.pairwise(ends)]


def measure_epochs(config: TrainConfig, data: TrainingData, rounds: int, epochs: int) -> dict[str, list[float]]:
    """Epochs of whole runs through Lightning, in turns."""
    teacher = make_teacher(config, data)
    runs: dict[str, Callable[[], list[float]]] = {
        PLAIN: lambda: epoch_seconds(fit_student, epochs, config=with_support(config, "none"), data=data)
    }
    for support, words in (("batch", "support from the batch"), ("drawn", "drawn support")):
        chosen = with_support(config, support)
        runs[f"teacher, {words}"] = lambda chosen=chosen: epoch_seconds(fit_teacher, epochs, config=chosen, data=data)
        runs[f"student, {words}"] = lambda chosen=chosen: epoch_seconds(
            fit_student, epochs, config=chosen, data=data, teacher=teacher
        )
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name] += run()
    return seconds


class Sections:
    """Seconds of a step by section, the graph cut where the encoders end."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.seconds: dict[str, list[float]] = {}
        self._cuts: list[tuple[Tensor, Tensor]] = []

    def _timed(self, name: str, run: Callable[[], Any]) -> Any:
        self._synchronize()
        start = time.perf_counter()
        result = run()
        self._synchronize()
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)
        return result

    def _synchronize(self) -> None:
        if self.variant.device.type == "cuda":
            torch.cuda.synchronize(self.variant.device)

    def _encode(self, encode: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        features = self._timed("encoders, forward", lambda: encode(*inputs))
        leaf = features.detach().requires_grad_()
        self._cuts.append((features, leaf))
        return leaf

    def _encode_frozen(self, encode: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        return self._timed("frozen teacher's encoders", lambda: encode(*inputs))

    def step(self) -> None:
        """One training step."""
        variant, stage = self.variant, self.variant.stage
        self._cuts.clear()
        earlier = {name: len(seconds) for name, seconds in self.seconds.items()}
        wrapped = [(stage.model.encoders if isinstance(stage.model, Teacher) else stage.model, self._encode)]
        if isinstance(stage.teacher, Teacher):
            wrapped.append((stage.teacher.encoders, self._encode_frozen))
        augment = stage.__dict__["_augment"]
        stage.__dict__["_augment"] = lambda *x, **options: self._timed("augmentation", lambda: augment(*x, **options))
        for encoders, wrapper in wrapped:
            for name in ("image_features", "text_features"):
                encode = getattr(encoders, name)
                setattr(encoders, name, lambda *x, encode=encode, wrapper=wrapper: wrapper(encode, x))
        try:
            batch = self._timed("data", variant.batch)
            loss = self._timed("rest, forward", lambda: stage.training_step(batch, 0))
        finally:
            stage.__dict__["_augment"] = augment
            for encoders, _ in wrapped:
                del encoders.image_features, encoders.text_features
        for name, seconds in self.seconds.items():
            if name in SECTIONS[1:4]:
                # Both encoders are one section, and like the augmentation it lies inside the forward.
                start = earlier.get(name, 0)
                seconds[start:] = [sum(seconds[start:])]
                self.seconds["rest, forward"][-1] -= seconds[-1]
        self._timed("rest, backward", loss.backward)
        features, leaves = zip(*self._cuts, strict=True)
        self._timed("encoders, backward", lambda: torch.autograd.backward(features, [leaf.grad for leaf in leaves]))
        self._timed("optimiser", variant.update)


def share_of_ours(variant: Variant, steps: int) -> float:
    """Part of a step's operator time that lcr2s:: operators take, as torch.profiler counts it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    gpu = variant.device.type == "cuda"
    if gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            variant.step()
    events = profile.key_averages()
    total = sum(event.self_device_time_total if gpu else event.self_cpu_time_total for event in events)
    own = [event for event in events if event.key.startswith("lcr2s::")]
    return sum(event.device_time_total if gpu else event.cpu_time_total for event in own) / total


def _row(op: str, part: str, name: str, args: argparse.Namespace, seconds: Sequence[float]) -> dict[str, object]:
    low, middle, high = (1e3 * torch.tensor(seconds).double().quantile(torch.tensor([0.2, 0.5, 0.8]).double())).tolist()
    return {
        **_shape(op, part, args),
        "candidate": name,
        "ms_p20": round(low, 3),
        "ms": round(middle, 3),
        "ms_p80": round(high, 3),
    }


def _shape(op: str, part: str, args: argparse.Namespace) -> dict[str, object]:
    detail = f"{args.preset}, {args.identities} x {args.instances}, sets up to {args.max_support}"
    return {"op": op, "part": part, "rows": args.identities * args.instances, "detail": detail, "dtype": "float32"}


def measure(args: argparse.Namespace, root: str) -> list[dict[str, object]]:
    """Every row: steps, epochs, profile."""
    settings: Settings = args.settings
    generate_corpus(root, identities=(args.people, 0, 0), seed=0)
    config = configuration(root, args)
    data = train_split(config)
    found = variants(config, data, settings.device)
    batch = args.identities * args.instances
    print(f"\nnaive against ours, losses and gradients: differ by at most {check_naive(found):.1e}, relative")

    steps: dict[str, Candidate | str] = {name: variant.step for name, variant in found.items()}
    rows = compare(steps, settings._replace(rounds=args.steps), "float32", baseline=PLAIN)
    rows = [{**_shape("training step", "step", args), **row} for row in rows]
    report(f"a training step of {batch} captions, {args.preset}", rows, settings._replace(csv=None))
    for row in rows:
        print(f"{row['candidate']:42} {1e3 * batch / float(str(row['ms'])):8.0f} samples/s")

    print(f"\nepochs of {len(found[PLAIN].loader)} steps through Lightning")
    epochs = measure_epochs(config, data, args.rounds, args.epochs)
    median = {name: float(torch.tensor(seconds).median()) for name, seconds in epochs.items()}
    captions = batch * len(found[PLAIN].loader)
    for name, seconds in epochs.items():
        row = _row("training epoch", "epoch", name, args, seconds)
        rows.append({**row, "columns": captions, "ratio": round(median[name] / median[PLAIN], 3)})
        print(
            f"{name:42} {median[name]:8.3f} s {captions / median[name]:8.0f} samples/s "
            f"{median[name] / median[PLAIN]:6.2f}x plain"
        )
    ratio = median["teacher, support from the batch"] / median[PLAIN]
    holds = "holds" if ratio <= GOAL else "does not hold"
    print(f"goal, an epoch of the teacher with support from the batch at most {GOAL}x plain: {holds}, {ratio:.3f}x")

    for name in (PLAIN, "teacher, support from the batch", "student, support from the batch"):
        rows += profile_rows(name, found[name], args, median[name] / len(found[PLAIN].loader))
    if settings.csv is not None:
        write(rows, settings)
    return rows


def profile_rows(name: str, variant: Variant, args: argparse.Namespace, epoch_step: float) -> list[dict[str, object]]:
    """Where a step's time goes; Lightning's part is what an epoch takes beyond its steps."""
    sections = Sections(variant)
    for _ in range(args.steps):
        sections.step()
    rows = [
        _row("training profile", part, name, args, sections.seconds[part])
        for part in SECTIONS
        if part in sections.seconds
    ]
    step = sum(float(str(row["ms"])) for row in rows)
    beyond = 1e3 * epoch_step - step
    rows.append({**_shape("training profile", "Lightning", args), "candidate": name, "ms": round(beyond, 3)})
    ours = share_of_ours(variant, min(args.steps, 10))
    rows.append(
        {
            **_shape("training profile", "lcr2s:: operators", args),
            "candidate": name,
            "ms": round(ours * step, 3),
            "note": "part of the sections above, as torch.profiler shares out operator time",
        }
    )
    print(f"\nprofile of a step, {name}: {step:.2f} ms, of which lcr2s:: operators {100 * ours:.1f} %")
    for row in rows:
        print(f"  {row['part']:24} {row['ms']:9.3f} ms")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--people", type=int, default=300, help="identities of the generated corpus, four views each")
    parser.add_argument("--identities", type=int, default=16, help="P of a batch")
    parser.add_argument("--instances", type=int, default=4, help="K of a batch")
    parser.add_argument("--max-support", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30, help="timed steps of every variant")
    parser.add_argument("--epochs", type=int, default=2, help="timed epochs of a run; --rounds runs of each")
    args = parse_arguments(parser, arguments)
    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings():
        # A schedule that steps outside Lightning, and Lightning's advice on what is chosen here.
        warnings.filterwarnings("ignore", module=r"(lightning|torch\.optim)\..*")
        measure(args, str(Path(root)))


if __name__ == "__main__":
    main()
