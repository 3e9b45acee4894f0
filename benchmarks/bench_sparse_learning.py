"""What a sparse embedding table saves: bytes in the file and in memory, and what it costs in time.

Tables of 20,000 rows and 64 columns with random zeros. Bytes are those of what is written (safetensors) and of what the
module holds; "csr int32" is the usual form with 32-bit columns. Time is a ratio to the dense table, the two timed in
turn in one run: looking 4,096 rows up, and scoring 256 users against all rows (the sparse table as a CSR product, its
CSR form made beforehand, and once with it made anew at each call). The last figure is a training step of LightGCN with
DSL against the plain one, updates every 20 steps included.

    python benchmarks/bench_sparse_learning.py
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pliant.core.cost import Ratio, count_bytes, time_ratio
from pliant.sparsity.sparse_learning import SparseEmbedding, SparseLearning
from pliant.tasks import recommendation
from tables import write

ROWS, COLUMNS, LOOKUP, USERS = 20_000, 64, 4_096, 256
DENSITIES = (0.5, 0.2, 0.1, 0.05)


def file_bytes(module: nn.Module) -> int:
    """Bytes of the module's state on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.safetensors"
        save_file(dict(module.state_dict()), path)
        return path.stat().st_size


def shown(ratio: Ratio) -> dict[str, float]:
    """Median and quartiles, two digits."""
    return {"median": round(ratio.median, 2), "low": round(ratio.low, 2), "high": round(ratio.high, 2)}


def table(density: float, generator: torch.Generator) -> nn.Embedding:
    """A dense embedding with an exact share of entries."""
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    gone = torch.randperm(weight.numel(), generator=generator)[round(density * weight.numel()) :]
    weight.view(-1)[gone] = 0.0
    return nn.Embedding.from_pretrained(weight)


def one_density(density: float, generator: torch.Generator) -> dict[str, Any]:
    """Bytes and time ratios at one density."""
    dense = table(density, generator)
    users = torch.randn(USERS, COLUMNS, generator=generator)
    index = torch.randint(ROWS, (LOOKUP,), generator=generator)
    nonzero = int(torch.count_nonzero(dense.weight))
    row: dict[str, Any] = {"density": density, "dense": {"file": file_bytes(dense), "resident": count_bytes(dense)}}
    row["csr_int32"] = {"resident": 8 * nonzero + 4 * (ROWS + 1)}
    row["chosen"] = SparseEmbedding(dense).format
    expected = users @ dense.weight.t()
    for form in ("bitmap", "csr"):
        sparse = SparseEmbedding(dense, form)  # type: ignore[arg-type]
        ready = sparse.csr()
        same = torch.equal(sparse(index), dense(index)) and torch.allclose((ready @ users.t()).t(), expected, atol=1e-4)
        assert same, "the sparse table and the dense one disagree"
        row[form] = {
            "file": file_bytes(sparse),
            "resident": count_bytes(sparse),
            "share_of_dense": round(count_bytes(sparse) / count_bytes(dense), 3),
            "lookup_ratio": shown(time_ratio(lambda s=sparse: s(index), lambda: dense(index))),  # type: ignore[misc]
            "scoring_ratio": shown(
                time_ratio(lambda r=ready: r @ users.t(), lambda: users @ dense.weight.t())  # type: ignore[misc]
            ),
            "scoring_ratio_csr_made_anew": shown(
                time_ratio(lambda s=sparse: s.csr() @ users.t(), lambda: users @ dense.weight.t())  # type: ignore[misc]
            ),
        }
    return row


def step(density: float, history: recommendation.Interactions, batch: tuple[Tensor, ...]) -> Callable[[], None]:
    """Twenty training steps of LightGCN, one update among them; at density 0 the plain model without us."""
    torch.manual_seed(0)
    model = recommendation.LightGCN(history, 64, 2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    loss: Callable[[Any], Tensor] = model.loss
    if density:
        net = SparseLearning(model, density=density, update_every=20, total_steps=10_000)
        net.attach_optimizer(optimizer)
        loss = net.loss

    def run() -> None:
        for _ in range(20):
            optimizer.zero_grad()
            loss(batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return run


def main() -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        rows = [one_density(density, generator) for density in DENSITIES]
    data = recommendation.synthetic(600, 3_600, 100)
    batch = next(iter(recommendation.PairBatches(data.train, 4_096)))
    training = shown(time_ratio(step(0.5, data.train, batch), step(0.0, data.train, batch), repeats=9))
    faster = [r["density"] for r in rows if min(r[f]["scoring_ratio"]["high"] for f in ("bitmap", "csr")) < 1.0]
    figures = {
        "table": f"{ROWS} x {COLUMNS} float32",
        "by_density": rows,
        "training_step_ratio": training,
        "smaller_at_every_density": all(r[r["chosen"]]["share_of_dense"] < 1.0 for r in rows),
        "lookup_is_faster": any(r[f]["lookup_ratio"]["median"] < 1.0 for r in rows for f in ("bitmap", "csr")),
        "scoring_is_faster_at_densities": faster,
    }
    what = "sparse embedding tables against dense ones: bytes, lookup, scoring; DSL's training step against plain"
    print(json.dumps(figures, indent=1))
    write("sparse_learning", what, **figures)


if __name__ == "__main__":
    main()
