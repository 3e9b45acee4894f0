from __future__ import annotations

import pytest
import torch

from pliant.tasks import detection


def perfect(targets: list[detection.Boxes], classes: int) -> list[torch.Tensor]:
    outputs = []
    for kinds, boxes in targets:
        logits = torch.full((len(kinds) + 3, classes), -9.0)
        logits[torch.arange(len(kinds)), kinds] = 5.0
        outputs.append(torch.cat([logits, torch.cat([boxes, torch.zeros(3, 4)])], 1))
    return outputs


def test_average_precision_of_the_truth_and_of_nothing() -> None:
    data = detection.synthetic(16)
    targets = data.test[1]
    assert detection.average_precision(perfect(targets, 2), targets, 2) == pytest.approx(1.0, abs=0.2)
    alone = [(k[:1], b[:1]) for k, b in targets]  # no two boxes that overlap
    assert detection.average_precision(perfect(alone, 2), alone, 2) == pytest.approx(1.0)
    wrong = [torch.cat([o[:, :2].flip(1), o[:, 2:]], 1) for o in perfect(alone, 2)]
    assert detection.average_precision(wrong, alone, 2) < 0.5  # the right boxes come after all wrong ones
    with pytest.raises(ValueError, match="no box"):
        detection.average_precision([torch.zeros(3, 6)], [(torch.zeros(0).long(), torch.zeros(0, 4))], 2)


def test_average_precision_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0.0, 0.2, 0.2], [0.5, 0.5, 0.7, 0.7]])
    target = [(torch.zeros(2).long(), boxes)]
    elsewhere = torch.tensor([0.8, 0.1, 0.9, 0.2])
    rows = [torch.cat([torch.tensor([s]), b]) for s, b in ((3.0, boxes[0]), (2.0, elsewhere), (1.0, boxes[1]))]
    # Hit, miss, hit: precision 1 at recall 1/2, 2/3 at recall 1.
    assert detection.average_precision([torch.stack(rows)], target, 1) == pytest.approx(0.5 + 0.5 * 2 / 3)
    twice = torch.stack([rows[0], rows[0], rows[2]])  # a second detection of the same box is suppressed
    assert detection.average_precision([twice], target, 1) == pytest.approx(1.0)


def test_iou_and_generalised_iou() -> None:
    a = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.5, 1.0]])
    assert detection.iou(a, a).tolist() == [[1.0, 0.5], [0.5, 1.0]]
    far = torch.tensor([[2.0, 0.0, 3.0, 1.0], [0.0, 0.0, 0.5, 1.0]])
    assert detection._giou(a, far).tolist() == pytest.approx([-1 / 3, 1.0])


def test_the_detector_learns_the_shapes() -> None:
    data = detection.synthetic(24)
    torch.manual_seed(0)
    model = detection.GridDetector(2, 48, 64, features=32, layers=1, inner=32)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for epoch in range(25):
        for x, y in detection.batches(data.train, 6, epoch):
            optimizer.zero_grad()
            loss = model.loss(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    with torch.no_grad():
        found = list(model(data.train[0]))
    assert detection.average_precision(found, data.train[1], 2) > 0.3
    assert model(data.test[0]).shape == (6, 48, 6)


def test_blood_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        data = detection.bccd()
    except FileNotFoundError:
        pytest.skip("bccd.npz is not at hand")
    assert [len(p[0]) for p in (data.train, data.validation, data.test)] == [205, 87, 72]
    assert data.train[0].shape[1:] == (3, 120, 160)
    assert sum(len(k) for p in (data.train, data.validation, data.test) for k, _ in p[1]) == 4888
    assert all(bool(((b >= 0) & (b <= 1)).all()) for _, b in data.train[1])
    monkeypatch.setenv("PLIANT_DATA", "/nowhere")
    with pytest.raises(FileNotFoundError, match=r"bccd\.npz.*synthetic"):
        detection.bccd()
