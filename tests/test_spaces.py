"""Architecture spaces, and the axes of real networks: nesting, canonical forms, slices, costs, and bad input."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pliant.core.cost import flops_per_sample
from pliant.core.cuts import can_crop
from pliant.core.dynamic import Point
from pliant.core.feeds import Feeds
from pliant.core.slicing import Slicing, make_divisible
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


# -- what inner channels follow -------------------------------------------------------------------------------------


class Squeeze(nn.Module):
    """Squeeze-and-excitation of linear layers, as many write it."""

    def __init__(self, channels: int, reduced: int, layers: int = 2) -> None:
        super().__init__()
        sizes = [channels, *[reduced] * (layers - 1), channels]
        self.fc = nn.ModuleList([nn.Linear(a, b) for a, b in itertools.pairwise(sizes)])

    def forward(self, x: Tensor) -> Tensor:
        b, c = x.shape[:2]
        y = x.mean((2, 3))
        for fc in self.fc:
            y = fc(torch.relu(y))
        return x * torch.sigmoid(y).view(b, c, 1, 1)


class Inverted(nn.Module):
    """An inverted residual; its parts are named against the order in which they run."""

    def __init__(self, channels: int, mid: int, reduced: int, layers: int = 2) -> None:
        super().__init__()
        self.a_squeeze = Squeeze(mid, reduced, layers)
        self.b_filter = nn.Conv2d(mid, mid, 3, 1, 1, groups=mid)
        self.c_up = nn.Conv2d(channels, mid, 1)
        self.d_down = nn.Conv2d(mid, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.d_down(self.a_squeeze(torch.relu(self.b_filter(self.c_up(x)))))  # type: ignore[no-any-return]


class Weighed(nn.Module):
    """A residual block of two convolutions, and a squeeze-and-excitation of its output: on the stream itself."""

    def __init__(self, channels: int, mid: int, reduced: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, mid, 3, 1, 1), nn.Conv2d(mid, channels, 3, 1, 1)
        self.squeeze = Squeeze(channels, reduced)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.squeeze(self.conv2(torch.relu(self.conv1(x))))  # type: ignore[no-any-return]


class Thrice(nn.Module):
    """Three convolutions, of which the second makes more channels than the first."""

    def __init__(self, channels: int, first: int, second: int) -> None:
        super().__init__()
        self.c = nn.Conv2d(second, channels, 1)
        self.b = nn.Conv2d(first, second, 3, 1, 1)
        self.a = nn.Conv2d(channels, first, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c(torch.relu(self.b(torch.relu(self.a(x)))))  # type: ignore[no-any-return]


class Timed(nn.Module):
    """A residual block whose inner channels get a vector added: they have two makers outside of the block."""

    def __init__(self, channels: int, mid: int, told: int) -> None:
        super().__init__()
        self.tell = nn.Linear(told, mid)
        self.conv1, self.conv2 = nn.Conv2d(channels, mid, 3, 1, 1), nn.Conv2d(mid, channels, 3, 1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + self.conv2(torch.relu(self.conv1(x) + self.tell(t)[:, :, None, None]))  # type: ignore[no-any-return]


class Told(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(3, 12)
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.blocks = nn.ModuleList([Timed(16, 32, 12), Timed(16, 32, 12)])
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        t = torch.relu(self.time(x.mean((2, 3))))
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, t)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Sided(nn.Module):
    """Two inner layers, each with the stem's channels (24) added by a convolution of its own, which is named first."""

    def __init__(self, channels: int, stem: int, mid: int, groups: int = 1) -> None:
        super().__init__()
        self.a_side, self.b_side = nn.Conv2d(stem, mid, 1), nn.Conv2d(stem, 2 * mid, 1)
        self.one, self.two = nn.Conv2d(channels, mid, 1), nn.Conv2d(mid, 2 * mid, 3, 1, 1, groups=groups)
        self.three = nn.Conv2d(2 * mid, channels, 1)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        y = torch.relu(self.one(x) + self.a_side(s))
        return x + self.three(torch.relu(self.two(y) + self.b_side(s)))  # type: ignore[no-any-return]


