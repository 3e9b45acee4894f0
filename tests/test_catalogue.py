"""What every method of the catalogue owes, present and to come: each test runs over all of ``cases.CASES``."""

from __future__ import annotations

import contextlib
import copy
import random
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pliant
from cases import CASES, Case
from pliant import catalog
from pliant.core import training
from pliant.core.dynamic import Dynamic, NotStaticError
from pliant.core.inputs import logits
from pliant.core.persistence import read_folder

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import arguments
import damage

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_method = pytest.mark.parametrize("case", list({c.slug: c for c in reversed(CASES)}.values()), ids=str)
pytestmark = pytest.mark.filterwarnings("ignore")

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01),
}


def train(net: Dynamic, case: Case, **options: Any) -> training.History:
    batches = case.batches(3)
    return pliant.fit(net, batches, validation=batches[:1], **{"epochs": 2, "lr": 0.01, "progress": False} | options)


def trained(case: Case) -> Dynamic:
    net = case.build()
    train(net, case)
    return net


def modes(net: nn.Module) -> dict[str, bool]:
    """The training flag of every module."""
    return {name: m.training for name, m in net.named_modules()}


def answers(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return logits(net(x))


def differences(one: Any, two: Any, at: str = "") -> list[str]:
    """Places in which two nests of values differ, bit for bit."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        same = one.dtype == two.dtype and one.shape == two.shape and torch.equal(one.nan_to_num(), two.nan_to_num())
        return [] if same else [at]
    if isinstance(one, dict) and isinstance(two, dict):
        missing = [f"{at}/{k}" for k in one.keys() ^ two.keys()]
        return missing + [d for k in one.keys() & two.keys() for d in differences(one[k], two[k], f"{at}/{k}")]
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        return [d for i, (a, b) in enumerate(zip(one, two, strict=True)) for d in differences(a, b, f"{at}[{i}]")]
    return [] if one == two or (one != one and two != two) else [f"{at}: {one!r}, {two!r}"]


def test_every_entry_has_a_case() -> None:
    assert {c.slug for c in CASES} == {e.slug for e in catalog.METHODS}
    assert len({str(c) for c in CASES}) == len(CASES)


@every_case
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_resumed_at_any_step_equals_the_unbroken_one(
    case: Case, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every checkpoint of a run in turn is all that is left; what is written at the end must be the same bits."""
    monkeypatch.setattr(training, "_KEPT", 100)
    options: dict[str, Any] = {"optimizer": OPTIMIZERS[optimizer], "checkpoint_every": 1}
    whole = case.build()
    full = train(whole, case, checkpoint=tmp_path / "whole", **options)
    steps = sorted((tmp_path / "whole").iterdir())
    assert len(steps) == full.steps == 6
    manifest, tensors = read_folder(steps[-1], "checkpoint")
    for step in steps[:-1]:
        shutil.copytree(step, tmp_path / "again" / step.name)
        net = case.build()
        history = train(net, case, checkpoint=tmp_path / "again", **options)
        assert history.resumed_from == int(step.name.removeprefix("step-"))
        assert history.losses == full.losses
        found, found_tensors = read_folder(tmp_path / "again" / steps[-1].name, "checkpoint")
        for side in (manifest, found):
            for name in ("seconds", "config_sha256", "tensors_sha256"):
                side.pop(name, None)
            side["progress"].pop("seconds", None)
        assert differences([manifest, tensors], [found, found_tensors]) == []
        assert differences(dict(whole.state_dict()), dict(net.state_dict())) == []
        shutil.rmtree(tmp_path / "again")


@every_case
def test_saved_and_loaded_it_answers_and_learns_alike(case: Case, tmp_path: Path) -> None:
    """Equal outputs at every point, and the loss and gradient of one more batch are equal too."""
    net = trained(case)
    pliant.save(net, tmp_path / "net")
    again = pliant.load(tmp_path / "net", **case.first())
    assert again.points() == net.points()
    assert again.point == net.point
    assert again.arguments() == net.arguments()
    x = case.inputs()
    for point in net.points():
        assert torch.equal(answers(net.use(point), x), answers(again.use(point), x)), point
    gradients = []
    for one in (net, again):
        one.use(one.points()[-1]).train().zero_grad()
        torch.manual_seed(0)
        one.schedule(0.5)
        value = one.loss(case.batches(1)[0])
        value.backward()
        gradients.append({n: p.grad for n, p in one.named_parameters() if p.grad is not None} | {"loss": value})
    assert differences(*gradients) == []


def test_what_load_is_given_goes_before_what_is_in_the_files(tmp_path: Path) -> None:
    case = CASES[0]
    pliant.save(trained(case), tmp_path / "net")
    example = torch.rand(3, 1, 6, 6)
    again = pliant.load(tmp_path / "net", **case.first(), accumulate=2, example=example)
    assert again.arguments()["accumulate"] == 2
    assert torch.equal(again.example, example)
    assert again.arguments()["calibration_batches"] == case.options["calibration_batches"]


def test_a_criterion_that_files_cannot_hold_is_asked_for(tmp_path: Path) -> None:
    case = CASES[0]
    pliant.save(case.build(criterion=nn.CrossEntropyLoss()), tmp_path / "net")
    with pytest.warns(UserWarning, match="criterion: the saved network had one of its own"):
        pliant.load(tmp_path / "net", **case.first())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pliant.load(tmp_path / "net", **case.first(), criterion=nn.CrossEntropyLoss())


@every_case
def test_saved_twice_and_copied_it_is_the_same(case: Case, tmp_path: Path) -> None:
    net = trained(case)
    pliant.save(net, tmp_path / "one")
    pliant.save(pliant.load(tmp_path / "one", **case.first()), tmp_path / "two")
    parts = [read_folder(tmp_path / name, "network") for name in ("one", "two")]
    for manifest, _ in parts:
        manifest.pop("config_sha256"), manifest.pop("tensors_sha256")
    assert differences(*map(list, parts)) == []
    twin, x = copy.deepcopy(net), case.inputs()
    for point in net.points():
        assert torch.equal(answers(net.use(point), x), answers(twin.use(point), x)), point


@every_method
def test_damaged_and_hostile_files_are_told(case: Case, tmp_path: Path) -> None:
    """A sample of what scripts/damage.py does in thousands: the same network, another one, or a documented error."""
    net = trained(case)
    pliant.save(net, tmp_path / "whole")
    wanted = answers(net, case.inputs())
    for i in range(20):
        shutil.copytree(tmp_path / "whole", tmp_path / "try" / "net")
        how = damage.damage(tmp_path / "try" / "net", random.Random(f"{case} {i}"))
        kind, message = damage.trial(case, tmp_path / "try" / "net", wanted, checkpoint=False)
        assert kind in ("same", "other", "told"), f"{how}: {message}"
        shutil.rmtree(tmp_path / "try")


@every_method
def test_damaged_and_hostile_checkpoints_are_told(case: Case, tmp_path: Path) -> None:
    net = case.build()
    train(net, case, checkpoint=tmp_path / "whole")
    first = min((tmp_path / "whole").iterdir())
    wanted = answers(net, case.inputs())
    for i in range(6):
        shutil.copytree(first, tmp_path / "try" / first.name)
        how = damage.damage(tmp_path / "try" / first.name, random.Random(f"{case} {i}"))
        kind, message = damage.trial(case, tmp_path / "try" / first.name, wanted, checkpoint=True)
        assert kind in ("same", "other", "told"), f"{how}: {message}"
        shutil.rmtree(tmp_path / "try")


# Values of which none is ever right, and which arguments must not swallow; scripts/arguments.py tries forty.
NEVER = ("object()", "1j", "[[[]]]", "10**999", "nan", "{1: 1}")


@every_method
@pytest.mark.parametrize("value", NEVER)
def test_a_wrong_argument_is_named(case: Case, value: str) -> None:
    for name in arguments.keywords(case):
        kind, message = arguments.trial(case, name, arguments.VALUES[value]())
        assert kind in ("named", "accepted"), f"{name} = {value}: {message}"
        if value in ("object()", "1j"):
            assert kind == "named", f"{name} = {value} was accepted"


@every_method
def test_compiled_it_answers_the_same_at_every_point(case: Case) -> None:
    """Served or refused, never answered wrongly."""
    net, x = trained(case), case.inputs()
    wanted = {point: answers(net.use(point), x) for point in (net.points()[0], net.points()[-1])}
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager")
    try:
        for point in [*wanted, *reversed(wanted)]:
            net.use(point)
            assert torch.allclose(answers(compiled, x), wanted[point], atol=1e-5), point
    finally:
        torch._dynamo.reset()


@every_method
def test_threads_at_one_point_do_not_disturb_each_other(case: Case) -> None:
    net, x = trained(case), case.inputs()
    rows = [x[i : i + 1] for i in range(len(x))]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for point in net.points()[:: max(len(net.points()) // 3, 1)]:
            net.use(point)
            wanted = [answers(net, row) for row in rows]
            wrong: list[str] = []

            def work(first: int, wanted: list[Tensor] = wanted, wrong: list[str] = wrong) -> None:
                try:
                    for i in range(first, first + 24):
                        if not torch.equal(answers(net, rows[i % len(rows)]), wanted[i % len(rows)]):
                            wrong.append(f"row {i % len(rows)}")
                except Exception as error:  # told by the main thread
                    wrong.append(repr(error))

            threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not wrong, (point, wrong[:3])
    finally:
        sys.setswitchinterval(before)


@every_method
def test_in_double_precision_it_answers_learns_and_is_extracted(case: Case, tmp_path: Path) -> None:
    net = trained(case).double()
    x = case.inputs()
    x = x.double() if x.is_floating_point() else x
    for twin in (net, copy.deepcopy(net)):
        for point in twin.points():
            out = answers(twin.use(point), x)
            assert out.dtype is torch.float64
            try:
                plain = twin.extract(point)
            except NotStaticError:
                continue
            assert torch.allclose(answers(plain, x), out, atol=1e-9), point
    batch = case.batches(1)[0]
    batch = tuple(t.double() if t.is_floating_point() else t for t in batch)
    net.use(net.points()[-1]).train()
    net.loss(batch).backward()
    assert any(p.grad is not None and p.grad.dtype is torch.float64 for p in net.parameters())


class Broken(RuntimeError):
    """What the criterion of a user raises."""


@every_method
def test_after_an_error_in_the_loss_it_is_as_before(case: Case) -> None:
    names = arguments.keywords(case)
    if "criterion" not in names:
        pytest.skip(f"{case.slug} takes no criterion")
    armed = [0]

    def criterion(output: Any, target: Tensor) -> Tensor:
        armed[0] -= 1
        if armed[0] == 0:
            raise Broken("no loss today")
        return nn.functional.cross_entropy(logits(output), target, reduction="none" if case.loss_by_row else "mean")

    net = case.build(criterion=criterion)
    train(net, case)
    x, batch = case.inputs(), case.batches(1)[0]
    point = net.points()[0]
    net.use(point)
    before, flags = answers(net, x), modes(net)
    for call in (1, 2, 3):
        armed[0] = call
        try:  # in evaluation mode: not even the statistics of norms move
            net.loss(batch)
        except Broken:
            assert net.point == point
            assert modes(net) == flags
            assert torch.equal(answers(net, x), before)
        armed[0] = call
        with contextlib.suppress(Broken):
            pliant.fit(net, [batch] * 3, epochs=1, lr=1e-9, progress=False)
        assert net.point in net.points()
        assert set(modes(net).values()) == {False}
        armed[0] = 0
        train(net, case, lr=1e-9)  # it can still learn
        net.use(point)
        before = answers(net, x)


def test_names_of_cases_are_pytest_ids() -> None:
    assert all(re.fullmatch(r"[a-z0-9-]+", str(c)) for c in CASES)
