"""Small images: Fashion-MNIST (embedded, so it runs anywhere offline), MNIST, CIFAR-10 and scikit-learn's digits.

Every data set comes as train / validation / test. Choices are made on validation, reports on test. Where the full files
are wanted (``fashion-mnist-full``, ``mnist``, ``cifar10``) they are looked for in this order: the folder
``$PLIANT_DATA``, the system's data package, the user's cache (downloaded once, checked against a published hash).
The copy of CIFAR-10 in ``$PLIANT_DATA`` may be re-compressed as JPEG; it is then named CIFAR-10-JPEG everywhere, and
networks trained on the original pixels lose about ten points on it.
"""

from __future__ import annotations

import gzip
import importlib
import io
import lzma
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

Bytes = NDArray[np.uint8]
Arrays = tuple[Bytes, Bytes]  # images (N, H, W) or (N, H, W, 3), and labels (N,)


@dataclass(frozen=True)
class ImageData:
    """One data set, normalised: images (N, C, H, W) float32 with zero mean and unit spread, labels (N,) int64."""

    name: str
    title: str
    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset
    classes: tuple[str, ...]

    @property
    def example(self) -> Tensor:
        """Two training images (2, C, H, W)."""
        images: Tensor = self.train.tensors[0]
        return images[:2].clone()

    def loaders(self, batch_size: int = 64) -> tuple[DataLoader[Any], DataLoader[Any], DataLoader[Any]]:
        """Loaders of train (shuffled, last incomplete batch dropped), validation and test (in order, 500 a batch)."""
        return (
            DataLoader(self.train, batch_size, shuffle=True, drop_last=True),
            DataLoader(self.validation, 500),
            DataLoader(self.test, 500),
        )


# -- the baseline network -------------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, I, H, W) -> (B, O, H / stride, W / stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, O, H / stride, W / stride)."""
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.shortcut(x) + self.norm2(self.conv2(y)))


class SmallResNet(nn.Module):
    """The baseline: a stem, three stages of residual blocks, a linear head. (B, C, H, W) -> (B, classes).

    With the default sizes 175 thousand parameters and 11 million FLOPs on a 28x28 image.
    """

    def __init__(
        self,
        in_channels: int = 1,
        classes: int = 10,
        widths: tuple[int, ...] = (16, 32, 64),
        blocks: int = 2,
        stem_stride: int = 2,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], 3, stem_stride, 1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        )
        stages = []
        channels = widths[0]
        for s, width in enumerate(widths):
            stage = []
            for b in range(blocks):
                stage.append(ResidualBlock(channels, width, stride=2 if s and not b else 1))
                channels = width
            stages.append(nn.Sequential(*stage))
        self.stages = nn.ModuleList(stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, classes)."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        features: Tensor = self.pool(x).flatten(1)
        return self.head(features)  # type: ignore[no-any-return]


# -- the data -------------------------------------------------------------------------------------------------------


def load(name: str = "fashion-mnist") -> ImageData:
    """One of ``NAMES``.

    Raises:
        ValueError: the name is unknown.
        FileNotFoundError: the data is nowhere to be found; the message tells the ways to get it.
        ImportError: a package that the data needs is missing; the message names the extra.
    """
    if name not in _SOURCES:
        raise ValueError(f"task: unknown image data {name!r}; allowed: {', '.join(NAMES)}")
    return _SOURCES[name]()


