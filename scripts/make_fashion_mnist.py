"""Make the embedded Fashion-MNIST subset from the Debian package ``dataset-fashion-mnist``.

    apt-get install dataset-fashion-mnist
    python scripts/make_fashion_mnist.py

12,000 training, 2,000 validation and 5,000 test images, the classes in equal shares: the first ones of each class in
the order of the original files, so that the choice can be checked. Training and validation images come from the
original training files, test images from the original test files. The rows are compressed with LZMA.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
from pathlib import Path

import numpy as np

SOURCE = Path("/usr/share/datasets/fashion-mnist")
TARGET = Path(__file__).parents[1] / "src/pliant/tasks/data/fashion_mnist_19k.u8.xz"
TRAIN, VALIDATION, TEST = 1200, 200, 500  # images of each class


def idx(name: str, header: int) -> np.ndarray:
    """The bytes of a gzipped IDX file after its header."""
    return np.frombuffer(gzip.decompress((SOURCE / name).read_bytes()), np.uint8, offset=header)


def first_of_each_class(labels: np.ndarray, start: int, count: int) -> np.ndarray:
    """Sorted positions of images number ``start`` to ``start + count`` of every class."""
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[start : start + count] for c in range(10)]))


def main() -> None:
    """Write the file: one uint8 array, a row for each image: 784 pixels, then the label."""
    rows = []
    for part, spans in (("train", [(0, TRAIN), (TRAIN, VALIDATION)]), ("t10k", [(0, TEST)])):
        pixels = idx(f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 784)
        labels = idx(f"{part}-labels-idx1-ubyte.gz", 8)
        for start, count in spans:
            chosen = first_of_each_class(labels, start, count)
            rows.append(np.concatenate([pixels[chosen], labels[chosen, None]], axis=1))
    table = np.concatenate(rows)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]
    TARGET.write_bytes(lzma.compress(table.tobytes(), lzma.FORMAT_XZ, filters=filters))
    print(f"{TARGET.name}: {len(table)} images, {TARGET.stat().st_size / 1e6:.2f} MB")
    print("sha256 of the decompressed bytes:", hashlib.sha256(table.tobytes()).hexdigest())


if __name__ == "__main__":
    main()
