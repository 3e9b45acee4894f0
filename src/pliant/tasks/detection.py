"""Detection: blood cells under the microscope (BCCD, 364 images, 4,888 boxes), a small detector, average precision.

The data are looked for in ``$PLIANT_DATA``/detection/bccd.npz; ``synthetic`` makes coloured shapes where they are not.
"""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Boxes = tuple[Tensor, Tensor]  # classes (n,) int64, and boxes (n, 4) as left, top, right, bottom in shares of the image


@dataclass(frozen=True)
class DetectionData:
    """Images (N, 3, H, W), normalised, and their boxes, in three parts."""

    name: str
    title: str
    train: tuple[Tensor, list[Boxes]]
    validation: tuple[Tensor, list[Boxes]]
    test: tuple[Tensor, list[Boxes]]
    classes: tuple[str, ...]


def bccd(height: int = 120, width: int = 160) -> DetectionData:
    """Red and white blood cells and platelets: 205 / 87 / 72 images, scaled down.

    Raises:
        FileNotFoundError: the file is not there; the message names the place.
        ImportError: Pillow is missing.
    """
    path = Path(os.environ.get("PLIANT_DATA", "")) / "detection" / "bccd.npz"
    if not os.environ.get("PLIANT_DATA") or not path.exists():
        raise FileNotFoundError("bccd: put bccd.npz into the folder detection/ of $PLIANT_DATA, or use synthetic()")
    try:
        pillow = importlib.import_module("PIL.Image")
    except ImportError as error:
        raise ImportError('bccd needs Pillow: pip install "pliant[data]"') from error
    with np.load(path, allow_pickle=False) as z:
        blob, boxes, split = z["jpeg"].tobytes(), torch.from_numpy(z["boxes"].astype(np.int64)), z["split"]
        names = tuple(str(c) for c in z["classes"])
        found, sizes = [], []
        for a, b in pairwise(z["off"]):
            image = pillow.open(io.BytesIO(blob[a:b])).convert("RGB")
            sizes.append(image.size)
            found.append(torch.from_numpy(np.array(image.resize((width, height)))).permute(2, 0, 1))
    pixels = torch.stack(found).float() / 255
    targets: list[Boxes] = []
    for i, (w, h) in enumerate(sizes):
        mine = boxes[boxes[:, 0] == i]
        targets.append((mine[:, 1], (mine[:, 2:].float() / torch.tensor([w, h, w, h])).clamp(0, 1)))
    parts = {p: [i for i, s in enumerate(split) if str(s) == p] for p in ("train", "val", "test")}
    mean = pixels[parts["train"]].mean((0, 2, 3), keepdim=True)
    spread = pixels[parts["train"]].std((0, 2, 3), keepdim=True)
    pixels = (pixels - mean) / spread
    train, validation, test = ((pixels[i], [targets[j] for j in i]) for i in parts.values())
    return DetectionData("bccd", f"BCCD at {width} x {height}", train, validation, test, names)


def synthetic(images: int = 48, height: int = 48, width: int = 64, seed: int = 0) -> DetectionData:
    """Generated: bright squares and discs on noise, two classes, one to four in an image."""
    rng = torch.Generator().manual_seed(seed)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    pixels = 0.3 * torch.randn(images, 3, height, width, generator=rng)
    targets: list[Boxes] = []
    for i in range(images):
        classes, boxes = [], []
        for _ in range(int(torch.randint(1, 5, (1,), generator=rng))):
            kind, half = (int(torch.randint(n, (1,), generator=rng)) for n in (2, 4))
            half += 4
            x = int(torch.randint(half, width - half, (1,), generator=rng))
            y = int(torch.randint(half, height - half, (1,), generator=rng))
            dx, dy = (columns - x).abs(), (rows - y).abs()
            shape = (torch.maximum(dx, dy) <= half) if kind == 0 else (dx**2 + dy**2 <= half**2)
            pixels[i, kind] += 2.0 * shape
            classes.append(kind)
            boxes.append([(x - half) / width, (y - half) / height, (x + half) / width, (y + half) / height])
        targets.append((torch.tensor(classes), torch.tensor(boxes)))
    a, b = images // 2, 3 * images // 4
    train, validation, test = ((pixels[i:j], targets[i:j]) for i, j in ((0, a), (a, b), (b, images)))
    return DetectionData("synthetic", "synthetic shapes", train, validation, test, ("square", "disc"))


def batches(part: tuple[Tensor, list[Boxes]], size: int, seed: int) -> Iterator[tuple[Tensor, list[Boxes]]]:
    """One shuffled pass over a part: images (B, 3, H, W) and their boxes."""
    order = torch.randperm(len(part[0]), generator=torch.Generator().manual_seed(seed))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        yield part[0][rows], [part[1][int(i)] for i in rows]


# -- the detector ---------------------------------------------------------------------------------------------------


