from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from pliant.core import persistence
from pliant.core.dynamic import Dynamic, Point
from pliant.core.inputs import call, split_batch
from pliant.core.objective import cross_entropy
from pliant.core.persistence import (
    CONFIG,
    TENSORS,
    DamagedError,
    ForeignError,
    NewerFormatError,
    SavedFileError,
    load,
    pack,
    read_tensors,
    save,
    unpack,
    write_tensors,
)

torch.set_num_threads(1)


class Toy(Dynamic):
    """A wrapped model with a scale as its dial, and a grown layer as its structure."""

    def __init__(self, model, example, *, scale=2.0, sizes=(1, 2), criterion=None):
        super().__init__()
        self.model, self.example, self.scale, self.sizes, self.criterion = model, example, scale, sizes, criterion
        self.extra = nn.ModuleList()
        self.point = self.points()[-1]

    def points(self):
        return [Point(factor=0.5), Point(factor=1.0)]

    def forward(self, x):
        y = call(self.model, x) * self.scale * float(self.point["factor"])
        for layer in self.extra:
            y = layer(y)
        return y

    def loss(self, batch):
        x, y = split_batch(batch)
        return cross_entropy(self(x), y)

    def extract(self, point):
        raise NotImplementedError

    def grow(self):
        self.extra.append(nn.Linear(3, 3))

    def structure(self):
        return {"grown": len(self.extra)}

    def restructure(self, structure):
        for _ in range(structure["grown"] - len(self.extra)):
            self.grow()


class Own(Dynamic):
    """A network of its own: sizes in place of a model, a required criterion."""

    def __init__(self, hidden, criterion):
        super().__init__()
        self.hidden, self.criterion = hidden, criterion
        self.layer = nn.Linear(4, hidden)
        self.point = Point(only=1)

    def points(self):
        return [Point(only=1)]

    def forward(self, x):
        return self.layer(x)

    def loss(self, batch):
        return self.criterion(self(batch[0]), batch[1])

    def extract(self, point):
        return self.layer


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.head = nn.Linear(4, 3)
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x):
        return self.head(self.b(self.a(x)))


@pytest.fixture(autouse=True)
def _catalogue(monkeypatch):
    monkeypatch.setattr(persistence, "_catalogue", lambda: [f"{__name__}:Toy", f"{__name__}:Own"])


X = torch.arange(20.0).reshape(5, 4) / 20


def toy() -> Toy:
    return Toy(Tied(), X.clone(), scale=1.5)


def seal(folder: Path, change: Any) -> None:
    """Alter config.json as someone would who also corrects its hash."""
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    config["config_sha256"] = persistence._digest(config)
    (folder / CONFIG).write_text(json.dumps(config))