def baseline(data: ImageData, seed: int = 0) -> SmallResNet:
    """A fresh baseline network for ``data``, initialised from ``seed``; the global generator is left as it was."""
    images: Tensor = data.train.tensors[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmallResNet(images.shape[1], len(data.classes), stem_stride=1 if images.shape[-1] < 16 else 2)


_FASHION = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
_DIGITS = tuple("0123456789")


def _embedded_fashion() -> ImageData:
    packed = (files("pliant.tasks") / "data" / "fashion_mnist_19k.u8.xz").read_bytes()
    table = np.frombuffer(lzma.decompress(packed), np.uint8).reshape(-1, 785)
    images, labels = table[:, :784].reshape(-1, 28, 28), table[:, 784]
    parts = [(images[a:b], labels[a:b]) for a, b in ((0, 12_000), (12_000, 14_000), (14_000, 19_000))]
    return _dataset("fashion-mnist", "Fashion-MNIST, embedded subset (12,000 / 2,000 / 5,000)", parts, _FASHION)


def _full_fashion() -> ImageData:
    def debian() -> tuple[Arrays, Arrays] | None:
        folder = Path("/usr/share/datasets/fashion-mnist")
        names = [
            f"{part}-{kind}.gz" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
        ]
        if not all((folder / n).exists() for n in names):
            return None
        return _idx([(folder / n).read_bytes() for n in names])

    def download() -> tuple[Arrays, Arrays]:
        base = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
        hashes = {
            "train-images-idx3-ubyte.gz": "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "md5:25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "md5:bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "md5:bb300cfdad3c16e7a12a480ee83cd310",
        }
        return _idx([_cached(base + n, n, h).read_bytes() for n, h in hashes.items()])

    train, test = _find("Fashion-MNIST", "fashion_mnist.npz", _npz, download, debian)
    return _split("fashion-mnist-full", "Fashion-MNIST (55,000 / 5,000 / 10,000)", train, test, 5_000, _FASHION)


def _mnist() -> ImageData:
    def download() -> tuple[Arrays, Arrays]:
        url = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"
        digest = "sha256:731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"
        with np.load(_cached(url, "mnist.npz", digest), allow_pickle=False) as z:
            return (z["x_train"], z["y_train"]), (z["x_test"], z["y_test"])

    train, test = _find("MNIST", "mnist.npz", _npz, download)
    return _split("mnist", "MNIST (55,000 / 5,000 / 10,000)", train, test, 5_000, _DIGITS)


def _cifar10() -> ImageData:
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    title = "CIFAR-10"

    def jpeg(path: Path) -> tuple[Arrays, Arrays]:
        nonlocal title
        title = "CIFAR-10-JPEG"
        try:
            pillow = importlib.import_module("PIL.Image")
        except ImportError as error:
            raise ImportError('CIFAR-10-JPEG needs Pillow: pip install "pliant[data]"') from error
        with np.load(path, allow_pickle=False) as z:
            header = z["header"].tobytes()
            parts = []
            for part in ("train", "test"):
                blob, offsets = z[f"{part}_blob"].tobytes(), z[f"{part}_off"]
                images = [
                    np.asarray(pillow.open(io.BytesIO(header + blob[a:b])).convert("RGB")) for a, b in pairwise(offsets)
                ]
                parts.append((np.stack(images), z[f"{part}_y"]))
        return parts[0], parts[1]

    def download() -> tuple[Arrays, Arrays]:  # the binary version: the other one is a pickle, which can run code
        url = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
        archive = _cached(url, "cifar-10-binary.tar.gz", "md5:c32a1d4ab5d03f1284b67883e8d87530")
        with tarfile.open(archive) as tar:
            rows = {
                Path(m.name).name: np.frombuffer(tar.extractfile(m).read(), np.uint8).reshape(-1, 3073)  # type: ignore[union-attr]
                for m in tar.getmembers()
                if m.name.endswith(".bin")
            }
        train = np.concatenate([rows[f"data_batch_{i}.bin"] for i in range(1, 6)])
        train_part, test_part = (
            (t[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), t[:, 0]) for t in (train, rows["test_batch.bin"])
        )
        return train_part, test_part

    train, test = _find("CIFAR-10", "cifar10_jpeg.npz", jpeg, download)
    return _split("cifar10", f"{title} (45,000 / 5,000 / 10,000)", train, test, 5_000, classes)


def _digits() -> ImageData:
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise ImportError('the digits come with scikit-learn: pip install "pliant[data]"') from error
    bunch = datasets.load_digits()
    images, labels = bunch.images.astype(np.uint8), bunch.target.astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(images))
    parts = [(images[i], labels[i]) for i in (order[:1078], order[1078:1258], order[1258:])]
    return _dataset("digits", "scikit-learn digits (1,078 / 180 / 539)", parts, _DIGITS)


