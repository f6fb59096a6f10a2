"""Other packages' operators as forms of ours, called as their documentation says.

Where one computes something else (another reduction, one direction, rows that must be gathered first), the adapter
makes it equal and the note of its row names how. A package that is not installed, needs a GPU or takes other dtypes is
a form with that reason. Every peer is checked against float64 in the run that times it (problem.judged).
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from problem import Form, UnavailableError, reason
from side_by_side import DTYPES
from torch import Tensor

from lcr2s_ext.ops import SupportIndex

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
RelationLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Metrics = Callable[[Tensor, Tensor, Tensor, Tensor], list[Tensor | None]]

HALF = ("bfloat16", "float16")
FLEX_BLOCK = 128
LARGEST_PAIR_MASK = 2**30


class Peer(NamedTuple):
    """A function of another package and how it becomes a form of an operator."""

    package: str
    """As pip names it."""
    module: str
    build: Callable[..., Callable[..., Any]]
    """The imported module and what the operator's problem hands over -> the call."""
    note: str = ""
    cuda: bool = False
    """Its kernels are CUDA's alone."""
    dtypes: Sequence[str] = DTYPES


def forms(peers: dict[str, Peer], device: torch.device, dtype: str, *problem: object) -> dict[str, Form]:
    """Every peer as a form: what to call, or why it cannot run here."""
    return {
        name: Form("peers", _absent(peer, device, dtype) or _build(peer, *problem), peer.note)
        for name, peer in peers.items()
    }


def _absent(peer: Peer, device: torch.device, dtype: str) -> str:
    if importlib.util.find_spec(peer.module.split(".")[0]) is None:
        return f"{peer.package} is not installed{' (needs CUDA)' if peer.cuda else ''}"
    if peer.cuda and device.type != "cuda":
        return "needs CUDA"
    if dtype not in peer.dtypes:
        return f"{peer.package} takes {' and '.join(peer.dtypes)} only"
    return ""


def _build(peer: Peer, *problem: object) -> Callable[..., Any] | str:
    try:
        return peer.build(importlib.import_module(peer.module), *problem)
    except Exception as error:  # whatever a package raises when it is loaded becomes its row
        return (
            reason(error) if isinstance(error, UnavailableError) else f"{peer.package} does not load: {reason(error)}"
        )


# Support attention. All gather the rows that sets name; ours reads them where they are.


def padded(index: SupportIndex) -> tuple[Tensor, Tensor]:
    """Rows of every set in slots, (B, S) int64, and which slots are filled, (B, S) bool, S the largest set."""
    lengths = index.indptr.diff()
    slots = torch.arange(max(int(lengths.max()), 1), device=lengths.device) < lengths.unsqueeze(1)
    return torch.zeros(slots.shape, dtype=torch.int64, device=slots.device).masked_scatter(slots, index.indices), slots


def _multihead_attention(nn: ModuleType, index: SupportIndex, query: Tensor) -> Attention:
    rows, slots = padded(index)
    heads, width = query.shape[1], query.shape[1] * query.shape[2]
    layer = nn.MultiheadAttention(width, heads, bias=False, batch_first=True, device=query.device, dtype=query.dtype)
    identity = torch.eye(width, device=query.device, dtype=query.dtype)
    layer.requires_grad_(False)
    layer.in_proj_weight.copy_(identity.repeat(3, 1))
    layer.out_proj.weight.copy_(identity)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        gathered = (key[rows].flatten(2), value[rows].flatten(2))
        out, _ = layer(query.flatten(1).unsqueeze(1), *gathered, key_padding_mask=~slots, need_weights=False)
        return out.view_as(query)

    return attention


def block_mask(flex: ModuleType, index: SupportIndex) -> Any:
    """The block mask of sets laid out one after another: a block of queries needs one run of blocks of rows."""
    indptr, batch = index.indptr, index.indptr.numel() - 1
    entries = index.indices.numel()
    device = indptr.device
    owner = torch.repeat_interleave(torch.arange(batch, device=device), indptr.diff())
    starts = torch.arange(0, batch, FLEX_BLOCK, device=device)
    first = indptr[starts] // FLEX_BLOCK
    last = (indptr[(starts + FLEX_BLOCK).clamp(max=batch)] + FLEX_BLOCK - 1) // FLEX_BLOCK
    blocks = (entries + FLEX_BLOCK - 1) // FLEX_BLOCK
    order = (first.unsqueeze(1) + torch.arange(blocks, device=device)) % blocks  # the needed ones come first
    return flex.BlockMask.from_kv_blocks(
        (last - first).int()[None, None],
        order.int()[None, None],
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=lambda _b, _h, q, kv: owner[kv] == q,
        seq_lengths=(batch, entries),
    )


