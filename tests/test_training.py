from __future__ import annotations

import errno
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pliant.core import persistence, training
from pliant.core.dynamic import Dynamic, Point
from pliant.core.objective import cross_entropy
from pliant.core.persistence import SavedFileError, read_folder
from pliant.core.training import DivergedError, fit, onecycle

torch.set_num_threads(1)


class Toy(Dynamic):
    def __init__(self, dropout: float = 0.3, norm: bool = True) -> None:
        super().__init__()
        self.dropout = dropout
        middle = nn.BatchNorm1d(12) if norm else nn.Identity()
        self.layers = nn.Sequential(nn.Linear(6, 12), middle, nn.Tanh(), nn.Dropout(dropout), nn.Linear(12, 3))
        self.grown = nn.ModuleList()
        self.grow_at: int | None = None
        self.point = Point(only=1)
        self.calls: list[object] = []

    def points(self):
        return [Point(only=1)]

    def forward(self, x):
        y = self.layers(x)
        for layer in self.grown:
            y = y + layer(x)
        return y

    def loss(self, batch):
        return cross_entropy(self(batch[0]), batch[1])

    def extract(self, point):
        raise NotImplementedError

    def schedule(self, progress):
        self.calls.append(progress)

    def epoch_end(self, validation):
        self.calls.append(("epoch", validation))
        if self.grow_at is not None and sum(isinstance(c, tuple) for c in self.calls) == self.grow_at:
            self.grow()

    def finish(self, train):
        self.calls.append("finish")

    def grow(self):
        self.grown.append(nn.Linear(6, 3))

    def structure(self):
        return {"grown": len(self.grown)}

    def restructure(self, structure):
        while len(self.grown) < structure["grown"]:
            self.grow()


class Noisy(Dataset):
    """Random augmentation from all three global generators."""

    def __len__(self):
        return 40

    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        x = torch.randn(6, generator=g) + 0.1 * torch.randn(6)
        return x * random.uniform(0.9, 1.1) + float(np.random.rand()) * 0.1, i % 3  # noqa: NPY002


def make(seed: int = 0, **kwargs) -> Toy:
    torch.manual_seed(seed)
    return Toy(**kwargs)


def loader(**kwargs) -> DataLoader:
    return DataLoader(Noisy(), 8, shuffle=True, **kwargs)


def batches(count: int = 4, rows: int = 8):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(rows, 6, generator=g), torch.randint(0, 3, (rows,), generator=g)) for _ in range(count)]


