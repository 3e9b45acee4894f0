"""How each method runs in the main job: its options, its steps, and the honest opponent beside it.

Every recipe takes one ``Setting``: the task, the trained baseline, and what all of them may spend. What is fair here:

* The baseline, every elastic method and every separately trained smaller network see the same number of steps on the
  same data. A step does not cost the same: BigNAS runs four children, ProARD an attack; the table has the time of
  each training. The separate networks are trained once, and are the opponent of the whole elastic family.
* RD pruning and global magnitude pruning start from the same trained baseline and share every step of fine-tuning.
* Structured pruning adapters, and torch-pruning beside them, have those same steps; the consensus sub-networks are
  trained from scratch, once for each share that is kept, with the baseline's steps each; DSL likewise for each density,
  with a fixed random mask beside it. DSnoT and Wanda have no training, FTWT half of the fine-tuning for each mass.
* JEI-DNN and the confidence threshold use the same frozen baseline and the same heads' training data.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from pliant import report
from pliant.core.cost import count_parameters
from pliant.core.dynamic import Dynamic, Point, Value
from pliant.core.inputs import Batch, Input, call, check_example, split_batch, take
from pliant.core.objective import Criterion, loss
from pliant.core.slicing import Slicing
from pliant.core.stacks import find_stacks
from pliant.core.training import fit
from pliant.tasks import Task

WIDTHS = (0.25, 0.5, 0.75, 1.0)
SPARSITY = (0.8, 0.9, 0.95, 0.98)
KEEP = (0.75, 0.5, 0.25)
COST_WEIGHTS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)

Note = Callable[[str, report.Kind, str, Dynamic, float, nn.Module], None]


@dataclass
class Setting:
    """What the recipes of one seed share.

    ``base`` is the trained baseline's model and ``full`` a plain copy of it, the reference of all times; ``note(name,
    kind, slug, net, start, full)`` measures a finished network and keeps it.
    """

    task: Task
    base: nn.Module
    full: nn.Module
    seed: int
    epochs: int
    finetune: int
    lr: float
    note: Note
    base_seconds: float = 0.0  # that the baseline took to train
    _separate: dict[float, Plain] = field(default_factory=dict)
    _seconds: dict[float, float] = field(default_factory=dict)

    def fit(self, net: Dynamic, **options: Any) -> None:
        """The training that the baseline had: the same epochs, rate and schedule, unless ``options`` say otherwise."""
        defaults = {"epochs": self.epochs, "lr": self.lr, "seed": self.seed, "progress": False}
        fit(net, self.task.train, **(defaults | options))

    def done(self, name: str, kind: report.Kind, slug: str, net: Dynamic, start: float) -> None:
        """Measure and keep a finished network whose training began at ``start``."""
        self.note(name, kind, slug, net, start, self.full)

    def separate(self, slug: str) -> dict[float, Plain]:
        """Smaller networks by width, each trained by itself; trained and noted once, for the first who asks."""
        if not self._separate:
            start = time.perf_counter()
            slicing = Slicing(self.task.model(self.seed), self.task.example)
            for width in WIDTHS[:-1]:
                began = time.perf_counter()
                model = fresh(slicing.subnetwork(width).extract(slicing.model), self.seed)
                self._separate[width] = Plain(model, self.task.example, self.task.criterion)
                self.fit(self._separate[width])
                self._seconds[width] = time.perf_counter() - began
            self.done("trained separately", "opponent", slug, Several(self._separate), start)
        return self._separate


def _sortednet(s: Setting) -> None:
    from pliant.elastic.sortednet import SortedNet

    start = time.perf_counter()
    depth = (0.5, 1.0) if find_stacks(s.base, s.task.example) else (1.0,)
    net = SortedNet(
        s.task.model(s.seed), s.task.example, width=WIDTHS, depth=depth, seed=s.seed, criterion=s.task.criterion
    )
    s.fit(net)
    s.done("SortedNet (one training)", "method", "sortednet", net, start)
    s.separate("sortednet")


def _bignas(s: Setting) -> None:
    from pliant.elastic.bignas import BigNAS

    start = time.perf_counter()
    model, example = s.task.model(s.seed), s.task.example
    try:
        net = BigNAS(model, example, width=WIDTHS, zero_gamma=True, seed=s.seed, criterion=s.task.criterion)
    except ValueError:  # its blocks do not end in a normalisation
        net = BigNAS(model, example, width=WIDTHS, seed=s.seed, criterion=s.task.criterion)
    s.fit(net)
    s.done("BigNAS (one training)", "method", "bignas", net, start)
    s.separate("bignas")


def _sn_net(s: Setting) -> None:
    """Stitches between two separately trained networks and the baseline; their training counts as its own."""
    from pliant.elastic.stitching import StitchNet

    separate, small = s.separate("sn-net"), (0.25, 0.5)
    start = time.perf_counter() - s.base_seconds - sum(s._seconds[width] for width in small)
    anchors = [copy.deepcopy(separate[width].model) for width in small] + [copy.deepcopy(s.base)]
    net = StitchNet(anchors, s.task.example, seed=s.seed, criterion=s.task.criterion)
    net.initialize(s.task.train)
    s.fit(net, epochs=s.finetune * len(SPARSITY), lr=0.1 * s.lr)
    s.done("SN-Net (stitched)", "method", "sn-net", net, start)


def _self_expanding(s: Setting) -> None:
    from pliant.elastic.self_expanding import SelfExpanding

    slicing = Slicing(s.task.model(s.seed), s.task.example)
    limit = count_parameters(slicing.model)
    small = fresh(slicing.subnetwork(WIDTHS[0]).extract(slicing.model), s.seed)
    start = time.perf_counter()
    net = SelfExpanding(
        small, s.task.example, capacity={"parameters": limit}, units=4, per_check=5, proposals=8, proposal_steps=10,
        score_samples=128, seed=s.seed, criterion=s.task.criterion,
    )  # fmt: skip
    s.fit(net)
    s.done("self-expanding (its growth)", "method", "self-expanding", net, start)
    s.separate("self-expanding")


def _proard(s: Setting) -> None:
    """Robust training with a weak attack of three steps, for its accuracy on clean inputs; it pays for robustness."""
    from pliant.elastic.proard import ProARD

    x = torch.cat([split_batch(batch)[0] for batch in s.task.train])
    low, high = float(x.min()), float(x.max())
    start = time.perf_counter()
    net = ProARD(
        s.task.model(s.seed), s.task.example, width=WIDTHS, divisor=1, bounds=(low, high), eps=0.031 * (high - low),
        step=0.016 * (high - low), attack_steps=3, students=(1, 1, 1), seed=s.seed,
    )  # fmt: skip
    s.fit(net)
    s.done("ProARD (robust, one training)", "method", "proard", net, start)
    s.separate("proard")


def _rd_pruning(s: Setting) -> None:
    from pliant.sparsity.rd_pruning import RDPruning

    x = take(split_batch(next(iter(s.task.train)))[0], slice(0, 64))
    arms: tuple[tuple[str, report.Kind, Any], ...] = (
        ("RD pruning", "method", "rd"),
        ("global magnitude", "opponent", "global"),
    )
    for name, kind, allocation in arms:
        start = time.perf_counter()
        net = RDPruning(
            copy.deepcopy(s.base),
            x,
            sparsity=SPARSITY,
            points="geometric",
            allocation=allocation,
            criterion=s.task.criterion,
        )
        s.fit(
            net,
            epochs=s.finetune * len(SPARSITY),
            optimizer=_adamw,
            lr_schedule="constant",
        )
        s.done(name, kind, "rd-pruning", net, start)


def _consensus(s: Setting) -> None:
    """One training for each share that is kept; layers, or channels where the network has no residual branches."""
    from pliant.sparsity.consensus import Consensus

    start = time.perf_counter()
    nets = []
    for keep in KEEP:
        try:
            net = Consensus(s.task.model(s.seed), s.task.example, keep=keep, seed=s.seed, criterion=s.task.criterion)
        except ValueError:  # no residual branch in it
            net = Consensus(
                s.task.model(s.seed),
                s.task.example,
                granularity="channel",
                keep=keep,
                seed=s.seed,
                criterion=s.task.criterion,
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that gates disagree: what is measured is what is cut out
            s.fit(net)
        nets.append(Only(net, "sparsity"))
    s.done("consensus (a training each)", "method", "consensus-subnetwork", Joined(nets), start)


def _dsnot(s: Setting) -> None:
    """Masks alone, of Wanda and refined, without a step of training; calibrated on 512 training samples."""
    from pliant.sparsity.dsnot import DSnoT

    x = [split_batch(batch)[0] for batch, _ in zip(s.task.train, range(8), strict=False)]
    arms: tuple[tuple[str, report.Kind, int], ...] = (("DSnoT (no training)", "method", 50), ("Wanda", "opponent", 0))
    for name, kind, cycles in arms:
        start = time.perf_counter()
        net = DSnoT(
            copy.deepcopy(s.base),
            s.task.example,
            calibration=x,
            sparsity=(0.3, 0.5, 0.7),
            cycles=cycles,
            criterion=s.task.criterion,
        )
        s.done(name, kind, "dsnot", Only(net.prune(), "sparsity"), start)


def _dsl(s: Setting) -> None:
    """Sparse from the first step to the last, once for each density, with the baseline's steps; a fixed mask beside."""
    from pliant.sparsity.sparse_learning import SparseLearning

    for name, kind, explore in (("DSL (sparse training)", "method", True), ("static random mask", "opponent", False)):
        start = time.perf_counter()
        nets = []
        for sparsity in SPARSITY[:3]:
            net = SparseLearning(
                s.task.model(s.seed),
                s.task.example,
                density=1 - sparsity,
                update_every=50,
                explore=explore,
                criterion=s.task.criterion,
                seed=s.seed,
            )
            s.fit(net)
            nets.append(net)
        s.done(name, cast(report.Kind, kind), "dsl", Joined(nets), start)