def _flex_attention(flex: ModuleType, index: SupportIndex, query: Tensor) -> Attention:
    if index.indices.numel() == 0:
        raise UnavailableError("no rows to attend to")
    mask = block_mask(flex, index)
    compiled = torch.compile(flex.flex_attention, fullgraph=True, dynamic=False)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        packed = (x.transpose(0, 1).unsqueeze(0) for x in (query, key[index.indices], value[index.indices]))
        return compiled(*packed, block_mask=mask).squeeze(0).transpose(0, 1)

    return attention


def _variable_length(function: Callable[..., Tensor], index: SupportIndex) -> Attention:
    rows = index.indptr.int()
    queries = torch.arange(rows.numel(), dtype=torch.int32, device=rows.device)
    longest = max(int(index.indptr.diff().max()), 1)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return function(query, key[index.indices], value[index.indices], queries, rows, 1, longest)

    return attention


ATTENTION = {
    "nn.MultiheadAttention": Peer(
        "torch",
        "torch.nn",
        _multihead_attention,
        "padded gather; its projections are identities, and the products with them are timed",
    ),
    "FlexAttention": Peer(
        "torch",
        "torch.nn.attention.flex_attention",
        _flex_attention,
        "compiled; gathered rows one after another; the block mask is made outside the timing",
    ),
    "torch varlen_attn": Peer(
        "torch",
        "torch.nn.attention.varlen",
        lambda varlen, index, query: _variable_length(varlen.varlen_attn, index),
        "gathered rows, one query a sequence",
        cuda=True,
        dtypes=HALF,
    ),
    "FlashAttention varlen": Peer(
        "flash-attn",
        "flash_attn",
        lambda flash, index, query: _variable_length(flash.flash_attn_varlen_func, index),
        "gathered rows, one query a sequence",
        cuda=True,
        dtypes=HALF,
    ),
}


# InfoNCE: a linear cross entropy is one direction of it, with the other side's rows as the classes.


def both_directions(cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor], scale: float) -> Loss:
    """InfoNCE from a mean cross entropy of (rows, rows of the classes, classes)."""

    def loss(image: Tensor, text: Tensor) -> Tensor:
        image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
        diagonal = torch.arange(len(image), device=image.device)
        return (cross_entropy(scale * image, text, diagonal) + cross_entropy(scale * text, image, diagonal)) / 2

    return loss


def _torch_linear_cross_entropy(functional: ModuleType, scale: float, batch: int) -> Loss:
    if not hasattr(functional, "linear_cross_entropy"):
        raise UnavailableError(f"torch {torch.__version__} has no linear_cross_entropy; 2.13 has")
    return both_directions(functional.linear_cross_entropy, scale)


def _torch_chunked_cross_entropy(nn: ModuleType, scale: float, batch: int) -> Loss:
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        raise UnavailableError(f"torch {torch.__version__} has no LinearCrossEntropyOptions; 2.13 has")
    options = nn.LinearCrossEntropyOptions()
    return both_directions(lambda x, w, y: F.linear_cross_entropy(x, w, y, options=options), scale)


def _cut_cross_entropy(package: ModuleType, scale: float, batch: int) -> Loss:
    return both_directions(package.linear_cross_entropy, scale)


def _cut_cross_entropy_compiled(package: ModuleType, scale: float, batch: int) -> Loss:
    return both_directions(lambda x, w, y: package.linear_cross_entropy(x, w, y, impl="torch_compile"), scale)


def _inf_cl(package: ModuleType, scale: float, batch: int) -> Loss:
    def loss(image: Tensor, text: Tensor) -> Tensor:
        image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
        # It cuts rows into heads, whose width must divide theirs and be a power of two of at least 16.
        head = min(image.shape[1] & -image.shape[1], 256)
        if head < 16:
            raise UnavailableError(f"needs a width that 16 divides, not {image.shape[1]}")
        directions = ((image, text), (text, image))
        return sum(package.cal_flash_loss(x, y, scale=scale, head_dim=head).mean() for x, y in directions) / 2

    return loss


