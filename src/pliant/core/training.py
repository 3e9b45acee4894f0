"""``fit``: a thin loop over ``accelerate``. One process, several (DDP) and sharded (FSDP) read the same.

What it adds to a loop that a user would write: the method's calls (``schedule``, ``epoch_end``, ``finish``), a progress
bar, a stop at the first loss that is not finite, and checkpoints from which a run goes on **bit by bit** as if it had
never been broken.

Exact resume rests on one rule: the random state never depends on the past. It is set from (seed, epoch) when the
loader's iterator is made and from (seed, batch, rank) before each batch is fetched, so a resumed run that pulls the
batches it has already seen stands where the unbroken one stood. A data set that keeps a random state *of its own* from
one epoch to the next is outside this rule. The caller's random states are given back at the end; a generator that the
loader was built with is set anew each epoch and stays so.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import (  # type: ignore[import-untyped]
    DistributedDataParallelKwargs,
    DistributedType,
)
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader

from pliant.core import check
from pliant.core.calibration import is_too_small
from pliant.core.dynamic import Dynamic, Point
from pliant.core.inputs import Batch, rows_of, split_batch, tensors_in, to_device
from pliant.core.persistence import (
    SavedFileError,
    load_state,
    pack,
    read_folder,
    standing,
    state_of,
    unpack,
    write_folder,
)

Schedule = Callable[[float], float]
_CHECK_EVERY = 16  # steps between looks at the loss where looking costs a synchronisation
_KEPT = 2
_STEP = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.step-\d{8,}\.[0-9a-f]{8}\.(tmp|old)")


class DivergedError(RuntimeError):
    """The loss or the weights are no longer finite.

    Attributes:
        step: the optimiser step at which it was seen.
        last: the last good checkpoint, None where none was written.
    """

    def __init__(self, step: int, what: str, last: Path | None, cure: str = "") -> None:
        good = (
            f"the last good checkpoint is {last}"
            if last
            else "no checkpoint was written (checkpoint=None, or too early)"
        )
        cure = cure or "A smaller lr, clip=1.0 or a longer warm-up are the usual cures"
        super().__init__(f"step {step}: {what}; {good}. {cure}")
        self.step = step
        self.last = last


@dataclass
class History:
    """What happened: optimiser steps, the mean loss of each epoch, seconds, and the step the run was resumed from."""

    steps: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    resumed_from: int | None = None


def onecycle(progress: float) -> float:
    """A quarter of linear warm-up from 1/25, then a half cosine to zero."""
    if progress < 0.25:
        return 0.04 + 0.96 * progress / 0.25
    return 0.5 * (1 + math.cos(math.pi * (progress - 0.25) / 0.75))


def cosine(progress: float) -> float:
    """A half cosine from one to zero."""
    return 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Schedule] = {"onecycle": onecycle, "cosine": cosine, "constant": lambda progress: 1.0}


class _Objective(nn.Module):
    """``net.loss`` as a forward pass, which is what DDP and FSDP wrap."""

    def __init__(self, net: Dynamic) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: Batch) -> Tensor:
        return self.net.loss(batch)


def fit(
    net: Dynamic,
    train: Iterable[Batch],
    *,
    validation: Iterable[Batch] | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    optimizer: Optimizer | Callable[[list[dict[str, Any]]], Optimizer] | None = None,
    lr: float = 0.1,
    weight_decay: float = 5e-4,
    lr_schedule: str | Schedule = "onecycle",
    clip: float | None = None,
    accumulate: int = 1,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: bool = True,
    progress: bool = True,
    accelerator: Accelerator | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> History:
    """Train ``net`` by its own ``loss`` and leave it in evaluation mode.

    Args:
        net: the network; it is moved to the accelerator's device.
        train: batches, read anew each epoch: a ``DataLoader``, a list, anything that can be iterated several times.
            In several processes each takes every n-th batch. A batch of one row that BatchNorm cannot take is left
            out, with a warning; a step of nothing else moves no weight.
        validation: handed to ``net.epoch_end``.
        epochs: passes over ``train``, which then needs a length. Give this or ``steps``.
        steps: optimiser steps.
        optimizer: an optimiser, or a function from parameter groups to one. SGD with Nesterov momentum 0.9 by default.
        lr: the peak learning rate of the default optimiser; a group's ``lr_scale`` multiplies it. Other optimisers
            keep theirs as the peak.
        weight_decay: handed to ``net.parameter_groups``.
        lr_schedule: "onecycle", "cosine", "constant", or a function from progress in [0, 1] to a factor.
        clip: largest norm of the gradient.
        accumulate: batches for each optimiser step; their mean gradient is used.
        seed: of everything random during training; the caller's random states are restored afterwards.
        checkpoint: a folder for checkpoints, of which the last two are kept.
        checkpoint_every: steps between them; one for each epoch by default.
        resume: go on from the newest checkpoint in the folder, with the same result as an unbroken run.
        progress: show a progress bar.
        accelerator: one of your own; ``Accelerator()`` by default.
        on_step: called with (steps done, steps in all, loss). The loss is NaN between the looks on devices where
            reading it costs a synchronisation.

    Raises:
        ValueError: an argument is not what is described here, or the checkpoint belongs to another run.
        DivergedError: the loss or a weight is not finite.
        OSError: a checkpoint cannot be written.
    """
    per_epoch = _check(
        net, train, epochs, steps, lr, weight_decay, clip, accumulate, checkpoint_every, lr_schedule, seed
    )
    for name, flag in (("resume", resume), ("progress", progress)):
        check.boolean(name, flag)
    factor = SCHEDULES[lr_schedule] if isinstance(lr_schedule, str) else lr_schedule
    accelerator = accelerator if accelerator is not None else Accelerator()
    if accelerator.ddp_handler is None:  # a sub-network's step leaves other parameters without a gradient
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    with _random_states(), _given_back(net):
        run = _Run(net, train, accelerator, optimizer, lr, weight_decay, seed)
        batches: int | None = None
        if per_epoch is not None:
            batches = len(run.train) if run.shards == 1 else max(per_epoch // run.shards, 1)  # type: ignore[arg-type]
        if steps is not None:
            total = steps
        else:
            assert epochs is not None
            assert batches is not None
            total = epochs * math.ceil(batches / accumulate)
        identity = {
            "class": f"{type(net).__module__}:{type(net).__qualname__}",
            "optimizer": type(run.optimizer.optimizer).__name__,
            "total steps": total,
            "epochs": epochs,
            "batches in an epoch": per_epoch,
            "accumulate": accumulate,
            "seed": seed,
            "lr": lr,
            "weight_decay": weight_decay,
            "lr_schedule": lr_schedule if isinstance(lr_schedule, str) else "a function",
            "clip": clip,
            "processes": accelerator.num_processes,
        }
        store = _Store(Path(checkpoint), identity, run) if checkpoint is not None else None
        if store is not None and getattr(train, "persistent_workers", False):
            warnings.warn(
                "train: persistent_workers=True keeps the workers' random state from epoch to epoch, so a data set "
                "with random augmentation is not resumed bit by bit; without it, it is",
                stacklevel=2,
            )
        if store is not None:
            if resume:
                store.restore()
            else:
                store.tidy()
        if run.done:
            net.eval()
            return run.history
        bar = _Bar(total, run.history.steps, progress and accelerator.is_main_process)
        with bar:
            _loop(
                run, store, bar, total, epochs, batches, factor, clip, accumulate, checkpoint_every, validation, on_step
            )
            run.check_weights(store.last if store is not None else None)
            run.reseed("finish")
            net.schedule(1.0)
            net.finish(train)
            run.done = True
            if store is not None:
                store.write()
    net.eval()
    return run.history


@contextmanager
def _given_back(net: Dynamic) -> Iterator[None]:
    """After an exception the network has the modes and the setting that it came with, and no gradients."""
    modes, point, training = [(m, m.training) for m in net.modules()], net.point, net.training
    try:
        yield
    except BaseException:
        with suppress(Exception):  # training may have changed which settings there are
            net.use(point)
        net.zero_grad(set_to_none=True)
        net.train(training)  # what the method made meanwhile
        for module, flag in modes:
            module.training = flag
        raise


def _loop(
    run: _Run,
    store: _Store | None,
    bar: _Bar,
    total: int,
    epochs: int | None,
    batches_per_epoch: int | None,
    factor: Schedule,
    clip: float | None,
    accumulate: int,
    every: int | None,
    validation: Iterable[Batch] | None,
    on_step: Callable[[int, int, float], None] | None,
) -> None:
    """Epochs of steps, from where ``run`` stands."""
    net, history, accelerator = run.net, run.history, run.accelerator
    changes = type(net).structure is not Dynamic.structure
    at_once = accelerator.device.type == "cpu" and accelerator.num_processes == 1  # reading the loss is then free
    pending: list[Tensor] = []
    start = time.perf_counter() - history.seconds

    def look() -> float:
        """Read the losses not yet read; stop at the first that is not finite."""
        if not pending:
            return math.nan
        values = torch.stack(pending)
        if accelerator.num_processes > 1:
            values = accelerator.reduce(values, "mean")
        read = values.tolist()
        first = history.steps - len(pending) + 1
        pending.clear()
        for i, value in enumerate(read):
            if not math.isfinite(value):
                raise DivergedError(first + i, f"the loss is {value}", store.last if store else None)
            run.loss_sum += value
        return float(read[-1])

    def save() -> None:
        look()
        history.seconds = time.perf_counter() - start
        if store is not None:
            store.write()

    net.train()
    while True:
        exhausted = False
        batches = run.batches() if history.steps < total else iter(())  # skips what a resumed run has already seen
        while history.steps < total:
            group = list(islice(batches, accumulate))
            if not group:
                exhausted = True
                break
            share = min(history.steps / total, 1.0)
            net.schedule(share)
            if changes:
                run.follow()
            run.set_lr(factor(share))
            run.optimizer.zero_grad(set_to_none=True)
            loss = run.gradient(group)
            if loss is None:  # the schedule goes on, no weight moves
                history.steps += 1
                bar.step(history.steps, math.nan)
                if on_step is not None:
                    on_step(history.steps, total, math.nan)
                if every is not None and history.steps % every == 0:
                    save()
                continue
            if at_once:
                value = loss.item()
                if not math.isfinite(value):
                    last = store.last if store else None
                    raise DivergedError(history.steps + 1, f"the loss is {value}", last, run.blame(group))
                run.loss_sum += value
                history.steps += 1
            else:
                pending.append(loss)
                history.steps += 1
                value = look() if history.steps % _CHECK_EVERY == 0 else math.nan
            if clip is not None:
                accelerator.clip_grad_norm_(run.objective.parameters(), clip)
            (run.optimizer.optimizer if run.bare else run.optimizer).step()
            run.loss_count += 1
            bar.step(history.steps, value)
            if on_step is not None:
                on_step(history.steps, total, value)
            if every is not None and history.steps % every == 0:
                save()
        look()
        if run.in_epoch == 0 and history.steps < total:
            raise ValueError(
                "train: it gave no batch" + (" the second time; an iterator can be read only once" if run.epoch else "")
            )
        if run.in_epoch and (exhausted or epochs is not None or run.in_epoch == batches_per_epoch):
            if not run.loss_count:
                raise ValueError("train: all of its batches have one row, which BatchNorm cannot normalise")
            history.losses.append(run.loss_sum / max(run.loss_count, 1))
            run.loss_sum, run.loss_count, run.in_epoch = 0.0, 0, 0
            run.epoch += 1
            run.reseed("epoch_end")
            net.epoch_end(validation)
            run.follow()
            net.train()
            if every is None:
                save()
        if history.steps >= total or (epochs is not None and run.epoch >= epochs):
            break
    look()
    history.seconds = time.perf_counter() - start


def _check(
    net: Dynamic,
    train: Any,
    epochs: int | None,
    steps: int | None,
    lr: float,
    weight_decay: float,
    clip: float | None,
    accumulate: int,
    every: int | None,
    lr_schedule: str | Schedule,
    seed: int,
) -> int | None:
    """Check the arguments; return the number of batches in an epoch where it is known."""
    check.instance("net", net, Dynamic, allowed="a pliant network")
    if (epochs is None) == (steps is None):
        raise ValueError(f"epochs, steps: give one of the two, got epochs={epochs} and steps={steps}")
    for name, value in {"epochs": epochs, "steps": steps, "checkpoint_every": every}.items():
        check.optional(check.whole, name, value, at_least=1, at_most=10**9)
    check.whole("accumulate", accumulate, at_least=1)
    check.positive("lr", lr)
    if clip != math.inf:
        check.optional(check.positive, "clip", clip)
    check.number("weight_decay", weight_decay, at_least=0)
    check.seed("seed", seed)
    if not callable(lr_schedule):
        check.choice("lr_schedule", lr_schedule, SCHEDULES)
    if not any(p.requires_grad for p in net.parameters()):
        raise ValueError("net: it has no trainable parameter (requires_grad is False everywhere)")
    if not isinstance(train, Iterable):
        raise TypeError(f"train: expected batches, got {type(train).__name__}")
    length: int | None = None
    if isinstance(train, Sized):
        try:
            length = len(train)
        except TypeError:  # a DataLoader over an iterable data set has __len__ and no length
            length = None
    if length == 0:
        raise ValueError("train: it is empty (its length is 0); with drop_last=True the batch may exceed the data")
    if epochs is not None and length is None:
        raise ValueError(
            f"train: {type(train).__name__} has no length, which epochs={epochs} needs; give steps= instead"
        )
    return length


class _Run:
    """The state of one training run: where it stands, and the objects that it moves."""

    def __init__(
        self,
        net: Dynamic,
        train: Iterable[Batch],
        accelerator: Accelerator,
        optimizer: Optimizer | Callable[[list[dict[str, Any]]], Optimizer] | None,
        lr: float,
        weight_decay: float,
        seed: int,
    ) -> None:
        self.net, self.accelerator, self.seed = net, accelerator, seed
        self.make, self.lr, self.weight_decay = optimizer, lr, weight_decay
        self.history = History()
        self.epoch = self.in_epoch = self.seen = self.skip = 0
        self.loss_sum, self.loss_count = 0.0, 0
        self.done = self.warned = False
        # accelerate's backward and step look for packages on every call; where they add nothing, they are passed by.
        self.bare = (
            accelerator.num_processes == 1
            and accelerator.distributed_type == DistributedType.NO
            and accelerator.mixed_precision == "no"
            and accelerator.scaler is None
        )
        self.reseed("loader", same=True)
        if accelerator.num_processes > 1 and isinstance(train, DataLoader):
            train = accelerator.prepare_data_loader(train)
            self.shards = 1  # accelerate has shared the batches out
        else:
            self.shards = accelerator.num_processes
        self.train = train
        self.prepare()

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of every parameter."""
        return bool(self.accelerator.distributed_type == DistributedType.FSDP)

    def prepare(self) -> None:
        """Build the optimiser and hand both to accelerate; again after the structure was changed by a checkpoint."""
        groups = self.net.parameter_groups(self.weight_decay)
        if isinstance(self.make, Optimizer):
            made = self.make
        elif self.make is not None:
            made = self.make([dict(g) for g in groups])
        else:
            made = SGD([dict(g) for g in groups], lr=self.lr, momentum=0.9, nesterov=True)
        held = {id(p) for g in made.param_groups for p in g["params"]}
        if not any(id(p) in held for p in self.net.parameters()):
            raise ValueError("optimizer: it holds no parameter of net; build it from net.parameter_groups()")
        for group in made.param_groups:
            group.setdefault("base_lr", group["lr"] * group.get("lr_scale", 1.0))
        self.objective, self.optimizer = self.accelerator.prepare(_Objective(self.net), made)
        self.heard = self._heard()
        self.net.attach_optimizer(self.optimizer.optimizer)

    def set_lr(self, factor: float) -> None:
        """The learning rate of every group: its own peak times ``factor``."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor

    def follow(self) -> None:
        """Let the optimiser and DDP follow parameters that the method added, removed or gave another shape."""
        if self.sharded:
            return
        if self.accelerator.num_processes > 1 and self.heard != self._heard():  # DDP listens to those it was built with
            self.objective = self.accelerator.prepare(_Objective(self.net))
            self.heard = self._heard()
        now = {id(p) for p in self.net.parameters() if p.requires_grad}
        optimizer = self.optimizer.optimizer
        held = {id(p) for g in optimizer.param_groups for p in g["params"]}
        if now == held:
            return
        known = {id(p) for p in self.net.parameters()}
        for group in optimizer.param_groups:  # a frozen parameter stays: it has no gradient and does not move
            for p in group["params"]:
                if id(p) not in known:
                    optimizer.state.pop(p, None)
            group["params"] = [p for p in group["params"] if id(p) in known]
        if not now - held:
            return
        if isinstance(self.make, Optimizer):
            return  # the caller's own optimiser holds what the caller gave it
        for group in self.net.parameter_groups(self.weight_decay):
            if fresh := [p for p in group["params"] if id(p) in now and id(p) not in held]:
                peak = optimizer.defaults["lr"] * group.get("lr_scale", 1.0)
                optimizer.add_param_group({**group, "params": fresh, "lr": peak, "base_lr": peak})

    def _heard(self) -> list[tuple[int, torch.Size, bool]]:
        return [(id(p), p.shape, p.requires_grad) for p in self.net.parameters()]

    def check_weights(self, last: Path | None) -> None:
        """Refuse weights that are not finite.

        Raises:
            DivergedError: one is not; ``last`` is the last good checkpoint.
        """
        for name, p in self.net.named_parameters():
            if p.is_floating_point() and not torch.isfinite(p).all():
                raise DivergedError(self.history.steps, f"the weight {name} is not finite", last)

    def blame(self, group: list[Batch]) -> str:
        """What to do about a loss that is not finite, where the inputs or the norm statistics tell."""
        try:
            inputs = [t for batch in group for t in tensors_in(split_batch(batch)[0])]
        except TypeError:  # a batch of the method's own form
            return ""
        if not any(bool(t.isnan().any()) for t in inputs if t.is_floating_point()):
            return ""
        poisoned = [n for n, b in self.net.named_buffers() if b.is_floating_point() and not b.isfinite().all()]
        also = f" Statistics of norms took it up ({poisoned[0]}): load the network anew." if poisoned else ""
        return f"The inputs of this batch hold NaN: repair the data.{also}"

    def gradient(self, group: list[Batch]) -> Tensor | None:
        """Add up the mean gradient of the batches; return their mean loss, None where none of them can be used."""
        device = self.accelerator.device
        total: Tensor | None = None
        left_out = 0
        for i, batch in enumerate(group):
            last = i == len(group) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.objective):
                try:
                    loss = self.objective(batch if device.type == "cpu" else to_device(batch, device))
                except ValueError as error:
                    if not (is_too_small(error) and _is_single(batch) and self.accelerator.num_processes == 1):
                        raise
                    self._leave_out()
                    left_out += 1
                    continue
                if not isinstance(loss, Tensor) or loss.numel() != 1:
                    got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                    raise TypeError(f"net: {type(self.net).__name__}.loss must return a scalar tensor, got {got}")
                if len(group) > 1:
                    loss = loss / len(group)
                if self.bare:
                    loss.backward()  # type: ignore[no-untyped-call]
                else:
                    self.accelerator.backward(loss)
            part = loss.detach()
            total = part if total is None else total + part
        if total is None:
            return None
        if left_out:  # the mean of those that count
            share = len(group) / (len(group) - left_out)
            total = total * share
            for p in self.objective.parameters():
                if p.grad is not None:
                    p.grad.mul_(share)
        return total.reshape(())

    def _leave_out(self) -> None:
        if not self.warned:
            self.warned = True
            warnings.warn(
                "train: a batch of one row is left out, because BatchNorm cannot normalise it; drop_last=True of a "
                "DataLoader, or another batch size, avoids such batches",
                stacklevel=5,
            )

    def batches(self) -> Iterator[Batch]:
        """One epoch of this process's batches, random states set before each; those already seen are skipped."""
        owners: list[Any] = [self.train, getattr(self.train, "sampler", None)]
        for owner in [*owners, getattr(self.train, "batch_sampler", None)]:
            if hasattr(owner, "set_epoch"):
                owner.set_epoch(self.epoch)
        self.reseed("epoch", same=True)
        for generator in _generators(self.train):
            generator.manual_seed(_mix(self.seed, "generator", self.epoch))
        iterator = iter(self.train)
        skip, self.skip = self.skip, 0
        first = self.seen - skip
        for index in count():
            self.reseed(first + index)
            turn = list(islice(iterator, self.shards))
            if not turn or (index and len(turn) < self.shards):  # a last round that is not full is dropped
                return
            if index < skip:
                continue
            self.seen += 1
            self.in_epoch += 1
            yield turn[self.accelerator.process_index % len(turn)]

    def reseed(self, what: object, *, same: bool = False) -> None:
        """Set every global random state from (seed, epoch or batch, rank)."""
        rank = 0 if same else self.accelerator.process_index
        _seed(_mix(self.seed, what, self.epoch if isinstance(what, str) else 0, rank))