_SOURCES: dict[str, Callable[[], ImageData]] = {
    "fashion-mnist": _embedded_fashion,
    "fashion-mnist-full": _full_fashion,
    "mnist": _mnist,
    "cifar10": _cifar10,
    "digits": _digits,
}
NAMES = tuple(_SOURCES)


def _dataset(name: str, title: str, parts: Sequence[Arrays], classes: tuple[str, ...]) -> ImageData:
    """Train, validation and test, normalised by the mean and spread of the training pixels, channel by channel."""
    pixels = [_planes(images) for images, _ in parts]
    mean, std = pixels[0].mean((0, 2, 3), keepdim=True), pixels[0].std((0, 2, 3), keepdim=True)
    a, b, c = (
        TensorDataset((images - mean) / std, torch.from_numpy(labels.astype(np.int64)))
        for images, (_, labels) in zip(pixels, parts, strict=True)
    )
    return ImageData(name, title, a, b, c, classes)


def _planes(images: Bytes) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(images)).float()
    return tensor[:, None] if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2).contiguous()


def _split(name: str, title: str, train: Arrays, test: Arrays, validation: int, classes: tuple[str, ...]) -> ImageData:
    """Hold ``validation`` training images out, drawn by a fixed permutation."""
    order = np.random.default_rng(0).permutation(len(train[0]))
    held, kept = np.sort(order[:validation]), np.sort(order[validation:])
    parts = [(train[0][kept], train[1][kept]), (train[0][held], train[1][held]), test]
    return _dataset(name, title, parts, classes)


def _find(
    title: str,
    file: str,
    read: Callable[[Path], tuple[Arrays, Arrays]],
    download: Callable[[], tuple[Arrays, Arrays]],
    system: Callable[[], tuple[Arrays, Arrays] | None] | None = None,
) -> tuple[Arrays, Arrays]:
    folder = os.environ.get("PLIANT_DATA")
    if folder and (path := Path(folder) / "images" / file).exists():
        return read(path)
    if system is not None and (found := system()) is not None:
        return found
    try:
        return download()
    except ImportError as error:
        raise FileNotFoundError(
            f"{title} was not found. Put {file} into the folder images/ of $PLIANT_DATA, "
            + ("install the system package dataset-fashion-mnist, " if system else "")
            + 'or let it be downloaded once: pip install "pliant[data]". '
            "The task fashion-mnist is embedded and needs none of these."
        ) from error
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{title} was not found in $PLIANT_DATA, and its download failed: {error}. "
            "The task fashion-mnist is embedded and needs no download."
        ) from error


def _cached(url: str, name: str, digest: str) -> Path:
    pooch = importlib.import_module("pooch")
    return Path(pooch.retrieve(url, known_hash=digest, fname=name, path=pooch.os_cache("pliant"), progressbar=False))


def _npz(path: Path) -> tuple[Arrays, Arrays]:
    with np.load(path, allow_pickle=False) as z:
        return (z["train_x"], z["train_y"]), (z["test_x"], z["test_y"])


def _idx(parts: list[bytes]) -> tuple[Arrays, Arrays]:
    """Train images, train labels, test images, test labels as gzipped IDX files."""
    raw = [np.frombuffer(gzip.decompress(p), np.uint8, offset=8 if i % 2 else 16) for i, p in enumerate(parts)]
    return (raw[0].reshape(-1, 28, 28), raw[1]), (raw[2].reshape(-1, 28, 28), raw[3])
