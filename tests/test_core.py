"""Points, costs, the frontier, the catalogue."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pliant
from cases import CASES
from pliant import catalog
from pliant.compare import Plain
from pliant.core import cost
from pliant.core.dynamic import Dynamic, NotStaticError, Point
from pliant.core.frontier import Frontier, Row, measure
from pliant.core.inputs import check_example, evaluating, inputs_of, split_batch
from pliant.elastic import SortedNet

NAME = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)


@given(st.dictionaries(NAME, st.integers(-1000, 1000) | st.sampled_from([0.5, 0.25, 2.75]), min_size=1, max_size=4))
def test_points_are_frozen_hashable_ordered_and_parse_back(values: dict[str, float]) -> None:
    point = Point(**values)
    assert dict(point) == values
    assert list(point) == list(values)
    assert Point.parse(str(point)) == point
    assert pickle.loads(pickle.dumps(point)) == point
    reordered = Point(**dict(reversed(values.items())))
    assert reordered == point
    assert hash(reordered) == hash(point)
    with pytest.raises(AttributeError, match="frozen"):
        point.x = 1


def test_point_prints_as_the_design_says() -> None:
    assert str(Point(width=0.5, depth=0.75)) == "width=0.5 depth=0.75"
    assert Point.parse("mode=clip")["mode"] == "clip"
    for text in ("width", "=1", "width="):
        with pytest.raises(ValueError, match="name=value"):
            Point.parse(text)
    with pytest.raises(TypeError, match="width"):
        Point(width=None)  # type: ignore[arg-type]


def test_the_contract_is_enforced() -> None:
    class Half(Dynamic):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Half()  # type: ignore[abstract]
    assert "pliant.deploy.compile" in str(NotStaticError(Point(exit=1), "why"))


# -- costs ------------------------------------------------------------------------------------------------------------


def test_flops_are_two_per_multiply_add_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 25, 7))
    x = torch.randn(4, 3, 5, 5)
    expected = 2 * (8 * 3 * 9 * 25 + 200 * 7)
    counted = cost.flops_per_sample(model, x)
    assert counted.total == expected
    assert counted.nonzero == expected
    with torch.no_grad():
        model[3].weight[:, :100] = 0  # half of the linear layer
        model[0].weight[:2] = 0  # a quarter of the convolution
    counted = cost.flops_per_sample(model, x)
    assert counted.total == expected
    assert counted.nonzero == 2 * (6 * 3 * 9 * 25 + 100 * 7)
    assert model.training


def test_flops_count_what_ran_not_what_might_have() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            rows = x[x[:, 0] > 0]
            return self.layer(rows)

    x = torch.randn(10, 8)
    x[:, 0] = torch.tensor([1.0] * 3 + [-1.0] * 7)
    assert cost.count_flops(lambda: Branch()(x)).total == 3 * 2 * 64


def test_flops_are_those_of_evaluation_whatever_the_mode() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.auxiliary = nn.Linear(4, 3, bias=False), nn.Linear(4, 50, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.auxiliary(x)
            out: Tensor = self.used(x)
            return out

    net = Net().train()
    assert cost.flops_per_sample(net, torch.randn(5, 4)).total == 2 * 4 * 3
    assert net.training
    data = [(torch.randn(5, 4), torch.zeros(5, dtype=torch.long))]
    [row] = measure(net, data, repeats=0)
    assert row.flops == 2 * 4 * 3
    assert (row.point, row.static) == (Point(network="Net"), True)
    assert net.training


def test_each_of_two_that_are_timed_runs_first_every_other_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs second finds a warm machine: a clock on which the second of a pair takes half as long tells."""
    ran: list[str] = []
    ratio = cost.time_ratio(lambda: ran.append("a"), lambda: ran.append("b"), repeats=4)
    assert ratio.median > 0
    pairs = ["".join(ran[i : i + 2]) for i in range(len(ran) % 2, len(ran), 2)][-4:]
    assert sorted(pairs) == ["ab", "ab", "ba", "ba"], ran
    now = [0.0]
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])
    turn = [0]

    def work(seconds: float) -> None:
        turn[0] += 1
        now[0] += seconds * (0.5 if turn[0] % 2 == 0 else 1.0)

    found = cost.time_ratio(lambda: work(3.0), lambda: work(1.0), repeats=8)
    assert found.low == pytest.approx(1.5)
    assert found.high == pytest.approx(6.0)


def test_parameters_and_bytes_count_tied_ones_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    assert cost.count_parameters(model) == 16 + 4 + 4 + 8
    assert cost.count_bytes(model) == 4 * (32 + 8) + 8
    sparse = nn.Module()
    sparse.weight = nn.Parameter(torch.eye(4).to_sparse_csr(), requires_grad=False)
    assert cost.count_bytes(sparse) == 4 * 4 + 8 * 5 + 8 * 4


