"""What a task is: losses, distillation and qualities by hand, and every method on tasks that are no (B, C) classes."""

from __future__ import annotations

import copy
import json
import math
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import pliant
from pliant import cli
from pliant.core import objective
from pliant.core.calibration import NormTable
from pliant.core.dynamic import Dynamic, Point
from pliant.core.frontier import Frontier, Row, evaluate, measure
from pliant.core.objective import Accuracy, Quality, distillation, hard_distillation, part
from pliant.elastic import BigNAS, ProARD, SortedNet, StitchNet
from pliant.recipes import Plain
from pliant.routing import JEIDNN
from pliant.sparsity import FTWT, Consensus, PruningAdapters, RDPruning
from pliant.weights import WeightCompander


def mlp(outputs: int = 1, inputs: int = 6, hidden: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def normalised(outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, outputs))


# -- losses -----------------------------------------------------------------------------------------------------------


def test_labels_of_any_whole_kind_are_served() -> None:
    y, t = torch.randn(5, 4), torch.tensor([0, 3, 1, 2, 2])
    wanted = F.cross_entropy(y, t)
    for labels in (t, t[:, None], t.int(), t.to(torch.uint8)[:, None]):
        assert torch.equal(objective.loss(y, labels), wanted)
        assert objective.accuracy(y, labels) == objective.accuracy(y, t)
    assert torch.equal(objective.loss({"logits": y}, t), wanted)
    assert torch.equal(objective.loss(y, F.one_hot(t, 4).double()), F.cross_entropy(y, F.one_hot(t, 4).float()))
    assert objective.loss(y, t, label_smoothing=0.2) == F.cross_entropy(y, t, label_smoothing=0.2)


def test_what_is_ignored_counts_nowhere() -> None:
    y, t = torch.randn(6, 4), torch.tensor([0, 3, -100, 2, -100, 1])
    kept = t != -100
    torch.testing.assert_close(objective.loss(y, t), F.cross_entropy(y[kept], t[kept]))
    assert objective.accuracy(y, t) == (y.argmax(1) == t)[kept].sum().item() / 4
    teacher = torch.randn(6, 4)
    torch.testing.assert_close(distillation(y, teacher, t), F.cross_entropy(y[kept], teacher[kept].softmax(1)))
    hard = F.cross_entropy(y[kept], teacher[kept].argmax(1))
    torch.testing.assert_close(hard_distillation(y, teacher, t), hard)
    torch.testing.assert_close(objective.target_outputs(y, t), y[kept].gather(1, t[kept, None]).sum())
    y.requires_grad_()
    nothing = objective.loss(y, torch.full((6,), -100))
    nothing.backward()
    assert nothing == 0
    assert y.grad is not None
    assert not y.grad.any()
    assert math.isnan(objective.accuracy(y, torch.full((6,), -100)))


def test_classes_lie_along_the_dimension_that_the_shapes_tell() -> None:
    t = torch.randint(0, 5, (2, 3))
    behind, first = torch.randn(2, 3, 5), torch.randn(2, 5, 3)
    assert objective.loss(behind, t) == F.cross_entropy(behind.flatten(0, 1), t.flatten())
    assert objective.loss(first, t) == F.cross_entropy(first, t)
    assert objective.accuracy(behind, t) == pytest.approx((behind.argmax(-1) == t).float().mean().item())
    assert objective.accuracy(first, t) == pytest.approx((first.argmax(1) == t).float().mean().item())


def test_where_both_dimensions_fit_it_asks() -> None:
    y, t = torch.randn(2, 5, 5), torch.randint(0, 5, (2, 5))
    for ask in (
        lambda: objective.loss(y, t),
        lambda: objective.accuracy(y, t),
        lambda: distillation(y, y.clone(), t),
        lambda: Plain(nn.Identity(), y).loss((y, t)),
    ):
        with pytest.raises(ValueError, match="dimension 1 or along the last"):
            ask()
    last = F.cross_entropy(y.flatten(0, 1), t.flatten())
    assert objective.loss(SimpleNamespace(logits=y), t) == last  # as transformers have it
    assert objective.cross_entropy(y, t, last=True) == last
    quality = Quality(objective.next_token_accuracy)
    quality.update(y, t, 2)
    assert quality.compute() == pytest.approx(objective.next_token_accuracy(y, t))


