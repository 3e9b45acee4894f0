"""Architecture spaces, and the axes of real networks: nesting, canonical forms, slices, costs, and bad input."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pliant.core.cost import flops_per_sample
from pliant.core.dynamic import Point
from pliant.core.slicing import Slicing, can_crop, make_divisible
from pliant.core.spaces import Axes, Coordinate, Space
from pliant.tasks.images import ResidualBlock, SmallResNet


def _space() -> Space:
    return Space(
        [
            Coordinate("a.width", "width", (8, 16, 24)),
            Coordinate("a.depth", "depth", (0, 1, 2)),
            Coordinate("a.0.expansion", "expansion", (0.5, 1.0), ("a.depth", 1)),
            Coordinate("a.1.expansion", "expansion", (0.5, 1.0), ("a.depth", 2)),
        ]
    )


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- spaces ---------------------------------------------------------------------------------------------------------


def test_enumerate_gives_every_architecture_once() -> None:
    space = _space()
    points = list(space.enumerate())
    assert len(points) == len(set(points)) == space.size == 3 * (1 + 2 + 4)
    assert all(p in space and space.canonical(p) == p for p in points)


@given(st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_samples_mutants_and_children_stay_inside(seed: int) -> None:
    space, g = _space(), _generator(seed)
    a, b = space.sample(g), space.sample(g)
    child, mutant = space.cross(a, b, g), space.mutate(a, 0.3, g)
    for point in (a, b, child, mutant):
        assert point in space
        assert space.canonical(point) in set(space.enumerate())
    assert all(child[n] in (a[n], b[n]) for n in space.coordinates)


def test_mutation_probabilities() -> None:
    space = Space(
        [Coordinate("x", "width", (1, 2, 3)), Coordinate("y", "depth", (1,)), Coordinate("z", "kernel", (3, 5))]
    )
    g = _generator()
    for _ in range(50):
        point = space.sample(g)
        assert space.mutate(point, 0.0, g) == point
        moved = space.mutate(point, 1.0, g)
        assert moved["x"] != point["x"]
        assert moved["z"] != point["z"]
        assert moved["y"] == point["y"]
        assert moved in space


def test_sampling_is_uniform() -> None:
    space, g = _space(), _generator()
    n = 3000
    for name in ("a.width", "a.depth"):
        counts = Counter(space.sample(g)[name] for _ in range(n))
        chi2 = sum((counts[v] - n / 3) ** 2 / (n / 3) for v in space.coordinates[name].choices)
        assert chi2 < 13.8, name  # two degrees of freedom, p = 0.001


def test_idle_coordinates_do_not_count() -> None:
    space = _space()
    a = Point(**{"a.width": 8, "a.depth": 1, "a.0.expansion": 0.5, "a.1.expansion": 0.5})
    b = Point(**{"a.width": 8, "a.depth": 1, "a.0.expansion": 0.5, "a.1.expansion": 1.0})
    assert space.canonical(a) == space.canonical(b)
    assert torch.equal(space.encode(a), space.encode(b))
    assert space.encode(a).tolist() == [1, 0, 0, 0, 1, 0, 1, 0, 0, 0]
    assert len(space.encode(a)) == space.features


def test_restricted_spaces_are_nested() -> None:
    space = _space()
    part = space.restrict({"width": (16, 24), "a.1.expansion": (1.0,)})
    assert part <= space
    assert not space <= part
    assert set(part.enumerate()) <= set(space.enumerate())
    with pytest.raises(ValueError, match="'heads' is neither"):
        space.restrict({"heads": (1,)})
    with pytest.raises(ValueError, match="width has none of"):
        space.restrict({"width": (7,)})


def test_ladder_runs_from_the_smallest_to_the_largest() -> None:
    space = _space()
    ladder = space.ladder(4)
    assert ladder[0] == space.smallest
    assert ladder[-1] == space.largest
    assert len(ladder) == len(set(ladder)) == 4


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"a.width": 8}, "missing: a.depth"),
        ({"a.width": 8, "a.depth": 1, "a.0.expansion": 1.0, "a.1.expansion": 1.0, "b": 1}, "unknown: b"),
        ({"a.width": 9, "a.depth": 1, "a.0.expansion": 1.0, "a.1.expansion": 1.0}, "a.width=9 is not one of 8, 16, 24"),
    ],
)
def test_points_outside_are_named(point: dict[str, Any], message: str) -> None:
    assert point not in _space()
    with pytest.raises(ValueError, match=message):
        _space().check(point)


def test_bad_coordinates() -> None:
    with pytest.raises(ValueError, match="names must differ"):
        Space([Coordinate("x", "width", (1,)), Coordinate("x", "width", (2,))])
    with pytest.raises(ValueError, match="x needs different choices"):
        Space([Coordinate("x", "width", ())])
    with pytest.raises(ValueError, match="needs 'y'"):
        Space([Coordinate("x", "width", (1,), ("y", 1))])


# -- the axes of a network ------------------------------------------------------------------------------------------


class Kernels(nn.Module):
    """Two stages of blocks with 5x5 depthwise convolutions, of which the second also has a 3x3 one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, 1, 1)
        self.a = nn.Sequential(*(self._block(8, 16, 5) for _ in range(2)))
        self.b = nn.Sequential(*(self._block(8, 16, 5, dilation=2) for _ in range(3)))
        self.head = nn.Linear(8, 4)

    @staticmethod
    def _block(channels: int, mid: int, kernel: int, dilation: int = 1) -> nn.Module:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.up = nn.Conv2d(channels, mid, 1)
                self.filter = nn.Conv2d(mid, mid, kernel, 1, kernel // 2 * dilation, dilation, mid)
                self.norm = nn.BatchNorm2d(mid)
                self.down = nn.Conv2d(mid, channels, 3, padding="same")

            def forward(self, x: Tensor) -> Tensor:
                return x + self.down(torch.relu(self.norm(self.filter(self.up(x)))))  # type: ignore[no-any-return]

        Block.__qualname__ = Block.__name__ = "Block"
        return Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(self.stem(x))).mean((2, 3)))  # type: ignore[no-any-return]