class DecoderLayer(nn.Module):
    """Self-attention and a feed-forward network among the tokens (B, T, d), as in detectors of the DETR family."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.activation_fn = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        out: Tensor = x + self.fc2(self.activation_fn(self.fc1(self.norm2(x))))
        return out


class GridDetector(nn.Module):
    """One token for each cell of 8 x 8 pixels; each says which object has its centre there, and its box.

    (B, 3, H, W) -> (B, H W / 64, classes + 4): logits, and left, top, right, bottom in shares of the image.
    """

    def __init__(
        self, classes: int, height: int, width: int, features: int = 64, layers: int = 3, inner: int = 128
    ) -> None:
        super().__init__()
        self.rows, self.columns = height // 8, width // 8
        stem: list[nn.Module] = []
        for before, after in ((3, 16), (16, 32), (32, features)):
            stem += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.stem = nn.Sequential(*stem)
        self.position = nn.Parameter(0.02 * torch.randn(1, self.rows * self.columns, features))
        self.layers = nn.ModuleList(DecoderLayer(features, 4, inner) for _ in range(layers))
        self.class_embed, self.bbox_embed = nn.Linear(features, classes), nn.Linear(features, 4)
        nn.init.constant_(self.class_embed.bias, -4.0)  # objects are rare: focal loss starts from there

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, T, classes + 4)."""
        tokens = self.stem(x).flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            tokens = layer(tokens)
        raw = self.bbox_embed(tokens)
        places = torch.arange(self.rows * self.columns, device=x.device)
        cell = torch.stack((places % self.columns, places // self.columns), -1)
        grid = torch.tensor([self.columns, self.rows], device=x.device)
        centre = (cell + raw[..., :2].sigmoid()) / grid
        half = raw[..., 2:].sigmoid() / 2
        return torch.cat([self.class_embed(tokens), centre - half, centre + half], -1)

    def loss(self, output: Tensor, target: Sequence[Boxes]) -> Tensor:
        """Focal loss of the classes (weight 2), L1 (5) and generalised IoU (2) of the boxes."""
        classes = output.shape[-1] - 4
        wanted = torch.zeros_like(output[..., :classes])
        images, cells, boxes = [], [], []
        for i, (kinds, where) in enumerate(target):
            centre = (where[:, :2] + where[:, 2:]) / 2
            column = (centre[:, 0] * self.columns).long().clamp(max=self.columns - 1)
            row = (centre[:, 1] * self.rows).long().clamp(max=self.rows - 1)
            wanted[i, row * self.columns + column, kinds] = 1.0
            images.append(torch.full_like(row, i))
            cells.append(row * self.columns + column)
            boxes.append(where)
        index, cell, box = torch.cat(images), torch.cat(cells), torch.cat(boxes).to(output)
        found = output[index, cell, classes:]
        raw = output[..., :classes]
        p = raw.sigmoid()
        right = torch.where(wanted > 0, p, 1 - p)
        each = F.binary_cross_entropy_with_logits(raw, wanted, reduction="none")
        focal = (torch.where(wanted > 0, 0.25, 0.75) * (1 - right) ** 2 * each).sum()
        count = max(1, len(box))
        return (2 * focal + 5 * (found - box).abs().sum() + 2 * (1 - _giou(found, box)).sum()) / count


def _giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised intersection over union of pairs of boxes (n, 4): (n,) in [-1, 1]."""
    inter = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp_min(0).prod(1)
    hull = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(1)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - inter
    return inter / union.clamp_min(1e-9) - (hull - union) / hull.clamp_min(1e-9)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of all pairs: (n, 4), (m, 4) -> (n, m)."""
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    inter = (high - low).clamp_min(0).prod(-1)
    area = [(t[:, 2:] - t[:, :2]).clamp_min(0).prod(-1) for t in (a, b)]
    return inter / (area[0][:, None] + area[1][None] - inter).clamp_min(1e-9)


def suppress(scores: Tensor, boxes: Tensor, limit: float = 0.5) -> list[int]:
    """Non-maximum suppression: the places of the boxes that stay, from the best score down."""
    order = scores.argsort(descending=True, stable=True).tolist()
    overlap = iou(boxes, boxes)
    stay: list[int] = []
    for i in order:
        if all(float(overlap[i, j]) <= limit for j in stay):
            stay.append(i)
    return stay


@torch.no_grad()
def average_precision(
    outputs: Sequence[Tensor], targets: Sequence[Boxes], classes: int, at: float = 0.5, top: int = 60
) -> float:
    """Mean over the classes of the average precision at one IoU: the area under precision against recall.

    Args:
        outputs: for each image the detector's (T, classes + 4).
        targets: its boxes.
        classes: how many.
        at: least IoU of a detection with a box that no better one has taken.
        top: detections of an image and class that are looked at, before suppression.
    """
    values = []
    for c in range(classes):
        hits: list[tuple[float, bool]] = []
        total = 0
        for output, (kinds, where) in zip(outputs, targets, strict=True):
            scores, boxes = output[:, c].sigmoid(), output[:, classes:]
            first = scores.argsort(descending=True, stable=True)[:top]
            scores, boxes = scores[first], boxes[first]
            mine = where[kinds == c].to(boxes)
            total += len(mine)
            overlap = iou(boxes, mine)
            taken: set[int] = set()
            for i in suppress(scores, boxes):
                free = [j for j in range(len(mine)) if j not in taken and float(overlap[i, j]) >= at]
                best = max(free, key=lambda j: float(overlap[i, j]), default=None)
                hits.append((float(scores[i]), best is not None))
                if best is not None:
                    taken.add(best)
        if not total:
            continue
        right = torch.tensor([hit for _, hit in sorted(hits, key=lambda h: -h[0])], dtype=torch.float64)
        recall = right.cumsum(0) / total
        precision = right.cumsum(0) / torch.arange(1, len(right) + 1)
        envelope = precision.flip(0).cummax(0).values.flip(0)
        steps = torch.diff(recall, prepend=torch.zeros(1, dtype=torch.float64))
        values.append(float((envelope * steps).sum()))
    if not values:
        raise ValueError("targets: they hold no box at all")
    return sum(values) / len(values)
