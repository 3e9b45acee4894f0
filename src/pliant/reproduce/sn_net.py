"""Stitching on scikit-learn's digits, and on four ResNets that others trained on CIFAR-10.

Digits: two residual MLPs of six blocks, widths 8 and 64, stitched by windows of two (16 stitches). The stitching layers
start at their least-squares solutions or at random; then 0, 100 or 600 steps of joint training at a tenth of the
learning rate. Against them: networks of four widths between, each trained alone.

CIFAR-10-JPEG (only where ``$PLIANT_DATA`` holds the images and the weights): ResNet-20 and ResNet-56, trained by others
on the original pixels, stitched inside their three stages. The images here are re-compressed, which costs all of these
networks about ten points; ResNet-32 and ResNet-44 of the same family are the networks of intermediate size.
"""

from __future__ import annotations

import importlib
import io
import os
import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core.cost import flops_per_sample
from pliant.core.dynamic import Point
from pliant.core.training import fit
from pliant.elastic.stitching import StitchNet
from pliant.reproduce.common import Batches, check, verdict
from pliant.tasks import images

WIDTHS, BLOCKS, STEPS, BATCH = (8, 64), 6, (250, 400), 64
BETWEEN = (16, 24, 32, 48)
LR = 3e-3
FINETUNE = (0, 100, 600)
ARMS = ("least squares", "random")
SEAMS = ((0, 0, 2), (0, 2, 7), (1, 0, 2), (1, 2, 7), (2, 0, 2), (2, 2, 7))  # (stage, j, k) that are evaluated
CIFAR_STEPS, CIFAR_TEST, CIFAR_TRAIN = 50, 1000, 3200


# -- digits -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """x + W2 relu(W1 norm(x)): (B, D) -> (B, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""
        y: Tensor = x + self.fc2(torch.relu(self.fc1(self.norm(x))))
        return y


class ResidualMLP(nn.Module):
    """Embedding, residual blocks, head: (B, 1, 8, 8) -> (B, 10)."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Sequential(nn.Flatten(), nn.Linear(64, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, 8, 8) -> (B, 10)."""
        y: Tensor = self.head(self.norm(self.blocks(self.embed(x))))
        return y


def _train(model: nn.Module, data: Batches) -> nn.Module:
    """Ordinary training by AdamW with a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(data))
    model.train()
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of (N, ...) that ``model`` classifies as ``y``."""
    right = [(model(x[i : i + 250]).argmax(1) == y[i : i + 250]).float() for i in range(0, len(x), 250)]
    return 100 * torch.cat(right).mean().item()


def _all(net: StitchNet, x: Tensor, y: Tensor, points: Sequence[Point]) -> list[float]:
    net.eval()
    return [_accuracy(net.use(point), x, y) for point in points]