@pytest.mark.parametrize(
    ("output", "target"),
    [
        (torch.randn(4, 1), torch.randn(4, 1)),
        (torch.randn(4, 1), torch.tensor([0, 1, 0, 1])),
        (torch.randn(4, 3), torch.randint(0, 2, (4, 3))),
        (torch.randn(4, 3), torch.rand(4, 3) + 1),
        (torch.randn(4, 3), torch.ones(4, 3, dtype=torch.bool)),
        (torch.randn(4, 3), {"boxes": torch.randn(4, 4)}),
        ({"a": torch.randn(4, 3), "b": torch.randn(4, 4)}, torch.tensor([0, 1, 2, 0])),
    ],
)
def test_what_is_not_certain_is_a_question(output: Any, target: Any) -> None:
    with pytest.raises(ValueError, match=r"target: what .* cannot be known.* give criterion="):
        objective.loss(output, target)
    with pytest.raises(ValueError, match="give metric="):
        Accuracy().update(output, target)
    with pytest.raises(ValueError, match="target: "):
        objective.target_outputs(output, target)


def test_labels_outside_the_classes_are_named() -> None:
    with pytest.raises(ValueError, match=r"labels run from 1 to 7, but the model has 4 outputs"):
        objective.loss(torch.randn(3, 4), torch.tensor([1, 7, -100]))


def test_a_criterion_is_given_the_prediction_or_the_whole_output() -> None:
    y, boxes = torch.randn(3, 4), torch.randn(3, 2)
    seen: list[Any] = []

    def criterion(output: Any, target: Any) -> Tensor:
        seen.append(output)
        return torch.zeros(())

    objective.loss({"logits": y, "boxes": boxes}, None, criterion)
    objective.loss((y, boxes), None, criterion)
    criterion.whole_output = True  # type: ignore[attr-defined]
    objective.loss({"logits": y, "boxes": boxes}, None, criterion)
    assert seen[0] is y
    assert seen[1][1] is boxes
    assert set(seen[2]) == {"logits", "boxes"}


# -- distillation -----------------------------------------------------------------------------------------------------


def test_distillation_over_tokens_is_over_the_vocabulary() -> None:
    student, teacher = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 5, requires_grad=True)
    t = torch.randint(0, 5, (2, 3))
    by_hand = -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1).mean()
    found = distillation(student, teacher, t)
    torch.testing.assert_close(found, by_hand)
    found.backward()
    assert teacher.grad is None
    maps = distillation(student.movedim(-1, 1), teacher.movedim(-1, 1), t)
    torch.testing.assert_close(maps, by_hand)
    torch.testing.assert_close(
        distillation(SimpleNamespace(logits=student), SimpleNamespace(logits=teacher), t), by_hand
    )


def test_distillation_of_real_numbers_and_of_a_dict() -> None:
    a, b = torch.randn(4, 2), torch.randn(4, 2)
    assert distillation(a, b, torch.randn(4, 2)) == F.mse_loss(a, b)
    c, d, t = torch.randn(4, 3), torch.randn(4, 3), torch.randint(0, 3, (4,))
    both = distillation({"boxes": a, "classes": c}, {"boxes": b, "classes": d}, {"classes": t, "boxes": a + 1})
    torch.testing.assert_close(both, F.mse_loss(a, b) + F.cross_entropy(c, d.softmax(1)))
    torch.testing.assert_close(distillation((c, a), (d, b), (t, a + 1)), both)
    for target in ({"classes": t}, t, [t, t, t], {"classes": t, "else": t, "more": t}):
        with pytest.raises(ValueError, match=r"distill: .* give distill="):
            distillation({"boxes": a, "classes": c}, {"boxes": b, "classes": d}, target)
    with pytest.raises(ValueError, match=r"distill: .* give distill="):
        distillation(a, b, torch.randint(0, 2, (4, 2)))


def test_targets_that_sum_to_one_are_classes_only_where_the_criterion_is_known() -> None:
    a, b, t = torch.randn(4, 3), torch.randn(4, 3), torch.eye(4, 3)
    t[3, 0] = 1.0
    over_classes = F.cross_entropy(a, b.softmax(1))
    for known in (None, nn.CrossEntropyLoss(), F.cross_entropy):
        assert distillation(a, b, t, criterion=known) == over_classes
    for real in (nn.BCEWithLogitsLoss(), nn.MSELoss()):
        assert distillation(a, b, t, criterion=real) == F.mse_loss(a, b)
    with pytest.raises(ValueError, match="sum to 1"):
        distillation(a, b, t, criterion=lambda y, z: (y - z).abs().mean())


