"""What DSnoT costs and what its zeros save on this CPU: time against Wanda alone, compressed rows, stored bytes.

Ratios of time, timed in turn in one run, one thread. Written to ``benchmarks/results/dsnot.json``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pliant.core import masks
from pliant.core.cost import Ratio, count_bytes, time_ratio
from pliant.core.sparse import SparseLinear
from pliant.sparsity.dsnot import DSnoT, Point, refine, zeros_in_row
from pliant.tasks.language import small_decoder
from tables import write

SHAPES = ((576, 576), (1536, 576), (576, 1536), (2048, 2048))  # the first three are SmolLM2-135M's


def _rounded(ratio: Ratio) -> dict[str, Any]:
    median, low, high = (float(f"{v:.3g}") for v in (ratio.median, ratio.low, ratio.high))
    return {"ratio": median, "quartiles": [low, high]}


def _pruning(rows: int, columns: int) -> dict[str, Any]:
    """Start and refinement against the start, for one layer whose statistics are known."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=rng)
    x = torch.randn(4096, columns, generator=rng) + 0.3 * torch.randn(columns, generator=rng)
    mean, variance, norm = x.mean(0).double(), x.var(0).double(), x.norm(dim=0).double()
    swaps = 0.0

    def start() -> tuple[Tensor, Tensor]:
        score = masks.wanda_score(weight, norm)
        return score, masks.row_mask(score, zeros_in_row(columns, 0.6))

    def refined() -> None:
        nonlocal swaps
        swaps = float(refine(weight, start()[1], mean, variance, norm).swaps.double().mean())

    ratio = time_ratio(refined, start, repeats=9)
    shown = {"layer": f"{rows}x{columns}", "Wanda and DSnoT / Wanda": _rounded(ratio)}
    return shown | {"seconds": float(f"{ratio.seconds:.3g}"), "swaps for each row": round(swaps, 1)}


def _model() -> dict[str, Any]:
    """The whole of it: block by block, calibration runs included."""
    torch.manual_seed(0)
    ids = torch.randint(0, 256, (64, 64))
    point = Point(sparsity=0.6)
    nets = [DSnoT(small_decoder(width=128, layers=4), ids, sparsity=0.6, cycles=c) for c in (50, 0)]
    ratio = time_ratio(nets[0].prune, nets[1].prune, repeats=7)
    swaps = sum(r.swaps for r in nets[0].report(point)) / len(nets[0].report(point))
    found = {"network": "Llama of 4 blocks, width 128, 64 x 64 tokens", "Wanda and DSnoT / Wanda": _rounded(ratio)}
    return found | {"seconds": float(f"{ratio.seconds:.3g}"), "swaps for each row": round(swaps, 1)}


@torch.no_grad()
def _running(size: int, sparsity: float, batch: int) -> dict[str, Any]:
    """A layer with that share of zeros in compressed rows against the dense one."""
    torch.manual_seed(0)
    layer, full = nn.Linear(size, size), nn.Linear(size, size)
    kept = masks.row_mask(masks.magnitude_score(layer.weight), zeros_in_row(size, sparsity))
    layer.weight.masked_fill_(~kept, 0.0)
    sparse, x = SparseLinear(layer), torch.randn(batch, size)
    dense = layer.weight.numel() * 4
    stored = int(kept.sum()) * 4 + masks.pack_bits(kept).numel()
    return {
        "layer": f"{size}x{size}",
        "zeros": sparsity,
        "batch": batch,
        "compressed rows / dense, time": _rounded(time_ratio(lambda: sparse(x), lambda: full(x), repeats=15)),
        "zeros in a dense layer / dense, time": _rounded(time_ratio(lambda: layer(x), lambda: full(x), repeats=15)),
        "compressed rows / dense, bytes": round((count_bytes(sparse) - 4 * size) / dense, 3),
        "bit mask and values / dense, bytes": round(stored / dense, 3),
        "bit mask and values / dense, bytes in 16 bits": round((stored - int(kept.sum()) * 2) / (dense // 2), 3),
    }


def main() -> None:
    """Measure all three and write the table."""
    torch.set_num_threads(1)
    pruning: list[dict[str, Any]] = []
    for shape in SHAPES:
        pruning.append(_pruning(*shape))
        print(pruning[-1])
    whole = _model()
    print(whole)
    running = []
    for size in (576, 2048):
        for sparsity in (0.5, 0.6, 0.7, 0.9):
            for batch in (1, 64):
                running.append(_running(size, sparsity, batch))
                print(running[-1])
    name = "compressed rows / dense, time"
    faster = [f"{r['layer']} {r['zeros']:.0%} batch {r['batch']}" for r in running if r[name]["quartiles"][1] < 1.0]
    paper = [r for r in running if r["zeros"] <= 0.7]
    won = sum(r[name]["quartiles"][1] < 1.0 for r in paper)
    write(
        "dsnot",
        "time ratios, one thread. Zeros alone save no time. At the paper's 50-70 % zeros compressed rows are faster in "
        f"{won} of {len(paper)} cases; what shrinks there is storage",
        pruning_of_one_layer=pruning,
        pruning_of_a_network=whole,
        running=running,
        faster_in_compressed_rows=faster,
    )


if __name__ == "__main__":
    main()