def _kernels(**options: Any) -> tuple[nn.Module, Axes, Tensor]:
    torch.manual_seed(0)
    model, x = Kernels(), torch.randn(2, 1, 9, 9)
    # the blocks of ``Kernels`` are of classes made one by one, so the stacks are named
    slicing = Slicing(model, x, stacks=["a", "b"])
    return model, Axes(slicing, x, **options), x


def _resnet(**options: Any) -> tuple[nn.Module, Axes, Tensor]:
    torch.manual_seed(0)
    model, x = SmallResNet(1, 10, (8, 16), 2), torch.randn(2, 1, 16, 16)
    return model, Axes(Slicing(model, x), x, **options), x


def test_what_belongs_to_which_stage() -> None:
    _, axes, _ = _resnet(width=(0.5, 1.0), depth=(0.5, 1.0), expansion=(0.5, 1.0), resolution=(12, 16))
    assert {name: c.choices for name, c in axes.space.coordinates.items()} == {
        "resolution": (12, 16),
        "stages.0.width": (4, 8),
        "stages.0.depth": (1, 2),
        "stages.0.expansion": (0.5, 1.0),
        "stages.1.width": (8, 16),
        "stages.1.depth": (1, 2),
        "stages.1.expansion": (0.5, 1.0),
    }


def test_expansion_follows_the_width_that_enters_the_block() -> None:
    _, axes, _ = _resnet(width=(0.5, 1.0), expansion=(0.5, 1.0))
    point = axes.space.check(
        {"stages.0.width": 4, "stages.0.expansion": 0.5, "stages.1.width": 16, "stages.1.expansion": 1.0}
    )
    sizes = axes.sizes(point)
    assert sizes["stages.0.1.conv1"] == 2  # 8 * 4/8 * 0.5
    assert sizes["stages.1.0.conv1"] == 8  # 16 * 4/8: what enters is the narrow first stage
    assert sizes["stages.1.1.conv1"] == 16


