"""What sharing costs in ProARD: a step with R students, and what a candidate costs in the search.

Ratios of time, timed in turn in one run. Written to ``benchmarks/results/proard.json``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pliant.core.adversary import PGD, kl_objective
from pliant.core.cost import Ratio, time_ratio
from pliant.elastic.proard import AccRobPredictor, ProARD, measure_point, rslad_loss, sample
from pliant.tasks.images import SmallResNet
from tables import write

BATCH, IMAGES, CANDIDATES = 64, 500, 16


def _static_step(models: Sequence[nn.Module], teacher: nn.Module, attack: PGD, x: Tensor) -> None:
    """One step of RSLAD for each of several plain networks, one after the other."""
    for model in models:
        with torch.no_grad():
            target = teacher(x)
        moved = attack.attack(kl_objective(model, target), x)
        rslad_loss(model(x), model(moved), target).backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)


def _rounded(ratio: Ratio) -> dict[str, Any]:
    median, low, high = (float(f"{v:.3g}") for v in (ratio.median, ratio.low, ratio.high))
    return {"ratio": median, "quartiles": [low, high]}


def _steps(net: ProARD, x: Tensor, y: Tensor) -> list[dict[str, Any]]:
    """A step of each phase against as many static steps of networks of the same sizes."""
    rows = []
    for phase in net.phases[1:]:
        net.enter(phase.name)
        students = [net.student(0, r) for r in range(1, phase.students + 1)]
        statics = [net.deployed(p, x).train() for p in students]
        teacher = net.frozen
        assert teacher is not None

        def shared(fresh: bool = False) -> None:
            if fresh:
                net.axes._networks.clear()
            net.train()
            net.steps.zero_()  # the same students in every repetition
            net.loss((x, y)).backward()  # type: ignore[no-untyped-call]
            net.zero_grad(set_to_none=True)

        def apart(statics: Sequence[nn.Module] = statics, teacher: nn.Module = teacher) -> None:
            _static_step(statics, teacher, net.attack, x)

        rows.append(
            {
                "phase": phase.name,
                "students": phase.students,
                "shared / separate steps": _rounded(time_ratio(shared, apart, repeats=7)),
                "the same, sub-networks built anew": _rounded(time_ratio(lambda: shared(True), apart, repeats=7)),
            }
        )
        print(rows[-1])
    return rows


def _candidates(net: ProARD, x: Tensor, y: Tensor) -> dict[str, Any]:
    """The predictor against recalibration and PGD-20 on held-out images, for the same candidates."""
    predictor = AccRobPredictor(net.space)
    points = sample(net.space, CANDIDATES)
    attack = PGD(net.eps, net.step, 20, "uniform")

    def predicted(flops: bool = False) -> None:
        predictor.predict(points)
        if flops:
            net.axes._flops.clear()
            net.axes._networks.clear()
            for p in points:
                net.flops(p)

    def measured() -> None:
        measure_point(net, points[0], [(x, y)], calibrate=x, attack=attack)

    found = {}
    for name, flops in (("predictor", False), ("predictor and FLOPs", True)):
        ratio = time_ratio(lambda: predicted(flops), measured, repeats=3, warmup=1)  # noqa: B023
        scaled = Ratio(*(v / CANDIDATES for v in (ratio.median, ratio.low, ratio.high, ratio.seconds)))
        found[f"{name} / measuring, for each candidate"] = _rounded(scaled)
        print(name, found)
    return found


def main() -> None:
    """Measure both and write the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = torch.rand(IMAGES, 1, 28, 28), torch.randint(0, 10, (IMAGES,))
    net = ProARD(SmallResNet(), x[:2], calibration_images=IMAGES)
    write(
        "proard",
        f"time ratios, SmallResNet (16, 32, 64) on 28x28, one thread. Steps: RSLAD with PGD-10, batch {BATCH}. "
        f"Candidates: statistics on {IMAGES} images and PGD-20 on {IMAGES} images against the predictor, which has to "
        "be trained on measured candidates first (2,000 in the paper)",
        steps=_steps(net, x[:BATCH], y[:BATCH]),
        search=_candidates(net, x, y),
    )


if __name__ == "__main__":
    main()
