"""A problem: one operator at one shape, the ways to compute it, and the run that checks, times and reports them."""

import argparse
import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from side_by_side import (
    Candidate,
    Settings,
    Work,
    checked,
    compare,
    our_backends,
    out_of_memory,
    part_selected,
    relative_error,
    report,
    selected,
)
from torch import Tensor

PROVIDERS = ["eager", "compile", "reference", "cpu", "triton", "cuda", "peers"]
OURS = ("reference", "cpu", "triton", "cuda")
LONGEST_REASON = 160
LOSS_SCALE = 2.0**15
"""As in mixed precision: without one, float16 holds nothing of the gradient of a mean over a million pairs."""


class UnavailableError(Exception):
    """Why a form cannot run, in the words of the row that says so."""


class Form(NamedTuple):
    """One way to compute an operator: what to call, or why it cannot run here."""

    provider: str
    call: Callable[..., object] | str
    note: str = ""
    """What it does otherwise than the operator, and how that was made equal."""


class Part(NamedTuple):
    """What is measured of every form: how it becomes a candidate, what float64 gives, the least work."""

    candidate: Callable[[Callable[..., object]], Candidate]
    exact: Sequence[Tensor]
    work: Work | None


class Problem(NamedTuple):
    """One operator at one shape, set up once: speed and memory are measured on the same candidates."""

    title: str
    shape: dict[str, object]
    """Columns of the results file: op, rows, columns, width, detail, dtype."""
    tolerance: float
    """Largest relative error in norm against float64."""
    forms: dict[str, Form]
    parts: dict[str, Part]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--provider", nargs="+", choices=PROVIDERS, help="whose forms run; default: all, compile only with --compile"
    )


def providers(args: argparse.Namespace) -> set[str]:
    """The providers asked for."""
    if args.provider:
        return {*args.provider, *(["compile"] if args.compile else [])}
    return {*PROVIDERS} - (set() if args.compile else {"compile"})


def our_forms(op: str, device: torch.device, form: Callable[[str], Callable[..., object]]) -> dict[str, Form]:
    """The reference and our kernels; `form` makes the call of a backend."""
    found = {"reference": Form("reference", form("reference"))}
    for backend, reason in our_backends(op, device).items():
        found[f"lcr2s_ext {backend}"] = Form(backend, reason or form(backend))
    for loads in _loads(op, device):
        pointers = found["lcr2s_ext triton"].call
        call = pointers if isinstance(pointers, str) else functools.partial(_loaded_by, loads, pointers)
        found[f"lcr2s_ext triton, {loads}"] = Form("triton", call)
    return found


def _loads(op: str, device: torch.device) -> tuple[str, ...]:
    """The ways beside pointers that Triton's kernels of `op` have on `device` to load their tiles."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return ()
    if op in ("support_attention", "relation_frobenius"):
        return ()
    return ("tma", "specialized") if op == "topk_similarity" else ("tma",)


def _loaded_by(loads: str, call: Callable[..., object], *args: object) -> object:
    # Imported here: compare.py runs these files over revisions that do not have it.
    from lcr2s_ext.triton import tile_loads

    with tile_loads(loads):
        return call(*args)


def compiled_forms(forms: dict[str, Form]) -> dict[str, Form]:
    """torch.compile of those of the forms that are PyTorch code: eager and reference."""
    return {
        f"{name}, compiled": Form("compile", torch.compile(form.call, dynamic=False), form.note)
        for name, form in forms.items()
        if form.provider in ("eager", "reference") and not isinstance(form.call, str)
    }


def chosen(forms: dict[str, Form], wanted: set[str]) -> dict[str, Form]:
    """The forms of the providers asked for, torch.compile of the others among them."""
    everything = {**forms, **compiled_forms(forms)} if "compile" in wanted else forms
    return {name: form for name, form in everything.items() if form.provider in wanted}


def both(
    call: Callable[..., Tensor], inputs: Sequence[Tensor], constants: Sequence[Tensor], upstream: Tensor | None
) -> list[Tensor]:
    """The value and the gradients of `inputs`."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    value = call(*leaves, *constants)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