def test_a_function_of_ones_own_gets_a_teacher_without_gradient() -> None:
    class Pair(NamedTuple):
        left: Tensor
        right: Tensor

    def how(student: Any, teacher: Any) -> Tensor:
        return (student[0] - teacher[0]).square().sum() + (student[1] - teacher[1]).abs().sum()

    s = Pair(torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True))
    t = Pair(torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True))
    found = distillation(s, t, None, how)
    assert found == how(s, t)
    found.backward()
    assert s.left.grad is not None
    assert t.left.grad is None
    assert t.right.grad is None
    carrier = SimpleNamespace(logits=t.left, more=t.right)
    take_all: Any = lambda a, b: (a.more * b.more).sum()  # noqa: E731
    take_all.whole_output = True
    distillation(SimpleNamespace(logits=s.left, more=s.right), carrier, None, take_all).backward()
    assert t.right.grad is None
    assert carrier.more.requires_grad


def test_hard_distillation_takes_classes_at_their_axis_and_real_numbers_by_the_criterion() -> None:
    a, b, t = torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.randint(0, 5, (2, 3))
    assert hard_distillation(a, b, t) == F.cross_entropy(a.flatten(0, 1), b.argmax(-1).flatten())
    c, d = torch.randn(4, 1), torch.randn(4, 1)
    assert hard_distillation(c, d, torch.randn(4, 1), nn.L1Loss()) == F.l1_loss(c, d)
    with pytest.raises(ValueError, match="give criterion="):
        hard_distillation(c, d, torch.randn(4, 1))


# -- BigNAS -----------------------------------------------------------------------------------------------------------


def _children(net: BigNAS) -> list[Point]:
    """Those that the next step will draw."""
    before = net.draws.clone()
    drawn = net.draw()
    net.draws.copy_(before)
    return drawn


def test_bignas_distils_real_numbers_by_their_distance() -> None:
    net = BigNAS(mlp(), torch.randn(2, 6), width=(0.5, 1.0), criterion=nn.MSELoss()).train()
    x, y = torch.randn(16, 6), torch.randn(16, 1)
    largest = net._run(net.space.largest, x)
    wanted = F.mse_loss(largest, y) + sum(
        F.mse_loss(net._run(p, x), largest.detach()) for p in _children(net)
    )  # fmt: skip
    found = net.loss((x, y))
    torch.testing.assert_close(found, wanted)
    ours = torch.autograd.grad(found, list(net.model.parameters()))
    theirs = torch.autograd.grad(wanted, list(net.model.parameters()))
    torch.testing.assert_close(ours, theirs)


def test_bignas_on_regression_teaches_its_smallest_child() -> None:
    x = torch.randn(256, 6)
    y = x[:, :1] + 0.5 * x[:, 1:2] + 3
    net = BigNAS(mlp(), x[:2], width=(0.5, 1.0), criterion=nn.MSELoss())
    pliant.fit(net, list(zip(x.split(32), y.split(32), strict=True)), epochs=40, lr=0.02, progress=False)
    front = measure(net, [(x, y)], metric=F.mse_loss, lower_is_better=True, repeats=0)
    worst, best = front.rows[0].quality, front.rows[-1].quality
    assert best < 0.1
    assert worst < best + 0.15


