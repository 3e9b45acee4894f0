"""``save`` and ``load``: a directory with ``config.json`` and ``model.safetensors``; nothing in it is ever executed.

``config.json`` names the class, its arguments, its structure and its setting, and holds the sha256 of both files, so
that a damaged or altered file is told before anything is built from it. The class is looked up in ``pliant.catalog``
and nowhere else. Arguments that hold code (a model, a criterion) are given again by the caller of ``load``.

The hashes guard against damage, not against an author with bad intent: such a file can still hold bad *numbers*.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import inspect
import json
import os
import re
import secrets
import shutil
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as _tensors_from
from safetensors.torch import save as _bytes_of
from torch import Tensor, nn

from pliant._version import __version__
from pliant.core.dynamic import Dynamic, Point
from pliant.core.inputs import first_line, take

FORMAT = 1
CONFIG, TENSORS = "config.json", "model.safetensors"
_LARGEST_CONFIG = 1 << 28
_ABANDONED = 3600.0  # seconds after which what an interrupted write left beside its folder is taken away
_STATE, _EXTRA = "state.", "extra."  # prefixes inside the tensor file: the state dict, and everything else


class SavedFileError(ValueError):
    """What was found in the folder cannot be loaded; the message says why."""


class ForeignError(SavedFileError):
    """The folder was not written by pliant, or names a class that pliant does not have."""


class DamagedError(SavedFileError):
    """A file is truncated, was altered, or does not fit the network."""


class NewerFormatError(SavedFileError):
    """The folder was written by a later version of pliant."""


# -- nested values as JSON and tensors --------------------------------------------------------------------------------


def pack(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """A nested structure as (JSON values, tensors): mappings with any plain keys, lists, tuples, numbers, tensors.

    Raises:
        TypeError: it holds something else.
    """
    tensors: dict[str, Tensor] = {}

    def go(x: Any) -> Any:
        if x is None or isinstance(x, bool | int | float | str):
            return x
        if isinstance(x, Tensor):
            name = str(len(tensors))
            tensors[name] = x
            return {"$tensor": name}
        if isinstance(x, Mapping):
            if all(isinstance(k, str) and not k.startswith("$") for k in x):
                return {k: go(v) for k, v in x.items()}
            return {"$dict": [[go(k), go(v)] for k, v in x.items()]}
        if isinstance(x, tuple):
            return {"$tuple": [go(v) for v in x]}
        if isinstance(x, list):
            return [go(v) for v in x]
        raise TypeError(f"cannot be saved: {type(x).__name__} is neither a number, a text, a tensor nor a nest of them")

    return go(value), tensors


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What ``pack`` was given.

    Raises:
        DamagedError: the two parts do not fit each other.
    """
    try:
        return _unpack(packed, tensors)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DamagedError(f"the JSON part does not fit the tensors: {error!r}") from None


def _unpack(x: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(x, list):
        return [_unpack(v, tensors) for v in x]
    if not isinstance(x, dict):
        return x
    if set(x) == {"$tensor"}:
        return tensors[x["$tensor"]]
    if set(x) == {"$tuple"}:
        return tuple(_unpack(v, tensors) for v in x["$tuple"])
    if set(x) == {"$dict"}:
        return {_unpack(k, tensors): _unpack(v, tensors) for k, v in x["$dict"]}
    return {k: _unpack(v, tensors) for k, v in x.items()}


# -- tensors as bytes -------------------------------------------------------------------------------------------------


def _encode(tensors: Mapping[str, Tensor]) -> bytes:
    """The tensors in safetensors form; views of one storage become copies of their own."""
    ready: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name}: a tensor of layout {tensor.layout} cannot be saved; make it dense first")
        t = tensor.detach().to("cpu").contiguous()
        where = t.untyped_storage().data_ptr()
        ready[name] = t.clone() if where in storages else t
        storages.add(where)
    return bytes(_bytes_of(ready))


def _decode(data: bytes, where: str) -> dict[str, Tensor]:
    try:
        return dict(_tensors_from(data))
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, OverflowError, AttributeError) as error:
        raise DamagedError(f"{where}: not a readable safetensors file, or truncated ({error})") from None


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file, flushed to the disk; returns the sha256 of its bytes."""
    data = _encode(tensors)
    _write(Path(path), data)
    return hashlib.sha256(data).hexdigest()


def read_tensors(path: str | os.PathLike[str], sha256: str | None = None) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedError: it is truncated, is no such file, or has another ``sha256``.
    """
    data = _read(Path(path), _tensor_bytes(Path(path)))
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise DamagedError(f"{path}: its contents differ from what was saved (sha256 mismatch): truncated or altered")
    return _decode(data, str(path))