def _is_single(batch: Batch) -> bool:
    try:
        return rows_of(split_batch(batch)[0]) == 1
    except TypeError:  # a batch of the method's own form
        return False


def _mix(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def _seed(value: int) -> None:
    torch.default_generator.manual_seed(value)  # torch.manual_seed would also queue a call for a GPU never used
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(value)
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)  # noqa: NPY002 - data sets of users draw from the global state


def _generators(train: Any) -> list[torch.Generator]:
    """Generators of the loader's own, whose state would otherwise depend on the epochs before."""
    found: dict[int, torch.Generator] = {}
    layer, seen = [train], set()
    while layer:  # accelerate wraps loaders and samplers several deep
        for owner in layer:
            for name in ("generator", "synchronized_generator"):
                if isinstance(generator := getattr(owner, name, None), torch.Generator):
                    found[id(generator)] = generator
        inner = [getattr(o, n, None) for o in layer for n in ("sampler", "batch_sampler", "base_dataloader")]
        seen |= {id(o) for o in layer}
        layer = list({id(o): o for o in inner if o is not None and id(o) not in seen}.values())
    return list(found.values())


@contextmanager
def _random_states() -> Iterator[None]:
    """The caller's random states are the same after the block as before."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


# -- checkpoints ------------------------------------------------------------------------------------------------------


class _Store:
    """The checkpoints of one run: folders ``step-00000123`` of JSON and safetensors."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], run: _Run) -> None:
        self.folder, self.identity, self.run = folder, dict(identity), run
        self.last: Path | None = None
        self.written: list[Path] = []
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"checkpoint: {folder} is a file; give the name of a folder")
        for path in self._named():
            if standing(path, "checkpoint") == "foreign":
                raise ValueError(
                    f"checkpoint: {path} was not written by pliant, and a run would come to stand there; give another "
                    "folder"
                )

    def _named(self) -> list[Path]:
        """Folders with the name of a checkpoint, from the oldest to the newest."""
        if not self.folder.is_dir():
            return []
        return sorted(
            (p for p in self.folder.iterdir() if _STEP.fullmatch(p.name) and (p.is_dir() or p.is_symlink())),
            key=lambda p: int(p.name.removeprefix("step-")),
        )

    def found(self) -> list[Path]:
        """Checkpoints from the oldest to the newest: folders with our own manifest, and nothing else."""
        return [p for p in self._named() if standing(p, "checkpoint") == "ours"]

    def tidy(self) -> None:
        """Take what interrupted writes left behind away, and set aside what has the name of a checkpoint and is none.

        The latter is renamed and never deleted, so that a run which comes to the same step can write there.
        """
        if self.run.accelerator.is_main_process and self.folder.is_dir():
            for leftover in self.folder.iterdir():
                if _LEFTOVER.fullmatch(leftover.name):
                    shutil.rmtree(leftover, ignore_errors=True)
            for path in set(self._named()) - set(self.found()):
                self._set_aside(path, "it has no readable config.json")
        self.run.accelerator.wait_for_everyone()

    def _set_aside(self, path: Path, why: object) -> None:
        if self.run.accelerator.is_main_process:
            aside = path.with_name(f"damaged-{path.name}-{secrets.token_hex(4)}")
            os.rename(path, aside)
            warnings.warn(f"checkpoint: {why}. {path.name} was set aside as {aside.name}", stacklevel=5)

    def write(self) -> None:
        """Write where the run stands.

        Raises:
            DivergedError: a weight is not finite; no checkpoint is written then.
            OSError: the folder cannot be written.
        """
        run = self.run
        step = run.history.steps
        model, aliases, optimizer = self._state()
        bad = [n for n, t in model.items() if t.is_floating_point() and not torch.isfinite(t).all()]
        trained = {n for n, _ in run.net.named_parameters()}
        if bad := [n for n in bad if n in trained]:
            raise DivergedError(step, f"the weight {bad[0]} is not finite", self.last)
        target = self.folder / f"step-{step:08d}"
        if run.accelerator.is_main_process:
            packed, tensors = pack({"optimizer": optimizer, "structure": run.net.structure()})
            manifest = {
                "identity": self.identity,
                "point": dict(run.net.point),
                "aliases": aliases,
                "progress": {
                    "step": step,
                    "epoch": run.epoch,
                    "in_epoch": run.in_epoch,
                    "seen": run.seen,
                    "loss_sum": run.loss_sum,
                    "loss_count": run.loss_count,
                    "losses": run.history.losses,
                    "seconds": run.history.seconds,
                    "done": run.done,
                },
                **packed,
            }
            named = {f"state.{k}": v for k, v in model.items()} | {f"extra.{k}": v for k, v in tensors.items()}
            write_folder(target, "checkpoint", manifest, named)
            self.written = [p for p in self.written if p != target] + [target]
            kept = set(self.written[-_KEPT:])
            others = [p for p in self.found() if p not in kept]
            if len(self.written) < _KEPT:  # a resumed run keeps the one that it came from
                others = [p for p in others if p != self.last]
            for old in others:
                # Renamed first, so that a deletion cut short never leaves half a checkpoint under a good name.
                aside = old.with_name(f".{old.name}.00000000.old")
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(old, aside)
                shutil.rmtree(aside, ignore_errors=True)
        run.accelerator.wait_for_everyone()
        self.last = target

    def _state(self) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
        """Model tensors, aliases, and the optimiser's state under the parameters' names."""
        run = self.run
        if run.sharded:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

            whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
            model, optimizer = get_state_dict(run.objective, run.optimizer.optimizer, options=whole)
            tensors = {k.removeprefix("net."): v for k, v in model.items() if isinstance(v, Tensor)}
            return tensors, {}, {"sharded": optimizer}
        tensors, aliases = state_of(run.net)
        inner = run.optimizer.optimizer
        names = {id(p): n for n, p in run.net.named_parameters()}
        state = {names[id(p)]: dict(s) for p, s in inner.state.items() if id(p) in names}
        groups = [
            {"options": _options(g), "names": [names[id(p)] for p in g["params"] if id(p) in names]}
            for g in inner.param_groups
        ]
        return tensors, aliases, {"state": state, "groups": groups}

    def restore(self) -> None:
        """Put the run where its newest intact checkpoint stands.

        Raises:
            ValueError: the checkpoint belongs to another run, or none is intact.
        """
        whole = len(self._named())
        self.tidy()
        broken: Exception | None = None
        for path in reversed(self.found()):
            try:
                manifest, tensors = read_folder(path, "checkpoint")
                at = _progress(path, manifest)
            except (SavedFileError, FileNotFoundError) as error:
                broken = error
                self.run.accelerator.wait_for_everyone()
                self._set_aside(path, f"{error}. The one before it is used instead")
                continue
            self._check_identity(path, manifest)
            try:
                self._apply(path, manifest, tensors, at)
            except SavedFileError:
                raise
            except Exception as error:  # a structure that was altered may break anything
                raise SavedFileError(f"checkpoint: {path} does not fit this network: {error!r}") from error
            self.last = path
            self.written = [p for p in self.found() if p.name <= path.name][-_KEPT:]
            return
        if broken is not None or whole:
            raise SavedFileError(
                f"checkpoint: none in {self.folder} is intact ({broken or 'no manifest can be read'}); what was there "
                "has been set aside, so the same call starts anew"
            ) from broken

    def _check_identity(self, path: Path, manifest: Mapping[str, Any]) -> None:
        theirs = manifest.get("identity")
        theirs = theirs if isinstance(theirs, dict) else {}
        for name, own in self.identity.items():
            if theirs.get(name) != own:
                raise ValueError(
                    f"checkpoint: {path} was written by a run with {name}={theirs.get(name)!r}, this one has {own!r}; "
                    "pass resume=False to start anew, or give another folder"
                )

    def _apply(
        self, path: Path, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], at: Mapping[str, Any]
    ) -> None:
        run = self.run
        model = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
        extra = {k.removeprefix("extra."): v for k, v in tensors.items() if k.startswith("extra.")}
        optimizer = unpack(manifest["optimizer"], extra)
        if run.sharded:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

            set_state_dict(
                run.objective,
                run.optimizer.optimizer,
                model_state_dict={f"net.{k}": v for k, v in model.items()},
                optim_state_dict=optimizer["sharded"],
                options=StateDictOptions(full_state_dict=True),
            )
        else:
            structure = unpack(manifest["structure"], extra)
            if not _same(structure, run.net.structure()):
                run.net.restructure(structure)
                run.net.to(run.accelerator.device)
                run.prepare()
            load_state(run.net, model, manifest["aliases"], path)
            self._load_optimizer(path, optimizer)
        run.net.use(Point(**manifest["point"]))
        run.history = History(at["step"], list(at["losses"]), at["seconds"], at["step"])
        run.epoch, run.in_epoch, run.seen = at["epoch"], at["in_epoch"], at["seen"]
        run.skip = run.in_epoch
        run.loss_sum, run.loss_count, run.done = at["loss_sum"], at["loss_count"], at["done"]

    def _load_optimizer(self, path: Path, saved: Mapping[str, Any]) -> None:
        inner = self.run.optimizer.optimizer
        by_name = dict(self.run.net.named_parameters())
        inner.state.clear()
        for name, state in saved["state"].items():
            if name not in by_name:
                raise SavedFileError(
                    f"checkpoint: {path} holds the optimiser's state of {name}, which net does not have"
                )
            p = by_name[name]
            for key, value in state.items():
                if not _fits(inner, key, value, p):
                    raise SavedFileError(f"checkpoint: {path} holds {check.show(value)} as the {key} of {name}")
            inner.state[p] = {
                k: v.to(p.device).clone() if isinstance(v, Tensor) and k != "step" else v for k, v in state.items()
            }
        names = {id(p): n for n, p in by_name.items()}
        for group in inner.param_groups:
            own = {names.get(id(p)) for p in group["params"]}
            for theirs in saved["groups"]:
                if own & set(theirs["names"]):
                    for key, value in theirs["options"].items():
                        if not _same_kind(group.get(key), value):
                            raise SavedFileError(f"checkpoint: {path} holds {check.show(value)} as the option {key}")
                    group.update(theirs["options"])
                    break