def test_round_trip_gives_equal_output_structure_point_and_example(tmp_path):
    net = toy()
    net.grow()
    net.use(Point(factor=0.5))
    save(net, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {CONFIG, TENSORS}
    again = load(tmp_path / "out", model=Tied())
    assert isinstance(again, Toy)
    assert torch.equal(again(X), net(X))
    assert again.point == Point(factor=0.5)
    assert again.scale == 1.5
    assert len(again.extra) == 1
    assert torch.equal(again.example, X[:2])
    assert again.sizes == [1, 2] or again.sizes == (1, 2)


@pytest.mark.parametrize("example", [(X,), {"x": X}])
def test_example_may_be_a_tuple_or_a_mapping(tmp_path, example):
    save(Toy(Tied(), example), tmp_path / "out")
    again = load(tmp_path / "out", model=Tied())
    assert type(again.example) is type(example)
    got = again.example[0] if isinstance(example, tuple) else again.example["x"]
    assert torch.equal(got, X[:2])


def test_tied_weights_are_written_once_and_stay_tied(tmp_path):
    net = toy()
    save(net, tmp_path / "out")
    names = read_tensors(tmp_path / "out" / TENSORS)
    assert "state.model.a.weight" in names
    assert "state.model.b.weight" not in names
    again = load(tmp_path / "out", model=Tied())
    assert again.model.a.weight is again.model.b.weight
    assert torch.equal(again.model.b.weight, net.model.a.weight)


def test_required_code_is_asked_for_by_name(tmp_path):
    save(Own(5, cross_entropy), tmp_path / "own")
    with pytest.raises(ValueError, match="criterion: Own needs it"):
        load(tmp_path / "own")
    with pytest.raises(ValueError, match="model: Own takes no such argument"):
        load(tmp_path / "own", model=Tied(), criterion=cross_entropy)
    net = load(tmp_path / "own", criterion=cross_entropy)
    assert net.hidden == 5
    save(toy(), tmp_path / "toy")
    with pytest.raises(ValueError, match="model: Toy needs it"):
        load(tmp_path / "toy")


def test_another_model_is_told(tmp_path):
    save(toy(), tmp_path / "out")
    other = Tied()
    other.head = nn.Linear(4, 7)
    with pytest.raises(DamagedError, match=r"head\.weight has shape \(3, 4\) there and \(7, 4\)"):
        load(tmp_path / "out", model=other)
    with pytest.raises(DamagedError, match="do not fit"):
        load(tmp_path / "out", model=nn.Linear(4, 3))


def test_class_must_be_in_the_catalogue(tmp_path, monkeypatch):
    save(toy(), tmp_path / "out")
    touched = tmp_path / "touched"
    for bad in ("os:system", "../../evil:Toy", f"{__name__}:Tied", "", None, ["a"], f"{__name__}:Toy.__init__"):
        seal(tmp_path / "out", lambda c, bad=bad: c.update({"class": bad}))
        with pytest.raises(ForeignError, match="not in pliant's catalogue"):
            load(tmp_path / "out", model=Tied())
    assert not touched.exists()
    monkeypatch.setattr(persistence, "_catalogue", lambda: [])
    with pytest.raises(TypeError, match="not in pliant's catalogue"):
        save(toy(), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_catalogue_itself_is_read(monkeypatch):
    monkeypatch.undo()
    assert "pliant.weights.weight_compander:WeightCompander" in persistence._catalogue()


def test_newer_foreign_missing(tmp_path):
    save(toy(), tmp_path / "out")
    seal(tmp_path / "out", lambda c: c.update(format=2, pliant="9.0"))
    with pytest.raises(NewerFormatError, match=r"format 2, written by pliant 9\.0"):
        load(tmp_path / "out", model=Tied())
    (tmp_path / "out" / CONFIG).write_text('{"model_type": "bert"}')
    with pytest.raises(ForeignError, match="not written by pliant"):
        load(tmp_path / "out", model=Tied())
    (tmp_path / "out" / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load(tmp_path / "out", model=Tied())
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load(tmp_path / "nowhere", model=Tied())


def test_truncated_and_altered(tmp_path):
    save(toy(), tmp_path / "out")
    for name in (CONFIG, TENSORS):
        whole = (tmp_path / "out" / name).read_bytes()
        for cut in (0, 1, 7, len(whole) // 2, len(whole) - 1):
            (tmp_path / "out" / name).write_bytes(whole[:cut])
            with pytest.raises(SavedFileError):
                load(tmp_path / "out", model=Tied())
        (tmp_path / "out" / name).write_bytes(whole)
    load(tmp_path / "out", model=Tied())
    seal(tmp_path / "out", lambda c: c["point"].update(factor=0.25))
    with pytest.raises(ValueError, match=r"factor=0\.25 is not a setting"):
        load(tmp_path / "out", model=Tied())
    seal(tmp_path / "out", lambda c: c.update(structure={"grown": "many"}))
    with pytest.raises(DamagedError, match="no test_persistence:Toy can be built"):
        load(tmp_path / "out", model=Tied())


def test_wrong_tensors_with_a_corrected_hash(tmp_path):
    save(toy(), tmp_path / "out")
    tensors = read_tensors(tmp_path / "out" / TENSORS)
    del tensors["state.model.a.weight"]
    digest = write_tensors(tmp_path / "out" / TENSORS, tensors)
    seal(tmp_path / "out", lambda c: c.update(tensors_sha256=digest))
    with pytest.raises(DamagedError, match=r"tied tensor 'model\.a\.weight' is missing"):
        load(tmp_path / "out", model=Tied())


def test_a_pickle_is_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    save(toy(), tmp_path / "out")
    torch.save({"x": Bomb()}, tmp_path / "out" / TENSORS)
    import hashlib

    digest = hashlib.sha256((tmp_path / "out" / TENSORS).read_bytes()).hexdigest()
    seal(tmp_path / "out", lambda c: c.update(tensors_sha256=digest))
    with pytest.raises(DamagedError, match="not a safetensors file"):
        load(tmp_path / "out", model=Tied())
    assert not (tmp_path / "exploded").exists()


def test_saving_again_replaces_and_strange_folders_are_refused(tmp_path):
    save(toy(), tmp_path / "out")
    net = toy()
    save(net, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out", model=Tied())(X), net(X))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "empty").mkdir()
    save(net, tmp_path / "empty")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds 'notes\.txt'"):
        save(net, tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="is a file"):
        save(net, tmp_path / "file")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / CONFIG).write_text("{}")
    with pytest.raises(FileExistsError, match="not a saved pliant network"):
        save(net, tmp_path / "strange")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("function", ["fsync", "mkdir"])
def test_full_disk_and_read_only_leave_the_former_network(tmp_path, monkeypatch, code, function):
    net = toy()
    save(net, tmp_path / "out")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail) if function == "fsync" else monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(OSError, match=r"cannot write .*out") as caught:
        save(toy(), tmp_path / "out")
    assert caught.value.errno == code
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    monkeypatch.setattr(persistence, "_catalogue", lambda: [f"{__name__}:Toy"])
    assert torch.equal(load(tmp_path / "out", model=Tied())(X), net(X))


def test_a_failed_last_rename_puts_the_former_network_back(tmp_path, monkeypatch):
    net = toy()
    save(net, tmp_path / "out")
    rename = os.rename

    def fail(a: Any, b: Any) -> None:
        if str(a).endswith(".tmp"):
            raise OSError(errno.EIO, "broken")
        rename(a, b)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="broken"):
        save(toy(), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert torch.equal(load(tmp_path / "out", model=Tied())(X), net(X))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_really_full_device(tmp_path):
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is what is checked
        write_tensors("/dev/full", {"x": torch.zeros(10)})
    assert caught.value.errno == errno.ENOSPC


def test_state_that_is_no_tensor_is_refused(tmp_path):
    net = toy()
    net.model.register_buffer("sparse", torch.eye(3).to_sparse())
    with pytest.raises(TypeError, match="layout"):
        save(net, tmp_path / "out")
    with pytest.raises(TypeError, match="expected a pliant network"):
        save(Tied(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    net = toy()
    original = persistence._catalogue
    persistence._catalogue = lambda: [f"{__name__}:Toy"]
    try:
        save(net, folder / "out")
    finally:
        persistence._catalogue = original
    return folder / "out", net(X).detach()


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_flipped_bytes_give_a_clear_error_or_the_same_network(saved, tmp_path, name, data):
    folder, expected = saved
    whole = (folder / name).read_bytes()
    flips = data.draw(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(1, 255)), min_size=1, max_size=3))
    damaged = bytearray(whole)
    for where, mask in flips:
        damaged[where] ^= mask
    shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True)
    (tmp_path / "copy" / name).write_bytes(bytes(damaged))
    try:
        net = load(tmp_path / "copy", model=Tied())
    except (SavedFileError, FileNotFoundError):
        return
    assert torch.equal(net(X), expected)


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4)
keys = st.text(max_size=3) | st.integers() | st.just("$tensor") | st.tuples(st.integers(), st.text(max_size=2))
nests = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(nests)
def test_pack_and_unpack_are_inverse(value):
    packed, tensors = pack(value)
    again = unpack(json.loads(json.dumps(packed)), tensors)
    assert again == value
    assert repr(again) == repr(value)


def test_pack_keeps_tensors_and_refuses_objects(tmp_path):
    value = {0: {"m": torch.randn(3), "step": 4}, "t": (torch.zeros(()), [torch.ones(0, 2)])}
    packed, tensors = pack(value)
    digest = write_tensors(tmp_path / "t", tensors)
    again = unpack(json.loads(json.dumps(packed)), read_tensors(tmp_path / "t", digest))
    assert torch.equal(again[0]["m"], value[0]["m"])
    assert again["t"][0].shape == ()
    assert again["t"][1][0].shape == (0, 2)
    with pytest.raises(TypeError, match="cannot be saved: object"):
        pack({"x": object()})
    with pytest.raises(DamagedError):
        unpack({"$tensor": "9"}, {})