def same(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# -- the loop ---------------------------------------------------------------------------------------------------------


def test_equals_a_bare_loop_and_calls_the_method():
    data = batches()
    net, bare = make(dropout=0.0), make(dropout=0.0)
    history = fit(net, data, epochs=3, lr=0.05, progress=False, lr_schedule="cosine", validation=data)
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    losses = []
    for step in range(12):
        optimizer.param_groups[0]["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * step / 12))
        optimizer.zero_grad()
        loss = bare.loss(data[step % 4])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert same(net, bare)
    assert history.steps == 12
    assert history.losses == pytest.approx([sum(losses[i : i + 4]) / 4 for i in (0, 4, 8)])
    shares = [c for c in net.calls if isinstance(c, float)]
    assert shares == [*(i / 12 for i in range(12)), 1.0]
    assert [c for c in net.calls if isinstance(c, tuple)] == [("epoch", data)] * 3
    assert net.calls[-2:] == [1.0, "finish"]
    assert not net.training


def test_accumulation_equals_the_joined_batch():
    data = batches(4)
    joined = [tuple(torch.cat(part) for part in zip(*data[i : i + 2], strict=True)) for i in (0, 2)]
    a, b = make(dropout=0.0, norm=False), make(dropout=0.0, norm=False)
    fit(a, data, epochs=2, accumulate=2, progress=False)
    fit(b, joined, epochs=2, progress=False)
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_random_states_are_given_back_and_the_seed_decides():
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    net = make()
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    fit(net, loader(), epochs=1, progress=False)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert (np.random.get_state()[1] == state[2]).all()  # noqa: NPY002
    torch.manual_seed(99)
    torch.randn(7)
    again, other = make(), make()
    fit(again, loader(), epochs=1, progress=False)
    fit(other, loader(), epochs=1, progress=False, seed=1)
    assert same(net, again)
    assert not same(net, other)


def test_steps_need_no_length_and_end_inside_an_epoch():
    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield torch.randn(6), 1

    net = make()
    assert fit(net, DataLoader(Endless(), 4), steps=7, progress=False).steps == 7
    net = make()
    history = fit(net, batches(4), steps=6, progress=False)
    assert (history.steps, len(history.losses)) == (6, 1)
    net = make()
    assert len(fit(net, batches(4), steps=8, progress=False).losses) == 2
    with pytest.raises(ValueError, match="has no length"):
        fit(make(), DataLoader(Endless(), 4), epochs=1, progress=False)
    with pytest.raises(ValueError, match="only once"):
        fit(make(), (b for b in batches(3)), steps=9, progress=False)


def test_lr_scale_optimizer_and_clip():
    class Two(Toy):
        def parameter_groups(self, weight_decay=0.0):
            return [
                {"params": list(self.layers[0].parameters()), "weight_decay": 0.0, "lr_scale": 0.0},
                {"params": list(self.layers[4].parameters()), "weight_decay": weight_decay},
            ]

    torch.manual_seed(0)
    net = Two()
    before = net.layers[0].weight.clone()
    fit(net, batches(), epochs=1, progress=False)
    assert torch.equal(net.layers[0].weight, before)
    made = []
    fit(make(), batches(), epochs=1, progress=False, optimizer=lambda p: made.append(torch.optim.Adam(p)) or made[0])
    assert made
    assert made[0].state
    net = make()
    start = [p.clone() for p in net.parameters()]
    own = torch.optim.SGD(net.parameters(), lr=1.0)
    fit(net, batches(1), steps=1, optimizer=own, clip=1e-3, lr_schedule="constant", progress=False)
    moved = sum((p - q).pow(2).sum() for p, q in zip(net.parameters(), start, strict=True)).sqrt()
    assert moved.item() == pytest.approx(1e-3, rel=1e-3)


def test_a_grown_structure_is_trained_and_resumed(tmp_path):
    def run(folder, until=None):
        net = make()
        net.grow_at = 1

        def stop(step, total, loss):
            if step == until:
                raise KeyboardInterrupt

        net_kwargs = {"epochs": 4, "progress": False, "checkpoint": folder, "checkpoint_every": 3, "on_step": stop}
        fit(net, loader(), **net_kwargs)
        return net

    whole = run(tmp_path / "a")
    assert len(whole.grown) == 1
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", until=11)
    net = make()
    fit(net, loader(), epochs=4, progress=False, checkpoint=tmp_path / "b", checkpoint_every=3)
    assert len(net.grown) == 1
    assert same(net, whole)


def test_progress_and_quiet(capsys):
    seen = []
    with redirect_stderr(io.StringIO()) as text:
        fit(make(), batches(), epochs=1, on_step=lambda *a: seen.append(a))
    assert "4/4" in text.getvalue()
    assert "steps/s" in text.getvalue()
    assert [s[:2] for s in seen] == [(i, 4) for i in (1, 2, 3, 4)]
    with redirect_stderr(io.StringIO()) as text:
        fit(make(), batches(), epochs=1, progress=False)
    assert text.getvalue() == ""
    assert capsys.readouterr().out == ""


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "give one of the two"),
        ({"epochs": 1, "steps": 1}, "give one of the two"),
        ({"epochs": 0}, "epochs: 0"),
        ({"steps": -3}, "steps: -3"),
        ({"epochs": 1.5}, r"epochs: 1\.5"),
        ({"epochs": 1, "accumulate": 0}, "accumulate: 0"),
        ({"epochs": 1, "lr": -1.0}, r"lr: -1\.0"),
        ({"epochs": 1, "lr": math.nan}, "lr: nan"),
        ({"epochs": 1, "clip": 0.0}, r"clip: 0\.0"),
        ({"epochs": 1, "lr_schedule": "linear"}, "lr_schedule: 'linear'; allowed: 'onecycle', 'cosine', 'constant'"),
        ({"epochs": 1, "checkpoint_every": 0}, "checkpoint_every: 0"),
        ({"epochs": 1, "seed": 1.5}, r"seed: 1\.5"),
        ({"epochs": 1, "weight_decay": -1}, "weight_decay: -1"),
        ({"epochs": 1, "resume": "yes"}, "resume: 'yes'"),
        ({"epochs": 1, "optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)}, "no parameter of net"),
    ],
)
def test_arguments(kwargs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fit(make(), batches(), progress=False, **kwargs)


def test_empty_frozen_foreign_and_wrong_labels():
    with pytest.raises(ValueError, match="train: it is empty"):
        fit(make(), [], epochs=1)
    with pytest.raises(ValueError, match="train: it is empty"):
        fit(make(), DataLoader(Noisy(), 64, drop_last=True), epochs=1)
    with pytest.raises(ValueError, match="gave no batch"):
        fit(make(), iter([]), steps=1, progress=False)
    with pytest.raises(TypeError, match="expected batches"):
        fit(make(), 3, epochs=1)
    with pytest.raises(TypeError, match="net: a Linear; allowed: a pliant network"):
        fit(nn.Linear(2, 2), batches(), epochs=1)
    with pytest.raises(ValueError, match="no trainable parameter"):
        fit(make().requires_grad_(False), batches(), epochs=1)
    with pytest.raises(ValueError, match=r"labels run from 0 to 7.*0\.\.2"):
        fit(make(), [(torch.zeros(4, 6), torch.tensor([0, 1, 2, 7]))], epochs=1, progress=False)


def test_nan_stops_with_the_step_and_the_last_good_checkpoint(tmp_path):
    data = batches(6)
    data[4][0][0, 0] = math.nan
    net = make(norm=False)
    with pytest.raises(
        DivergedError, match=r"step 5: the loss is nan; the last good checkpoint is .*step-00000004"
    ) as e:
        fit(net, data, epochs=2, progress=False, checkpoint=tmp_path / "run", checkpoint_every=2)
    assert e.value.step == 5
    assert all(torch.isfinite(p).all() for p in net.parameters())
    with pytest.raises(DivergedError, match="no checkpoint was written"):
        fit(make(norm=False), data, epochs=2, progress=False)


def test_no_checkpoint_of_weights_that_are_not_finite(tmp_path):
    class Bad(Toy):
        def loss(self, batch):  # a finite loss with a gradient that is not: sqrt at zero
            return super().loss(batch) + (self.layers[0].bias * 0).abs().sum().sqrt()

    with pytest.raises(DivergedError, match="is not finite"):
        fit(Bad(), batches(), steps=1, progress=False, checkpoint=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_loss_must_be_a_scalar():
    class Vector(Toy):
        def loss(self, batch):
            return self(batch[0])

    with pytest.raises(TypeError, match="must return a scalar"):
        fit(Vector(), batches(), epochs=1, progress=False)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def interrupted(folder, until, **kwargs):
    def stop(step, total, loss):
        if step == until:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(make(), loader(), checkpoint=folder, progress=False, on_step=stop, **kwargs)


@pytest.mark.parametrize("until", [1, 5, 6, 9, 10, 14])
@pytest.mark.parametrize("every", [None, 1, 4, 5])
def test_ctrl_c_then_resume_is_bit_identical(tmp_path, until, every):
    whole = make()
    full = fit(whole, loader(), epochs=3, progress=False)
    interrupted(tmp_path, until, epochs=3, checkpoint_every=every)
    assert len(list(tmp_path.iterdir())) <= 2
    torch.manual_seed(123)
    net = make(seed=7)  # other initial weights: all come from the checkpoint, or the run starts anew
    reached = (until - 1) // (every or 5)  # on_step stops the run before that step's checkpoint is written
    if not reached:
        net = make()
    history = fit(net, loader(), epochs=3, checkpoint=tmp_path, progress=False, checkpoint_every=every)
    assert same(net, whole)
    assert history.losses == full.losses
    assert history.steps == full.steps == 15


def test_other_loaders_resume_too(tmp_path):
    def sources():
        yield lambda: loader(generator=torch.Generator().manual_seed(3))
        yield lambda: loader(num_workers=1)
        yield lambda: batches(5)

    for i, source in enumerate(sources()):
        whole = make()
        fit(whole, source(), epochs=2, progress=False)

        def stop(step, total, loss):
            if step == 8:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit(
                make(),
                source(),
                epochs=2,
                progress=False,
                checkpoint=tmp_path / str(i),
                checkpoint_every=3,
                on_step=stop,
            )
        net = make(seed=4)
        fit(net, source(), epochs=2, progress=False, checkpoint=tmp_path / str(i), checkpoint_every=3)
        assert same(net, whole)


def test_adam_resumes_and_a_finished_run_is_returned_at_once(tmp_path):
    def run(folder=None, on_step=None, seed=0):
        net = make(seed)
        adam = lambda groups: torch.optim.AdamW(groups, lr=0.01)  # noqa: E731
        history = fit(
            net,
            loader(),
            epochs=2,
            progress=False,
            optimizer=adam,
            checkpoint=folder,
            checkpoint_every=2,
            on_step=on_step,
        )
        return net, history

    def stop(step, total, loss):
        if step == 7:
            raise KeyboardInterrupt

    whole, _ = run()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop)
    net, history = run(tmp_path, seed=3)
    assert same(net, whole)
    assert history.resumed_from == 6
    again, history = run(tmp_path, lambda *_: pytest.fail("it trained again"), seed=5)
    assert same(again, whole)
    assert history.resumed_from == 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000008", "step-00000010"]


def test_another_run_is_refused(tmp_path):
    interrupted(tmp_path, 6, epochs=3)
    common = {"checkpoint": tmp_path, "progress": False}
    with pytest.raises(ValueError, match="total steps=15, this one has 20"):
        fit(make(), loader(), epochs=4, **common)
    with pytest.raises(ValueError, match=r"lr=0\.1, this one has 0\.2"):
        fit(make(), loader(), epochs=3, lr=0.2, **common)
    with pytest.raises(ValueError, match="optimizer='SGD', this one has 'Adam'"):
        fit(make(), loader(), epochs=3, optimizer=torch.optim.Adam, **common)

    class Other(Toy):
        pass

    with pytest.raises(ValueError, match="class="):
        fit(Other(), loader(), epochs=3, **common)
    wide = make()
    wide.layers[4] = nn.Linear(12, 9)
    with pytest.raises(ValueError, match=r"layers\.4\.weight has shape \(3, 12\) there and \(9, 12\)"):
        fit(wide, loader(), epochs=3, **common)
    history = fit(make(), loader(), epochs=4, resume=False, **common)
    assert history.resumed_from is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000015", "step-00000020"]


def test_a_damaged_checkpoint_falls_back_with_a_warning_and_two_are_an_error(tmp_path):
    whole = make()
    fit(whole, loader(), epochs=3, progress=False)
    interrupted(tmp_path, 8, epochs=3, checkpoint_every=2)
    newest, older = tmp_path / "step-00000008", tmp_path / "step-00000006"
    if not newest.exists():
        newest, older = older, tmp_path / "step-00000004"
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (newest / "model.safetensors").write_bytes(bytes(data))
    net = make()
    with pytest.warns(UserWarning, match="sha256 mismatch"):
        history = fit(net, loader(), epochs=3, progress=False, checkpoint=tmp_path, checkpoint_every=2)
    assert history.resumed_from == int(older.name[5:])
    assert same(net, whole)
    for p in tmp_path.glob("step-*"):
        (p / "config.json").write_text("{")
    with pytest.warns(UserWarning, match="set aside"), pytest.raises(SavedFileError, match=r"none in .* is intact"):
        fit(make(), loader(), epochs=3, progress=False, checkpoint=tmp_path, checkpoint_every=2)


@pytest.mark.parametrize("damage", ["truncated", "empty", "no config", "no tensors", "short tensors"])
@pytest.mark.parametrize("resume", [True, False])
def test_a_run_goes_on_past_a_damaged_checkpoint_which_is_set_aside(tmp_path, damage, resume):
    whole = make()
    fit(whole, loader(), epochs=3, progress=False)
    interrupted(tmp_path, 8, epochs=3, checkpoint_every=2)
    newest = max(tmp_path.iterdir())
    config, tensors = newest / "config.json", newest / "model.safetensors"
    before = config.read_bytes(), tensors.read_bytes()
    if damage in ("truncated", "empty"):
        config.write_bytes(before[0][: 40 if damage == "truncated" else 0])
    elif damage == "short tensors":
        tensors.write_bytes(before[1][:-9])
    else:
        (config if damage == "no config" else tensors).unlink()
    left = {p.name: p.read_bytes() for p in newest.iterdir()}
    net = make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(net, loader(), epochs=3, progress=False, checkpoint=tmp_path, checkpoint_every=2, resume=resume)
    assert same(net, whole)
    if resume or damage not in ("no tensors", "short tensors"):
        assert "set aside" in str(caught[0].message)
        [aside] = tmp_path.glob(f"damaged-{newest.name}-*")
        assert {p.name: p.read_bytes() for p in aside.iterdir()} == left


@pytest.mark.parametrize(
    "files", [("model.ckpt",), ("config.json",), ("config.json", "model.safetensors", "README.md")]
)
@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("own", [False, True])
def test_what_another_tool_wrote_under_a_checkpoint_s_name_is_never_touched(tmp_path, files, resume, own):
    if own:
        interrupted(tmp_path, 8, epochs=3, checkpoint_every=2)
    foreign = tmp_path / "step-00001000"
    foreign.mkdir()
    for name in files:
        (foreign / name).write_text('{"model_type": "llama"}')
    before = {p.name for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"checkpoint: .*step-00001000 was not written by pliant"):
        fit(make(), loader(), epochs=3, progress=False, checkpoint=tmp_path, checkpoint_every=2, resume=resume)
    assert {p.name for p in tmp_path.iterdir()} == before
    assert {p.name for p in foreign.iterdir()} == set(files)


def test_workers_that_outlive_an_epoch_are_told_where_a_run_is_to_be_resumed(tmp_path):
    data = TensorDataset(*batches(1)[0])
    with pytest.warns(UserWarning, match="train: persistent_workers=True"):
        fit(
            make(), DataLoader(data, 8, num_workers=1, persistent_workers=True), epochs=1, progress=False,
            checkpoint=tmp_path,
        )  # fmt: skip


def test_the_one_cycle_rises_in_a_quarter_and_falls_from_the_peak() -> None:
    assert onecycle(0.0) == pytest.approx(0.04)
    assert onecycle(0.125) == pytest.approx(0.52)
    assert onecycle(0.25) == pytest.approx(1.0)
    assert onecycle(0.2499999) == pytest.approx(onecycle(0.25), abs=1e-5)
    assert onecycle(0.625) == pytest.approx(0.5)
    assert onecycle(0.5) == pytest.approx(0.5 * (1 + math.cos(math.pi / 3)))
    assert onecycle(1.0) == pytest.approx(0.0, abs=1e-12)


def test_an_error_gives_the_network_back_with_its_modes_and_setting(monkeypatch):
    net = make().train()
    net.layers[1].eval()
    before = [m.training for m in net.modules()]

    def fails(step, total, loss):
        if step == 2:
            net.eval()
            raise RuntimeError("a callback of the user's")

    with pytest.raises(RuntimeError, match="a callback"):
        fit(net, batches(), epochs=1, progress=False, on_step=fails)
    assert [m.training for m in net.modules()] == before
    assert all(p.grad is None for p in net.parameters())
    assert net.point in net.points()


def test_weights_that_are_not_finite_after_the_last_step_are_no_success(tmp_path):
    options = {"lr": 1e38, "weight_decay": 100.0, "lr_schedule": "constant"}
    for folder in (None, tmp_path):
        with pytest.raises(DivergedError, match=r"step 1: the weight .* is not finite") as caught:
            fit(make(), batches(1), epochs=1, progress=False, checkpoint=folder, **options)
        assert caught.value.step == 1


def test_the_cure_for_inputs_of_nan_is_no_smaller_rate():
    data = batches()
    data[1][0][2, 3] = math.nan
    with pytest.raises(DivergedError, match=r"step 2: .* The inputs of this batch hold NaN: repair the data"):
        fit(make(), data, epochs=1, progress=False)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_disk_full_and_read_only_name_the_folder_and_keep_the_last(tmp_path, monkeypatch, code):
    calls = [0]
    real = os.fsync

    def fsync(handle):
        calls[0] += 1
        if calls[0] > 6:
            raise OSError(code, os.strerror(code))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=r"cannot write .*step-0000000") as caught:
        fit(make(), loader(), epochs=3, progress=False, checkpoint=tmp_path, checkpoint_every=2)
    assert caught.value.errno == code
    assert all(p.name.startswith("step-") for p in tmp_path.iterdir())
    monkeypatch.undo()
    whole, net = make(), make()
    fit(whole, loader(), epochs=3, progress=False)
    fit(net, loader(), epochs=3, progress=False, checkpoint=tmp_path, checkpoint_every=2)
    assert same(net, whole)


def test_checkpoint_is_a_file(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        fit(make(), batches(), epochs=1, progress=False, checkpoint=tmp_path / "x")


def test_checkpoints_hold_no_pickle(tmp_path):
    fit(make(), batches(), epochs=1, progress=False, checkpoint=tmp_path)
    for folder in tmp_path.iterdir():
        assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors"}
        manifest, tensors = read_folder(folder, "checkpoint")
        assert json.dumps(manifest)
        assert tensors


CHILD = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_training import make, loader
from pliant.core.training import fit
net = make()
fit(net, loader(), epochs=6, progress=False, checkpoint=sys.argv[1], checkpoint_every=1,
    on_step=lambda s, t, l: print(s, flush=True))
torch.save(net.state_dict(), sys.argv[2])
"""


def test_kill_9_at_random_moments_then_resume_is_bit_identical(tmp_path):
    whole = make()
    fit(whole, loader(), epochs=6, progress=False)
    code = CHILD.format(tests=str(Path(__file__).parent))
    out = tmp_path / "final.pt"
    chance = random.Random(0)
    kills = 0
    for attempt in range(10):
        child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run"), str(out)], stdout=subprocess.PIPE)
        if attempt < 4:
            for _ in range(chance.randint(1, 6)):
                child.stdout.readline()
            time.sleep(chance.uniform(0, 0.02))  # a step ends with a checkpoint, so this falls into one
            child.send_signal(signal.SIGKILL)
            kills += 1
        child.wait()
        child.stdout.close()
        if out.exists():
            break
    assert kills == 4
    assert out.exists()
    final = torch.load(out, weights_only=True)
    assert all(torch.equal(final[k], v) for k, v in whole.state_dict().items())
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["step-00000029", "step-00000030"]


@pytest.mark.parametrize("moment", ["tensors", "config", "before rename", "between renames", "delete"])
def test_dying_at_each_moment_of_a_checkpoint_write(tmp_path, monkeypatch, moment):
    """The process dies (nothing is cleaned up) during the third checkpoint."""
    whole = make()
    fit(whole, loader(), epochs=2, progress=False)
    code = f"""
import os, sys, torch, shutil
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_training import make, loader
from pliant.core import persistence, training
from pliant.core.training import fit
moment, count = {moment!r}, [0]
def dying(function, test):
    def inner(*args, **kwargs):
        if test(*args):
            count[0] += 1
            if count[0] == 3:
                os.kill(os.getpid(), 9)
        return function(*args, **kwargs)
    return inner
def half(path, data):
    if moment in path.name:
        count[0] += 1
        if count[0] == 3:
            open(path, "wb").write(data[:len(data) // 2])
            os.kill(os.getpid(), 9)
    write(path, data)
write = persistence._write
if moment in ("tensors", "config"):
    persistence._write = half
elif moment == "before rename":
    os.rename = dying(os.rename, lambda a, b: str(a).endswith(".tmp"))
elif moment == "between renames":
    os.rename = dying(os.rename, lambda a, b: str(b).endswith(".old"))
else:
    shutil.rmtree = dying(shutil.rmtree, lambda p, **k: os.path.exists(p))
fit(make(), loader(), epochs=2, progress=False, checkpoint=sys.argv[1], checkpoint_every=1)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    net = make()
    history = fit(net, loader(), epochs=2, progress=False, checkpoint=tmp_path, checkpoint_every=1)
    assert history.resumed_from
    assert same(net, whole)
    assert all(p.name.startswith("step-") for p in tmp_path.iterdir())


# -- several processes ------------------------------------------------------------------------------------------------

DDP = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from test_training import make, batches, loader, same
from pliant.core.training import fit
from accelerate import PartialState
net = make(dropout=0.0, norm=False)
net.spare = torch.nn.Linear(2, 2)  # never used: find_unused_parameters
history = fit(net, batches(8), epochs=2, progress=False, checkpoint=sys.argv[1])
assert PartialState().num_processes == 2, PartialState()
def stop(step, total, loss):
    if step == 5:
        raise KeyboardInterrupt
def again(folder, on_step=None):  # shuffle, dropout, augmentation, norms: exact resume in several processes
    other = make()
    fit(other, loader(), epochs=3, progress=False, checkpoint=folder, checkpoint_every=2, on_step=on_step)
    return other
whole = again(sys.argv[1] + "-whole")
try:
    again(sys.argv[1] + "-cut", stop)
    raise AssertionError("it was not interrupted")
except KeyboardInterrupt:
    pass
assert same(again(sys.argv[1] + "-cut"), whole)
if PartialState().is_main_process:
    torch.save(net.state_dict(), sys.argv[2])
PartialState().destroy_process_group()
"""


def test_two_processes_equal_one_with_the_joined_batch(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(DDP.format(tests=str(Path(__file__).parent)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    command += [str(tmp_path / "run"), str(tmp_path / "final.pt")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    data = batches(8)
    joined = [tuple(torch.cat(part) for part in zip(*data[i : i + 2], strict=True)) for i in range(0, 8, 2)]
    net = make(dropout=0.0, norm=False)
    fit(net, joined, epochs=2, progress=False)
    final = torch.load(tmp_path / "final.pt", weights_only=True)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(final[name], value, rtol=1e-5, atol=1e-6)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["step-00000004", "step-00000008"]


def test_tensor_data_set_and_no_leftover_threads_of_state():
    data = TensorDataset(torch.randn(16, 6), torch.randint(0, 3, (16,)))
    net = make()
    assert fit(net, DataLoader(data, 4), epochs=1, progress=False).steps == 4
    assert training._mix(0, 1) != training._mix(0, 2)
    assert persistence.FORMAT == 1
