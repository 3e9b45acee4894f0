"""Does compaction turn saved FLOPs into saved time? Time ratio over FLOP ratio of early exit, goal at most 1.10.

A transformer of 12 blocks (D = 192, N = 65) on batches of 64, exits uniform over depth. Three ways to leave: rows are
taken out (compacted), rows are computed on and masked, and the batch leaves when its slowest row does.
Run: python benchmarks/bench_rows.py
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import torch
from torch import Tensor, nn

from pliant.core.cost import count_flops, time_ratio
from pliant.core.rows import ExitPlan

BATCH, DEPTH, WIDTH, TOKENS, HEADS, CLASSES = 64, 12, 192, 65, 3, 10
TARGET = Path(__file__).parent / "results" / "rows.json"


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm: (B, N, D) -> (B, N, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, h: Tensor) -> Tensor:
        """One block."""
        b, n, d = h.shape
        q, k, v = self.qkv(self.norm1(h)).view(b, n, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4)
        a = nn.functional.scaled_dot_product_attention(q, k, v)
        h = h + self.out(a.transpose(1, 2).reshape(b, n, d))
        return h + self.mlp(self.norm2(h))


class Transformer(nn.Module):
    """Blocks and a head on the first token: (B, N, D) -> (B, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, h: Tensor) -> Tensor:
        """Logits."""
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h[:, 0]))


def main() -> None:
    """Measure and write the results."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Transformer().eval()
    heads = [nn.Linear(WIDTH, CLASSES) for _ in range(DEPTH - 1)]
    x = torch.randn(BATCH, TOKENS, WIDTH)
    plan = ExitPlan(model, x[:2])
    exits = torch.arange(BATCH) % DEPTH  # DEPTH - 1 is the end of the network
    exits = exits[torch.randperm(BATCH)]

    def visit(k: int, hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return exits[rows] == k, heads[k](model.norm(hidden[:, 0]))

    def slowest(k: int, hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(rows, k >= int(exits.max()), dtype=torch.bool), heads[k](model.norm(hidden[:, 0]))

    ways = {
        "compacted": lambda: plan.run(model, x, visit),
        "masked": lambda: plan.run(model, x, visit, "never"),
        "slowest leaves": lambda: plan.run(model, x, slowest),
    }
    results = {}
    with torch.inference_mode():
        full = count_flops(lambda: model(x)).total
        for name, way in ways.items():
            flops = count_flops(way).total / full
            time = time_ratio(way, lambda: model(x), repeats=7, warmup=1)
            results[name] = {
                "flop_ratio": flops,
                "time_ratio": time.median,
                "time_ratio_low": time.low,
                "time_ratio_high": time.high,
                "time_over_flops": time.median / flops,
            }
            print(f"{name:15} FLOPs {flops:.3f}  time {time.median:.3f}  time / FLOPs {time.median / flops:.3f}")
    record = {
        "goal": "compacted: time_over_flops <= 1.10",
        "met": results["compacted"]["time_over_flops"] <= 1.10,
        "batch": BATCH,
        "blocks": DEPTH,
        "width": WIDTH,
        "tokens": TOKENS,
        "results": results,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }
    TARGET.parent.mkdir(exist_ok=True)
    part = TARGET.with_suffix(".part")
    part.write_text(json.dumps(record, indent=2) + "\n")
    part.replace(TARGET)


if __name__ == "__main__":
    main()
