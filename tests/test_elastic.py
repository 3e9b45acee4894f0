"""What all five elastic networks owe alike: compiled, in threads, in other dtypes, after an error."""

from __future__ import annotations

import copy
import itertools
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.core.dynamic import Dynamic
from pliant.core.training import fit
from pliant.elastic import proard
from pliant.elastic.bignas import BigNAS
from pliant.elastic.proard import ProARD
from pliant.elastic.self_expanding import SelfExpanding
from pliant.elastic.sortednet import SortedNet
from pliant.elastic.stitching import StitchNet
from pliant.tasks.images import SmallResNet

X = torch.rand(16, 1, 12, 12, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 4, (16,), generator=torch.Generator().manual_seed(2))
DATA = [(X[:8], Y[:8]), (X[8:], Y[8:])]


def _resnet(widths: tuple[int, ...] = (8, 16), blocks: int = 2) -> SmallResNet:
    torch.manual_seed(0)
    model = SmallResNet(1, 4, widths, blocks)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # nothing is hidden by ones and zeros
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.3)
            nn.init.normal_(module.running_mean, 0.0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def _sortednet(**options: Any) -> SortedNet:
    return SortedNet(_resnet(), X[:2], **{"width": (0.5, 1.0), "depth": (0.5, 1.0), "accumulate": 2, **options})


def _bignas(**options: Any) -> BigNAS:
    return BigNAS(_resnet(), X[:2], **{"resolution": (8, 12), "offer": 3, **options})


def _proard(**options: Any) -> ProARD:
    given = {"kernel": (1, 3), "divisor": 2, "attack_steps": 1, "offer": 3, "calibration_batch": 8}
    return ProARD(_resnet(), X[:2], **{**given, **options})


def _stitchnet(**options: Any) -> StitchNet:
    return StitchNet([_resnet((4, 8)), _resnet((8, 16))], X[:2], **options)


def _self_expanding(**options: Any) -> SelfExpanding:
    given = {"proposals": 2, "proposal_steps": 1, "tau": 0.0, "alpha": -1.0, "score_samples": 16}
    return SelfExpanding(_resnet(), X[:2], **{**given, **options})


MAKE: dict[str, Callable[..., Any]] = {
    "SortedNet": _sortednet,
    "BigNAS": _bignas,
    "ProARD": _proard,
    "StitchNet": _stitchnet,
    "SelfExpanding": _self_expanding,
}
all_five = pytest.mark.parametrize("name", list(MAKE))


def _ready(name: str) -> Dynamic:
    """A network all of whose points differ and answer."""
    net: Dynamic = MAKE[name]()
    if isinstance(net, StitchNet):
        net.initialize(DATA, images=16, ridge=1e-3)
    elif isinstance(net, SelfExpanding):
        for _ in range(2):
            assert net.maybe_expand(DATA) is not None
            with torch.no_grad():
                for p in net.model.parameters():
                    p += 0.05 * torch.randn_like(p)
    else:
        net.finish(DATA)
    return net.eval()


# -- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # at all points; test_catalogue asks at the first and the last
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ("SortedNet", "ProARD"))) for n in MAKE]
)
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled_networks_answer_as_they_do_uncompiled_at_every_point(name: str, backend: str) -> None:
    torch._dynamo.reset()
    net = _ready(name)
    compiled = torch.compile(net, backend=backend)
    chosen = net.points() if backend == "aot_eager" else [net.points()[0], net.points()[-1]]
    for points in (chosen, chosen[::-1]):  # each again, after others were in use
        for point in points:
            with torch.no_grad():
                expected = net.use(point)(X)
                torch.testing.assert_close(compiled(X), expected, rtol=1e-4, atol=1e-5)
    different = [net.use(p)(X) for p in net.points()]
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.pairwise(different))
    torch._dynamo.reset()


# -- threads ----------------------------------------------------------------------------------------------------------