def _digits(seeds: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """For each seed: accuracies of the 18 paths by arm and steps, of the anchors before, and of separate networks."""
    data = images.load("digits")
    (x, y), (vx, vy), (tx, ty) = (part.tensors for part in (data.train, data.validation, data.test))
    found: dict[str, Any] = {"paths": {}, "anchors": [], "short": [], "long": [], "valid": []}
    for seed in range(seeds):
        progress(f"digits, seed {seed}")
        anchors = [_train(ResidualMLP(w, 10 * seed + i), Batches(x, y, seed, STEPS[i])) for i, w in enumerate(WIDTHS)]
        found["anchors"].append([_accuracy(a, tx, ty) for a in anchors])
        for arm in ARMS:
            for steps in FINETUNE:
                copies = [ResidualMLP(w, 0) for w in WIDTHS]
                for mine, trained in zip(copies, anchors, strict=True):
                    mine.load_state_dict(trained.state_dict())
                net = StitchNet(copies, x[:2], blocks="blocks", seed=seed)
                ids = [Point(stitch=i) for i in range(len(net.configurations))]
                if arm == ARMS[0]:
                    net.initialize(x, images=500)
                if steps:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", UserWarning)  # that the layers are random: this arm is about it
                        fit(
                            net, Batches(x, y, 100 + seed, steps), steps=steps, lr_schedule="cosine", weight_decay=0.0,
                            optimizer=lambda groups: torch.optim.AdamW(groups, LR / 10), seed=seed, progress=False,
                        )  # fmt: skip
                found["paths"].setdefault((arm, steps), []).append(_all(net, tx, ty, ids))
                if (arm, steps) == (ARMS[0], FINETUNE[-1]):
                    found["valid"].append(_all(net, vx, vy, ids))
        share = FINETUNE[-1] // len(BETWEEN)
        for name, steps in (("short", share), ("long", STEPS[1])):
            nets = [_train(ResidualMLP(w, 10 * seed + 5), Batches(x, y, seed, steps)) for w in BETWEEN]
            found[name].append([_accuracy(n, tx, ty) for n in nets])
    found["costs"] = [net.costs()[i]["flops"] for i in ids]
    found["between"] = [flops_per_sample(ResidualMLP(w, 0), x[:1]).total for w in BETWEEN]
    return found


def _spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation, ties by their mean rank."""

    def ranks(v: Sequence[float]) -> Tensor:
        t = torch.tensor(v, dtype=torch.float64)
        return (t[:, None] > t).double().sum(1) + 0.5 * (t[:, None] == t).double().sum(1)

    if len(a) < 3:
        return float("nan")
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def _pareto(costs: Sequence[float], quality: Sequence[float]) -> list[int]:
    kept: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -quality[i])):
        if not kept or quality[i] > quality[kept[-1]]:
            kept.append(i)
    return kept


# -- CIFAR-10-JPEG ----------------------------------------------------------------------------------------------------


class CifarBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without weights: (B, I, H, W) -> (B, O, H / stride, W / stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride, self.added = stride, (out_channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, O, H / stride, W / stride)."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.added:  # every second pixel, and zeros for the channels that are new
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added, self.added))
        return torch.relu(x + y)


class CifarResNet(nn.Module):
    """The ResNet for CIFAR of He et al. 2016, depth 6 n + 2: (B, 3, 32, 32) -> (B, 10)."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        n = (depth - 2) // 6
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)

        def stage(i: int, o: int, stride: int) -> nn.Sequential:
            return nn.Sequential(CifarBlock(i, o, stride), *(CifarBlock(o, o, 1) for _ in range(n - 1)))

        self.layer1, self.layer2, self.layer3 = stage(16, 16, 1), stage(16, 32, 2), stage(32, 64, 2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 32, 32) -> (B, 10)."""
        x = torch.relu(self.bn1(self.conv1(x)))
        y: Tensor = self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))
        return y


def cifar_resnet(depth: int) -> CifarResNet:
    """A trained ResNet-20, -32, -44 or -56 out of ``$PLIANT_DATA/models/cifar_resnet``, in evaluation mode.

    Raises:
        FileNotFoundError: the weights are not there.
    """
    path = Path(os.environ.get("PLIANT_DATA", "")) / "models" / "cifar_resnet" / f"resnet{depth}.safetensors"
    if not os.environ.get("PLIANT_DATA") or not path.exists():
        raise FileNotFoundError(f"ResNet-{depth} for CIFAR-10 is not in models/cifar_resnet/ of $PLIANT_DATA")
    model = CifarResNet(depth)
    state = {k: v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")}  # not in the file
    model.load_state_dict(state | load_file(path))
    return model.eval()


def cifar_jpeg(part: str, count: int) -> tuple[Tensor, Tensor]:
    """``count`` images of CIFAR-10-JPEG (count, 3, 32, 32), drawn once for all, and labels (count,).

    They are normalised as the networks of ``cifar_resnet`` were trained. The file is sorted by class, so that the
    first images of it would be no fair sample.

    Raises:
        FileNotFoundError: the images are not there.
    """
    path = Path(os.environ.get("PLIANT_DATA", "")) / "images" / "cifar10_jpeg.npz"
    if not os.environ.get("PLIANT_DATA") or not path.exists():
        raise FileNotFoundError("CIFAR-10-JPEG (cifar10_jpeg.npz) is not in images/ of $PLIANT_DATA")
    pillow = importlib.import_module("PIL.Image")
    with np.load(path, allow_pickle=False) as z:
        header, blob, offset = z["header"].tobytes(), z[f"{part}_blob"].tobytes(), z[f"{part}_off"]
        labels = z[f"{part}_y"].astype(np.int64)
    rows = np.random.default_rng(0).permutation(len(labels))[:count]
    pixels = [
        np.asarray(pillow.open(io.BytesIO(header + blob[offset[i] : offset[i + 1]])).convert("RGB")) for i in rows
    ]
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return ((x - mean) / std).contiguous(), torch.from_numpy(labels[rows])


def _cifar(seeds: int, progress: Callable[[str], None]) -> dict[str, Any] | None:
    try:
        alone = {depth: cifar_resnet(depth) for depth in (20, 32, 44, 56)}
        (x, y), (tx, ty) = cifar_jpeg("train", CIFAR_TRAIN), cifar_jpeg("test", CIFAR_TEST)
    except (FileNotFoundError, ImportError) as error:
        progress(f"CIFAR-10-JPEG is left out: {error}")
        return None
    found: dict[str, Any] = {"arms": {}, "anchors": {}}
    found["alone"] = {depth: _accuracy(model, tx, ty) for depth, model in alone.items()}
    found["alone flops"] = {depth: flops_per_sample(model, x[:1]).total for depth, model in alone.items()}
    for seed in range(seeds):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        calibration = [(x[order[i : i + BATCH]], y[order[i : i + BATCH]]) for i in range(0, 512, BATCH)]
        for arm in ARMS:
            progress(f"CIFAR-10-JPEG, seed {seed}, {arm}")
            net = StitchNet([cifar_resnet(20), cifar_resnet(56)], x[:2], seed=seed)
            seams = [net.find(0, 1, j, k, stage) for stage, j, k in SEAMS]
            ends = [Point(stitch=0), Point(stitch=1)]
            if arm == ARMS[0]:
                net.initialize(calibration, images=512, recalibrate=False)
                found["arms"].setdefault("least squares, statistics of the anchors", []).append(
                    _all(net, tx, ty, seams)
                )
            net.calibrate(calibration, batches=len(calibration), points=seams)
            found["arms"].setdefault(f"{arm}, 0 steps", []).append(_all(net, tx, ty, seams))
            net.train()
            optimizer = torch.optim.SGD(net.parameter_groups(1e-4), lr=0.01, momentum=0.9)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, CIFAR_STEPS)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                for batch in Batches(x, y, seed, CIFAR_STEPS, flip=True):
                    optimizer.zero_grad()
                    net.loss(batch).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    schedule.step()
            net.calibrate(calibration, batches=len(calibration), points=[*seams, *ends])
            values = _all(net, tx, ty, [*seams, *ends])
            found["arms"].setdefault(f"{arm}, {CIFAR_STEPS} steps", []).append(values[:-2])
            found["anchors"].setdefault(arm, []).append(values[-2:])
    found["flops"] = [net.costs()[p]["flops"] for p in seams]
    found["paths"] = len(net.configurations)
    return found


# -- the verdict ------------------------------------------------------------------------------------------------------


def run(seeds: int = 3, progress: Callable[[str], None] = print) -> dict[str, Any]:
    """Both parts for ``seeds`` seeds: accuracies in percent."""
    d = _digits(seeds, progress)
    c = _cifar(seeds, progress)
    last = FINETUNE[-1]

    def mean(arm: str, steps: int) -> float:
        return statistics.fmean(statistics.fmean(row[2:]) for row in d["paths"][arm, steps])

    final: list[list[float]] = d["paths"][ARMS[0], last]

    def within(budget: float) -> list[float]:
        """Test accuracy, seed by seed, of the stitch that is best on validation among those that cost no more."""
        inside = [n for n, cost in enumerate(d["costs"]) if cost <= budget and n >= 2]
        found = []
        for row, valid in zip(final, d["valid"] if inside else [], strict=bool(inside)):
            found.append(row[max(inside, key=valid.__getitem__)])
        return found

    worst = min(min(row[2:]) - before[0] for row, before in zip(final, d["anchors"], strict=True))
    lost = max(before[i] - row[i] for row, before in zip(final, d["anchors"], strict=True) for i in (0, 1))
    kept = [_pareto(d["costs"], row) for row in d["valid"]]
    order = statistics.fmean(
        _spearman([d["costs"][i] for i in rows], [row[i] for i in rows]) for rows, row in zip(kept, final, strict=True)
    )
    everywhere = statistics.fmean(_spearman(d["costs"], row) for row in final)
    gain = [mean(ARMS[0], s) - mean(ARMS[1], s) for s in FINETUNE]
    behind = [
        statistics.fmean(row[i] for row in d["short"]) - statistics.fmean(best)
        for i, budget in enumerate(d["between"])
        if (best := within(budget))
    ]
    checks = [
        check("digits: least squares beats random layers by 50 points before training", gain[0], least=50),
        check("digits: ... by 20 points after 100 steps", gain[1], least=20),
        check(f"digits: ... and is not behind after {last} steps (mean of 16 stitches)", gain[2], least=0),
        check("digits: no stitch ends more than 1.5 points below the small anchor", worst, least=-1.5),
        check("digits: no anchor loses more than 2 points", lost, most=2),
        check(
            f"digits: the best stitch within the cost of a network trained alone ({last // len(BETWEEN)} steps "
            "each) is at most 1.5 points behind it",
            max(behind),
            most=1.5,
        ),
        check("digits: Spearman(cost, test accuracy) over the validation's Pareto set >= 0.7", order, least=0.7),
    ]
    table: list[dict[str, Any]] = [
        {"part": "digits", "arm": f"{arm}, {steps} steps", "what": "16 stitches, mean of seeds"}
        | _spread([statistics.fmean(row[2:]) for row in rows])
        | {"worst": round(min(min(row[2:]) for row in rows), 1), "anchors": _pair([row[:2] for row in rows])}
        for (arm, steps), rows in d["paths"].items()
    ]
    table.append({"part": "digits", "arm": "anchors alone", "what": "before stitching", "anchors": _pair(d["anchors"])})
    for i, width in enumerate(BETWEEN):
        best = within(d["between"][i])
        table.append(
            {"part": "digits", "arm": f"width {width} trained alone", "flops": d["between"][i]}
            | {f"{last // len(BETWEEN)} steps": _spread([row[i] for row in d["short"]])["accuracy"]}
            | {f"{STEPS[1]} steps": _spread([row[i] for row in d["long"]])["accuracy"]}
            | {"best stitch within its cost": _spread(best)["accuracy"] if best else "none"}
        )
    notes = [
        f"Budgets on digits: the anchors took {STEPS[0]} + {STEPS[1]} steps, joint training {last}; the networks "
        f"of sizes between took {last // len(BETWEEN)} steps each (the same {last} in all) or {STEPS[1]} each.",
        "A Pareto set rises by its definition, so it is chosen on validation and judged on test; over all paths the "
        f"rank correlation of cost and accuracy is {everywhere:.2f}: stitches that run a part of the depth twice "
        "(k <= j) cost more and are often no better.",
        "A best stitch is chosen on the 180 validation images.",
    ]
    if c is None:
        notes.append("The part on CIFAR-10-JPEG was left out: $PLIANT_DATA does not hold the images and the weights.")
    else:
        _add_cifar(c, table, checks, notes)
    return {
        "claim": "One stitched network gives dozens of networks between two trained ones at once; least-squares layers "
        "are near their targets before any training, and short joint training makes all of them good.",
        "source_figure": "arXiv:2302.06586, Fig. 6-7 and Tab. 3; experiment of the specification on digits",
        "baselines": ["stitching layers that start at random", "networks of sizes between, each trained alone"],
        "table": table,
        "checks": checks,
        "verdict": verdict(checks),
        "notes": notes,
    }


def _add_cifar(c: dict[str, Any], table: list[dict[str, Any]], checks: list[dict[str, Any]], notes: list[str]) -> None:
    part = "CIFAR-10-JPEG"
    for arm, rows in c["arms"].items():
        table.append(
            {"part": part, "arm": arm, "what": f"{len(SEAMS)} stitches of {c['paths'] - 2}, mean"}
            | _spread([statistics.fmean(row) for row in rows])
            | {
                f"stage {s} j={j} k={k}": _spread([row[i] for row in rows])["accuracy"]
                for i, (s, j, k) in enumerate(SEAMS)
            }
        )
    table.append({"part": part, "arm": "MFLOPs"} | {
        f"stage {s} j={j} k={k}": round(c["flops"][i] / 1e6, 1) for i, (s, j, k) in enumerate(SEAMS)
    })  # fmt: skip
    for arm, rows in c["anchors"].items():
        table.append(
            {"part": part, "arm": f"ResNet-20, ResNet-56 inside, {arm}, {CIFAR_STEPS} steps", "anchors": _pair(rows)}
        )
    for depth, value in c["alone"].items():
        mega = round(c["alone flops"][depth] / 1e6, 1)
        table.append({"part": part, "arm": f"ResNet-{depth} as it came", "accuracy": f"{value:.1f}", "MFLOPs": mega})

    def mean(arm: str) -> float:
        return statistics.fmean(statistics.fmean(row) for row in c["arms"][arm])

    trained = [f"{arm}, {CIFAR_STEPS} steps" for arm in ARMS]
    fresh = [f"{arm}, 0 steps" for arm in ARMS]
    lost = max(c["alone"][(20, 56)[i]] - row[i] for row in c["anchors"][ARMS[0]] for i in (0, 1))
    checks += [
        check(
            f"{part}: least squares beats random layers by 20 points before training", mean(fresh[0]) - mean(fresh[1]),
            least=20,
        ),
        check(
            f"{part}: ... and is not behind after {CIFAR_STEPS} steps", mean(trained[0]) - mean(trained[1]), least=0
        ),
        check(f"{part}: no anchor loses more than 2 points", lost, most=2),
    ]  # fmt: skip
    notes += [
        f"{part}: ResNets trained by others on the original pixels, which lose about ten points on these images; "
        f"{CIFAR_TEST} test images drawn once (standard error about 1.2 points), {CIFAR_TRAIN} training images, "
        f"{CIFAR_STEPS} steps of {BATCH} with flips only, SGD at a tenth of the anchors' rate; {len(SEAMS)} of "
        f"{c['paths'] - 2} stitches are evaluated. Far from the paper's 30 epochs.",
        f"{part}: stitched paths and anchors inside saw a few of these images in training, ResNet-32 and ResNet-44 as "
        "they came did not, so the two are not compared by a check.",
    ]


def _pair(rows: Sequence[Sequence[float]]) -> str:
    return " / ".join(f"{statistics.fmean(row[i] for row in rows):.1f}" for i in (0, 1))


def _spread(values: Sequence[float]) -> dict[str, str]:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"accuracy": f"{statistics.fmean(values):.1f} ± {spread:.1f}"}