def test_bignas_distils_tokens_over_the_vocabulary() -> None:
    net = BigNAS(mlp(5), torch.randn(2, 3, 6), width=(0.5, 1.0), label_smoothing=0.0).train()
    x, y = torch.randn(4, 3, 6), torch.randint(0, 5, (4, 3))
    z = net._run(net.space.largest, x)
    wanted = F.cross_entropy(z.flatten(0, 1), y.flatten())
    for p in _children(net):
        wanted = wanted - (z.detach().softmax(-1) * net._run(p, x).log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(net.loss((x, y)), wanted)


def test_bignas_searches_in_the_direction_of_its_metric() -> None:
    x = torch.randn(64, 6)
    data = [(x, x[:, :1])]
    net = BigNAS(mlp(hidden=16), x[:2], width=(0.25, 0.5, 1.0), criterion=nn.MSELoss())
    pliant.fit(net, data, steps=5, lr=0.01, progress=False)
    options = {"trials": 3, "metric": F.mse_loss, "flops": 1e9}
    low, high = (net.search(data, data, lower_is_better=lower, **options) for lower in (True, False))
    assert min(t.quality for t in low.trials) == next(t.quality for t in low.trials if t.point == low.best)
    assert max(t.quality for t in high.trials) == next(t.quality for t in high.trials if t.point == high.best)


# -- outputs of two heads, by a criterion of one's own ----------------------------------------------------------------


class TwoHeads(nn.Module):
    """Images (B, 1, 8, 8) to classes (B, 3) and boxes (B, 4)."""

    def __init__(self, form: str = "dict") -> None:
        super().__init__()
        self.form = form
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.classes, self.boxes = nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        h = self.stem(x).mean((2, 3))
        c, b = self.classes(h), self.boxes(h)
        return {"classes": c, "boxes": b} if self.form == "dict" else (c, b)


def both(output: Any, target: Any) -> Tensor:
    c, b = (output["classes"], output["boxes"]) if isinstance(output, Mapping) else output
    t, wanted = (target["classes"], target["boxes"]) if isinstance(target, Mapping) else target
    return F.cross_entropy(c, t) + F.mse_loss(b, wanted)


IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(3))
BOTH = {"classes": torch.arange(8) % 3, "boxes": torch.rand(8, 4, generator=torch.Generator().manual_seed(4))}
MAKERS: dict[str, Callable[[nn.Module], Dynamic]] = {
    "sortednet": lambda m: SortedNet(m, IMAGES, width=(0.5, 1.0), criterion=both),
    "sortednet-sum": lambda m: SortedNet(m, IMAGES, width=(0.5, 1.0), mode="sum", criterion=both),
    "bignas": lambda m: BigNAS(m, IMAGES, width=(0.5, 1.0), criterion=both),
    "consensus": lambda m: Consensus(m, IMAGES, granularity="channel", keep=0.5, criterion=both),
    "adapters": lambda m: PruningAdapters(m, IMAGES, density=(0.5,), rank=2, criterion=both),
    "rd": lambda m: RDPruning(m, IMAGES, sparsity=(0.5,), criterion=both),
    "ftwt": lambda m: FTWT(m, IMAGES, mass=0.9, criterion=both),
    "compander": lambda m: WeightCompander(m, IMAGES, criterion=both),
    "plain": lambda m: Plain(m, IMAGES, both),
}


@pytest.mark.parametrize("form", ["dict", "tuple"])
@pytest.mark.parametrize("name", MAKERS)
def test_two_heads_by_a_criterion_of_ones_own(name: str, form: str) -> None:
    model = TwoHeads(form)
    net = MAKERS[name](model).train()
    batch = (IMAGES, BOTH if form == "dict" else tuple(BOTH.values()))
    value = net.loss(batch)
    value.backward()
    assert value.isfinite()
    assert value > 0
    heads = [p.grad for n, p in net.named_parameters() if "boxes" in n and p.requires_grad and p.grad is not None]
    moved = heads or [p.grad for p in net.parameters() if p.grad is not None]  # adapters stand elsewhere
    assert sum(float(g.abs().sum()) for g in moved) > 0
    if name in ("bignas", "sortednet-sum", "sortednet"):
        net.eval()
        torch.testing.assert_close(net.loss(batch), both(net(IMAGES), BOTH))


def test_bignas_distils_key_by_key_or_as_it_is_told() -> None:
    net = BigNAS(TwoHeads(), IMAGES, width=(0.5, 1.0), criterion=both).train()
    z = net._run(net.space.largest, IMAGES)
    wanted = both(z, BOTH)
    for p in _children(net):
        y = net._run(p, IMAGES)
        wanted = wanted + F.cross_entropy(y["classes"], z["classes"].detach().softmax(1))
        wanted = wanted + F.mse_loss(y["boxes"], z["boxes"].detach())
    torch.testing.assert_close(net.loss((IMAGES, BOTH)), wanted)

    def how(student: Any, teacher: Any) -> Tensor:
        return (student["boxes"] - teacher["boxes"]).abs().mean()

    own = BigNAS(copy.deepcopy(net.model), IMAGES, width=(0.5, 1.0), criterion=both, distill=how).train()
    z = own._run(own.space.largest, IMAGES)
    wanted = both(z, BOTH) + sum(how(own._run(p, IMAGES), z) for p in _children(own))
    torch.testing.assert_close(own.loss((IMAGES, BOTH)), wanted)


def test_stitching_learns_from_a_teacher_of_real_numbers() -> None:
    x, y, teacher = torch.randn(8, 6), torch.randn(8, 1), mlp(hidden=4)
    anchors = [
        nn.Sequential(
            nn.Linear(6, h), nn.Sequential(*[nn.Sequential(nn.Linear(h, h), nn.Tanh()) for _ in range(3)]),
            nn.Linear(h, 1),
        )
        for h in (4, 8)
    ]  # fmt: skip
    net = StitchNet(anchors, x, teacher=teacher, criterion=nn.MSELoss()).eval()
    output = net(x)
    torch.testing.assert_close(net.loss((x, y)), 0.5 * F.mse_loss(output, y) + 0.5 * F.mse_loss(output, teacher(x)))