def _tensor_bytes(path: Path) -> int:
    """The size that a safetensors file's own header gives it; a file of any other size is not read at all.

    A header is at most 100 MB, as the format says. A file of holes can claim a size that no memory holds.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(100_000_000, size - 8):
            raise DamagedError(f"{path}: not a safetensors file, or truncated (its header cannot be read)")
        try:
            header = json.loads(file.read(length).decode("utf-8"))
            ends = [int(v["data_offsets"][1]) for k, v in header.items() if k != "__metadata__"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError) as error:
            raise DamagedError(f"{path}: not a safetensors file, its header is no such table ({error})") from None
    wanted = 8 + length + max(ends, default=0)
    if size != wanted:
        raise DamagedError(f"{path}: has {size} bytes where its header tells {wanted}; truncated or altered")
    return size


def _read(path: Path, limit: int) -> bytes:
    """The contents of a file of at most ``limit`` bytes."""
    size = path.stat().st_size
    if size > limit:
        raise DamagedError(f"{path}: has {size} bytes, more than the {limit} that it may have")
    try:
        return path.read_bytes()
    except MemoryError as error:
        raise DamagedError(f"{path}: its {size} bytes do not fit into the memory") from error


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Flush a directory's entries, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


# -- a folder of one manifest and its tensors -------------------------------------------------------------------------


def _digest(manifest: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in manifest.items() if k != "config_sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_folder(folder: Path, kind: str, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write ``config.json`` and ``model.safetensors`` so that the folder holds either all of them or none.

    They are written beside it, flushed, and renamed into place; a former folder of the same kind is first renamed
    away and deleted at the end.

    Raises:
        FileExistsError: the folder holds anything else.
        OSError: the disk is full, or the place cannot be written; nothing half-written is left.
    """
    if os.path.lexists(folder):
        _check_ours(folder, kind)
    data = _encode(tensors)
    full = {"format": FORMAT, "pliant": __version__, "kind": kind, **manifest}
    full["tensors_sha256"] = hashlib.sha256(data).hexdigest()
    full["config_sha256"] = _digest(full)
    text = json.dumps(full, indent=1).encode()
    token = f".{folder.name}.{secrets.token_hex(4)}"
    fresh, former = folder.with_name(f"{token}.tmp"), folder.with_name(f"{token}.old")
    moved = False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        _write(fresh / TENSORS, data)
        _write(fresh / CONFIG, text)
        _sync(fresh)
        if folder.exists():
            os.rename(folder, former)
            moved = True
        os.rename(fresh, folder)
        _sync(folder.parent)
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        if moved and not folder.exists():
            os.rename(former, folder)
        code = error.errno if error.errno is not None else errno.EIO
        reason = error.strerror or str(error)
        raise OSError(code, f"cannot write {folder}: {reason}; nothing was changed") from error
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        if moved and not folder.exists():
            os.rename(former, folder)
        raise
    if moved:
        shutil.rmtree(former, ignore_errors=True)
    _take_away_leftovers(folder)


def _take_away_leftovers(folder: Path) -> None:
    """Remove what writes of ``folder`` left that were killed long ago, now that a whole one stands there."""
    pattern = re.compile(re.escape(f".{folder.name}.") + r"[0-9a-f]{8}\.(tmp|old)")
    for path in folder.parent.iterdir():
        with suppress(OSError):
            if pattern.fullmatch(path.name) and time.time() - path.stat().st_mtime > _ABANDONED:
                shutil.rmtree(path)


def standing(folder: Path, kind: str) -> Literal["ours", "damaged", "foreign"]:
    """What stands in ``folder``: what ``write_folder`` wrote as ``kind``, remains of it, or certainly something else.

    What is ours has a readable manifest and no other file; its tensors may be damaged all the same.
    """
    if folder.is_symlink() or not folder.is_dir() or {p.name for p in folder.iterdir()} - {CONFIG, TENSORS}:
        return "foreign"
    if not (folder / CONFIG).is_file():
        return "damaged"
    try:
        return "ours" if _manifest(folder).get("kind") == kind else "foreign"
    except NewerFormatError:
        return "ours"
    except ForeignError:
        return "foreign"
    except DamagedError:
        return "damaged"