def test_per_block_choices_are_idle_where_the_block_is_gone() -> None:
    _, axes, _ = _resnet(depth=(0.5, 1.0), expansion=(0.5, 1.0), per_block=("expansion",))
    assert axes.space.coordinates["stages.1.1.expansion"].needs == ("stages.1.depth", 2)
    assert axes.space.coordinates["stages.1.0.expansion"].needs is None
    assert axes.space.size == (2 + 4) ** 2
    small = {"stages.0.depth": 2, "stages.1.depth": 1, "stages.1.0.expansion": 0.5,
             "stages.0.0.expansion": 0.5, "stages.0.1.expansion": 1.0}  # fmt: skip
    a, b = ({**small, "stages.1.1.expansion": e} for e in (0.5, 1.0))
    assert axes.flops(a) == axes.flops(b)


def test_blocks_may_have_names() -> None:
    torch.manual_seed(0)
    blocks = nn.Sequential()
    for name in ("first", "second", "third"):
        blocks.add_module(name, ResidualBlock(4, 4))
    model = nn.Sequential(nn.Conv2d(1, 4, 3), blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    x = torch.randn(2, 1, 8, 8)
    axes = Axes(Slicing(model, x), x, depth={"1": (1, 3)}, expansion=(0.5, 1.0), per_block=("expansion",))
    assert axes.space.coordinates["1.2.expansion"].needs == ("1.depth", 3)
    network = axes.network({**axes.space.largest, "1.depth": 1, "1.0.expansion": 0.5})
    assert network.skeleton[1].first.conv1.out_channels == 2  # type: ignore[index]
    assert network.run(model, x).shape == (2, 2)


def test_kernels_are_centre_crops() -> None:
    model, axes, x = _kernels(kernel=(3, 5))
    network = axes.network(Point(**{"a.kernel": 3, "b.kernel": 5}))
    views = network.views(model)
    full = model.get_submodule("a.0.filter").weight
    assert torch.equal(views["a.0.filter.weight"], full[:, :, 1:4, 1:4])
    assert views["a.0.filter.weight"].data_ptr() == full[:, :, 1:, 1:].data_ptr()  # type: ignore[index]
    assert views["b.0.filter.weight"].shape[-1] == 5
    zeroed = Kernels()
    zeroed.load_state_dict(model.state_dict())
    for block in zeroed.a:
        w = block.filter.weight.data  # type: ignore[union-attr]
        w[:, :, [0, 4], :] = 0  # type: ignore[index]
        w[:, :, :, [0, 4]] = 0  # type: ignore[index]
    torch.testing.assert_close(network.run(model.eval(), x), zeroed(x))


def test_a_dilated_kernel_keeps_the_shape() -> None:
    model, axes, x = _kernels(kernel=(1, 3, 5))
    for k in (1, 3, 5):
        network = axes.network(Point(**{"a.kernel": k, "b.kernel": k}))
        assert network.run(model, x).shape == (2, 4)


def test_what_can_be_cropped() -> None:
    assert can_crop(nn.Conv2d(1, 1, 5, padding=2), 3)
    assert can_crop(nn.Conv2d(1, 1, 5, padding="same"), 1)
    assert not can_crop(nn.Conv2d(1, 1, 5, padding=0), 3)  # the output would grow
    assert not can_crop(nn.Conv2d(1, 1, 5, padding=2), 2)
    assert not can_crop(nn.Conv2d(1, 1, 3, padding=1), 5)
    assert not can_crop(nn.Conv2d(1, 1, (3, 5), padding=2), 3)
    assert not can_crop(nn.Conv2d(1, 1, 5, padding=2, padding_mode="circular"), 3)
    assert not can_crop(nn.ConvTranspose2d(1, 1, 5, padding=2), 3)
    assert not can_crop(nn.Linear(3, 3), 1)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_run_is_extract_and_costs_are_those_of_the_extracted(seed: int) -> None:
    model, axes, x = _RESNET
    point = axes.space.sample(_generator(seed))
    network = axes.network(point)
    resized = axes.resized(x, point)
    for training in (True, False):
        child = network.extract(model).train(training)
        network.skeleton.train(training)
        before = {n: t.clone() for n, t in model.state_dict().items()}
        with torch.no_grad():
            a = network.run(model, resized)
            model.load_state_dict(before)  # training statistics moved
            assert torch.equal(a, child(resized))
    assert axes.flops(point) == flops_per_sample(child, resized).total
    assert axes.parameters(point) == sum(p.numel() for p in child.parameters())


_RESNET = _resnet(width=(0.25, 0.5, 1.0), depth=(0.5, 1.0), expansion=(0.5, 1.0), resolution=(9, 12, 16))


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_counting_on_a_hollow_network_is_the_same(seed: int) -> None:
    _, axes, _ = _KERNELS
    point = axes.space.canonical(axes.space.sample(_generator(seed)))
    assert axes._count(point, axes._hollow) == axes._count(point, axes.slicing.model) == axes.flops(point)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_kernels_run_is_extract(seed: int) -> None:
    model, axes, x = _KERNELS
    network = axes.network(axes.space.sample(_generator(seed)))
    network.skeleton.eval()
    with torch.no_grad():
        assert torch.equal(network.run(model, x), network.extract(model)(x))


_KERNELS = _kernels(kernel=(1, 3, 5), width=(0.5, 1.0), depth={"a": (1, 2), "b": (0, 2, 3)}, expansion=(0.25, 1.0))


def test_resolutions_keep_the_shape_of_the_image() -> None:
    _, axes, _ = _resnet(resolution=(12, 16))
    x = torch.randn(2, 1, 16, 24)
    assert axes.resized(x, Point(resolution=12)).shape == (2, 1, 12, 18)
    assert axes.resized(x, Point(resolution=16)) is x


def test_permuting_channels_changes_nothing() -> None:
    model, axes, x = _resnet(expansion=(0.5, 1.0))
    model.eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight)
        nn.init.uniform_(norm.bias)
        nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
    before = model(x)
    for group in axes.slicing.groups:
        order = torch.randperm(group.channels, generator=_generator()).tolist()
        weights = axes.slicing.importance(group)
        axes.slicing.permute(group, order)
        torch.testing.assert_close(axes.slicing.importance(group), weights[order])
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="order: expected a permutation"):
        axes.slicing.permute(axes.slicing.groups[0], [0, 0])