def clip_formula(scale: float) -> Loss:
    """open_clip's ClipLoss as published: two products of normalised features, the mean of two cross entropies."""

    def loss(image: Tensor, text: Tensor) -> Tensor:
        image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
        diagonal = torch.arange(len(image), device=image.device)
        return (
            F.cross_entropy(scale * image @ text.T, diagonal) + F.cross_entropy(scale * text @ image.T, diagonal)
        ) / 2

    return loss


def _clip_loss(package: ModuleType, scale: float, batch: int) -> Loss:
    module = package.ClipLoss()
    return lambda image, text: module(F.normalize(image, dim=1), F.normalize(text, dim=1), scale)


def _metric_learning(criterion: Callable[..., Tensor]) -> Loss:
    def loss(image: Tensor, text: Tensor) -> Tensor:
        # Two tensors of labels: one and the same would tell it that row i is its own pair, which it leaves out.
        labels = {"labels": torch.arange(len(image), device=image.device)}
        labels["ref_labels"] = labels["labels"].clone()
        return (criterion(image, ref_emb=text, **labels) + criterion(text, ref_emb=image, **labels)) / 2

    return loss


def _sup_con(losses: ModuleType, scale: float, batch: int) -> Loss:
    reducers = importlib.import_module("pytorch_metric_learning.reducers")
    return _metric_learning(losses.SupConLoss(temperature=1 / scale, reducer=reducers.MeanReducer()))


def _nt_xent(losses: ModuleType, scale: float, batch: int) -> Loss:
    mask = 4 * batch * batch * (batch - 1)
    if mask > LARGEST_PAIR_MASK:
        raise UnavailableError(f"its mask of positive by negative pairs needs {mask / 2**30:.1f} GiB")
    return _metric_learning(losses.NTXentLoss(temperature=1 / scale))


_LINEAR = "one linear cross entropy a direction, of normalised rows"
_OWN_LABELS = "each pair a label of its own, one loss a direction"
INFO_NCE = {
    "open_clip ClipLoss": Peer("open-clip-torch", "open_clip", _clip_loss, "normalised features"),
    "open_clip ClipLoss, re-expressed": Peer(
        "torch", "torch", lambda _, scale, batch: clip_formula(scale), "its published formula, written here"
    ),
    "F.linear_cross_entropy": Peer("torch", "torch.nn.functional", _torch_linear_cross_entropy, _LINEAR),
    "F.linear_cross_entropy, chunked": Peer("torch", "torch.nn", _torch_chunked_cross_entropy, _LINEAR),
    "Liger linear cross entropy": Peer(
        "liger-kernel",
        "liger_kernel.transformers.functional",
        lambda liger, scale, batch: both_directions(liger.liger_fused_linear_cross_entropy, scale),
        _LINEAR,
        cuda=True,
    ),
    "Inf-CLIP": Peer("inf-cl", "inf_cl", _inf_cl, "one loss a direction, of normalised rows; in float32", cuda=True),
    "cut-cross-entropy": Peer(
        "cut-cross-entropy", "cut_cross_entropy", _cut_cross_entropy, _LINEAR, cuda=True, dtypes=HALF
    ),
    "cut-cross-entropy, torch_compile": Peer(
        "cut-cross-entropy", "cut_cross_entropy", _cut_cross_entropy_compiled, f"{_LINEAR}; its compiled form"
    ),
    "QuACK linear cross entropy": Peer(
        "quack-kernels",
        "quack.linear_cross_entropy",
        lambda quack, scale, batch: both_directions(quack.chunked_linear_cross_entropy, scale),
        _LINEAR,
        cuda=True,
        dtypes=HALF,
    ),
    "metric-learning SupConLoss": Peer(
        "pytorch-metric-learning", "pytorch_metric_learning.losses", _sup_con, f"{_OWN_LABELS}, plain mean"
    ),
    "metric-learning NTXentLoss": Peer(
        "pytorch-metric-learning", "pytorch_metric_learning.losses", _nt_xent, _OWN_LABELS
    ),
}