# -- parts of batches -------------------------------------------------------------------------------------------------


def test_lists_of_boxes_are_parted_between_images() -> None:
    x = torch.arange(4.0)[:, None]
    boxes = [torch.full((n, 4), float(i)) for i, n in enumerate((2, 0, 5, 4))]
    for targets in (boxes, tuple(boxes), [{"boxes": b, "labels": torch.zeros(len(b))} for b in boxes]):
        parts = part(x, targets, 2)
        assert [len(t) for _, t in parts] == [2, 2]
        for rows, told in parts:
            for i, t in zip(rows[:, 0].tolist(), told, strict=True):
                assert t is targets[int(i)]


def test_targets_over_all_samples_are_parted_in_each() -> None:
    x, a, b = torch.randn(4, 2), torch.arange(4), torch.randn(4, 3)
    for targets in ((a, b), [a, b], {"a": a, "b": b}):
        parts = [list(t.values()) if isinstance(t, dict) else list(t) for _, t in part(x, targets, 4)]
        assert torch.equal(torch.cat([p[0] for p in parts]), a)
        assert torch.equal(torch.cat([p[1] for p in parts]), b)
    two = part(x[:2], [a[:2], b[:2]], 2)  # as many targets as rows, as a loader's last batch may have
    assert [len(t[0]) for _, t in two] == [1, 1]
    assert torch.equal(part([x, b], a, 2)[1][0][1], b[2:])
    with pytest.raises(ValueError, match="one for each sample or 2 targets over all"):
        part(x[:2], [b[:2], b[2:]], 2)
    assert len(part(x[:2], [b[:2], b[2:]], 1)) == 1
    for targets in (torch.arange(3), torch.arange(8), [1, 2, 3]):
        with pytest.raises(ValueError, match="batch: 4 inputs"):
            part(x, targets, 2)
    with pytest.raises(ValueError, match="no rows"):
        part(x[:0], a[:0], 2)


def test_parts_are_as_equal_as_can_be_and_no_smaller_than_wanted() -> None:
    x, y = torch.randn(11, 2), torch.arange(11)
    assert [len(t) for _, t in part(x, y, 4)] == [2, 3, 3, 3]
    assert [len(t) for _, t in part(x[:3], y[:3], 4)] == [1, 1, 1]
    assert [len(t) for _, t in part(x[:7], y[:7], 4, least=2)] == [2, 2, 3]
    assert [len(t) for _, t in part(x[:1], y[:1], 4, least=2)] == [1]


def test_sortednet_parts_boxes_between_images() -> None:
    seen: list[list[int]] = []

    def criterion(output: Tensor, target: list[Tensor]) -> Tensor:
        assert len(output) == len(target)
        seen.append([int(t[0, 0]) for t in target])
        return output.sum() * 0

    net = SortedNet(mlp(4), torch.randn(2, 6), width=(0.5, 1.0), criterion=criterion).train()
    net.loss((torch.randn(8, 6), [torch.full((8, 4), float(i)) for i in range(7)] + [torch.full((3, 4), 7.0)]))
    assert seen == [[0, 1], [2, 3], [4, 5], [6, 7]]


# -- small last batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("norm", [False, True])
def test_small_last_batches(rows: int, norm: bool) -> None:
    x, y = torch.randn(16 + rows, 6), torch.randint(0, 3, (16 + rows,))
    model = normalised() if norm else mlp(3)
    net = SortedNet(model, x[:2], width=(0.5, 1.0))
    data = [(x[:8], y[:8]), (x[8:16], y[8:16]), (x[16:], y[16:])]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        history = pliant.fit(net, data, epochs=2, progress=False)
    left_out = [w for w in told if "a batch of one row is left out" in str(w.message)]
    assert len(left_out) == (1 if norm and rows == 1 else 0)
    assert history.steps == 6
    assert len(history.losses) == 2
    assert all(map(math.isfinite, history.losses))
    assert len(measure(net, data, repeats=0)) == 2


