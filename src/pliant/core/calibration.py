"""Normalisation statistics of many sub-networks that share their weights.

A running mean belongs to one network: with shared weights every size, path or depth sees other activations, so one set
of buffers is wrong for all of them. ``NormTable`` keeps a row for each point, and re-estimates a row on a few batches
with nothing else changed: not the weights, not the buffers of the model, not the rows of other points.

With B batches, batch b having n_b values per channel, mean m_b and biased variance v_b:

    "cumulative"   mean = (1/B) sum m_b             var = (1/B) sum v_b n_b/(n_b - 1)     (BatchNorm, momentum=None)
    "ofa"          mean = sum n_b m_b / sum n_b     var = sum n_b v_b / sum n_b           (Once-for-all)
    "pooled"       mean = sum n_b m_b / sum n_b     var = sum n_b (v_b + (m_b - mean)^2) / sum n_b

"pooled" is the variance of all values together, exact for the first layer; later layers see inputs that were
normalised batch by batch. In all three each layer normalises by its batch's own statistics meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pliant.core.dynamic import Point
from pliant.core.inputs import device_of, inputs_of, removing, to_device

Estimator = Literal["cumulative", "ofa", "pooled"]
Run = Callable[[Any, Mapping[str, Tensor]], Any]


class NormTable(nn.Module):
    """One row of running means and variances for each point; every normalisation layer owns a range of columns.

    Args:
        model: the full network; its layers that keep running statistics are found by name.
        points: the first rows. They hold the model's own statistics and are stale until estimated.

    A layer that a point cuts to its first or scattered c channels uses the first c of its columns. Layers that training
    leaves in evaluation mode (frozen ones) have no part in it: they keep the model's own statistics, see ``follow``.
    """

    mean: Tensor
    var: Tensor
    fresh: Tensor
    frozen: Tensor

    def __init__(self, model: nn.Module, points: Sequence[Point]) -> None:
        super().__init__()
        self.columns: dict[str, tuple[int, int]] = {}  # layer -> (first column, channels)
        means, variances = [], []
        start = 0
        for name, module in model.named_modules():
            if isinstance(module, _NormBase) and module.running_mean is not None:
                assert module.running_var is not None
                self.columns[name] = (start, module.num_features)
                start += module.num_features
                means.append(module.running_mean.detach())
                variances.append(module.running_var.detach())
        device = device_of(model)
        self._rows: dict[Point, int] = {}
        first = torch.cat(means) if means else torch.zeros(0, device=device)
        second = torch.cat(variances) if variances else torch.ones(0, device=device)
        self.register_buffer("mean", first.new_zeros(0, start))
        self.register_buffer("var", first.new_zeros(0, start))
        self.register_buffer("fresh", torch.zeros(0, dtype=torch.bool, device=device))
        self.register_buffer("frozen", torch.zeros(len(self.columns), dtype=torch.bool))
        self._read: tuple[Tensor, int, frozenset[str]] | None = None  # what ``still`` read, and of what
        self._first = (first, second)  # what a new row starts from
        for point in points:
            self.add(point)

    def __bool__(self) -> bool:
        return bool(self.columns)

    def __contains__(self, point: Point) -> bool:
        if torch.compiler.is_compiling():  # which takes the keys of a dictionary by identity
            return any(known == point for known in self._rows)
        return point in self._rows

    def points(self) -> list[Point]:
        """The points that have a row, in order."""
        return list(self._rows)

    def add(self, point: Point, *, fresh: bool = False) -> None:
        """A row for ``point`` where it has none, with the statistics that the model came with."""
        if point in self._rows:
            return
        self._rows[point] = len(self._rows)
        self.mean = torch.cat([self.mean, self._first[0].to(self.mean)[None]])
        self.var = torch.cat([self.var, self._first[1].to(self.var)[None]])
        known = torch.tensor([fresh or not self.columns], device=self.fresh.device)
        self.fresh = torch.cat([self.fresh, known])

    def keep(self, points: Iterable[Point]) -> None:
        """Only the rows of ``points``, in that order; new rows where there were none."""
        wanted = list(dict.fromkeys(points))
        for point in wanted:
            self.add(point)
        rows = torch.tensor([self._rows[p] for p in wanted], dtype=torch.long, device=self.mean.device)
        self.mean, self.var, self.fresh = self.mean[rows], self.var[rows], self.fresh[rows]
        self._rows = {point: row for row, point in enumerate(wanted)}

    def stale(self) -> None:
        """The weights have moved: no row may be trusted until it is estimated again."""
        if self.columns:
            self.fresh.fill_(False)

    def trust(self, point: Point) -> None:
        """The row of ``point`` is right: it came with the model, or training kept it."""
        self.fresh[self._rows[point]] = True

    def check(self, point: Point) -> None:
        """Raise RuntimeError where the statistics of ``point`` have not been estimated since training."""
        if not self.columns or (point in self._rows and bool(self.fresh[self._rows[point]])):
            return
        raise RuntimeError(
            f"the normalisation statistics of {point} have not been estimated since training; "
            "call net.finish(train) or net.calibrate(data) first (pliant.fit does so at its end)"
        )

    def follow(self, model: nn.Module) -> None:
        """Take note, in a step of training, which layers of ``model`` use the statistics that they have."""
        modules = dict(model.named_modules())
        now = frozenset(name for name in self.columns if not modules[name].training)
        if now != self.still:
            self.frozen.copy_(torch.tensor([name in now for name in self.columns], dtype=torch.bool))

    @property
    def still(self) -> frozenset[str]:
        """The layers that training leaves as they are; the buffer is read once for each change of it."""
        version = 0 if self.frozen.is_inference() else self.frozen._version
        if self._read is None or self._read[0] is not self.frozen or self._read[1] != version:
            names = frozenset(n for n, held in zip(self.columns, self.frozen.tolist(), strict=True) if held)
            self._read = (self.frozen, version, names)
        return self._read[2]

    def place(self, point: Point) -> tuple[object, ...]:
        """Where the row of ``point`` lies in memory: while this stays the same, so do its ``tensors``."""
        return (self._rows.get(point, -1), self.mean.data_ptr(), self.var.data_ptr(), self.still)

    def tensors(self, point: Point, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """The buffers of ``point`` by name, as views on its row.

        ``layers`` are the modules that the point has, by name; those that keep no statistics are passed over.
        """
        row, found, still = self._rows[point], {}, self.still
        for name, (start, _) in self.columns.items():
            if name in layers and name not in still:
                end = start + int(layers[name].num_features)  # type: ignore[arg-type]
                found[f"{name}.running_mean"] = self.mean[row, start:end]
                found[f"{name}.running_var"] = self.var[row, start:end]
        return found

    @torch.no_grad()
    def estimate(
        self,
        point: Point,
        skeleton: nn.Module,
        run: Run,
        batches: Sequence[Any],
        estimator: Estimator = "cumulative",
    ) -> None:
        """Reset the row of ``point`` and estimate it again on ``batches``; ``skeleton`` is left in evaluation mode.

        Args:
            point: a point; a row is added where it has none.
            skeleton: the modules that run at ``point``, named as in the full network.
            run: ``run(x, tensors)`` runs them once with the buffers of ``tensors`` in place of their own.
            batches: inputs, see ``batches_of``; one that has a single value per channel at some layer is passed over.
            estimator: "cumulative", "ofa" or "pooled".

        Raises:
            ValueError: no batch has more than one value per channel.
        """
        check_estimator(estimator)
        if not self.columns:
            return
        self.add(point)
        skeleton.eval()
        estimated = self.columns.keys() - self.still
        layers = {name: m for name, m in skeleton.named_modules() if name in estimated}
        seen: dict[str, list[tuple[int, Tensor, Tensor]]] = {name: [] for name in layers}
        # A layer in training mode writes into its buffers: give it some that nobody reads.
        scratch = {name: t.clone() for name, t in self.tensors(point, layers).items()}
        scratch |= {f"{n}.num_batches_tracked": torch.zeros((), dtype=torch.int64, device=self.mean.device)
                    for n, m in layers.items() if getattr(m, "num_batches_tracked", None) is not None}  # fmt: skip
        refused: ValueError | None = None
        handles = [m.register_forward_pre_hook(_noting(seen[name])) for name, m in layers.items()]
        with removing(handles):
            try:
                for layer in layers.values():
                    layer.train()
                for x in batches:
                    before = {name: len(noted) for name, noted in seen.items()}
                    try:
                        run(x, scratch)
                    except ValueError as error:
                        if not is_too_small(error):
                            raise
                        for name, noted in seen.items():
                            del noted[before[name] :]
                        refused = error
            finally:
                skeleton.eval()
        if refused is not None and not any(seen.values()):
            raise ValueError("data: none of its batches has more than one value per channel") from refused
        for name, noted in seen.items():
            if not noted:
                continue  # a layer that does not run at this point
            mean, var = combine(noted, estimator)
            start = self.columns[name][0]
            row = self._rows[point]
            self.mean[row, start : start + len(mean)] = mean
            self.var[row, start : start + len(var)] = var
        self.trust(point)


def is_too_small(error: Exception) -> bool:
    """Whether an error says that BatchNorm was given one value per channel, which has no variance."""
    return str(error).startswith("Expected more than 1 value per channel")


def _noting(noted: list[tuple[int, Tensor, Tensor]]) -> Callable[[nn.Module, Any], None]:
    def note(module: nn.Module, args: Any) -> None:
        x: Tensor = args[0].detach()
        x = x if x.dtype == torch.float64 else x.float()
        dims = [d for d in range(x.ndim) if d != 1]
        var, mean = torch.var_mean(x, dims, correction=0)
        noted.append((x.numel() // x.shape[1], mean, var))

    return note


def combine(noted: Sequence[tuple[int, Tensor, Tensor]], estimator: Estimator) -> tuple[Tensor, Tensor]:
    """Mean and variance (C,), float64, from (values per channel, mean, biased variance) of each batch."""
    counts = torch.tensor([n for n, _, _ in noted], dtype=torch.float64, device=noted[0][1].device)[:, None]
    means = torch.stack([m for _, m, _ in noted]).double()
    variances = torch.stack([v for _, _, v in noted]).double()
    if estimator == "cumulative":
        mean, var = means.mean(0), (variances * counts / (counts - 1).clamp(min=1)).mean(0)
    else:
        share = counts / counts.sum()
        mean = (share * means).sum(0)
        spread = (means - mean) ** 2 if estimator == "pooled" else torch.zeros_like(means)
        var = (share * (variances + spread)).sum(0)
    return mean, var


def check_estimator(estimator: str) -> None:
    """Raise ValueError unless ``estimator`` is one of the three."""
    if estimator not in get_args(Estimator):
        raise ValueError(f"estimator: {estimator!r} is not one of {', '.join(get_args(Estimator))}")


def batches_of(data: Any, count: int, device: torch.device) -> list[Any]:
    """The inputs of the first ``count`` batches of ``data`` (batches, or one input), on ``device``.

    Raises:
        ValueError: ``data`` has no batches.
    """
    taken = [to_device(x, device) for x, _ in zip(inputs_of(data), range(count), strict=False)]
    if not taken:
        raise ValueError("data: it has no batches to estimate normalisation statistics on")
    return taken
