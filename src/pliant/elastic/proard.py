"""ProARD: one training, many adversarially robust sizes.

Mousavi, Mousavi, Daneshtalab: "ProARD: progressive adversarial robustness distillation: provide wide range of robust
students", IJCNN 2025, arXiv:2506.07666. The losses are those of TRADES (Zhang et al., arXiv:1901.08573), RSLAD (Zi et
al., arXiv:2108.07969), ARD (Goldblum et al., arXiv:1905.09747) and AdaAD (Huang et al., CVPR 2023); the elastic
operators those of Once-for-all (Cai et al., arXiv:1908.09791).

The idea: (1) the largest member of an elastic network is trained to be robust and becomes the teacher; (2) students,
which are slices of the same weights, are distilled from it on attacked inputs, first with free width, then free depth,
then free expansion; (3) a small network that predicts (accuracy, robust accuracy) of an architecture is searched
under a FLOPs cap.

Notation: x in [0,1] (B, ...), labels y (B,), logits f(x), T(x), S(x) (B, C) of the network, teacher and student;
KL(p||q) = sum_c p_c (log p_c - log q_c), mean over the batch. Attacks are those of ``pliant.core.adversary``.

    TRADES   x' maximises KL(f(x) || f(x'))         L = CE(f(x), y) + beta KL(f(x) || f(x')),                 beta = 6
    RSLAD    x' maximises KL(T(x) || S(x'))         L = 5/6 KL(T(x) || S(x')) + 1/6 KL(T(x) || S(x))
    ARD      x' as in RSLAD                         L = alpha t^2 KL(T_t(x) || S_t(x')) + (1 - alpha) CE(S(x), y),
                                                    alpha = 1, t = 30
    AdaAD    x' maximises KL(T(x') || S(x'))        L = alpha KL(T(x') || S(x')) + (1 - alpha) KL(T(x) || S(x)),
                                                    alpha = 1
    a step   L = sum_{r=1..R} L(S_{a_r}),  a_r drawn uniformly from the phase's space by (seed, step, r), on one batch;
             R = 1, 2, 4 while width, depth, expansion are the last axis freed
    kernels  w_5 = crop_5(w_7) M_75,  w_3 = crop_3(w_5) M_53;  M (25, 25) and (9, 9) per layer, the identity at first

Phases: the spaces grow one into the other: {all widths, full depth, full expansion}, then the next smaller depth, then
all, then the next smaller expansion, then all. Before expansions are added, the inner channels of every block are
sorted by the sum of |w| over the weights that read them; channels of sizes that were trained already stay within them.

Where paper, code and specification differ or are silent:

- The code means the KL over batch *and* classes, with log(p + 1e-5). Here it is the batch mean of class sums, with
  log-softmax; ``reduction="elementwise"`` divides by C (the 1e-5 is not copied).
- The code draws one student and runs a whole epoch on it. Here R students share each batch and each step, as the
  paper's words and Once-for-all have it. The gradients of the R students are added.
- Attacks in the code use the student's running statistics, which mix all sizes. ``attack_norm="batch"`` (default)
  normalises by the attacked batch, dropout off, buffers untouched; ``"eval"`` is the code's way.
- The paper's teacher is "dynamic" and trained jointly; the code's is a frozen copy. Both are here: ``teacher="frozen"``
  (default) and ``"live"``: the current largest network, detached, in batch statistics; it gets TRADES in each step.
- Sorting protects the inner sizes that earlier *expansions* made at full width, as in the code. Inner sizes that come
  from narrower stages were trained, too, and the first sort moves them; ``protect="all"`` keeps these as well.
- Every phase has its own optimiser and learning rate in the paper: ``train_progressively``. Under a single
  ``pliant.fit`` the phases share one optimiser, whose momentum the sort does not follow (it fades within some steps).
- The published predictor adds the accuracy's base value to both outputs. Here each output has its own.
- Calibration of normalisation statistics on clean images is what the code does; ``calibrate_on="both"`` adds attacked
  ones. Which is better is measured in ``pliant.reproduce.proard``.
- The code saves the checkpoint of the best clean accuracy; robust overfitting asks for the best held-out robust one.
"""

from __future__ import annotations

import copy
import hashlib
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core import check
from pliant.core.adversary import (
    PGD,
    Objective,
    Reduction,
    kl_divergence,
    kl_objective,
    robust_accuracy,
)
from pliant.core.calibration import Estimator, NormTable, check_estimator
from pliant.core.dynamic import Dynamic, Point, Value
from pliant.core.inputs import (
    Batch,
    call,
    check_example,
    device_of,
    evaluating,
    inputs_of,
    logits,
    packed,
    rows_of,
    split_batch,
    to_device,
)
from pliant.core.objective import cross_entropy, row_classes
from pliant.core.slicing import Group, Slicing, make_divisible
from pliant.core.spaces import Axes, Inner, Shares, Space, check_axes
from pliant.core.subnetwork import SubNetwork
from pliant.core.training import fit

__all__ = [
    "PGD",
    "AccRobPredictor",
    "ElasticResNet",
    "Found",
    "Phase",
    "PhaseReport",
    "ProARD",
    "adaad_loss",
    "ard_loss",
    "robust_accuracy",
    "rslad_loss",
    "search",
    "trades_loss",
    "train_progressively",
]

AxisSizes = Shares | Mapping[str, Sequence[int]]
Students = Literal["rslad", "ard", "adaad", "trades"]
EXPANSION = (0.57, 0.71, 1.0)  # 0.2 and 0.25 of the paper as shares of its 0.35


# -- the losses -------------------------------------------------------------------------------------------------------


def trades_loss(
    clean: Tensor, attacked: Tensor, target: Tensor, *, beta: float = 6.0, reduction: Reduction = "batchmean"
) -> Tensor:
    """TRADES (arXiv:1901.08573): CE(f(x), y) + beta KL(f(x) || f(x')).

    Shapes: ``clean`` and ``attacked`` logits (B, C), ``target`` (B,); a scalar. The gradient flows through both.
    """
    loss = cross_entropy(clean, target)
    return loss + beta * kl_divergence(clean, attacked, reduction=reduction) if beta else loss


def rslad_loss(clean: Tensor, attacked: Tensor, teacher: Tensor, *, reduction: Reduction = "batchmean") -> Tensor:
    """RSLAD (arXiv:2108.07969): 5/6 KL(T(x) || S(x')) + 1/6 KL(T(x) || S(x)).

    Shapes: the student's ``clean`` and ``attacked`` logits and those of the ``teacher`` on x, each (B, C); a scalar.
    """
    robust, natural = (kl_divergence(teacher, s, reduction=reduction) for s in (attacked, clean))
    return 5 / 6 * robust + 1 / 6 * natural