def test_a_batch_that_is_left_out_changes_nothing() -> None:
    x, y = torch.randn(9, 6), torch.randint(0, 3, (9,))
    model = normalised()
    whole, single = (x[:8], y[:8]), (x[8:], y[8:])
    nets = [Plain(copy.deepcopy(model), x[:2]) for _ in range(2)]
    options: dict[str, Any] = {"steps": 1, "lr_schedule": "constant", "weight_decay": 0.0, "progress": False}
    pliant.fit(nets[0], [whole], **options)
    with pytest.warns(UserWarning, match="left out"):
        pliant.fit(nets[1], [whole, single], accumulate=2, **options)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)  # the mean gradient of the one batch that counts
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ValueError, match="all of its batches have one row"),
    ):
        pliant.fit(Plain(model, x[:2]), [single], steps=3, progress=False)


def test_nothing_else_is_swallowed() -> None:
    def refuse(output: Tensor, target: Tensor) -> Tensor:
        raise ValueError("Expected something else")

    with pytest.raises(ValueError, match="something else"):
        pliant.fit(Plain(mlp(3), torch.randn(2, 6), refuse), [(torch.randn(1, 6), torch.zeros(1).long())], steps=1)

    class Pooled(nn.Module):  # one value per channel whatever the batch
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(x.mean(0, keepdim=True)).expand(len(x), -1))

    with pytest.raises(ValueError, match="more than 1 value per channel"):
        pliant.fit(Plain(Pooled(), torch.randn(2, 6)), [(torch.randn(4, 6), torch.zeros(4).long())], steps=1)


def test_statistics_pass_over_single_values() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    at, x = Point(width=1.0), torch.randn(12, 6)

    def run(x: Tensor, tensors: Mapping[str, Tensor]) -> Any:
        return torch.func.functional_call(model, dict(tensors), (x,))

    tables = [NormTable(model, [at]) for _ in range(2)]
    tables[0].estimate(at, model, run, [x[:6], x[6:]])
    tables[1].estimate(at, model, run, [x[:6], x[:1], x[6:]])
    assert torch.equal(tables[0].mean, tables[1].mean)
    assert torch.equal(tables[0].var, tables[1].var)
    with pytest.raises(ValueError, match="none of its batches"):
        tables[0].estimate(at, model, run, [x[:1]])


# -- measuring --------------------------------------------------------------------------------------------------------


class Error:
    """Mean squared error over all numbers, with the interface of torchmetrics, its ``==`` included."""

    higher_is_better = False

    def __init__(self) -> None:
        self.total, self.count, self.resets = 0.0, 0, 0

    def __eq__(self, other: object) -> Any:
        return Error()  # compositional, and true whatever it is compared with

    __hash__ = None  # type: ignore[assignment]

    def update(self, output: Tensor, target: Tensor) -> None:
        self.total += float((output - target).square().sum())
        self.count += target.numel()

    def compute(self) -> Tensor:
        return torch.tensor(self.total / self.count)

    def reset(self) -> None:
        self.total, self.count = 0.0, 0
        self.resets += 1