def _fits(optimizer: Optimizer, key: str, value: Any, p: Tensor) -> bool:
    """Whether a value can be what one of torch's own optimisers keeps for ``p``; of others everything can."""
    if not type(optimizer).__module__.startswith("torch.optim") or type(optimizer).__name__ == "LBFGS":
        return True
    if isinstance(value, Tensor):
        whole = value.shape == p.shape or type(optimizer).__name__ == "Adafactor"
        return whole or (key != "momentum_buffer" and value.numel() == 1)
    return value is None or (key == "step" and isinstance(value, int | float) and not isinstance(value, bool))


def _same_kind(own: Any, value: Any) -> bool:
    """Whether an option of a group can have been ``value`` where it is ``own`` by default."""
    if isinstance(own, bool) or isinstance(value, bool):
        return isinstance(value, bool) and (own is None or isinstance(own, bool))
    if isinstance(own, int | float):
        return isinstance(value, int | float) and abs(value) < 1e15
    return value is None or (isinstance(value, int | float | str) if own is None else type(own) is type(value))


def _progress(path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Where the checkpoint stands, checked.

    Raises:
        SavedFileError: an entry is missing or is not what ``write`` writes.
    """
    try:
        at: dict[str, Any] = check.instance("progress", manifest.get("progress"), dict)
        for name in ("step", "epoch", "in_epoch", "seen", "loss_count"):
            check.whole(name, at[name], at_least=0, at_most=10**12)
        for name in ("loss_sum", "seconds"):
            check.number(name, at[name])
        check.sequence("losses", at["losses"], lambda name, value: check.instance(name, value, float), empty=True)
        check.boolean("done", at["done"])
    except (KeyError, TypeError, ValueError) as error:
        raise SavedFileError(f"checkpoint: {path} does not tell where the run stood ({error})") from None
    return at


def _same(one: Any, two: Any) -> bool:
    """Whether two structures are written alike: lists and tuples are told apart, mappings are not."""
    (packed, tensors), (other, others) = pack(one), pack(two)
    return packed == other and all(torch.equal(t, others[name]) for name, t in tensors.items())


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k != "params" and (v is None or isinstance(v, bool | int | float | str))}


# -- the progress bar -------------------------------------------------------------------------------------------------


class _Bar:
    """Steps, loss, speed and time left, drawn four times a second at most; nothing where ``shown`` is False."""

    def __init__(self, total: int, done: int, shown: bool) -> None:
        self.bar: Any = None
        self.total, self.start, self.first, self.drawn = total, time.perf_counter(), done, 0.0
        self.loss = math.nan
        if shown:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn("fit"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:.1f} steps/s  left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                auto_refresh=False,
            )
            self.task = self.bar.add_task("fit", total=total, completed=done, loss=math.nan, speed=0.0)

    def __enter__(self) -> _Bar:
        if self.bar is not None:
            self.bar.start()
        return self

    def step(self, step: int, loss: float) -> None:
        """Tell the bar where the run stands."""
        if self.bar is None:
            return
        if not math.isnan(loss):
            self.loss = loss
        now = time.perf_counter()
        if now - self.drawn < 0.25 and step < self.total:
            return
        self.drawn = now
        speed = (step - self.first) / max(now - self.start, 1e-9)
        self.bar.update(self.task, completed=step, loss=self.loss, speed=speed, refresh=True)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