def _computes_something_else(why: str) -> Callable[..., Loss]:
    def build(*_: object) -> Loss:
        raise UnavailableError(f"computes something else: {why}")

    return build


SDM = {
    "metric-learning SupConLoss": Peer(
        "pytorch-metric-learning",
        "pytorch_metric_learning",
        _computes_something_else("cross entropy of the labels' distribution, where SDM is the divergence from it"),
    ),
}


# Relation KL: the two directions' divergences of softmax rows, summed.


def _cosines(image: Tensor, text: Tensor, scale: float) -> Tensor:
    return scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T


def _liger_kl(liger: ModuleType, student_scale: float, teacher_scale: float, *_: Tensor) -> RelationLoss:
    def loss(image: Tensor, text: Tensor, soft_image: Tensor, soft_text: Tensor) -> Tensor:
        student, teacher = _cosines(image, text, student_scale), _cosines(soft_image, soft_text, teacher_scale)
        return sum(
            liger.liger_kl_div(x.log_softmax(1), z.log_softmax(1), reduction="batchmean", log_target=True)
            for x, z in ((student, teacher), (student.T, teacher.T))
        )

    return loss


def _liger_linear_kl(liger: ModuleType, student_scale: float, teacher_scale: float, *_: Tensor) -> RelationLoss:
    def loss(image: Tensor, text: Tensor, soft_image: Tensor, soft_text: Tensor) -> Tensor:
        image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
        teacher = _cosines(soft_image, soft_text, teacher_scale)
        rows = liger.liger_fused_linear_kl_div(student_scale * image, text, teacher.softmax(1))
        return rows + liger.liger_fused_linear_kl_div(student_scale * text, image, teacher.T.softmax(1))

    return loss


def _entropies(teacher_scale: float, soft_image: Tensor, soft_text: Tensor) -> Tensor:
    logits = _cosines(soft_image.double(), soft_text.double(), teacher_scale)
    return -sum((z.softmax(1) * z.log_softmax(1)).sum(1).mean() for z in (logits, logits.T)).to(soft_image.dtype)


def _distill_loss(
    package: ModuleType, student_scale: float, teacher_scale: float, soft_image: Tensor, soft_text: Tensor
) -> RelationLoss:
    module = package.DistillClipLoss()
    entropies = _entropies(teacher_scale, soft_image, soft_text)

    def loss(*features: Tensor) -> Tensor:
        image, text, soft_image, soft_text = (F.normalize(x, dim=1) for x in features)
        _, distillation = module(image, text, student_scale, soft_image, soft_text, teacher_scale)
        return 2 * distillation - entropies

    return loss


def _distill_formula(
    _: ModuleType, student_scale: float, teacher_scale: float, soft_image: Tensor, soft_text: Tensor
) -> RelationLoss:
    entropies = _entropies(teacher_scale, soft_image, soft_text)

    def loss(*features: Tensor) -> Tensor:
        v, t, e, f = (F.normalize(x, dim=1) for x in features)
        student = (student_scale * v @ t.T, student_scale * t @ v.T)
        teacher = (teacher_scale * e @ f.T, teacher_scale * f @ e.T)
        pairs = zip(student, teacher, strict=True)
        return -sum((z.softmax(1) * x.log_softmax(1)).sum(1).mean() for x, z in pairs) - entropies

    return loss


_ENTROPY = "its cross entropies less the teacher's entropy, which is computed outside the timing"
RELATION_KL = {
    "open_clip DistillClipLoss": Peer(
        "open-clip-torch", "open_clip", _distill_loss, f"{_ENTROPY}; doubled; its contrastive term is computed as well"
    ),
    "open_clip DistillClipLoss, re-expressed": Peer(
        "torch", "torch", _distill_formula, f"its published formula, written here; {_ENTROPY}"
    ),
    "Liger KL": Peer(
        "liger-kernel",
        "liger_kernel.transformers.functional",
        _liger_kl,
        "one divergence a direction; logits and log_softmax by torch",
        cuda=True,
    ),
    "Liger linear KL": Peer(
        "liger-kernel",
        "liger_kernel.transformers.functional",
        _liger_linear_kl,
        "one divergence a direction; the teacher's softmax by torch",
        cuda=True,
    ),
}


# Retrieval.