def differentiable(
    exact_form: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor] = (),
    upstream: Tensor | None = None,
    *,
    forward: Work | None = None,
    backward: Work | None = None,
    forward_backward: Work | None = None,
    backward_alone: bool = False,
) -> dict[str, Part]:
    """Forward without gradients, forward + backward, and where asked the backward alone on a retained graph.

    Args:
        exact_form: what float64 results are computed with.
        inputs: whose gradients are wanted.
        constants: further arguments, without gradients.
        upstream: gradient of the value; of a scalar value 1, or LOSS_SCALE for float16 inputs.
        forward, backward, forward_backward: the least work of each part.
        backward_alone: measure the backward by itself as well.
    """
    if upstream is None and inputs[0].dtype == torch.float16:
        upstream = torch.tensor(LOSS_SCALE, device=inputs[0].device)
    exact = both(
        exact_form,
        [tensor.double() for tensor in inputs],
        [tensor.double() for tensor in constants],
        None if upstream is None else upstream.double(),
    )

    def value(call: Callable[..., Tensor]) -> Candidate:
        def candidate() -> list[Tensor]:
            with torch.no_grad():
                return [call(*inputs, *constants)]

        return candidate

    def gradients(call: Callable[..., Tensor]) -> Candidate:
        graph: list[tuple[Tensor, list[Tensor]]] = []

        def candidate() -> list[Tensor]:
            if not graph:  # the first run, which is the check's, is not timed
                leaves = [tensor.detach().requires_grad_() for tensor in inputs]
                graph.append((call(*leaves, *constants), leaves))
            return list(torch.autograd.grad(*graph[0], upstream, retain_graph=True))

        return candidate

    parts = {"forward": Part(value, exact[:1], forward)}
    if backward_alone:
        parts["backward"] = Part(gradients, exact[1:], backward)
    parts["forward + backward"] = Part(
        lambda call: lambda: both(call, inputs, constants, upstream), exact, forward_backward
    )
    return parts


def reason(error: BaseException) -> str:
    """The first line of what went wrong first."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, UnavailableError):
        return line
    name = type(error).__name__
    # torch.compile wraps what the traced code raised into words of its own.
    inner = re.search(r"raised exception (\w+)\((['\"])(.*?)(\. |\2)", line)
    if inner:
        name, line = inner[1], inner[3]
    return f"{name}: {line}"[:LONGEST_REASON] if line else name


def judged(candidate: Candidate, exact: Sequence[Tensor], tolerance: float) -> Candidate | str:
    """Somebody else's candidate if its results are those of float64, otherwise the words of its row.

    A result that is None is one that the candidate does not compute.
    """
    try:
        results = candidate()
    except Exception as error:  # whatever another package raises becomes its row
        if not out_of_memory(error):
            return reason(error)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return "out of memory"
    for part, (result, oracle) in enumerate(zip(results, exact, strict=True)):
        error = 0.0 if result is None else relative_error(result, oracle)
        if not error <= tolerance:
            return f"result {part} is off by {error:.1e} relative to float64, not timed"
    return candidate


def run(problem: Problem, settings: Settings) -> None:
    """Check, time and report every part. A wrong result of ours ends the run; of anyone else it is a row."""
    torch.compiler.reset()  # a sweep must not run into the limit of recompilations
    for name, part in problem.parts.items():
        if not part_selected(name):
            continue
        candidates = selected(
            {
                form_name: form.call if isinstance(form.call, str) else part.candidate(form.call)
                for form_name, form in problem.forms.items()
            }
        )
        for form_name, candidate in candidates.items():
            if isinstance(candidate, str):
                continue
            if problem.forms[form_name].provider in OURS:
                candidates |= checked({form_name: candidate}, part.exact, problem.tolerance, problem.title)
            else:
                candidates[form_name] = judged(candidate, part.exact, problem.tolerance)
        rows = compare(candidates, settings, str(problem.shape["dtype"]), part.work)
        for row in rows:
            notes = [problem.forms[str(row["candidate"])].note if "ms" in row else "", str(row["note"])]
            row["note"] = "; ".join(filter(None, notes))
        report(f"{name}: {problem.title}", [{**problem.shape, "part": name, **row} for row in rows], settings)
