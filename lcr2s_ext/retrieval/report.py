"""A page of ranked retrievals: one self-contained HTML file, thumbnails embedded, right ones framed."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcr2s_ext import ops
from lcr2s_ext.retrieval.evaluate import RetrievalFeatures, Split

__all__ = ["RankedQuery", "rank_queries", "write_report"]

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #8884; text-align: right; }
th:first-child, td:first-child { text-align: left; }
pre { overflow-x: auto; padding: .8rem; background: #8881; }
section { margin: 1.6rem 0; }
blockquote { margin: 0 0 .5rem; font-size: 1.05rem; }
ol { display: flex; flex-wrap: wrap; gap: .5rem; list-style: none; margin: 0; padding: 0; }
figure { margin: 0; padding: 3px; border: 3px solid transparent; border-radius: 4px; text-align: center; }
figure.right { border-color: #1a9850; }
figure img { display: block; height: 128px; image-rendering: auto; }
figcaption { font-size: .75rem; opacity: .8; }
.note { opacity: .8; }
"""


@dataclass
class RankedQuery:
    """One sentence and what was retrieved for it, best first.

    Attributes:
        text: the query sentence.
        images: retrieved images: paths, PIL images, or uint8 ``(3, H, W)`` tensors.
        correct: whether each of them shows the person meant; empty where that is not known.
        scores: cosine of each; may be empty.
        note: a line of plain text under the sentence.
    """

    text: str
    images: Sequence[Any]
    correct: Sequence[bool] = field(default_factory=tuple)
    scores: Sequence[float] = field(default_factory=tuple)
    note: str = ""


def rank_queries(
    features: RetrievalFeatures,
    split: Split,
    queries: Sequence[int] | Tensor,
    *,
    k: int = 10,
    backend: str | None = None,
) -> list[RankedQuery]:
    """The best ``k`` distinct images of a split for some of its captions.

    Args:
        features: of the whole split, as :func:`~lcr2s_ext.retrieval.embed_split` returns them.
        split: where the captions and image files are.
        queries: int64 positions of captions in the split.
        k: thumbnails a query; a smaller gallery gives fewer.
        backend: passed to :func:`lcr2s_ext.ops.topk_similarity`.

    Raises:
        IndexError: a position outside the split.
        ValueError: ``k`` below 1, or no query.
    """
    chosen = torch.as_tensor(queries, dtype=torch.int64).reshape(-1)
    if not len(chosen):
        raise ValueError("queries: expected at least one caption, got none")
    captions = len(split.captions)
    low, high = int(chosen.min()), int(chosen.max())
    if low < 0 or high >= captions:
        raise IndexError(f"queries: expected positions in [0, {captions}), got {low}..{high}")
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    k = min(k, len(features.image))
    values, indices = ops.topk_similarity(features.text[chosen], features.image, k, backend=backend)
    right = features.image_ids[indices] == features.text_ids[chosen][:, None]
    counts = (features.image_ids[None, :] == features.text_ids[chosen][:, None]).sum(1)
    ranked = []
    for row, caption in enumerate(chosen.tolist()):
        found, identity = int(right[row].sum()), int(features.text_ids[caption])
        ranked.append(
            RankedQuery(
                text=split.captions[caption],
                images=[split.image_paths[int(features.image_rows[i])] for i in indices[row].tolist()],
                correct=right[row].tolist(),
                scores=values[row].tolist(),
                note=f"identity {identity}: {found} of its {int(counts[row])} images in the first {k}",
            )
        )
    return ranked


def write_report(
    path: str | Path,
    queries: Sequence[RankedQuery],
    *,
    title: str = "Ranked retrievals",
    notes: Sequence[str] = (),
    table: Sequence[Mapping[str, Any]] = (),
    preformatted: str = "",
) -> Path:
    """Write one HTML file that needs nothing else: images are embedded, no script, no external resource.

    Args:
        path: of the file; its folder is made.
        queries: what to show, in this order.
        title: heading.
        notes: paragraphs under the heading.
        table: rows of a table, as mappings with the same keys.
        preformatted: text shown as it is, in a fixed-width font.

    Returns:
        The path.

    Raises:
        ValueError: where a query's marks or scores are not as many as its images.
        FileNotFoundError: an image file that is missing.
        TypeError: an image that is neither a path, a PIL image nor a uint8 tensor.
    """
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        # A second lock on the same door: nothing can be loaded even if something slipped through the escaping.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        *(f'<p class="note">{html.escape(note)}</p>' for note in notes),
    ]
    if table:
        keys = list(table[0])
        head = "".join(f"<th>{html.escape(str(key))}</th>" for key in keys)
        parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>")
        for row in table:
            parts.append("<tr>" + "".join(f"<td>{html.escape(str(row.get(key, '')))}</td>" for key in keys) + "</tr>")
        parts.append("</tbody></table>")
    if preformatted:
        parts.append(f"<pre>{html.escape(preformatted)}</pre>")
    parts += [_section(number, query) for number, query in enumerate(queries)]
    parts.append("</body></html>")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return path


def _section(number: int, query: RankedQuery) -> str:
    shown = len(query.images)
    for name, values in (("correct", query.correct), ("scores", query.scores)):
        if len(values) not in (0, shown):
            raise ValueError(
                f"queries[{number}].{name}: expected none or one for each of {shown} images, got {len(values)}"
            )
    items = []
    for rank, image in enumerate(query.images):
        right = bool(query.correct[rank]) if len(query.correct) else False
        caption = f"{rank + 1}" + (f" · {query.scores[rank]:.3f}" if len(query.scores) else "")
        label = f"rank {rank + 1}" + ((", right" if right else ", wrong") if len(query.correct) else "")
        frame = ' class="right"' if right else ""
        items.append(
            f"<li><figure{frame}>"
            f'<img alt="{label}" src="data:image/png;base64,{_png(image, number)}">'
            f"<figcaption>{caption}</figcaption></figure></li>"
        )
    note = f'<p class="note">{html.escape(query.note)}</p>' if query.note else ""
    return f"<section><blockquote>{html.escape(query.text)}</blockquote>{note}<ol>{''.join(items)}</ol></section>"


def _png(image: Any, number: int) -> str:
    from PIL import Image

    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3:
            raise TypeError(
                f"queries[{number}].images: expected uint8 tensors (3, H, W), got {image.dtype} {tuple(image.shape)}"
            )
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    elif isinstance(image, (str, Path)):
        with Image.open(image) as opened:
            picture = opened.convert("RGB")
    elif isinstance(image, Image.Image):
        picture = image.convert("RGB")
    else:
        raise TypeError(f"queries[{number}].images: expected paths, PIL images or tensors, got {type(image).__name__}")
    if picture.height > 256:
        # Thumbnails: a page of full photographs would be tens of megabytes.
        picture = picture.resize((max(1, round(picture.width * 256 / picture.height)), 256))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