def ard_loss(
    clean: Tensor,
    attacked: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    temperature: float = 30.0,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """ARD (arXiv:1905.09747): alpha t^2 KL(T_t(x) || S_t(x')) + (1 - alpha) CE(S(x), y).

    Shapes: logits (B, C), ``target`` (B,); a scalar.
    """
    distance = kl_divergence(teacher, attacked, temperature=temperature, reduction=reduction)
    loss = alpha * temperature**2 * distance
    return loss + (1 - alpha) * cross_entropy(clean, target) if alpha != 1 else loss


def adaad_loss(
    clean: Tensor,
    attacked: Tensor,
    teacher: Tensor,
    teacher_attacked: Tensor,
    *,
    alpha: float = 1.0,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """AdaAD (CVPR 2023): alpha KL(T(x') || S(x')) + (1 - alpha) KL(T(x) || S(x)).

    Shapes: logits of student and teacher on x and on x', each (B, C); a scalar.
    """
    loss = alpha * kl_divergence(teacher_attacked, attacked, reduction=reduction)
    return loss + (1 - alpha) * kl_divergence(teacher, clean, reduction=reduction) if alpha != 1 else loss


# -- the space of the paper as a plain network ------------------------------------------------------------------------


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, *, relu: bool = True) -> nn.Sequential:
    layers = [
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        *([nn.ReLU()] if relu else []),
    ]
    return nn.Sequential(*layers)


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1, a shortcut: (B, I, H, W) -> (B, O, H / stride, W / stride)."""

    def __init__(self, in_channels: int, out_channels: int, mid_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, mid_channels, 1)
        self.conv2 = _conv(mid_channels, mid_channels, 3, stride)
        self.conv3 = _conv(mid_channels, out_channels, 1, relu=False)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            self.shortcut = _conv(in_channels, out_channels, 1, stride, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, O, H / stride, W / stride)."""
        return torch.relu(self.conv3(self.conv2(self.conv1(x))) + self.shortcut(x))


class ResidualConv(nn.Module):
    """x + ReLU(BN(conv3x3(x))), (B, C, H, W) -> the same; the stem's part that may be left out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x + self.conv(x)  # type: ignore[no-any-return]


class ElasticResNet(nn.Module):
    """The largest network of the paper's ResNet-50 space for 32x32 images: (B, in_channels, H, W) -> (B, classes).

    A plain network; ``axes()`` gives the arguments that make it elastic: ``ProARD(net, example, **net.axes())``.

    Args:
        in_channels: channels of the image.
        classes: outputs.
        width: channels behind the stem; half of them inside it.
        stages: channels of the stages.
        base_blocks: blocks of each stage that are always there.
        extra: how many more each stage has.
        expansion: mid channels as a share of a block's output.
        strides: of the first block of each stage.
        dropout: before the head.
        divisor: all channels are multiples of it.
    """

    def __init__(
        self,
        in_channels: int = 3,
        classes: int = 10,
        *,
        width: int = 64,
        stages: Sequence[int] = (256, 512, 1024, 2048),
        base_blocks: Sequence[int] = (2, 2, 4, 2),
        extra: int = 2,
        expansion: float = 0.35,
        strides: Sequence[int] = (1, 2, 2, 2),
        dropout: float = 0.1,
        divisor: int = 8,
    ) -> None:
        super().__init__()
        if not len(stages) == len(base_blocks) == len(strides):
            raise ValueError(
                f"stages, base_blocks, strides: {len(stages)}, {len(base_blocks)} and {len(strides)} entries; "
                "one for each stage"
            )
        if min(base_blocks) < 1 or extra < 0:
            raise ValueError(f"base_blocks, extra: {tuple(base_blocks)}, {extra}; at least one block, and none less")
        self.base_blocks, self.extra, self.expansion, self.divisor = tuple(base_blocks), extra, expansion, divisor
        out = make_divisible(width, divisor)
        mid = make_divisible(out // 2, divisor)
        self.stem1 = _conv(in_channels, mid, 3)
        self.stem_residual = nn.ModuleList([ResidualConv(mid)])
        self.stem2 = _conv(mid, out, 3)
        blocks = []
        for channels, base, stride in zip(stages, base_blocks, strides, strict=True):
            stage = []
            for i in range(base + extra):
                inner = make_divisible(round(channels * expansion), divisor)
                stage.append(Bottleneck(out, channels, inner, stride if i == 0 else 1))
                out = channels
            blocks.append(nn.Sequential(*stage))
        self.stages = nn.ModuleList(blocks)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(out, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, classes)."""
        x = self.stem1(x)
        for block in self.stem_residual:
            x = block(x)
        x = self.stem2(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(self.dropout(x.mean((2, 3))))  # type: ignore[no-any-return]

    def axes(
        self, width: Sequence[float] = (0.65, 0.8, 1.0), expansion: Sequence[float] = (0.2, 0.25, 0.35)
    ) -> dict[str, Any]:
        """Keyword arguments of ``ProARD``: 6 widths, a skippable stem block, 0 to ``extra`` blocks, expansion by block.

        Raises:
            ValueError: ``expansion`` does not end at the one that the network has.
        """
        if max(expansion) != self.expansion:
            raise ValueError(
                f"expansion: {tuple(expansion)} must have {self.expansion}, the network's own, as its last"
            )
        depth = {f"stages.{i}": tuple(range(n, n + self.extra + 1)) for i, n in enumerate(self.base_blocks)}
        return {
            "width": tuple(width),
            "depth": {"stem_residual": (0, 1), **depth},
            "expansion": tuple(expansion),
            "per_block": ("expansion",),
            "relative": "out",
            "inner": "md",
            "divisor": self.divisor,
            "stacks": ["stem_residual", *depth],
        }


# -- phases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """One phase of the training: its space, students in a step (R), and the paper's table for it."""

    name: str
    axis: str
    space: Space
    students: int
    epochs: float
    warmup: float
    lr: float
    weight_decay: float
    sorts: bool = False  # smaller expansions come in: channels are sorted first

    def __repr__(self) -> str:
        return f"Phase({self.name}, {self.space.size:.3g} architectures, {self.students} students)"


# axis -> (epochs, warm-up, lr) of its earlier and of its last phase
_TABLE = {
    "width": ((25.0, 0.0, 3e-2), (120.0, 5.0, 3e-2)),
    "kernel": ((25.0, 0.0, 3e-2), (120.0, 5.0, 3e-2)),
    "depth": ((25.0, 0.0, 2.5e-3), (120.0, 5.0, 7.5e-3)),
    "expansion": ((25.0, 0.0, 2.5e-3), (120.0, 5.0, 7.5e-3)),
}
_STUDENTS = {"width": 0, "kernel": 0, "depth": 1, "expansion": 2}


class ProARD(Dynamic):
    """A robust elastic network: width, depth, expansion and filter size of one set of weights.

    Args:
        model: your network, a classifier (B, ...) -> (B, C); it is wrapped, not copied. Its input is one tensor
            inside ``bounds``: normalisation by mean and spread belongs inside the model.
        example: an input batch for it, of any size.
        width: shares of the channels of every stage, 1 among them, or {stage: numbers of channels}. None: the paper's
            (0.65, 0.8, 1) where they round to different sizes.
        depth: shares of the blocks of every stage, or {stack: numbers of blocks}. None: up to two blocks less.
        expansion: shares of the inner channels of a block; with ``inner`` the ratios themselves, the model's own last.
            None: the paper's, (0.57, 0.71, 1) of the full ones.
        kernel: odd filter sizes, such as (3, 5, 7), of the convolutions inside of blocks.
        per_block: axes ("expansion", "kernel") that are chosen block by block.
        relative: inner channels follow the block's output ("out", as in the paper's ResNet) or its input ("in").
        inner: a rule ``inner(channels, expansion)`` for inner channels; "md" is the paper's
            ``make_divisible(round(channels * expansion), divisor)``.
        kernel_matrices: smaller filters pass through learned matrices; otherwise they are the mere centre.
        objective: of the students: "rslad", "ard", "adaad", or "trades" (on the labels, without the teacher).
        reduction: of the divergences: "batchmean", or "elementwise" for parity with the reference code.
        beta: of TRADES.
        alpha: of ARD and AdaAD.
        temperature: of ARD.
        eps: radius of the training attack.
        step: length of its steps.
        attack_steps: how many.
        start: its start: "gaussian" or "uniform".
        bounds: the least and the largest value of an input.
        attack_norm: normalise by the attacked "batch", or by the running statistics ("eval").
        teacher: "frozen", "live", or a network of your own (B, ...) -> (B, C), which is copied and frozen.
        pretrain: training begins with TRADES on the largest network. False where the model comes robust.
        phases: axes in the order in which they are freed; or, for phases of your own, mappings from coordinates or axes
            to choices, where what is not named stays at its largest. Each must contain the one before it.
        students: R while width or kernel, depth, expansion is the last axis freed.
        shares: of the training that each of ``self.phases`` takes under ``pliant.fit``; by default as the paper's
            epochs: 120, 120, 25, 120, 25, 120, each of 120 with 5 more.
        protect: what a sort leaves in its place: sizes of earlier "expansion"s, or "all" trained sizes.
        offer: how many points ``points()`` has before a search, from the smallest to the largest.
        calibrate_on: "clean" images or "both", clean and attacked.
        calibration_images: how many.
        calibration_batch: in batches of this size.
        exclude: names of modules (fnmatch patterns) that keep their full width.
        divisor: kept channels are multiples of this where the sizes allow.
        stacks: names of the block lists that depth cuts; found by themselves where None.
        seed: of students and random starts.

    Raises:
        ValueError: an argument is out of range, or the model cannot be sliced; the message names what is wrong.
        TypeError: the example is not one tensor of floating point numbers.
    """

    steps: Tensor

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        *,
        width: AxisSizes | None = None,
        depth: AxisSizes | None = None,
        expansion: Sequence[float] | None = None,
        kernel: Sequence[int] = (),
        per_block: Sequence[str] = ("kernel", "expansion"),
        relative: Literal["in", "out"] = "out",
        inner: Inner | Literal["md"] | None = None,
        kernel_matrices: bool = True,
        objective: Students = "rslad",
        reduction: Literal["batchmean", "elementwise"] = "batchmean",
        beta: float = 6.0,
        alpha: float = 1.0,
        temperature: float = 30.0,
        eps: float = 0.031,
        step: float = 0.0078,
        attack_steps: int = 10,
        start: Literal["gaussian", "uniform"] = "gaussian",
        bounds: Sequence[float] = (0.0, 1.0),
        attack_norm: Literal["batch", "eval"] = "batch",
        teacher: Literal["frozen", "live"] | nn.Module = "frozen",
        pretrain: bool = True,
        phases: Sequence[str | Mapping[str, Sequence[Value]]] = ("width", "kernel", "depth", "expansion"),
        students: Sequence[int] = (1, 2, 4),
        shares: Sequence[float] | None = None,
        protect: Literal["expansion", "all"] = "expansion",
        offer: int = 5,
        calibrate_on: Literal["clean", "both"] = "clean",
        calibration_images: int = 2000,
        calibration_batch: int = 200,
        exclude: Sequence[str] = (),
        divisor: int = 8,
        stacks: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check.module("model", model)
        if start is None:
            raise ValueError(
                "start: None is not allowed: where student and teacher agree the attack's gradient is zero, and its "
                "sign is rounding noise; use gaussian or uniform"
            )
        check_axes(width, depth, kernel, expansion, (), per_block, relative, shares=inner is None)
        if inner is not None and not callable(inner) and inner != "md":
            raise check.wrong("inner", inner, "'md', a function of (channels, expansion), or None")
        check.boolean("kernel_matrices", kernel_matrices)
        check.choice("objective", objective, Students)
        check.choice("reduction", reduction, ("batchmean", "elementwise"))
        check.number("beta", beta, at_least=0)
        check.share("alpha", alpha)
        check.positive("temperature", temperature)
        check.number("eps", eps, at_least=0)
        check.number("step", step, at_least=0)
        check.whole("attack_steps", attack_steps, at_least=1)
        check.choice("start", start, ("gaussian", "uniform"))
        check.sequence("bounds", bounds, check.number, length=2)
        check.choice("attack_norm", attack_norm, ("batch", "eval"))
        if not isinstance(teacher, nn.Module):
            check.choice("teacher", teacher, ("frozen", "live"))
        check.boolean("pretrain", pretrain)
        check.sequence("phases", phases, _check_phase, empty=True)
        check.sequence("students", students, lambda n, v: check.whole(n, v, at_least=1, at_most=10_000), length=3)
        check.optional(check.sequence, "shares", shares, lambda n, v: check.number(n, v, at_least=0))
        check.choice("protect", protect, ("expansion", "all"))
        check.whole("offer", offer, at_least=1, at_most=10_000)
        check.choice("calibrate_on", calibrate_on, ("clean", "both"))
        check.whole("calibration_images", calibration_images, at_least=1, at_most=10**9)
        check.whole("calibration_batch", calibration_batch, at_least=1)
        check.names("exclude", exclude)
        check.whole("divisor", divisor, at_least=1)
        check.optional(check.names, "stacks", stacks)
        check.seed("seed", seed)
        self.example = example
        self.per_block, self.relative, self.inner = tuple(per_block), relative, inner
        self.kernel, self.kernel_matrices = tuple(kernel), kernel_matrices
        self.objective, self.reduction = objective, reduction
        self.beta, self.alpha, self.temperature = beta, alpha, temperature
        self.eps, self.step, self.attack_steps, self.start, self.bounds = eps, step, attack_steps, start, tuple(bounds)
        self.attack_norm, self.pretrain = attack_norm, pretrain
        self.students, self.protect, self.offer = tuple(students), protect, offer
        self.calibrate_on = calibrate_on
        self.calibration_images, self.calibration_batch = calibration_images, calibration_batch
        self.exclude, self.divisor, self.stacks, self.seed = tuple(exclude), divisor, stacks, seed
        self.attack = PGD(eps, step, attack_steps, start, bounds=tuple(bounds))  # type: ignore[arg-type]
        try:
            self.attack.check(example)
        except (TypeError, ValueError) as error:
            raise type(error)(f"example: {error}") from None
        self.model = model
        self.classes = _classes("model", model, example)
        self.width, self.depth, self.expansion = width, depth, expansion  # as given, for ``arguments``
        self.axes = self._lay_axes(width, depth, expansion)
        self.space = self.axes.space
        self.matrices = self._make_matrices()
        self._shufflable = self._find_shufflable()
        self.given_phases = phases
        self.phases = self._list_phases(phases)
        self.shares = self._check_shares(shares)
        self.phase, self.held = 0, False
        self.teacher = teacher if isinstance(teacher, str) else "given"
        self.frozen: nn.Module | None = None
        self._take_teacher(teacher)
        self._offered = sorted(self.space.ladder(offer), key=self.flops)
        self.norms = NormTable(model, self._offered)
        self.point = self.space.largest
        self.norms.add(self.point)
        self.norms.trust(self.point)  # it came with the model
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    # -- construction -------------------------------------------------------------------------------------------

    def _lay_axes(self, width: AxisSizes | None, depth: AxisSizes | None, expansion: Sequence[float] | None) -> Axes:
        """The axes asked for; where nothing was asked, the paper's, as far as the model has them."""
        example, defaults = self.example, width is None and depth is None and expansion is None
        fixed = [w is not None and not isinstance(w, Mapping) and set(w) == {1.0} for w in (width, expansion)]
        slicing = Slicing(
            self.model, example, width=not all(fixed), exclude=self.exclude, divisor=self.divisor, stacks=self.stacks
        )
        if expansion is None and self.inner is not None:
            raise ValueError("expansion: give the ratios that inner= is called with, the model's own as the last")
        if width is None or expansion is None:
            stages = Axes(slicing, example).stages  # nothing is free yet: it only reads the model's stages
            main = {name: stage.width[0] for name, stage in stages.items() if stage.width}
            inside = [g for stage in stages.values() for found in stage.inner.values() for g in found]
            if width is None:
                width = {name: sorted({_rounded(g, w) for w in (0.65, 0.8, 1.0)}) for name, g in main.items()}
            if expansion is None:
                expansion = EXPANSION if any(_rounded(g, EXPANSION[0]) < g.channels for g in inside) else (1.0,)
        if depth is None:
            depth = {name: [max(1, n - 2), max(1, n - 1), n] for name, n in slicing.stacks.items()}
        axes = Axes(
            slicing,
            example,
            width=width,
            depth=depth,
            kernel=self.kernel,
            expansion=expansion,
            per_block=self.per_block,
            relative=self.relative,
            inner=self._rule(),
        )
        if defaults and not self.kernel and not axes.space.coordinates:
            raise ValueError(
                "model: with the default choices nothing of it can change; give width=, depth= or expansion="
            )
        return axes

    def _rule(self) -> Inner | None:
        if not isinstance(self.inner, str):
            return self.inner
        divisor = self.divisor
        return lambda channels, e: make_divisible(round(channels * e), divisor)

    def _make_matrices(self) -> nn.ParameterDict:
        """For each convolution that can shrink, one matrix for each step of the chain, at the identity."""
        found = nn.ParameterDict()
        device = device_of(self.model)
        for name, full in self._convolutions().items() if self.kernel_matrices else ():
            dimensions = len(self.model.get_submodule(name).kernel_size)  # type: ignore[arg-type]
            for size in self._chain(full):
                eye = torch.eye(size**dimensions, device=device)
                found[f"{name.replace('.', '/')}:{size}"] = nn.Parameter(eye)
        return found

    def _convolutions(self) -> dict[str, int]:
        """Convolutions that can shrink, and their full filter size."""
        stages = self.axes.stages.values()
        return {n: full for s in stages for by_name in s.kernels.values() for n, full in by_name.items()}

    def _chain(self, full: int) -> list[int]:
        """The sizes below ``full``, from the largest to the smallest."""
        return sorted((k for k in set(self.kernel) if k < full), reverse=True)

    def _find_shufflable(self) -> list[tuple[str, Group]]:
        """Inner groups whose channels may be reordered, with the coordinate that sizes them, from back to front."""
        found = []
        for stage in self.axes.stages.values():
            name = f"{stage.name}."
            for block, groups in stage.inner.items():
                per_block = f"{name}{block}.expansion"
                coordinate = per_block if per_block in self.space.coordinates else f"{name}expansion"
                for group in reversed(groups):
                    try:
                        self.axes.slicing.permute(group, range(group.channels))
                    except ValueError:
                        continue  # places have a meaning there (heads, groups): they stay
                    found.append((coordinate, group))
        return found

    def _list_phases(self, given: Sequence[str | Mapping[str, Sequence[Value]]]) -> tuple[Phase, ...]:
        coordinates = self.space.coordinates
        free: dict[str, tuple[Value, ...]] = {n: c.choices[-1:] for n, c in coordinates.items()}
        axes = list(dict.fromkeys(c.axis for c in coordinates.values()))
        phases = []
        if self.pretrain:
            phases.append(Phase("teacher", "teacher", self.space.restrict(free), 1, 120, 5, 0.1, 2e-4))
        before = self.space.restrict(free)
        last = "width"
        for number, entry in enumerate(given):
            if isinstance(entry, str):
                if entry not in _TABLE:
                    raise ValueError(f"phases: {entry!r} is not one of {', '.join(_TABLE)}, or a mapping of choices")
                steps = self._widen(entry, free)
            else:
                opened = self.space.restrict(entry)  # names what is unknown
                named = {n for n, c in coordinates.items() if n in entry or c.axis in entry}
                steps = [{n: opened.coordinates[n].choices if n in named else coordinates[n].choices[-1:]
                          for n in coordinates}]  # fmt: skip
            for i, choices in enumerate(steps):
                space = self.space.restrict(choices)
                if not before <= space:
                    lost = next(n for n in coordinates if not set(before.coordinates[n].choices) <= set(choices[n]))
                    raise ValueError(
                        f"phases: number {number} is not a superset of the one before it: {lost} had "
                        f"{before.coordinates[lost].choices} and would have {choices[lost]}"
                    )
                grown = [c.axis for n, c in coordinates.items() if len(choices[n]) > len(before.coordinates[n].choices)]
                if not grown and isinstance(entry, str):
                    continue
                last = max([last, *grown], key=lambda a: _STUDENTS.get(a, 0))
                final = i == len(steps) - 1
                epochs, warmup, lr = _TABLE[last][final]
                label = entry if isinstance(entry, str) else f"phase {number}"
                phases.append(
                    Phase(
                        name=f"{label}-{'abcdefghijklmnopqrstuvwxyz'[i % 26]}" if len(steps) > 1 else label,
                        axis=last,
                        space=space,
                        students=self.students[_STUDENTS[last]],
                        epochs=epochs,
                        warmup=warmup,
                        lr=lr,
                        weight_decay=3e-5,
                        sorts="expansion" in grown,
                    )
                )
                before, free = space, choices
        if not self.space <= before:
            lost = next(n for n, c in coordinates.items() if before.coordinates[n].choices != c.choices)
            raise ValueError(
                f"phases: the last one must be the whole space, but {lost} has only {before.coordinates[lost].choices} "
                f"of {coordinates[lost].choices}; axes of this network: {', '.join(axes)}"
            )
        if not any(p.axis != "teacher" for p in phases):  # one architecture: static distillation
            phases.append(Phase("student", "width", self.space, self.students[0], 120, 5, 3e-2, 3e-5))
        return tuple(phases)

    def _widen(self, axis: str, free: Mapping[str, tuple[Value, ...]]) -> list[dict[str, tuple[Value, ...]]]:
        """The phases of one axis: width and kernel in one, depth and expansion one smaller choice at a time."""
        own = {n: c.choices for n, c in self.space.coordinates.items() if c.axis == axis}
        most = max((len(choices) for choices in own.values()), default=0)
        counts = [most] if axis in ("width", "kernel") else range(2, most + 1)
        return [{**free, **{n: choices[-k:] for n, choices in own.items()}} for k in counts if k > 1]

    def _check_shares(self, shares: Sequence[float] | None) -> tuple[float, ...]:
        if shares is None:
            total = sum(p.epochs + p.warmup for p in self.phases)
            return tuple((p.epochs + p.warmup) / total for p in self.phases)
        if len(shares) != len(self.phases) or min(shares) < 0 or sum(shares) <= 0:
            names = ", ".join(p.name for p in self.phases)
            raise ValueError(f"shares: {list(shares)} must be numbers >= 0, not all zero, one for each of {names}")
        return tuple(s / sum(shares) for s in shares)

    def _take_teacher(self, teacher: str | nn.Module) -> None:
        if isinstance(teacher, str):
            return
        classes = _classes("teacher", teacher, self.example)
        if classes != self.classes:
            raise ValueError(f"teacher: it has {classes} classes, the model has {self.classes}")
        self.frozen = _frozen(teacher)

    # -- the contract -------------------------------------------------------------------------------------------

    def points(self) -> list[Point]:
        """The offered architectures, from the fewest FLOPs to the most; ``use`` takes any other of the space, too."""
        return list(self._offered)

    def _known(self, point: Mapping[str, Value]) -> Point:
        return self.space.check(point)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own output (B, C), computed by the architecture in use.

        In evaluation mode it runs with the statistics of this architecture, in training mode with those of the batch.

        Raises:
            RuntimeError: in evaluation mode, the normalisation statistics of this architecture are stale.
        """
        x, network = packed(args, kwargs), self.axes.network(self.point)
        if self.training:
            return self._run(network, x, "train")
        self.norms.check(self.point)
        network.skeleton.eval()
        if self.matrices:  # filters are products, which no view shows
            return self._run(network, x, "eval", self._statistics(self.point, network))
        place = self.norms.place(self.point)
        return network.infer(self.model, x, lambda: self._statistics(self.point, network), place)

    def loss(self, batch: Batch) -> Tensor:
        """The objective of the current phase on one batch of inputs (B, ...) and labels (B,): a scalar.

        In the teacher's phase TRADES of the largest network; afterwards the sum over R students, and with a live
        teacher TRADES of the largest network as well. In evaluation mode nothing is counted and no buffer moves.

        Raises:
            ValueError: the inputs leave ``bounds``, or the labels are not one class for each row.
        """
        x, y = split_batch(batch)
        y = row_classes(y, rows_of(x), "ProARD")
        self.attack.check(x)
        if self.training:
            self.norms.follow(self.model)
        value = self._objective(x, y, int(self.steps))
        if self.training:  # at last: after an error the same step can be taken again
            self.steps += 1
            self.norms.stale()
        return value

    def _objective(self, x: Tensor, y: Tensor, step: int) -> Tensor:
        """The objective of the current phase at step number ``step``."""
        phase = self.phases[self.phase]
        if phase.axis == "teacher":
            return self._trades(self.space.largest, x, y, self.generator(step, 0))
        losses = []
        if self.teacher == "live":
            losses.append(self._trades(self.space.largest, x, y, self.generator(step, 0)))
        reference = self.teacher_logits(x) if self.objective != "trades" else None
        for r in range(1, phase.students + 1):
            student = self.student(step, r)
            losses.append(self._distil(student, x, y, reference, self.generator(step, r)))
        return torch.stack(losses).sum()

    def extract(self, point: Mapping[str, Value]) -> nn.Module:
        """The plain, smaller network of ``point`` with its own weights and statistics, in evaluation mode.

        Raises:
            ValueError: ``point`` is outside of the space.
            RuntimeError: its normalisation statistics are stale.
        """
        known = self._known(point)
        self.norms.check(known)
        network = self.axes.network(known)
        return network.extract(self.model, {**self._statistics(known, network), **self._filters(network)})

    def schedule(self, progress: float) -> None:
        """Enter the phase that ``progress`` falls into, unless a phase is held (see ``enter``)."""
        if self.held:
            return
        done, target = 0.0, len(self.phases) - 1
        for i, share in enumerate(self.shares):
            done += share
            if progress < done - 1e-9:
                target = i
                break
        if target < self.phase:  # a new training begins
            self.phase = target
        while self.phase < target:
            self._enter(self.phase + 1)

    def finish(self, train: Iterable[Batch]) -> None:
        """Re-estimate the normalisation statistics of the offered points on the training data."""
        self.calibrate(train)

    def train(self, mode: bool = True) -> ProARD:
        """Training or evaluation mode; the frozen teacher stays in evaluation mode."""
        super().train(mode)
        if self.frozen is not None:
            self.frozen.eval()
        return self

    def parameter_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Weights and kernel matrices are decayed; biases and the scales of normalisation are not."""
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return [g for g in groups if g["params"]]

    # -- what ``save`` writes -----------------------------------------------------------------------------------

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments; a teacher or a rule of your own is given again to ``load``."""
        found = super().arguments()
        found["phases"] = _plain_phases(self.given_phases)
        if self.teacher == "given":
            found.pop("teacher")
        return found

    def structure(self) -> dict[str, Any]:
        """The offered points, those with statistics, the phase, and whether there is a frozen teacher."""
        return {
            "offered": [dict(p) for p in self._offered],
            "rows": [dict(p) for p in self.norms.points()],
            "phase": self.phases[self.phase].name,
            "held": self.held,
            "frozen": self.frozen is not None,
            "teacher": self.teacher,
        }

    def restructure(self, structure: dict[str, Any]) -> None:
        """Make this network ready for the tensors of one whose ``structure()`` is given.

        Raises:
            ValueError: a point is outside of the space, the phase is unknown, or the teacher was one of your own and
                was not given again.
        """
        if (structure["teacher"] == "given") != (self.teacher == "given"):
            raise ValueError(f"teacher: it was {structure['teacher']} when this was saved; give it again: teacher=...")
        offered = [self.space.check(p) for p in structure["offered"]]
        rows = [self.space.check(p) for p in structure["rows"]]
        self.phase = self._index(structure["phase"])
        self.held = bool(structure["held"])
        self._offered = offered
        self.norms.keep(rows)
        if self.teacher != "given":
            self.frozen = _frozen(self.model) if structure["frozen"] else None

    # -- phases -------------------------------------------------------------------------------------------------

    def enter(self, phase: str, *, hold: bool = True) -> None:
        """Go to a phase by name; with ``hold`` training stays there until ``held`` is set to False.

        On the way the phases between are entered in their order: the teacher is frozen, channels are sorted.

        Raises:
            ValueError: there is no phase of that name.
        """
        target = self._index(phase)
        if target < self.phase:
            self.phase = target
        while self.phase < target:
            self._enter(self.phase + 1)
        self.held = hold

    def _index(self, phase: str) -> int:
        names = [p.name for p in self.phases]
        if phase not in names:
            raise ValueError(f"phase: {phase!r} is not one of {', '.join(names)}")
        return names.index(phase)

    def _enter(self, number: int) -> None:
        before, after = self.phases[number - 1], self.phases[number]
        if before.axis == "teacher":
            self._snapshot(anew=True)
        if after.sorts:
            self.sort_channels(before.space)
        self.phase = number

    def _snapshot(self, *, anew: bool) -> None:
        """The frozen teacher: a copy of the largest network as it is now."""
        if self.teacher == "frozen" and (anew or self.frozen is None):
            self.frozen = _frozen(self.model)

    @torch.no_grad()
    def sort_channels(self, trained: Space | None = None) -> None:
        """Put the inner channels of every block in the order of their importance, the largest first.

        The importance of a channel is the sum of |w| over the weights that read it. The largest network computes the
        same function afterwards.

        Args:
            trained: a part of the space whose sizes were trained already; channels stay within these sizes.
        """
        sizes = self._sizes_of(trained) if trained is not None else {}
        for _, group in self._shufflable:
            weight = self.axes.slicing.importance(group)
            borders = sorted({0, group.channels, *sizes.get(group.name, ())})
            order: list[int] = []
            for low, high in pairwise(borders):
                inside = torch.sort(weight[low:high], descending=True, stable=True).indices + low
                order += inside.tolist()
            if order != list(range(group.channels)):
                self.axes.slicing.permute(group, order)
        self.norms.stale()

    def _sizes_of(self, trained: Space) -> dict[str, set[int]]:
        """The sizes that inner groups have in ``trained``: at full width, or with ``protect="all"`` at every width."""
        largest: dict[str, Value] = dict(self.space.largest)
        narrow = [largest]
        if self.protect == "all":
            for name, c in trained.coordinates.items():
                narrow += [{**largest, name: choice} for choice in c.choices if c.axis == "width"]
        found: dict[str, set[int]] = {}
        swell = {n: c.choices for n, c in trained.coordinates.items() if c.axis == "expansion"}
        for values in narrow:
            for i in range(max((len(c) for c in swell.values()), default=1)):
                sizes = self.axes.sizes({**values, **{n: c[min(i, len(c) - 1)] for n, c in swell.items()}})
                for _, group in self._shufflable:
                    found.setdefault(group.name, set()).add(sizes[group.name])
        return found

    def generator(self, step: int, student: int) -> torch.Generator:
        """The random state of student number ``student`` (from 1; 0 is the teacher) of a step: f(seed, step, r)."""
        digest = hashlib.blake2b(repr((self.seed, step, student)).encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def student(self, step: int, number: int) -> Point:
        """The architecture of student ``number`` of a step, drawn uniformly from the current phase's space."""
        return self.space.canonical(self.phases[self.phase].space.sample(self.generator(step, number)))

    # -- objectives ---------------------------------------------------------------------------------------------

    def teacher_logits(self, x: Tensor) -> Tensor:
        """The teacher's logits (B, C) on x, detached: the frozen one's, or the current largest network's."""
        with torch.no_grad():
            return self._teach()(x).detach()

    def _teach(self) -> Callable[[Tensor], Tensor]:
        if self.teacher == "live":
            return self._attacked(self.space.largest, norm="batch")
        self._snapshot(anew=False)
        frozen = self.frozen
        assert frozen is not None
        return lambda x: logits(call(frozen, x))

    def _trades(self, point: Point, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """TRADES of one architecture on the labels."""
        under = self._attacked(point)
        with torch.no_grad():
            clean = under(x)
        moved = self.attack.attack(kl_objective(under, clean), x, generator=generator)
        natural, attacked = self._logits(point, x), self._logits(point, moved)
        return trades_loss(natural, attacked, y, beta=self.beta, reduction=self.reduction)  # type: ignore[arg-type]

    def _distil(
        self, point: Point, x: Tensor, y: Tensor, reference: Tensor | None, generator: torch.Generator
    ) -> Tensor:
        """The students' loss of one architecture."""
        if self.objective == "trades" or reference is None:
            return self._trades(point, x, y, generator)
        under, teach = self._attacked(point), self._teach()
        climb: Objective = kl_objective(under, reference)
        if self.objective == "adaad":
            climb = lambda v: kl_divergence(teach(v), under(v), reduction="sum")  # noqa: E731
        moved = self.attack.attack(climb, x, generator=generator)
        attacked, natural = self._logits(point, moved), self._logits(point, x)
        options: dict[str, Any] = {"reduction": self.reduction}
        if self.objective == "rslad":
            return rslad_loss(natural, attacked, reference, **options)
        if self.objective == "ard":
            options |= {"alpha": self.alpha, "temperature": self.temperature}
            return ard_loss(natural, attacked, reference, y, **options)
        return adaad_loss(natural, attacked, reference, self.teacher_logits(moved), alpha=self.alpha, **options)

    def _logits(self, point: Point, x: Tensor) -> Tensor:
        return logits(self._run(self.axes.network(point), x, "train" if self.training else "eval"))

    def _attacked(self, point: Point, norm: str | None = None) -> Callable[[Tensor], Tensor]:
        """The function x -> logits at ``point`` as an attack sees it: no dropout, and no buffer moves."""
        network = self.axes.network(point)
        if (norm or self.attack_norm) == "eval" or not self.training:
            return lambda x: logits(self._run(network, x, "eval"))
        buffers = {n: b for n, b in network.views(self.model).items() if n.rpartition(".")[0] in self.norms.columns}
        scratch = {
            n: b.clone() for n, b in buffers.items()
            if n.endswith((".running_mean", ".running_var", ".num_batches_tracked"))
        }  # fmt: skip
        return lambda x: logits(self._run(network, x, "batch", scratch))

    # -- running ------------------------------------------------------------------------------------------------

    def _run(
        self, network: SubNetwork, x: Any, mode: Literal["train", "batch", "eval"], tensors: Mapping[str, Tensor] = {}
    ) -> Any:
        """The sub-network on x; in "batch" mode only its normalisation layers are in training mode."""
        network.set_mode(self.model, mode == "train")
        if mode == "batch":
            for name in self.norms.columns.keys() - self.norms.still:
                if name in network.modules:
                    network.modules[name].train()
        return network.run(self.model, x, {**tensors, **self._filters(network)})

    def _filters(self, network: SubNetwork) -> dict[str, Tensor]:
        """Smaller filters that pass through their matrices: w_5 = crop(w_7) M_75, w_3 = crop(w_5) M_53."""
        found: dict[str, Tensor] = {}
        if not self.matrices:
            return found
        modules = network.modules
        for name, full in self._convolutions().items():
            if name not in modules:
                continue  # depth has left this block out
            size = int(modules[name].kernel_size[0])  # type: ignore[index]
            if size == full:
                continue
            weight: Tensor = self.model.get_submodule(name).weight  # type: ignore[assignment]
            for dim, runs in network.cuts.get(f"{name}.weight", {}).items():
                if dim < 2:
                    pieces = [weight.narrow(dim, at, n) for at, n in runs]
                    weight = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
            for smaller in self._chain(full):
                margin = (weight.shape[-1] - smaller) // 2
                for dim in range(2, weight.ndim):
                    weight = weight.narrow(dim, margin, smaller)
                matrix = self.matrices[f"{name.replace('.', '/')}:{smaller}"]
                weight = F.linear(weight.flatten(2), matrix).reshape(weight.shape)
                if smaller == size:
                    break
            found[f"{name}.weight"] = weight
        return found

    def _statistics(self, point: Point, network: SubNetwork, table: NormTable | None = None) -> dict[str, Tensor]:
        table = self.norms if table is None else table
        if not table:
            return {}
        return table.tensors(point, network.modules)

    # -- normalisation statistics -------------------------------------------------------------------------------

    def calibrate(
        self,
        data: Iterable[Any] | Tensor,
        *,
        points: Sequence[Mapping[str, Value]] | None = None,
        estimator: Estimator = "ofa",
        calibrate_on: Literal["clean", "both"] | None = None,
    ) -> None:
        """Re-estimate normalisation statistics on the first ``calibration_images`` inputs of ``data``.

        Args:
            data: batches, or one tensor of inputs (N, ...).
            points: architectures of the space; the offered ones by default.
            estimator: see ``pliant.core.calibration``; "ofa" is the reference code's.
            calibrate_on: "clean" inputs, or "both": these and as many attacked ones; as constructed where None.

        Raises:
            ValueError: ``data`` has no batches, or an argument is unknown.
        """
        check_estimator(estimator)
        if not self.norms:
            return
        batches = self._calibration(data)
        for point in [self._known(p) for p in points] if points is not None else self._offered:
            self._estimate(self.norms, point, batches, estimator, calibrate_on or self.calibrate_on)

    def _calibration(self, data: Iterable[Any] | Tensor) -> list[Tensor]:
        """Inputs for the statistics, in batches of the size wanted."""
        taken: list[Tensor] = []
        left, device = self.calibration_images, device_of(self.model)
        for x in inputs_of(data):
            if left <= 0:
                break
            part: Tensor = x[:left]  # type: ignore[index, assignment]
            taken.append(part)
            left -= len(part)
        if not taken:
            raise ValueError("data: it has no batches to estimate normalisation statistics on")
        return [to_device(part, device) for part in torch.split(torch.cat(taken), self.calibration_batch)]

    def _estimate(
        self, table: NormTable, point: Point, batches: Sequence[Tensor], estimator: Estimator, on: str
    ) -> None:
        network = self.axes.network(point)
        filters = {n: t.detach() for n, t in self._filters(network).items()}
        if on == "both":
            batches = [*batches, *(self._calibration_attack(point, x) for x in batches)]

        def run(x: Tensor, tensors: Mapping[str, Tensor]) -> Any:
            return network.run(self.model, x, {**tensors, **filters})

        table.estimate(point, network.skeleton, run, batches, estimator)

    def _calibration_attack(self, point: Point, x: Tensor) -> Tensor:
        """The x' that maximises KL(S(x) || S(x')) in batch statistics; it needs neither label nor teacher."""
        training = self.training
        self.training = True  # of this module alone: batch statistics
        try:
            under = self._attacked(point, norm="batch")
            with torch.no_grad():
                clean = under(x)
            return self.attack.attack(kl_objective(under, clean), x, generator=self.generator(-1, 0))
        finally:
            self.training = training

    def deployed(self, point: Mapping[str, Value], data: Iterable[Any] | Sequence[Tensor]) -> nn.Module:
        """The plain network of any architecture, statistics estimated on ``data``, this network left as it was.

        Raises:
            ValueError: ``point`` is outside of the space, or ``data`` has no batches.
        """
        known = self._known(point)
        network = self.axes.network(known)
        table = NormTable(self.model, [known]).to(device_of(self.model))
        if table:
            self._estimate(table, known, self._calibration(data), "ofa", self.calibrate_on)
        statistics = self._statistics(known, network, table)
        return network.extract(self.model, {**statistics, **self._filters(network)})

    # -- choosing -----------------------------------------------------------------------------------------------

    def flops(self, point: Mapping[str, Value]) -> int:
        """FLOPs for one sample at any architecture of the space (2 per multiply-add)."""
        return self.axes.flops(point)

    def set_points(self, points: Iterable[Mapping[str, Value]], data: Iterable[Any] | None = None) -> list[Point]:
        """From now on ``points()`` are these (what a search found), in the order of their FLOPs.

        Args:
            points: architectures of the space.
            data: batches to estimate their normalisation statistics on; otherwise call ``calibrate``.

        Raises:
            ValueError: there are none, or one is outside of the space.
        """
        chosen = sorted(dict.fromkeys(self._known(p) for p in points), key=self.flops)
        if not chosen:
            raise ValueError("points: there are none to offer")
        self._offered = chosen
        self.norms.keep([*chosen, *(p for p in (self.point,) if p in self.norms and p not in chosen)])
        if data is not None:
            self.calibrate(data)
        return list(chosen)

    def extra_repr(self) -> str:
        """The space, the points offered, the phase and the setting."""
        return (
            f"architectures={self.space.size:.3g}, offered={len(self._offered)}, "
            f"phase={self.phases[self.phase].name}, objective={self.objective}, at={self.point}"
        )


def _check_phase(name: str, phase: Any) -> Any:
    """An axis, or a mapping from coordinates or axes to choices."""
    if isinstance(phase, Mapping):
        return check.mapping(name, phase, lambda n, v: check.sequence(n, v, check.number), empty=False)
    return check.choice(name, phase, _TABLE)


def _rounded(group: Group, share: float) -> int:
    return min(group.channels, make_divisible(group.channels * share, group.bundle))


def _classes(name: str, model: nn.Module, example: Tensor) -> int:
    try:
        shape = tuple(check_example(model, example).shape)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error
    if len(shape) != 2 or shape[1] < 2:
        raise ValueError(f"{name}: its output has shape {shape}; logits (B, C) of two or more classes are needed")
    return shape[1]


def _frozen(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval().requires_grad_(False)


def _plain_phases(phases: Sequence[str | Mapping[str, Sequence[Value]]]) -> list[Any]:
    return [p if isinstance(p, str) else {n: list(c) for n, c in p.items()} for p in phases]


# -- the training of the paper ----------------------------------------------------------------------------------------


@dataclass
class PhaseReport:
    """What one phase did: optimiser steps, mean loss of each epoch, (step, held-out robust accuracy), the step kept."""

    name: str
    steps: int
    losses: list[float]
    scores: list[tuple[int, float]] = field(default_factory=list)
    kept: int | None = None


def train_progressively(
    net: ProARD,
    train: Iterable[Batch],
    *,
    validation: Iterable[Batch] | None = None,
    epochs: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
    lrs: Sequence[float] | None = None,
    attack: PGD | None = None,
    every: int | None = None,
    candidates: int = 3,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> list[PhaseReport]:
    """Train phase by phase, each with an optimiser and a cosine of its own, from the best state of the one before.

    The rates, warm-ups and weight decays are those of the paper's table (``net.phases``), for one device.

    Args:
        net: the network; it ends in its last phase, offered points calibrated, in evaluation mode.
        train: batches, as for ``fit``.
        validation: held-out batches. The state of the highest robust accuracy on them, the mean over ``candidates``
            architectures of the phase, is what a phase ends with. Without it a phase ends with its last state.
        epochs: of each of ``net.phases``; the paper's (with warm-up) where neither this nor ``steps`` is given.
        steps: optimiser steps of each phase.
        lrs: peak learning rates of each phase; the table's by default.
        attack: for the held-out accuracy; 20 steps of the training attack's length from a uniform start by default.
        every: steps between looks at the held-out accuracy; an epoch by default.
        candidates: architectures that are looked at, a ladder of the phase's space.
        seed: of everything random.
        progress: show progress bars.
        options: further arguments of ``fit``: ``clip``, ``accumulate``, ``accelerator``, ``optimizer``.

    Raises:
        ValueError: a list has not one entry for each phase.
    """
    for name, given in (("epochs", epochs), ("steps", steps), ("lrs", lrs)):
        if given is not None and len(given) != len(net.phases):
            names = ", ".join(p.name for p in net.phases)
            raise ValueError(f"{name}: {len(given)} numbers for {len(net.phases)} phases: {names}")
    if epochs is not None and steps is not None:
        raise ValueError(f"epochs, steps: give one of the two, got epochs={epochs} and steps={steps}")
    attack = attack if attack is not None else replace(net.attack, steps=20, start="uniform")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        images = torch.cat(net._calibration(train))
    reports = []
    for number, phase in enumerate(net.phases):
        net.enter(phase.name)
        best: dict[str, Tensor] = {}
        report = PhaseReport(phase.name, 0, [])
        amount: dict[str, int] = {"epochs": round(phase.epochs + phase.warmup)}
        if steps is not None or epochs is not None:
            given = steps if steps is not None else epochs
            assert given is not None
            amount = {"steps" if steps is not None else "epochs": given[number]}
        if 0 in amount.values():
            reports.append(report)
            continue
        period = every if every is not None else _length(train)
        points = phase.space.ladder(candidates)

        def look(
            done: int, total: int, loss: float, points: Sequence[Point] = points, period: int | None = period,
            report: PhaseReport = report, best: dict[str, Tensor] = best,
        ) -> None:  # fmt: skip
            """Keep the state if it is the best so far; the next step does not notice."""
            if validation is None or not (done == total or (period and done % period == 0)):
                return
            score = sum(robust_accuracy(net.deployed(p, images), validation, attack, seed=seed) for p in points)
            report.scores.append((done, score / len(points)))
            if report.kept is None or score / len(points) > max(s for _, s in report.scores[:-1]):
                report.kept = done
                best.update({n: t.detach().clone() for n, t in _trained(net).items()})

        history = fit(
            net, train, **amount, lr=phase.lr if lrs is None else lrs[number], weight_decay=phase.weight_decay,  # type: ignore[arg-type]
            lr_schedule=_warmed(phase.warmup / (phase.epochs + phase.warmup)), seed=seed + number, progress=progress,
            on_step=look, **options,
        )  # fmt: skip
        report.steps, report.losses = history.steps, history.losses
        if best and report.kept != history.steps:
            with torch.no_grad():
                for name, tensor in _trained(net).items():
                    tensor.copy_(best[name])
            net.norms.stale()
        reports.append(report)
    net.held = False
    net.calibrate(train)
    net.eval()
    return reports


def _trained(net: ProARD) -> dict[str, Tensor]:
    """What a phase moves: weights, buffers and kernel matrices, not the teacher and not the statistics of points."""
    return {**net.model.state_dict(), **{f"matrices.{n}": t for n, t in net.matrices.state_dict().items()}}


def _length(train: Iterable[Batch]) -> int | None:
    try:
        return len(train)  # type: ignore[arg-type]
    except TypeError:
        return None


def _warmed(share: float) -> Callable[[float], float]:
    """A linear warm-up over ``share`` of the training, then a half cosine to zero."""

    def factor(progress: float) -> float:
        if progress < share:
            return (progress + 1e-3) / (share + 1e-3)
        return 0.5 * (1 + math.cos(math.pi * (progress - share) / (1 - share)))

    return factor


# -- accuracy and robustness, predicted -------------------------------------------------------------------------------


class AccRobPredictor(nn.Module):
    """(accuracy, robust accuracy) of an architecture: one-hot features -> six hidden layers of 400 -> two outputs.

    Args:
        space: the space whose points are encoded; idle coordinates are zero.
        hidden: units of a layer.
        layers: hidden layers.

    Shapes: features (N, ``space.features``) -> (N, 2), shares in [0, 1], each the network's output plus its base value.
    """

    base: Tensor

    def __init__(self, space: Space, *, hidden: int = 400, layers: int = 6) -> None:
        super().__init__()
        self.space = space
        sizes = [space.features, *[hidden] * layers]
        body: list[nn.Module] = []
        for a, b in pairwise(sizes):
            body += [nn.Linear(a, b), nn.ReLU()]
        self.body = nn.Sequential(*body, nn.Linear(sizes[-1], 2, bias=False))
        self.register_buffer("base", torch.zeros(2))
        self.errors: dict[str, float] = {}

    def forward(self, features: Tensor) -> Tensor:
        """(N, features) -> (N, 2)."""
        return self.body(features) + self.base  # type: ignore[no-any-return]

    @torch.no_grad()
    def predict(self, points: Sequence[Mapping[str, Value]]) -> Tensor:
        """(N, 2): accuracy and robust accuracy of each point."""
        features = torch.stack([self.space.encode(p) for p in points]).to(self.base.device)
        with evaluating(self):
            return self(features).cpu()  # type: ignore[no-any-return]

    def learn(
        self,
        points: Sequence[Mapping[str, Value]],
        measured: Tensor,
        *,
        epochs: int = 50,
        batch: int = 256,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        held_out: float = 0.2,
        seed: int = 0,
    ) -> AccRobPredictor:
        """Fit to ``measured`` (N, 2), shares in [0, 1]; the errors on the held-out part are in ``errors``.

        The loss is the sum of the two mean squared errors, the optimiser Adam.

        Raises:
            ValueError: there are fewer than two points, or the shapes or the range do not fit.
        """
        measured = torch.as_tensor(measured, dtype=torch.float32)
        if len(points) < 2 or measured.shape != (len(points), 2):
            raise ValueError(f"measured: shape {tuple(measured.shape)} for {len(points)} points (at least two): (N, 2)")
        if not (measured.min() >= 0 and measured.max() <= 1):
            raise ValueError(f"measured: from {measured.min():g} to {measured.max():g}; shares in [0, 1]")
        device = self.base.device
        features = torch.stack([self.space.encode(p) for p in points]).to(device)
        measured = measured.to(device)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(points), generator=generator).to(device)
        cut = int(held_out * len(points))
        test, train = order[:cut], order[cut:]
        self.base.copy_(measured[train].mean(0))
        optimizer = torch.optim.Adam(self.parameters(), lr=lr, weight_decay=weight_decay)
        self.train()
        with torch.enable_grad():
            for _ in range(epochs):
                for rows in torch.split(train[torch.randperm(len(train), generator=generator).to(device)], batch):
                    optimizer.zero_grad()
                    error = self(features[rows]) - measured[rows]
                    error.square().mean(0).sum().backward()
                    optimizer.step()
        self.eval()
        if len(test):
            with torch.no_grad():
                wrong = (self(features[test]) - measured[test]).square().mean(0).sqrt()
            self.errors = {"accuracy": float(wrong[0]), "robustness": float(wrong[1])}
        return self

    @classmethod
    def fit(
        cls,
        net: ProARD,
        data: Iterable[Batch],
        *,
        calibrate: Iterable[Any],
        n: int = 2000,
        attack: PGD | None = None,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> AccRobPredictor:
        """Measure ``n`` architectures of ``net`` and learn from them.

        Args:
            net: the trained network; it is left as it was.
            data: held-out *training* batches, on which accuracy and robust accuracy are measured.
            calibrate: batches for the normalisation statistics of each architecture.
            n: how many; all of the space where it has no more.
            attack: 20 steps of the training attack's length from a uniform start by default.
            seed: of the sample, the attacks and the predictor.
            progress: called with (measured, in all).
            options: arguments of ``learn``.
        """
        attack = attack if attack is not None else replace(net.attack, steps=20, start="uniform")
        points = sample(net.space, n, seed)
        batches = torch.cat(net._calibration(calibrate))
        rows = []
        for i, point in enumerate(points):
            rows.append(measure_point(net, point, data, calibrate=batches, attack=attack, seed=seed))
            if progress is not None:
                progress(i + 1, len(points))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            predictor = cls(net.space)
        return predictor.to(device_of(net.model)).learn(points, torch.tensor(rows), seed=seed, **options)


def sample(space: Space, count: int, seed: int = 0) -> list[Point]:
    """``count`` different architectures drawn uniformly by coordinates; all of them where there are no more."""
    if space.size <= count:
        return list(space.enumerate())
    generator = torch.Generator().manual_seed(seed)
    found: dict[Point, None] = {}
    while len(found) < count:
        found[space.canonical(space.sample(generator))] = None
    return list(found)


def measure_point(
    net: ProARD,
    point: Mapping[str, Value],
    data: Iterable[Batch],
    *,
    calibrate: Iterable[Any] | Tensor,
    attack: PGD,
    seed: int = 0,
) -> tuple[float, float]:
    """(accuracy, robust accuracy) of the extracted network of ``point``, statistics estimated on ``calibrate``."""
    plain = net.deployed(point, calibrate)
    right = seen = 0
    with torch.no_grad():
        for batch in data:
            x, y = to_device(split_batch(batch), device_of(plain))
            y = row_classes(y, rows_of(x), "ProARD")
            right += int((logits(plain(x)).argmax(1) == y).sum())
            seen += len(y)
    if not seen:
        raise ValueError("data: it has no batches, so there is nothing to measure")
    return right / seen, robust_accuracy(plain, data, attack, seed=seed)


# -- search -----------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """An architecture that a search found: its point, predicted accuracy and robust accuracy, FLOPs for one sample."""

    point: Point
    accuracy: float
    robustness: float
    flops: int


def search(
    net: ProARD,
    predictor: AccRobPredictor,
    *,
    max_flops: float,
    population: int = 100,
    generations: int = 100,
    mutation: float = 0.1,
    seed: int = 0,
) -> list[Found]:
    """NSGA-II over predictions: the best trade-offs of accuracy and robustness within a FLOPs cap.

    Uniform crossover; each gene takes a random choice with probability ``mutation``; the cap is a constraint. What is
    returned is not dominated by anything that the search has looked at, the most robust first.

    Args:
        net: the network, for its space and FLOPs.
        predictor: (accuracy, robust accuracy) of points.
        max_flops: the cap, FLOPs for one sample.
        population: individuals.
        generations: of them.
        mutation: see above.
        seed: of the search; global random states are left as they were.

    Raises:
        ImportError: pymoo is not installed.
        ValueError: the smallest network exceeds the cap.
    """
    try:
        from pymoo.algorithms.moo.nsga2 import NSGA2  # type: ignore[import-untyped]
        from pymoo.core.mutation import Mutation  # type: ignore[import-untyped]
        from pymoo.core.problem import Problem  # type: ignore[import-untyped]
        from pymoo.core.repair import Repair  # type: ignore[import-untyped]
        from pymoo.operators.crossover.ux import UniformCrossover  # type: ignore[import-untyped]
        from pymoo.optimize import minimize  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError('the search needs pymoo: pip install "pliant[search]"') from error
    for name, number in (("population", population), ("generations", generations)):
        if number < 1:
            raise ValueError(f"{name}: {number} is not a positive number")
    if not 0 <= mutation <= 1:
        raise ValueError(f"mutation: {mutation} is not in [0, 1]")
    space = net.space
    least = net.flops(space.smallest)
    if not least <= max_flops:
        raise ValueError(f"max_flops: {max_flops:g} is below the smallest network's {least:,}")
    coordinates = list(space.coordinates.values())
    lengths = np.array([len(c.choices) for c in coordinates])
    rng = np.random.default_rng(seed)

    def decode(genes: Any) -> Point:
        values = {c.name: c.choices[int(g)] for c, g in zip(coordinates, genes, strict=True)}
        return space.canonical(Point(**values))

    def encode(point: Point) -> list[int]:
        return [c.choices.index(point[c.name]) for c in coordinates]

    seen: dict[Point, Found] = {}

    def look(points: Sequence[Point]) -> list[Found]:
        if fresh := [p for p in dict.fromkeys(points) if p not in seen]:
            for p, (accuracy, robustness) in zip(fresh, predictor.predict(fresh).tolist(), strict=True):
                seen[p] = Found(p, accuracy, robustness, net.flops(p))
        return [seen[p] for p in points]

    class Architectures(Problem):  # type: ignore[misc]
        def _evaluate(self, x: Any, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            found = look([decode(genes) for genes in x])
            out["F"] = np.array([[1 - f.accuracy, 1 - f.robustness] for f in found])
            out["G"] = np.array([[f.flops / max_flops - 1] for f in found])

    class RandomChoice(Mutation):  # type: ignore[misc]
        def _do(self, problem: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            return np.where(rng.random(x.shape) < mutation, rng.integers(lengths, size=x.shape), x)

    class Canonical(Repair):  # type: ignore[misc]
        def _do(self, problem: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            return np.array([encode(decode(genes)) for genes in x], dtype=int).reshape(x.shape)

    if coordinates:
        problem = Architectures(
            n_var=len(coordinates), n_obj=2, n_ieq_constr=1, xl=np.zeros_like(lengths), xu=lengths - 1, vtype=int
        )
        algorithm = NSGA2(
            pop_size=population, sampling=rng.integers(lengths, size=(population, len(lengths))), repair=Canonical(),
            crossover=UniformCrossover(prob=1.0), mutation=RandomChoice(prob=1.0),
        )  # fmt: skip
        state, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002
        try:
            minimize(problem, algorithm, ("n_gen", generations), seed=seed, verbose=False)
        finally:
            random.setstate(state)
            np.random.set_state(numbers)  # noqa: NPY002
    look([space.smallest])
    return pareto([f for f in seen.values() if f.flops <= max_flops])


def pareto(found: Sequence[Found]) -> list[Found]:
    """Those that no other beats in accuracy or robustness without losing in the other, the most robust first."""
    kept: list[Found] = []
    best = -math.inf  # the highest accuracy among all that are more robust
    ordered = sorted(found, key=lambda f: (-f.robustness, -f.accuracy, f.flops))
    for i, f in enumerate(ordered):
        twin = bool(kept) and (kept[-1].accuracy, kept[-1].robustness) == (f.accuracy, f.robustness)
        if f.accuracy > best or (i and twin):
            kept.append(f)
            best = max(best, f.accuracy)
    return kept