def _check_ours(folder: Path, kind: str) -> None:
    """Refuse to replace what is not ours."""
    if not folder.is_dir():
        raise FileExistsError(errno.EEXIST, f"folder: {folder} is a file; give the name of a folder")
    names = {p.name for p in folder.iterdir()}
    if names and standing(folder, kind) != "ours":
        strange = sorted(names - {CONFIG, TENSORS})
        what = f"holds {strange[0]!r}" if strange else f"holds something that is not a saved pliant {kind}"
        raise FileExistsError(errno.EEXIST, f"folder: {folder} {what}; give an empty or a new folder")


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        found = json.loads(_read(path, _LARGEST_CONFIG).decode("utf-8"))
    except DamagedError:
        raise
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: not readable as JSON, truncated or altered ({error})") from None
    if not isinstance(found, dict) or "pliant" not in found or "format" not in found:
        raise ForeignError(f"{path}: not written by pliant (it has no 'pliant' and 'format' entries)")
    if isinstance(found["format"], int) and found["format"] > FORMAT:
        raise NewerFormatError(
            f"{path}: has format {found['format']}, written by pliant {found['pliant']}; "
            f"this is pliant {__version__}, which reads up to format {FORMAT}. Upgrade pliant"
        )
    return found


def read_folder(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest and the tensors that ``write_folder`` wrote, checked.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        SavedFileError: one of its kinds says what is wrong.
    """
    if not folder.is_dir():
        asides = sorted(folder.parent.glob(f".{folder.name}.*.old")) if folder.parent.is_dir() else []
        hint = f"; a write was interrupted, the former copy stands in {asides[-1]}" if asides else ""
        raise FileNotFoundError(errno.ENOENT, f"no such folder: {folder}{hint}")
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise FileNotFoundError(errno.ENOENT, f"{folder} holds no {name}; it is not a complete saved {kind}")
    manifest = _manifest(folder)
    if manifest["format"] != FORMAT:
        raise DamagedError(f"{folder / CONFIG}: unknown format {manifest['format']!r}; this pliant reads {FORMAT}")
    if manifest.get("config_sha256") != _digest(manifest):
        raise DamagedError(f"{folder / CONFIG}: its contents differ from what was saved (sha256 mismatch): altered")
    if manifest.get("kind") != kind:
        raise ForeignError(f"{folder}: holds a {manifest.get('kind')!r}, expected a {kind!r}")
    return manifest, read_tensors(folder / TENSORS, manifest.get("tensors_sha256", ""))


# -- state dicts ------------------------------------------------------------------------------------------------------


def state_of(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict with tied tensors once, and the aliases {name left out: name kept}.

    Raises:
        TypeError: the state holds something that is no tensor.
    """
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: the state holds a {type(tensor).__name__}; only tensors can be saved")
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            kept[name] = tensor.detach()
    return kept, aliases


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], aliases: Mapping[str, str], where: object) -> None:
    """Load what ``state_of`` gave, strictly.

    Raises:
        DamagedError: a name or a shape does not fit the module.
    """
    if not isinstance(aliases, Mapping) or not all(isinstance(v, str) for v in aliases.values()):
        raise DamagedError(f"{where}: its aliases are no table of names")
    missing = [target for target in aliases.values() if target not in tensors]
    if missing:
        raise DamagedError(f"{where}: the tied tensor {missing[0]!r} is missing")
    state = dict(tensors) | {name: tensors[target] for name, target in aliases.items()}
    own = module.state_dict()
    for name in own:
        if name in state and isinstance(own[name], Tensor) and own[name].shape != state[name].shape:
            raise DamagedError(
                f"{where}: {name} has shape {tuple(state[name].shape)} there and {tuple(own[name].shape)} in this "
                f"{type(module).__name__}; the model or an argument differs from what was saved"
            )
    try:
        module.load_state_dict(state, strict=True)
    except Exception as error:  # a module's own way of loading may raise anything
        detail = " ".join(str(error).split())
        raise DamagedError(f"{where}: the tensors do not fit this {type(module).__name__}: {detail}") from None


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}


# -- the two verbs ----------------------------------------------------------------------------------------------------


def _catalogue() -> Sequence[str]:
    """Paths of the classes that may be saved and loaded."""
    from pliant.catalog import METHODS

    return [entry.path for entry in METHODS]


def _path_of(net: Dynamic) -> str:
    cls = type(net)
    own = f"{cls.__module__}:{cls.__qualname__}"
    for path in _catalogue():
        module, _, name = path.partition(":")
        if path == own or getattr(sys.modules.get(module), name, None) is cls:
            return path
    raise TypeError(
        f"net: {own} is not in pliant's catalogue, so load could not find it again; save its state_dict() instead"
    )