def test_time_ratio_sees_double_work() -> None:
    a, b = torch.randn(300, 300), torch.randn(300, 300)
    ratio = cost.time_ratio(lambda: [a @ b for _ in range(8)], lambda: [a @ b for _ in range(2)], repeats=9)
    assert ratio.low <= ratio.median <= ratio.high
    assert ratio.median > 1.5
    with pytest.raises(ValueError, match="repeats: 2"):
        cost.time_ratio(lambda: None, lambda: None, repeats=2)


# -- the frontier -----------------------------------------------------------------------------------------------------


def row(quality: float, flops: int, **more: Any) -> Row:
    values = {
        "nonzero_flops": flops, "parameters": flops, "bytes": flops, "latency": 1.0,
        "latency_low": 1.0, "latency_high": 1.0, "static": True,
    }  # fmt: skip
    return Row(Point(width=flops), quality, flops, **(values | more))


ROWS = st.lists(st.tuples(st.floats(0, 1), st.integers(1, 50)), min_size=1, max_size=12)


@given(ROWS, st.integers(0, 60))
def test_best_is_the_brute_force_answer(pairs: list[tuple[float, int]], budget: int) -> None:
    front = Frontier(tuple(row(q, f) for q, f in pairs))
    fit = [(q, f) for q, f in pairs if f <= budget]
    if not fit:
        with pytest.raises(ValueError, match="no point fits flops"):
            front.best(flops=budget)
        return
    top = max(q for q, _ in fit)
    assert front.best(flops=budget)["width"] == min(f for q, f in fit if q == top)
    assert front.quality_at(budget) == top


@given(ROWS, ROWS)
def test_pareto_and_dominance(a: list[tuple[float, int]], b: list[tuple[float, int]]) -> None:
    first, second = (Frontier(tuple(row(q, f) for q, f in pairs)) for pairs in (a, b))
    kept = first.pareto().rows
    for r in first.rows:  # every row is beaten or equalled by one that was kept
        assert any(k.flops <= r.flops and k.quality >= r.quality for k in kept)
    assert [k.quality for k in kept] == sorted({k.quality for k in kept})
    assert not first.dominates(first)
    assert not (first.dominates(second) and second.dominates(first))


def small_net() -> SortedNet:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    return SortedNet(model, torch.randn(2, 6), width=(0.5, 1.0))


def test_measure() -> None:
    net = small_net()
    x = torch.randn(50, 6)
    with evaluating(net), torch.no_grad():
        labels = net(x).argmax(1)  # so that the full network is right everywhere
    data = [(x[:30], labels[:30]), (x[30:], labels[30:])]
    net.use(net.points()[0]).train()
    front = measure(net, data, repeats=3)
    assert net.point == net.points()[0]
    assert net.training
    assert front.rows[-1].quality == 1.0
    small = net.extract(net.points()[0])
    assert front.rows[0].quality == pytest.approx((small(x).argmax(1) == labels).float().mean().item())
    assert [r.flops for r in front] == [2 * (6 * 8 + 8 * 4), 2 * (6 * 16 + 16 * 4)]
    assert [r.parameters for r in front] == [6 * 8 + 8 + 8 * 4 + 4, 6 * 16 + 16 + 16 * 4 + 4]
    assert all(r.static and r.latency > 0 for r in front)
    assert Frontier.from_dicts(json.loads(json.dumps(front.to_dicts())), front.name) == front
    assert list(front.to_pandas()["width"]) == [0.5, 1.0]
    with pytest.raises(ValueError, match="no batches"):
        measure(net, [])
    with pytest.raises(ValueError, match="unknown cost 'watts'"):
        front.best(watts=3)
    assert math.isnan(measure(net, data, repeats=0).rows[0].latency)