def test_make_divisible() -> None:
    assert [make_divisible(v) for v in (1, 8, 11, 12, 100, 33.3)] == [8, 8, 16, 16, 104, 32]
    assert make_divisible(18.6) == 24  # 16 would be below 90 %


@given(st.floats(0.5, 4000), st.sampled_from([1, 2, 4, 8, 16]))
def test_make_divisible_stays_near(value: float, divisor: int) -> None:
    n = make_divisible(value, divisor)
    assert n % divisor == 0
    assert n >= max(divisor, 0.9 * value)
    assert n <= max(value + divisor, divisor)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": (0.5,)}, "width: .* with 1 among them"),
        ({"width": {"stages.9": (4,)}}, "width: 'stages.9' is not a stage"),
        ({"width": {"stages.0": (3, 4)}}, "width: stages.0 has 8 channels"),
        ({"depth": (0.0, 1.0)}, "depth: .* shares in"),
        ({"depth": {"stages.0": (1, 3)}}, "depth: stages.0 has 2 blocks"),
        ({"depth": {"blocks": (1,)}}, "depth: 'blocks' is not a stack"),
        ({"kernel": (2, 3)}, "kernel: .* must be odd"),
        ({"kernel": (3, 5)}, "kernel: nothing in the model can change"),
        ({"expansion": (2.0, 1.0)}, "expansion: .* shares in"),
        ({"resolution": (0, 16)}, "resolution: .* positive whole numbers"),
        ({"resolution": (16, 20)}, "resolution: the example is 16 pixels high"),
        ({"per_block": ("width",)}, "per_block: 'width'"),
        ({"relative": "all"}, "relative: 'all'"),
        ({"expansion": (0.5, 1.0), "inner": lambda channels, e: channels + 1}, "inner: it gives"),
    ],
)
def test_bad_axes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _resnet(**options)


def test_a_resolution_that_the_model_refuses() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4 * 36, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).flatten(1))  # type: ignore[no-any-return]

    x = torch.randn(2, 1, 8, 8)
    with pytest.raises(ValueError, match="resolution: the model does not run at resolution=6"):
        Axes(Slicing(Fixed(), x, width=False), x, resolution=(6, 8))
    with pytest.raises(ValueError, match="resolution: needs one tensor of images"):
        Axes(Slicing(nn.Linear(4, 2), torch.randn(2, 4), width=False), torch.randn(2, 4), resolution=(4,))