@all_five
def test_threads_answer_alike_at_a_point(name: str) -> None:
    net = _ready(name)
    inputs = [torch.rand(4, 1, 12, 12) for _ in range(4)]
    for point in net.points()[:: max(1, len(net.points()) // 6)]:
        net.use(point)
        for grad in (False, True):

            def answer(x: Tensor, grad: bool = grad) -> Tensor:
                with torch.set_grad_enabled(grad):
                    return net(x).detach()

            alone = [answer(x) for x in inputs]
            with ThreadPoolExecutor(4) as pool:
                for _ in range(8):
                    for found, expected in zip(pool.map(answer, inputs), alone, strict=True):
                        assert torch.equal(found, expected), point


# -- after an error ---------------------------------------------------------------------------------------------------


@all_five
def test_an_error_in_the_second_criterion_leaves_the_network_as_it_was(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def failing(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def criterion(*args: Any, **kwargs: Any) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise ZeroDivisionError
            return function(*args, **kwargs)

        return criterion

    if name == "ProARD":  # whose losses are its own
        monkeypatch.setattr(proard, "trades_loss", failing(proard.trades_loss))
    options: dict[str, Any] = {} if name == "ProARD" else {"criterion": failing(nn.functional.cross_entropy)}
    options |= {"distill": False} if name == "BigNAS" else {}
    net = MAKE[name](**options).train()
    if calls == 0 and name in ("ProARD", "StitchNet", "SelfExpanding"):  # these ask once in a step
        net.loss((X, Y))
    modes = {n: m.training for n, m in net.named_modules()}
    before = {n: t.clone() for n, t in net.state_dict().items() if "running" not in n and "tracked" not in n}
    places = {n: id(t) for n, t in [*net.named_parameters(), *net.named_buffers()]}
    point, structure = net.point, str(net.structure())
    with pytest.raises(ZeroDivisionError):
        net.loss((X, Y))
    assert {n: m.training for n, m in net.named_modules()} == modes
    assert {n: id(t) for n, t in [*net.named_parameters(), *net.named_buffers()]} == places
    assert net.point == point
    assert str(net.structure()) == structure
    for n, t in before.items():
        if not n.startswith("norms."):  # statistics of sizes that ran have moved, and are marked as stale
            assert torch.equal(net.state_dict()[n], t), n
    assert torch.isfinite(net.loss((X, Y)))
    net.finish(DATA)
    assert torch.isfinite(net.eval()(X)).all()


def test_an_error_in_a_check_for_growth_is_no_check() -> None:
    net, failed = _growing(), []

    def criterion(output: Tensor, target: Tensor) -> Tensor:
        if failed and failed.pop():
            raise ZeroDivisionError
        return nn.functional.cross_entropy(output, target)

    net._criterion = criterion
    net.train().loss((X, Y))
    failed.append(True)
    with pytest.raises(ZeroDivisionError):
        net.epoch_end(None)
    assert net.clock.tolist() == [0, 0]
    assert net.training
    assert len(net._recent) == 1
    net.epoch_end(None)
    assert net.clock.tolist() == [1, 1]
    assert len(net.stages) == 1


# -- in double precision ----------------------------------------------------------------------------------------------


@all_five
def test_double_precision_after_construction(name: str) -> None:
    net = _ready(name).double()
    if isinstance(net, StitchNet):  # made again from what a copy holds
        net = copy.deepcopy(net)
    for point in (net.points()[0], net.points()[-1]):
        found = net.use(point)(X.double())
        assert found.dtype == torch.float64
        assert torch.equal(net.extract(point)(X.double()), found)
    net.train().loss((X.double(), Y)).backward()


# -- resumed ----------------------------------------------------------------------------------------------------------


def _teacher() -> nn.Module:
    return _resnet((8, 16)).eval()


def _growing(**options: Any) -> SelfExpanding:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 4), nn.SiLU(), nn.Linear(4, 3), nn.SiLU(), nn.Linear(3, 4))
    given = {"proposals": 2, "proposal_steps": 1, "tau": 0.0, "alpha": -1.0}
    return SelfExpanding(model, X[:2], **{**given, **options})


RUNS: dict[str, Callable[[], Any]] = {
    "SortedNet": _sortednet,
    "SortedNet sum": lambda: _sortednet(mode="sum", width=(1.0,)),
    "SortedNet switchable replay": lambda: _sortednet(norm_stats="switchable", replay=True),
    "BigNAS": _bignas,
    "ProARD": _proard,
    "ProARD live": lambda: _proard(teacher="live", objective="adaad"),
    "StitchNet": lambda: _stitchnet(teacher=_teacher()).initialize(X, ridge=1e-3),
    "SelfExpanding": lambda: _growing(score_samples=12),
    "SelfExpanding leaky": lambda: _growing(
        rule="secnn", score="diag", cooldown=0, activation="leaky", actions=("layers",), capacity={"layers": 2}
    ),
}  # fmt: skip


@pytest.mark.slow  # more variants of what test_catalogue asks of every method
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("name", list(RUNS))
def test_a_run_resumed_at_any_step_is_the_unbroken_one(name: str, optimizer: str, tmp_path: Path) -> None:
    made: list[torch.optim.Optimizer] = []
    train = [(X[i : i + 4], Y[i : i + 4]) for i in range(0, 12, 4)]
    steps = 6

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        kinds = {
            "sgd": lambda: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
            "adam": lambda: torch.optim.Adam(groups, lr=0.01),
        }
        made.append(kinds[optimizer]())
        return made[-1]

    def run(folder: Path, on_step: Any = None) -> tuple[Any, ...]:
        net = RUNS[name]()
        history = fit(
            net, train, epochs=2, optimizer=make, checkpoint=folder, checkpoint_every=1, progress=False, on_step=on_step
        )
        order = [n for g in made[-1].param_groups for p in g["params"] for n, q in net.named_parameters() if q is p]
        state = [made[-1].state[p] for g in made[-1].param_groups for p in g["params"]]
        log = net.history if isinstance(net, SelfExpanding) else []
        return net, history, dict(zip(order, state, strict=True)), log

    def keep(step: int, *_: Any) -> None:
        if step > 1:
            shutil.copytree(tmp_path / "whole", tmp_path / str(step - 1))

    whole, history, state, log = run(tmp_path / "whole", keep)
    assert history.steps == steps
    if isinstance(whole, SelfExpanding):
        assert len(whole.stages) >= 2
    for step in range(1, steps):
        again, resumed, its_state, its_log = run(tmp_path / str(step))
        assert resumed.resumed_from == step
        assert resumed.losses == history.losses
        assert its_log == log
        assert list(again.state_dict()) == list(whole.state_dict())
        for key, value in whole.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), (step, key)
        assert set(its_state) == set(state)
        for key, entries in state.items():
            for entry, value in entries.items():
                assert torch.equal(torch.as_tensor(its_state[key][entry]), torch.as_tensor(value)), (step, key, entry)