def save(net: Dynamic, folder: str | os.PathLike[str]) -> Path:
    """Write ``net`` into ``folder`` and return the folder. A network saved there before is replaced.

    The tensors are gathered in memory once before they are written.

    Raises:
        TypeError: ``net`` is not a method of pliant, or holds what cannot be saved.
        FileExistsError: ``folder`` holds anything that is not a saved pliant network.
        OSError: the folder cannot be written; a network saved there before is still whole.
    """
    if not isinstance(net, Dynamic):
        raise TypeError(f"net: expected a pliant network, got {type(net).__name__}")
    where = Path(folder).resolve()
    tensors, aliases = state_of(net)
    parts: dict[str, Any] = {"arguments": net.arguments(), "structure": net.structure()}
    example = getattr(net, "example", None)
    if example is not None and "example" in inspect.signature(type(net).__init__).parameters:
        parts["example"] = take(dict(example) if isinstance(example, Mapping) else example, slice(0, 2))
    packed, extra = pack(parts)
    manifest = {"class": _path_of(net), **packed, "point": dict(net.point), "aliases": aliases, "given": _given(net)}
    named = {_STATE + k: v for k, v in tensors.items()} | {_EXTRA + k: v for k, v in extra.items()}
    write_folder(where, "network", manifest, named)
    return where


def _given(net: Dynamic) -> list[str]:
    """Optional arguments that hold code or data, which the caller gave and the files cannot hold."""
    own = vars(net) | net._modules
    saved = net.arguments()
    return [
        p.name
        for p in inspect.signature(type(net).__init__).parameters.values()
        if p.default is None and p.name != "example" and own.get(p.name) is not None and p.name not in saved
    ]


def load(folder: str | os.PathLike[str], model: nn.Module | None = None, **given: Any) -> Dynamic:
    """The network that ``save`` wrote, at the setting it stood at and in evaluation mode: it answers as the saved one.

    Args:
        folder: what ``save`` was given.
        model: the user's own model, for methods that wrap one: freshly built, with the same shapes; its weights are
            overwritten.
        given: other constructor arguments that hold code or data, such as ``criterion``.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a constructor argument is missing or unknown, or (as ``SavedFileError``) the files are foreign,
            damaged, too new, or do not fit the model.
    """
    where = Path(folder)
    manifest, tensors = read_folder(where, "network")
    path = manifest.get("class")
    if not isinstance(path, str) or path not in _catalogue():
        raise ForeignError(f"{where}: names the class {path!r}, which is not in pliant's catalogue")
    module, _, name = path.partition(":")
    cls = getattr(importlib.import_module(module), name)
    arguments = _arguments(cls, manifest, tensors, where, given if model is None else given | {"model": model})
    for name in manifest.get("given", []):
        if name not in arguments:
            warnings.warn(
                f"{name}: the saved network had one of its own, which files cannot hold; without {name}= in this call "
                f"the loaded one has the default",
                stacklevel=2,
            )
    extra = _under(_EXTRA, tensors)
    try:
        net: Dynamic = cls(**arguments)
        net.restructure(unpack(manifest["structure"], extra))
        load_state(net, _under(_STATE, tensors), manifest["aliases"], where)
        net.use(Point(**manifest["point"]))
    except SavedFileError:
        raise
    except Exception as error:  # what was altered may break anything; a model that does not fit ends here too
        raise DamagedError(
            f"{where}: no {path} can be built from its arguments, structure and point with what was given: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    return net.eval()


def _arguments(
    cls: type, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], where: Path, given: dict[str, Any]
) -> dict[str, Any]:
    """Constructor arguments: those saved, then those given."""
    signature = list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]
    names = {p.name for p in signature if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    extra = _under(_EXTRA, tensors)
    listed = manifest.get("given", [])
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise DamagedError(f"{where}: its list of given arguments is none")
    arguments = unpack(manifest.get("arguments", {}), extra)
    if not isinstance(arguments, dict):
        raise DamagedError(f"{where}: its arguments are not a mapping")
    if "example" in manifest:
        arguments["example"] = unpack(manifest["example"], extra)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature)
    for name in given:
        if name not in names and not open_ended:
            raise ValueError(f"{name}: {cls.__name__} takes no such argument; it takes {', '.join(sorted(names))}")
    for name in arguments:
        if name not in names and not open_ended:
            raise DamagedError(f"{where}: holds the argument {name!r}, which {cls.__name__} does not take")
    arguments |= given
    missing = [p.name for p in signature if p.name in names and p.default is p.empty and p.name not in arguments]
    if "example" in missing:
        raise DamagedError(f"{where}: its example is missing, which {cls.__name__} is built with and save writes")
    if missing:
        raise ValueError(
            f"{missing[0]}: {cls.__name__} needs it and it is not in the files, since it holds code or data; "
            f"call load({str(where)!r}, {missing[0]}=...)"
        )
    return arguments