def test_a_metric_that_accumulates_and_knows_its_direction() -> None:
    x, y = torch.randn(10, 6), torch.randn(10, 1)
    metric = Error()
    metric.update(y, y + 5)  # its own state is not looked at, and not touched
    net = Plain(mlp(), x[:2])
    front = measure(net, [(x[:7], y[:7]), (x[7:], y[7:])], metric=metric, repeats=0)
    assert front.lower_is_better
    assert front.metric == "Error"
    assert front.rows[0].quality == pytest.approx(F.mse_loss(net(x), y).item(), rel=1e-5)
    assert metric.total == pytest.approx(250)
    assert metric.resets == 0
    by_function = evaluate(net, [(x[:7], y[:7]), (x[7:], y[7:])], F.mse_loss)  # weighted by rows
    assert by_function == pytest.approx(front.rows[0].quality, rel=1e-5)
    assert not measure(net, [(x, y)], metric=metric, lower_is_better=False, repeats=0).lower_is_better
    with pytest.raises(TypeError, match="got the class Error"):
        measure(net, [(x, y)], metric=Error, repeats=0)
    with pytest.raises(TypeError, match="expected a function"):
        measure(net, [(x, y)], metric=3, repeats=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give metric="):
        measure(net, [(x, y)], repeats=0)


def test_batches_of_several_lengths_and_dict_targets() -> None:
    model = mlp(5)
    data = [(torch.randn(4, t, 6), torch.randint(0, 5, (4, t))) for t in (2, 3, 7)]
    net = Plain(model, data[0][0])
    front = measure(net, data, repeats=0)
    right = sum(int((model(x).argmax(-1) == y).sum()) for x, y in data)
    assert front.rows[0].quality == right / (4 * 12)
    assert front.rows[0].flops == 2 * (6 * 8 + 8 * 5) * 12 * 4 / 12  # per sample, of which there are 12
    images = [(torch.randn(2, 1, s, s), {k: v[:2] for k, v in BOTH.items()}) for s in (8, 12)]
    heads = TwoHeads()
    found = measure(Plain(heads, images[0][0], both), images, metric=lambda y, t: float(both(y, t)), repeats=0)
    assert found.rows[0].quality == pytest.approx(sum(float(both(heads(x), t)) for x, t in images) / 2, rel=1e-5)


def test_measure_keeps_no_outputs() -> None:
    alive: list[Any] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(3)
            self.most = 0

        def forward(self, x: Tensor) -> Tensor:
            self.most = max(self.most, sum(ref() is not None for ref in alive))
            y: Tensor = self.inner(x)
            alive.append(weakref.ref(y))
            return y

    model = Watched()
    data = [(torch.randn(4, 6), torch.randint(0, 3, (4,))) for _ in range(6)]
    net = Plain(model, data[0][0])
    alive.clear()
    model.most = 0
    measure(net, data, repeats=0)
    assert len(alive) >= 6
    assert model.most == 0
    assert not any(ref() is not None for ref in alive)


def test_counts_are_of_the_network_alone_and_what_is_unknown_is_told() -> None:
    x, y = torch.randn(40, 6), torch.randint(0, 3, (40,))

    def dear(output: Tensor, target: Tensor) -> Tensor:
        return (output @ output.T).trace()

    assert measure(Plain(mlp(3), x), [(x, y)], metric=dear, repeats=0).rows[0].flops == 2 * (6 * 8 + 8 * 3)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) + torch.linalg.svdvals(x[:, None] * torch.ones(1, 6, 1)).sum() * 0

    with pytest.warns(UserWarning, match="no formula is known"):
        row = measure(Plain(Odd(), x), [(x, y)], repeats=0).rows[0]
    assert any("svd" in name for name in row.unknown)


def _row(cost: int, quality: float) -> Row:
    return Row(Point(width=cost), quality, cost, cost, cost, cost, 1.0, 1.0, 1.0, True)


def test_a_frontier_of_errors() -> None:
    front = Frontier((_row(1, 5.0), _row(2, 1.0), _row(3, 2.0)), "net", lower_is_better=True, metric="error")
    assert front.best() == Point(width=2)
    assert front.best(flops=1) == Point(width=1)
    assert [r.quality for r in front.pareto()] == [5.0, 1.0]
    assert front.pareto().lower_is_better
    assert front.quality_at(3) == 1.0
    assert front.quality_at(0) == float("inf")
    worse = Frontier((_row(1, 5.0), _row(2, 3.0)), lower_is_better=True)
    assert front.dominates(worse)
    assert not worse.dominates(front)
    with pytest.raises(ValueError, match="better when low"):
        front.dominates(Frontier((_row(1, 5.0),)))
    assert Frontier.from_dicts(json.loads(json.dumps(front.to_dicts())), "net") == front
    up = Frontier(front.rows)
    assert up.best() == Point(width=1)
    assert len(up.pareto()) == 1
    assert up.quality_at(0) == float("-inf")
    assert "lower_is_better" not in up.to_dicts()[0]
    pytest.importorskip("matplotlib")
    axes = front.plot().axes[0]
    assert axes.get_ylabel() == "test error (lower is better)"
    assert sorted(axes.lines[0].get_ydata()) == [1.0, 2.0, 5.0]  # in its own sign and scale
    assert max(up.plot().axes[0].lines[0].get_ydata()) == 500.0


def test_a_metric_of_several_numbers_is_refused() -> None:
    quality = Quality(SimpleNamespace(update=lambda *_: None, reset=lambda: None, compute=lambda: torch.ones(2)))
    quality.update(torch.randn(2, 3), torch.zeros(2).long(), 2)
    with pytest.raises(ValueError, match="several numbers"):
        quality.compute()


# -- methods that need classes ----------------------------------------------------------------------------------------