def test_plot_writes_a_picture(tmp_path: Any) -> None:
    front = Frontier((row(0.5, 100), row(0.9, 1000)), "two")
    front.plot(str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


# -- inputs -----------------------------------------------------------------------------------------------------------


def test_batches_and_inputs() -> None:
    x, y = torch.randn(3, 2), torch.zeros(3)
    assert split_batch((x, y))[1] is y
    assert set(split_batch({"ids": x, "labels": y})[0]) == {"ids"}
    assert [len(i) for i in inputs_of([(x, y), (x, y)])] == [3, 3]
    with pytest.raises(TypeError, match="3 items"):
        split_batch((x, y, y))
    with pytest.raises(ValueError, match="NaN"):
        check_example(nn.Linear(2, 2), torch.full((1, 2), math.nan))


def test_evaluating_restores_each_flag() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[0].eval()
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == [True, False, True]


# -- the catalogue ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", catalog.METHODS, ids=lambda e: e.slug)
def test_entries_name_real_classes(entry: catalog.Entry) -> None:
    found = entry.load()
    assert issubclass(found, Dynamic)
    assert getattr(getattr(pliant, entry.family), entry.name) is found
    assert entry.arxiv in (sys.modules[found.__module__].__doc__ or "")


def test_the_catalogue_imports_nothing_heavy() -> None:
    code = "import sys, pliant.catalog; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def _first(entry: catalog.Entry, make: Callable[[int], nn.Module]) -> dict[str, Any]:
    """A method's first argument, by its name: a model of width 4, or two for the method that joins several."""
    return {"anchors": [make(4), make(8)]} if entry.slug == "sn-net" else {"model": make(4)}


# What a method cannot do without on this network: no residual sums that it can gate, even filters.
_OPTIONS_BY_NAME: dict[str, dict[str, Any]] = {
    "consensus-subnetwork": {"granularity": "channel"},
    "structured-pruning-adapters": {"targets": ("*layer*",)},
}


# An attack moves one tensor of numbers, filters are gated by images, the others need experts or a language model.
_BY_NAME = [e for e in catalog.METHODS if e.slug not in ("proard", "ftwt", "alf-lb", "duo-llm", "code-completion-exit")]


@pytest.mark.parametrize("entry", _BY_NAME, ids=lambda e: e.slug)
def test_every_method_takes_inputs_by_name(entry: catalog.Entry) -> None:
    """Networks of transformers take keyword arguments: trained, measured and used like any other."""
    transformers = pytest.importorskip("transformers")

    def model(c: int) -> nn.Module:
        config = transformers.ViTConfig(
            hidden_size=4 * c, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8 * c,
            image_size=8, patch_size=4, num_channels=1, num_labels=3,
        )  # fmt: skip
        network: nn.Module = transformers.ViTForImageClassification(config)
        return network

    x, y = {"pixel_values": torch.randn(16, 1, 8, 8)}, torch.randint(0, 3, (16,))
    net = entry.load()(**_first(entry, model), example=x, **_OPTIONS_BY_NAME.get(entry.slug, {}))
    pliant.fit(net, [{**x, "labels": y}] * 4, epochs=4, lr=0.01, progress=False)
    front = measure(net, [(x, y)], repeats=3)
    assert len(front) == len(net.points())
    for point in net.points():
        by_name, whole = net.use(point)(**x), net(x)
        assert torch.equal(getattr(by_name, "logits", by_name), getattr(whole, "logits", whole))


def test_plain_is_an_ordinary_network() -> None:
    net = Plain(nn.Linear(3, 2), torch.randn(2, 3))
    x = torch.randn(4, 3)
    assert torch.equal(net.extract(net.point)(x), net(x))


def test_tools_of_transformers_find_what_they_ask_of_a_model(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    [case] = [c for c in CASES if c.slug == "duo-llm"]
    net = case.build()
    assert net.config is net.model.config
    assert net.main_input_name == "input_ids"
    with pytest.raises(AttributeError, match=r"extract\(point\)\.save_pretrained"):
        net.save_pretrained(tmp_path)
    with pytest.raises(AttributeError, match="nonsense"):
        net.nonsense  # noqa: B018 - the error is what is asked for

    class Trainer(transformers.Trainer):  # type: ignore[misc, name-defined]
        def compute_loss(self, model: Any, inputs: Any, **_: Any) -> Tensor:
            return model.loss(inputs)  # type: ignore[no-any-return]

    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        remove_unused_columns=False, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    row = {"input_ids": torch.arange(1, 9), "labels": torch.arange(1, 9)}
    Trainer(model=net, args=options, train_dataset=[row] * 8).train()
    assert any(not torch.equal(before[n], p) for n, p in net.named_parameters())


def test_the_example_goes_where_the_weights_go() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, input: Tensor, kind: Tensor) -> Tensor:
            found: Tensor = self.head(torch.relu(self.hidden(input) + kind[:, None]))
            return found

    net = SortedNet(Net(), {"input": torch.randn(2, 3), "kind": torch.zeros(2, dtype=torch.long)})
    net.double()
    assert net.example["input"].dtype is torch.float64
    assert net.example["kind"].dtype is torch.long
    net.to(torch.bfloat16)
    assert net.example["input"].dtype is torch.bfloat16
    net.to("meta")  # has no values, and an example without values is of no use
    assert net.example["input"].device.type == "cpu"
