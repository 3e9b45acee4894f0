"""Which sparse form of a layer is faster than its dense form, and from which share of zeros on.

Time ratios to the dense layer, one thread, the two timed in turn; below 1 the sparse form wins. The peers: torchao's
semi-structured weights, and PyTorch's pruning masks, which compute all zeros. Written to ``results/sparse.json``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

from pliant.core import masks
from pliant.core.cost import time_ratio
from pliant.core.sparse import BlockSparseLinear, Compact, SparseConv2d, SparseLinear
from tables import write


def ratio(sparse: nn.Module, dense: nn.Module, x: torch.Tensor) -> float:
    """Time of the sparse form over that of the dense one."""
    with torch.no_grad():
        return round(time_ratio(lambda: sparse(x), lambda: dense(x), repeats=21).median, 2)


def blocky(layer: nn.Linear, block: int, share: float) -> nn.Linear:
    """The layer without this share of its blocks."""
    grid = torch.ones(layer.out_features // block * (layer.in_features // block))
    grid[torch.randperm(len(grid))[: round(share * len(grid))]] = 0
    with torch.no_grad():
        layer.weight.mul_(torch.kron(grid.view(layer.out_features // block, -1), torch.ones(block, block)))
    return layer


def main() -> None:
    """Linear layers of two sizes, convolutions of three, batches of 1 and 64."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    linear: list[dict[str, Any]] = []
    for size in (512, 2048):
        for share in (0.5, 0.7, 0.8, 0.9, 0.95, 0.99):
            dense = nn.Linear(size, size)
            with torch.no_grad():
                dense.weight[~masks.magnitude_mask(dense.weight, round(share * size * size))] = 0
            rows = nn.Linear(size, size)
            with torch.no_grad():
                rows.weight[: round(share * size)] = 0
            forms: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
                "csr": lambda: (SparseLinear(dense), dense),  # noqa: B023
                "rows, compact": lambda: (Compact(rows), rows),  # noqa: B023
            }
            for block in (8, 32):
                for product in ("bsr", "batched"):
                    layer = blocky(nn.Linear(size, size), block, share)
                    forms[f"blocks {block}, {product}"] = lambda w=layer, b=block, p=product: (
                        BlockSparseLinear(w, b, p),
                        w,
                    )
            for batch in (1, 64):
                x = torch.randn(batch, size)
                row = {"size": size, "zeros": share, "batch": batch}
                row |= {name: ratio(*make(), x) for name, make in forms.items()}
                linear.append(row)
                print(row)
    conv: list[dict[str, Any]] = []
    for channels, side in ((32, 14), (64, 8), (256, 8)):
        for share in (0.8, 0.9, 0.95, 0.99):
            layer = nn.Conv2d(channels, channels, 3, padding=1)
            with torch.no_grad():
                layer.weight[~masks.magnitude_mask(layer.weight, round(share * layer.weight.numel()))] = 0
            for batch in (1, 64):
                x = torch.randn(batch, channels, side, side)
                row = {"channels": channels, "side": side, "zeros": share, "batch": batch}
                conv.append(row | {"csr of patches": ratio(SparseConv2d(layer), layer, x)})
                print(conv[-1])
    peers: list[dict[str, Any]] = []
    dense = nn.Linear(2048, 2048)
    masked = prune.l1_unstructured(copy.deepcopy(dense), "weight", amount=0.9)
    x = torch.randn(64, 2048)
    peers.append({"peer": "torch.nn.utils.prune, 90 % zeros, batch 64", "time ratio": ratio(masked, dense, x)})
    try:
        from torchao.sparsity import semi_sparse_weight, sparsify_

        half = nn.Sequential(copy.deepcopy(dense)).to(torch.bfloat16)
        with torch.no_grad():
            half[0].weight.mul_(masks.group_mask(masks.magnitude_score(half[0].weight), 2, 4))
        reference = copy.deepcopy(half)
        sparsify_(half, semi_sparse_weight())
        peers.append({"peer": "torchao 2:4", "time ratio": ratio(half, reference, x.to(torch.bfloat16))})
    except Exception as error:
        peers.append({"peer": "torchao 2:4 on CPU", "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"})
    print(peers)
    write("sparse", "time of a sparse form over the dense layer's, one thread", linear=linear, conv=conv, peers=peers)


if __name__ == "__main__":
    main()