def test_methods_that_need_one_class_for_each_row_say_so() -> None:
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])

    def network() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(),
            nn.Sequential(*[nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(3)]),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
        )  # fmt: skip

    plain = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    nets = [
        JEIDNN(network(), images, cost_weights=(0.5,)),
        ProARD(plain, images, expansion=(1.0,), width=(0.5, 1.0), divisor=1, attack_steps=1),
    ]
    bad = (torch.rand(4, 1), torch.randint(0, 2, (4, 3)), torch.ones(4, dtype=torch.bool), [0, 1, 2, 0])
    for net in nets:
        for target in (*bad, torch.tensor([0, 1, -100, 2])):
            with pytest.raises(ValueError, match=r"target: .* needs one class for each of the 4 rows, .*; got "):
                net.train().loss((images, target))
    values = [nets[0].train().loss((images, t)) for t in (labels, labels[:, None], labels.int())]
    assert values[0] == values[1] == values[2]
    assert nets[1].train().loss((images, labels[:, None].int())).isfinite()


# -- the command line -------------------------------------------------------------------------------------------------

CODE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
def network():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
def line():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
def few():
    x = torch.randn(80, 6, generator=torch.Generator().manual_seed(0)); y = x[:, :3].argmax(1)
    return TensorDataset(x[:40], y[:40]), TensorDataset(x[40:60], y[40:60]), TensorDataset(x[60:], y[60:])
def real():
    return tuple(TensorDataset(x.tensors[0], x.tensors[0][:, :1]) for x in few())
def error(output, target):
    return (output - target).square().mean()
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "task_of_mine.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return ["compare", "--methods", "sortednet", "--epochs", "1", "--json"]


def test_compare_with_fewer_samples_than_a_batch(own: list[str]) -> None:
    found = CliRunner().invoke(cli.app, [*own, "--model", "task_of_mine:network", "--data", "task_of_mine:few"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["results"][0]["test"]


def test_compare_on_real_numbers(own: list[str]) -> None:
    data = [*own, "--model", "task_of_mine:line", "--data", "task_of_mine:real"]
    for given in ([], ["--criterion", "torch.nn:MSELoss"]):
        result = CliRunner().invoke(cli.app, [*data, *given])
        assert result.exit_code != 0
        assert ("give metric=" if given else "give criterion=") in str(result.exception)
    given = ["--criterion", "torch.nn:MSELoss", "--metric", "task_of_mine:error", "--lower-is-better"]
    result = CliRunner().invoke(cli.app, [*data, *given, "--budget", "flops=1e9"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    rows = [row for r in found["results"] for front in r["validation"] for row in front]
    assert all(row["metric"] == "error" and row["lower_is_better"] for row in rows)
    name, point = found["winner"]["name"], found["winner"]["point"]
    chosen = next(r for r in found["results"] if r["name"] == name)["validation"][-1]
    assert next(r["quality"] for r in chosen if r["point"] == point) == min(row["quality"] for row in rows)


def test_losses_as_metrics_know_their_direction() -> None:
    for metric in (nn.MSELoss(), F.mse_loss, F.cross_entropy):
        assert objective.Quality(metric).lower_is_better is True
    assert objective.Quality().lower_is_better is False


def test_a_point_of_nan_is_never_the_best() -> None:
    rows = [Row(Point(size=i), q, i, i, i, i, 1.0, 1.0, 1.0, True) for i, q in enumerate((math.nan, 0.5, 0.7))]
    for lower in (False, True):
        front = Frontier(tuple(rows), lower_is_better=lower)
        assert front.best()["size"] == (1 if lower else 2)
        assert all(not math.isnan(r.quality) for r in front.pareto())


def test_boxes_of_each_image_stay_whole_also_where_all_have_as_many_as_there_are_images() -> None:
    x, boxes = torch.randn(4, 3, 8, 8), [{"boxes": torch.randn(4, 4)} for _ in range(4)]
    for targets in (boxes, tuple(boxes)):
        parts = objective.part(x, targets, 2)
        assert [len(y) for _, y in parts] == [2, 2]
        assert all(b["boxes"].shape == (4, 4) for _, y in parts for b in y)
    labels, weight = torch.arange(2), torch.tensor(0.5)
    for _, (mine, same) in objective.part(x[:2], (labels, weight), 2):
        assert mine.shape == (1,)
        assert same is weight


def test_distillation_of_a_mapping_never_pairs_targets_by_their_place() -> None:
    out = {"labels": torch.randn(3, 4), "boxes": torch.randn(3, 4)}
    with pytest.raises(ValueError, match="distill"):
        objective.distillation(out, out, (torch.rand(3, 4), torch.tensor([0, 1, 2])))


def test_maps_of_transformers_with_as_many_classes_as_pixels_are_asked_for() -> None:
    class Output:
        logits = torch.randn(2, 5, 5, 5)

    with pytest.raises(ValueError, match="dimension 1 or along the last"):
        objective.loss(Output(), torch.randint(0, 5, (2, 5, 5)))