def ranked_metrics(order: Tensor, query_ids: Tensor, gallery_ids: Tensor) -> list[Tensor]:
    """R@1, R@5, R@10, mAP and mINP of the gallery's order for each query, (Q, G) int64, the way re-identification
    repositories compute them; queries without a match are left out."""
    hits = gallery_ids[order] == query_ids[:, None]
    hits = hits[hits.any(1)]
    found = hits.cumsum(1)
    recalls = [(found[:, k - 1] > 0).double().mean() for k in (1, 5, 10)]
    rank = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    count = found[:, -1]
    precision = (found / rank * hits).sum(1) / count
    last = (hits * rank).amax(1)
    return [*recalls, precision.double().mean(), (count / last).double().mean()]


def _torchmetrics(retrieval: ModuleType) -> Metrics:
    def metrics(query: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor) -> list[Tensor | None]:
        scores = F.normalize(query, dim=1) @ F.normalize(gallery, dim=1).T + 2
        same = query_ids[:, None] == gallery_ids
        numbers = torch.arange(len(query), device=query.device)[:, None].expand_as(same)
        results: list[Tensor | None] = []
        for metric in (
            *(retrieval.RetrievalHitRate(top_k=k, empty_target_action="skip") for k in (1, 5, 10)),
            retrieval.RetrievalMAP(empty_target_action="skip"),
        ):
            results.append(metric.to(query.device)(scores, same, indexes=numbers))
        return [*results, None]

    return metrics


def _accuracy_calculator(calculator: ModuleType) -> Metrics:
    def metrics(query: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor) -> list[Tensor | None]:
        wanted = ("precision_at_1", "mean_average_precision")
        unit = (F.normalize(query, dim=1), F.normalize(gallery, dim=1))
        found = calculator.AccuracyCalculator(include=wanted, device=query.device).get_accuracy(
            unit[0], query_ids, unit[1], gallery_ids
        )
        first, mean = (torch.tensor(found[name], dtype=torch.float64, device=query.device) for name in wanted)
        return [first, None, None, mean, None]

    return metrics


def _faiss_search(faiss: ModuleType, query: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Inner products and rows of the k best, brute force."""
    query, gallery = F.normalize(query, dim=1), F.normalize(gallery, dim=1)
    if query.is_cuda:
        if not hasattr(faiss, "StandardGpuResources"):
            raise UnavailableError("this faiss has no GPU index (faiss-cpu)")
        importlib.import_module("faiss.contrib.torch_utils")  # lets it take torch's tensors
        return faiss.knn_gpu(_gpu_resources(faiss), query, gallery, k, metric=faiss.METRIC_INNER_PRODUCT)
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(gallery.numpy())
    values, rows = index.search(query.numpy(), k)
    return torch.from_numpy(values), torch.from_numpy(rows)


_resources: dict[str, object] = {}


def _gpu_resources(faiss: ModuleType) -> object:
    if "gpu" not in _resources:
        _resources["gpu"] = faiss.StandardGpuResources()
    return _resources["gpu"]


def _faiss_metrics(faiss: ModuleType) -> Metrics:
    def metrics(query: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor) -> list[Tensor | None]:
        return [*ranked_metrics(_faiss_search(faiss, query, gallery, len(gallery))[1], query_ids, gallery_ids)]

    return metrics


METRICS = {
    "torchmetrics": Peer(
        "torchmetrics",
        "torchmetrics.retrieval",
        _torchmetrics,
        "no mINP; cosines + 2, as it takes a match with a score of 0 or less for none",
    ),
    "metric-learning AccuracyCalculator": Peer(
        "pytorch-metric-learning",
        "pytorch_metric_learning.utils.accuracy_calculator",
        _accuracy_calculator,
        "R@1 and mAP alone, of normalised rows, with its own search (faiss)",
        dtypes=["float32"],
    ),
    "faiss, full search": Peer(
        "faiss-cpu",
        "faiss",
        _faiss_metrics,
        "IndexFlatIP over normalised rows ranks the whole gallery, then hits are cumulated by torch",
        dtypes=["float32"],
    ),
}
TOP_K = {
    "faiss IndexFlatIP": Peer(
        "faiss-cpu",
        "faiss",
        lambda faiss, k: lambda query, gallery: _faiss_search(faiss, query, gallery, k)[0],
        "normalised rows; the index is built in the timing",
        dtypes=["float32"],
    ),
}