class Aside(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.stem, self.entry = nn.Conv2d(3, 24, 3, 2, 1), nn.Conv2d(24, 16, 1)
        self.blocks = nn.ModuleList([Sided(16, 24, 32, groups), Sided(16, 24, 32, groups)])
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        s = self.stem(x)
        x = self.entry(s)
        for block in self.blocks:
            x = block(x, s)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Dense(nn.Module):
    """The second convolution reads the block's input beside what the first one made of it."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, growth, 3, 1, 1), nn.Conv2d(channels + growth, growth, 3, 1, 1)
        self.close = nn.Conv2d(channels + 2 * growth, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([x, self.first(x)], 1)
        return x + self.close(torch.cat([y, torch.relu(self.second(y))], 1))  # type: ignore[no-any-return]


def _laid(*blocks: nn.Module, stem: int = 16, **options: Any) -> Axes:
    model = nn.Sequential(
        nn.Conv2d(3, stem, 3, 2, 1), nn.Sequential(*blocks), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(stem, 4)
    )
    x = torch.randn(2, 3, 12, 12)
    sizes: dict[str, Any] = {"width": (0.5, 0.75, 1.0), "expansion": (0.25, 0.5, 1.0)}
    return Axes(Slicing(model, x, stacks=["1"]), x, **{**sizes, **options})


def _made(axes: Axes, point: Mapping[str, Any]) -> dict[str, int]:
    """The channels that every layer makes, seen on the weights."""
    views = axes.network(point).views(axes.slicing.model)
    return {n.removesuffix(".weight"): len(t) for n, t in views.items() if n.endswith(".weight") and t.ndim > 1}


@pytest.mark.parametrize("relative", ["in", "out"])
def test_a_bottleneck_of_linear_layers_follows_the_expanded_channels(relative: Any) -> None:
    axes = _laid(Inverted(16, 48, 12), Inverted(16, 64, 20, layers=3), relative=relative)
    points = list(axes.space.enumerate())
    assert len(points) == 9
    for point in points:
        made, width, e = _made(axes, point), int(point["1.width"]), float(point["1.expansion"])
        for block, (mid, reduced) in enumerate([(48, 12), (64, 20)]):
            expanded = make_divisible(mid * width / 16 * e, 1)
            assert made[f"1.{block}.c_up"] == made[f"1.{block}.b_filter"] == expanded
            assert made[f"1.{block}.a_squeeze.fc.{block + 1}"] == expanded
            assert made[f"1.{block}.a_squeeze.fc.0"] == make_divisible(reduced * expanded / mid, 1)
        assert made["1.1.a_squeeze.fc.1"] == made["1.1.a_squeeze.fc.0"]  # a second bottleneck follows the first


@pytest.mark.parametrize("relative", ["in", "out"])
def test_a_bottleneck_on_the_stream_follows_the_stream(relative: Any) -> None:
    axes = _laid(Weighed(16, 8, 4), Weighed(16, 24, 8), relative=relative)
    for point in axes.space.enumerate():
        made, width, e = _made(axes, point), int(point["1.width"]), float(point["1.expansion"])
        for block, (mid, reduced) in enumerate([(8, 4), (24, 8)]):
            assert made[f"1.{block}.conv1"] == make_divisible(mid * width / 16 * e, 1)
            assert made[f"1.{block}.squeeze.fc.0"] == make_divisible(reduced * width / 16, 1)


def test_blocks_whose_only_inner_channels_are_a_bottleneck_have_no_expansion() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filter, self.squeeze = nn.Conv2d(16, 16, 3, 1, 1), Squeeze(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.squeeze(self.filter(x))  # type: ignore[no-any-return]

    axes = _laid(Plain(), Inverted(16, 32, 8), per_block=("expansion",))
    assert "1.0.expansion" not in axes.space.coordinates
    assert "1.1.expansion" in axes.space.coordinates
    made = _made(axes, axes.space.check({"1.width": 8, "1.1.expansion": 0.25}))
    assert (made["1.0.squeeze.fc.0"], made["1.1.a_squeeze.fc.0"]) == (4, 1)


def test_a_second_inner_layer_follows_the_first() -> None:
    axes = _laid(Thrice(16, 8, 24), Thrice(16, 12, 12))
    for point in axes.space.enumerate():
        made, width, e = _made(axes, point), int(point["1.width"]), float(point["1.expansion"])
        for block, (first, second) in enumerate([(8, 24), (12, 12)]):
            size = make_divisible(first * width / 16 * e, 1)
            assert made[f"1.{block}.a"] == size
            assert made[f"1.{block}.b"] == make_divisible(second * size / first, 1)


def test_of_two_makers_the_one_on_the_images_counts() -> None:
    x = torch.randn(2, 3, 12, 12)
    axes = Axes(Slicing(Told(), x), x, width=(0.5, 1.0), expansion=(0.5, 1.0))
    for point in axes.space.enumerate():
        expected = int(32 * int(point["blocks.width"]) / 16 * float(point["blocks.expansion"]))
        assert _made(axes, point)["blocks.0.conv1"] == expected  # whatever "time.width" is
    assert axes.space.coordinates["time.width"].choices == (6, 12)


def test_the_stream_of_the_stage_goes_before_other_channels_and_these_before_inner_ones() -> None:
    x = torch.randn(2, 3, 12, 12)
    axes = Axes(Slicing(Aside(), x), x, width=(0.5, 1.0), expansion=(0.5, 1.0))
    for point in axes.space.enumerate():
        made, e = _made(axes, point), float(point["blocks.expansion"])
        for block in (0, 1):
            assert made[f"blocks.{block}.one"] == int(32 * int(point["blocks.width"]) / 16 * e)
            assert made[f"blocks.{block}.two"] == int(64 * int(point["stem.width"]) / 24 * e)


def test_both_sides_of_a_grouped_convolution_keep_the_same_groups() -> None:
    x = torch.randn(2, 3, 12, 12)
    axes = Axes(Slicing(Aside(groups=4), x), x, width=(0.5, 1.0), expansion=(0.5, 1.0))
    for point in axes.space.enumerate():
        made = _made(axes, point)
        groups = make_divisible(4 * int(point["blocks.width"]) / 16 * float(point["blocks.expansion"]), 1)
        assert (made["blocks.0.one"], made["blocks.0.two"]) == (8 * groups, 16 * groups)


def test_inner_channels_behind_the_pooling_are_no_squeeze() -> None:
    """Blocks of linear layers on the pooled channels of a convolution: one place, as all of the block sees."""

    class Perceptron(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]

    blocks = nn.Sequential(Perceptron(), Perceptron())
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), blocks, nn.Linear(16, 4))
    x = torch.randn(2, 3, 12, 12)
    axes = Axes(Slicing(model, x), x, width=(0.5, 1.0), expansion=(0.25, 1.0))
    assert _made(axes, axes.space.smallest)["3.0.up"] == 4
    assert _made(axes, axes.space.largest)["3.0.up"] == 32


def test_what_reads_the_stream_as_well_is_a_share_of_the_stream() -> None:
    axes = _laid(Dense(16, 8), Dense(16, 8))
    for point in axes.space.enumerate():
        made = _made(axes, point)
        size = make_divisible(8 * int(point["1.width"]) / 16 * float(point["1.expansion"]), 1)
        assert made["1.0.first"] == made["1.0.second"] == size


def test_regnet_y_of_transformers() -> None:
    """Grouped convolutions between two inner groups, and a squeeze-and-excitation of the second."""
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = t.RegNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2], groups_width=8, num_labels=5)
    x = {"pixel_values": torch.randn(2, 3, 32, 32)}
    axes = Axes(Slicing(t.RegNetForImageClassification(config), x), x, width=(0.5, 1.0), expansion=(0.5, 1.0))
    assert config.layer_type == "y"
    for point in axes.space.enumerate():
        made = _made(axes, point)
        for s, full in enumerate((32, 64)):
            name = f"regnet.encoder.stages.{s}.layers"
            entering = (int(point["regnet.embedder.embedder.convolution.width"]) / 16,
                        int(point["regnet.encoder.stages.0.layers.width"]) / 32)[s]  # fmt: skip
            here = int(point[f"{name}.width"]) / full
            for block, share in enumerate((entering, here)):
                block_name, reduced = f"{name}.{block}", round((16, 32, 64)[s + block] / 4)
                mid = make_divisible(full * share * float(point[f"{name}.expansion"]), 8)  # whole groups
                assert made[f"{block_name}.layer.0.convolution"] == made[f"{block_name}.layer.1.convolution"] == mid
                assert made[f"{block_name}.layer.2.attention.0"] == make_divisible(reduced * mid / full, 1)
                assert made[f"{block_name}.layer.2.attention.2"] == mid


@pytest.mark.parametrize("stacks", [None, ["efficientnet.encoder.blocks"]])
def test_efficientnet_of_transformers(stacks: Any) -> None:
    """With its blocks as a stack, and without: what squeezes follows what is expanded, and is no choice of its own."""
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = t.EfficientNetConfig(
        image_size=32, width_coefficient=1.0, depth_coefficient=1.0, in_channels=[32, 16], out_channels=[16, 24],
        kernel_sizes=[3, 5], strides=[1, 2], num_block_repeats=[1, 2], expand_ratios=[1, 6], depthwise_padding=[],
        hidden_dim=1280, num_labels=5,
    )  # fmt: skip
    x = {"pixel_values": torch.randn(2, 3, 32, 32)}
    expansion = (0.5, 1.0) if stacks else (1.0,)
    slicing = Slicing(t.EfficientNetForImageClassification(config), x, stacks=stacks)
    axes = Axes(slicing, x, width=(0.25, 0.5, 1.0), expansion=expansion)
    full = _made(axes, axes.space.largest)
    assert not [n for n in axes.space.coordinates if "squeeze" in n]
    generator = _generator()
    for _ in range(12):
        made = _made(axes, axes.space.canonical(axes.space.sample(generator)))
        for block in range(3):
            name = f"efficientnet.encoder.blocks.{block}"
            expanded = made[f"{name}.expansion.expand_conv" if block else "efficientnet.embeddings.convolution"]
            squeezed = f"{name}.squeeze_excite.reduce"
            whole = full[f"{name}.squeeze_excite.expand"]
            assert made[squeezed] == make_divisible(full[squeezed] * expanded / whole, 1)
            assert made[f"{name}.squeeze_excite.expand"] == expanded
            assert made[f"{name}.depthwise_conv.depthwise_conv"] == expanded


def test_modules_tell_their_rules() -> None:
    class Ruled(Inverted):
        def inner_width(self, layer: str, channels: int, share: float) -> int | None:
            asked.append((layer, channels, share))
            return channels // 5 if layer == "a_squeeze.fc.0" else None

    class Inside(Squeeze):
        def inner_width(self, layer: str, channels: int, share: float) -> int:
            assert layer == "fc.0"
            return channels // 3

    asked: list[tuple[str, int, float]] = []
    first, second = Ruled(16, 40, 8), Ruled(16, 48, 16)
    second.a_squeeze = Inside(48, 16)
    axes = _laid(first, second)
    made = _made(axes, axes.space.check({"1.width": 12, "1.expansion": 0.5}))
    assert made["1.0.c_up"] == 15  # 40 * 12/16 * 0.5: no rule
    assert made["1.0.a_squeeze.fc.0"] == 3
    assert made["1.1.a_squeeze.fc.0"] == 18 // 3  # the nearest one
    assert ("a_squeeze.fc.0", 15, 1.0) in asked
    assert ("c_up", 12, 0.5) in asked
    given = _laid(Ruled(16, 40, 8), Ruled(16, 40, 8), expansion=(1.0, 2.5), inner=lambda c, e: int(c * e) // 2 * 2)
    made = _made(given, given.space.check({"1.width": 12, "1.expansion": 1.0}))
    assert (made["1.0.c_up"], made["1.0.a_squeeze.fc.0"]) == (12, 2)  # ``inner`` is for what the expansion scales
    with pytest.raises(ValueError, match=r"inner_width of a module around '1.0.a_squeeze.fc.0' .* 8 channels .* has 9"):
        _laid(Ruled(16, 40, 9), Ruled(16, 40, 8))


def test_makers_and_gates() -> None:
    axes = _laid(Inverted(16, 48, 12), Inverted(16, 64, 20, layers=3))
    feeds = Feeds(axes.slicing, axes.example, lambda name: name[:3] if name.startswith("1.") else None)
    made = {tuple(f.layer for f in makers) for makers in feeds.feeds.values()}
    assert ("1.0.a_squeeze.fc.1", "1.0.c_up") in made
    assert ("0", "1.0.d_down", "1.1.d_down") in made
    assert {f.layer for name in feeds.gates for f in feeds.feeds[name]} == {
        "1.0.a_squeeze.fc.0", "1.1.a_squeeze.fc.0", "1.1.a_squeeze.fc.1"
    }  # fmt: skip
    (squeeze,) = (f for makers in feeds.feeds.values() for f in makers if f.layer == "1.0.a_squeeze.fc.0")
    assert (squeeze.channels, squeeze.places) == (48, 1)
    assert squeeze.active({squeeze.groups[0][0].name: 20}) == 20
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(2)]
    perceptron, x = nn.Sequential(nn.Linear(4, 8), *blocks, nn.Linear(8, 2)), torch.randn(2, 4)
    assert not Feeds(Slicing(perceptron, x), x, lambda name: None).gates  # one place everywhere squeezes nothing


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
        ({"depth": (0.0, 1.0)}, r"depth\[0\]: 0\.0; allowed: a finite number above 0"),
        ({"depth": {"stages.0": (1, 3)}}, "depth: stages.0 has 2 blocks"),
        ({"depth": {"blocks": (1,)}}, "depth: 'blocks' is not a stack"),
        ({"kernel": (2, 3)}, r"kernel: \(2, 3\); allowed: odd"),
        ({"kernel": (3, 5)}, "kernel: nothing in the model can change"),
        ({"expansion": (2.0, 1.0)}, r"expansion\[0\]: 2\.0; allowed: a finite number above 0"),
        ({"resolution": (0, 16)}, r"resolution\[0\]: 0; allowed: a whole number from 1"),
        ({"resolution": (16, 20)}, "resolution: the example is 16 pixels high"),
        ({"per_block": ("width",)}, r"per_block: \('width',\)"),
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