def _ftwt(s: Setting) -> None:
    """Heads on the trained baseline, once for each share of the mass, with pruning's steps of fine-tuning each."""
    from pliant.sparsity.ftwt import FTWT

    start = time.perf_counter()
    nets = []
    for mass in (0.95, 0.9, 0.8):
        net = FTWT(copy.deepcopy(s.base), s.task.example, mass=mass, seed=s.seed, criterion=s.task.criterion)
        s.fit(net, epochs=max(2, s.finetune * len(SPARSITY) // 2), lr=0.02, lr_schedule="cosine")
        net.tune(take(split_batch(next(iter(s.task.train)))[0], slice(0, 64)))  # layer by layer what is fastest here
        nets.append(Only(net, "mass"))
    s.done("FTWT (filters per sample)", "method", "ftwt", Joined(nets), start)


def _adapters(s: Setting) -> None:
    """SPLoRA on the trained baseline, and torch-pruning beside it, by rounds with the same steps to recover."""
    from pliant.sparsity.pruning_adapters import PruningAdapters

    start = time.perf_counter()
    epochs, tuned = s.finetune * len(SPARSITY), {"optimizer": _adamw, "lr_schedule": "constant"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a first layer of one channel can use no more than rank 1
        net = PruningAdapters(
            copy.deepcopy(s.base),
            s.task.example,
            density=KEEP,
            step=0.05,
            adapt=0.0,
            seed=s.seed,
            criterion=s.task.criterion,
        )
    s.fit(net, epochs=epochs, **tuned)
    s.done("SPLoRA (frozen weights)", "method", "structured-pruning-adapters", net, start)
    start = time.perf_counter()
    nets: dict[float, Plain] = {}
    model, before = copy.deepcopy(s.base), 1.0
    for keep in KEEP:
        model = _torch_pruned(model, s, keep / before)
        before, nets[keep] = keep, Plain(model, s.task.example, s.task.criterion)
        s.fit(nets[keep], epochs=max(1, epochs // len(KEEP)), **tuned)
        model = copy.deepcopy(nets[keep].model)
    s.done("torch-pruning", "opponent", "structured-pruning-adapters", Several(nets), start)


def _torch_pruned(model: nn.Module, s: Setting, keep: float) -> nn.Module:
    """``model`` with this share of its channels, the rest cut by torch-pruning's group magnitude, over all layers."""
    import torch_pruning

    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    for p in model.parameters():
        p.requires_grad_(True)
    pruner = torch_pruning.pruner.BasePruner(
        model, s.task.example, importance=torch_pruning.importance.GroupMagnitudeImportance(), global_pruning=True,
        pruning_ratio=1 - keep, ignored_layers=head, max_pruning_ratio=0.95,
    )  # fmt: skip
    pruner.step()
    return model


def _adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, 1e-3)


def _jei_dnn(s: Setting) -> None:
    from pliant.routing.jei_dnn import JEIDNN, ThresholdExit

    start = time.perf_counter()
    net = JEIDNN(copy.deepcopy(s.base), s.task.example, cost_weights=COST_WEIGHTS)
    train, validation = net.cache(s.task.train, shuffle=True), net.cache(s.task.validation)
    fit(
        net, train, validation=validation, epochs=3 * s.finetune * len(SPARSITY), lr=0.01, lr_schedule="cosine",
        seed=s.seed, progress=False,
    )  # fmt: skip
    s.done("JEI-DNN (learned gates)", "method", "jei-dnn", Only(net, "cost_weight"), start)
    start = time.perf_counter()
    threshold = ThresholdExit(net, target_costs=(0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)).calibrate(validation)
    s.done("confidence threshold", "opponent", "jei-dnn", threshold, start)
    s.done("cut off after block k", "opponent", "jei-dnn", Only(net, "exit"), start)


RECIPES: dict[str, Callable[[Setting], None]] = {
    "sortednet": _sortednet,
    "rd-pruning": _rd_pruning,
    "jei-dnn": _jei_dnn,
    "bignas": _bignas,
    "sn-net": _sn_net,
    "self-expanding": _self_expanding,
    "proard": _proard,
    "dsnot": _dsnot,
    "dsl": _dsl,
    "ftwt": _ftwt,
    "consensus-subnetwork": _consensus,
    "structured-pruning-adapters": _adapters,
}
METHODS = tuple(RECIPES)
UNSTRUCTURED = (
    "rd-pruning",
    "dsnot",
    "dsl",
)  # single zeros: their place on the chart is by the FLOPs on weights that are not zero
DEFAULT = ("sortednet", "rd-pruning", "jei-dnn")  # what runs in a few minutes when nothing is asked for


# -- networks that the chart needs besides the methods ----------------------------------------------------------------


class Plain(Dynamic):
    """An ordinary network under the contract: one point. Baselines are trained and measured by the same code."""

    def __init__(self, model: nn.Module, example: Input, criterion: Criterion | None = None) -> None:
        super().__init__()
        check_example(model, example)
        self.model, self.criterion = model, criterion
        self.point = Point(width=1.0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output."""
        return self.model(*args, **kwargs)

    def loss(self, batch: Batch) -> Tensor:
        """The criterion; cross entropy where it is None."""
        x, y = split_batch(batch)
        return loss(call(self.model, x), y, self.criterion)

    def points(self) -> list[Point]:
        """The only one."""
        return [Point(width=1.0)]

    def extract(self, point: Mapping[str, Value]) -> nn.Module:
        """A copy of the model, in evaluation mode."""
        self._known(point)
        return copy.deepcopy(self.model).eval()


class Several(Dynamic):
    """Separately trained networks behind one dial, so that they are measured as one line."""

    def __init__(self, nets: Mapping[float, Plain]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets.values())
        self._points = [Point(width=w) for w in nets]
        self.point = self._points[-1]

    def _at(self, point: Mapping[str, Value]) -> Plain:
        net = self.nets[self._points.index(self._known(point))]
        assert isinstance(net, Plain)
        return net

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the network in use."""
        return self._at(self.point)(*args, **kwargs)

    def loss(self, batch: Batch) -> Tensor:
        """The loss of the network in use; each was trained on its own."""
        return self._at(self.point).loss(batch)

    def points(self) -> list[Point]:
        """One for each network."""
        return list(self._points)

    def extract(self, point: Mapping[str, Value]) -> nn.Module:
        """A copy of one of them."""
        net = self._at(point)
        return net.extract(net.point)


class Only(Dynamic):
    """The points of a network that have a certain name, so that they are drawn as a line of their own."""

    def __init__(self, net: Dynamic, name: str) -> None:
        super().__init__()
        self.net, self.name = net, name
        self.point = self.points()[-1]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the network."""
        return self.net(*args, **kwargs)

    def loss(self, batch: Batch) -> Tensor:
        """The network's own."""
        return self.net.loss(batch)

    def points(self) -> list[Point]:
        """Those of the network that name ``self.name``."""
        return [p for p in self.net.points() if self.name in p]

    def use(self, point: Mapping[str, Value]) -> Only:
        """Turn the network's dial."""
        super().use(point)
        self.net.use(self.point)
        return self

    def extract(self, point: Mapping[str, Value]) -> nn.Module:
        """The network's own."""
        return self.net.extract(self._known(point))


class Joined(Dynamic):
    """Networks that were trained one for each setting, behind one dial: the points of all of them."""

    def __init__(self, nets: Sequence[Dynamic]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)
        self._places = {point: i for i, net in enumerate(nets) for point in net.points()}
        self.point = next(reversed(self._places))

    def _at(self, point: Mapping[str, Value]) -> Dynamic:
        net = self.nets[self._places[self._known(point)]]
        assert isinstance(net, Dynamic)
        return net

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the network in use."""
        return self._at(self.point)(*args, **kwargs)

    def loss(self, batch: Batch) -> Tensor:
        """The loss of the network in use; each was trained on its own."""
        return self._at(self.point).loss(batch)

    def points(self) -> list[Point]:
        """Those of all networks."""
        return list(self._places)

    def use(self, point: Mapping[str, Value]) -> Joined:
        """Turn to the network that has ``point``, and its dial to it."""
        super().use(point)
        self._at(self.point).use(self.point)
        return self

    def extract(self, point: Mapping[str, Value]) -> nn.Module:
        """The plain network of ``point``."""
        return self._at(point).extract(self._known(point))


def fresh(model: nn.Module, seed: int) -> nn.Module:
    """New initial weights for its own size: a slice of a larger initialisation has the larger one's spread."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
    return model
