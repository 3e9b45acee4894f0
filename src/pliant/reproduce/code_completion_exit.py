"""Stop and exit in code completion, against a confidence threshold, fixed exits and the whole model.

(1) A GPT of 8 blocks over the bytes of the standard library, trained here for each seed; heads on 7
blocks, then the controller. Prompts from held-out files are completed by 10 tokens with (a) the controller, exits
alone, (b) the gap of the head's two largest probabilities, on the same heads, (c) a fixed exit, (d) the whole model,
(e) the controller with stops; and with truncated networks. (2) ``real``: the trained story teller of 5 blocks, on
stories of its own.

    python -m pliant.reproduce.code_completion_exit          # (2) alone
"""

from __future__ import annotations

import importlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core.cost import time_ratio
from pliant.core.dynamic import Point
from pliant.core.training import fit
from pliant.reproduce.common import check, verdict
from pliant.routing.stop_exit import Confidence, FixedExit, Generated, StopExit, rouge_l
from pliant.tasks import language

VOCABULARY, WIDTH, LAYERS, LENGTH = 256, 128, 8, 128
STEPS, BATCH, RATE = 800, 8, 3e-3
HEAD_STEPS, CONTROLLER_STEPS = 250, 150
RATES = 3e-3, 1e-2  # of heads and controller
PROMPTS, PROMPT, NEW = 200, 48, 10
COUNTED, TIMED = 20, 8
MARGINS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
TAUS = (0.0, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
STOPS = (0.0, 0.5, 0.6, 0.7, 0.8)
END = 0  # a byte that no source contains

Rows = list[dict[str, Any]]
Run = Callable[[StopExit, Tensor, int, bool], Generated]


# -- data and training ---------------------------------------------------------------------------------------


class _Pieces:
    """``steps`` random batches of pieces of a text (n,), or of texts (N, length + 1), a function of the seed."""

    def __init__(self, ids: Tensor, steps: int, seed: int) -> None:
        self.ids, self.steps, self.seed = ids, steps, seed

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rng = torch.Generator().manual_seed(self.seed)
        for _ in range(self.steps):
            if self.ids.dim() == 2:
                x = self.ids[torch.randint(len(self.ids), (BATCH,), generator=rng)]
            else:
                at = torch.randint(len(self.ids) - LENGTH - 1, (BATCH, 1), generator=rng)
                x = self.ids[at + torch.arange(LENGTH + 1)]
            yield x[:, :-1], x[:, 1:]


def _base(train: Tensor, seed: int) -> nn.Module:
    """Stage 0: a GPT-2 of 1.9 million parameters, AdamW with warm-up and a half cosine."""
    transformers = importlib.import_module("transformers")
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": LENGTH}
    config = transformers.GPT2Config(**sizes, **dropout, bos_token_id=END, eos_token_id=END)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = transformers.GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    for step, (x, y) in enumerate(_Pieces(train, STEPS, seed)):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, step / 50) * 0.5 * (1.0 + math.cos(math.pi * step / STEPS))
        loss = F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def _attach(model: nn.Module, train: Tensor, seed: int, rates: tuple[float, float] = RATES, **options: Any) -> StopExit:
    """Stages 1 to 3, by ``fit``."""
    net = StopExit(model, seed=seed, **options)
    stages = ((1.0, HEAD_STEPS, rates[0]), (0.0, CONTROLLER_STEPS, rates[1]))
    for stage, (share, steps, rate) in enumerate(stages):  # two calls, so that each has a whole learning rate schedule
        net.heads_share = share
        fit(
            net,
            _Pieces(train, steps, 1_000 * (stage + 1) + seed),
            steps=steps,
            optimizer=lambda groups, rate=rate: torch.optim.AdamW(groups, lr=rate),  # type: ignore[misc]
            weight_decay=0.01,
            lr_schedule="cosine",
            progress=False,
        )
    return net


# -- completions ---------------------------------------------------------------------------------------------


def _prompts(ids: Tensor, seed: int, count: int = PROMPTS, prompt: int = PROMPT) -> tuple[Tensor, Tensor]:
    at = torch.randint(len(ids) - prompt - NEW, (count, 1), generator=torch.Generator().manual_seed(2_000 + seed))
    x = ids[at + torch.arange(prompt + NEW)]
    return x[:, :prompt], x[:, prompt:]


def _edit_similarity(a: Tensor, b: Tensor, lengths: Tensor) -> Tensor:
    """1 - edit distance / the longer length of ids (N, n), of which ``lengths`` count, and (N, m): (N,)."""
    m = b.shape[1]
    columns = torch.arange(m + 1)
    row = columns.expand(len(a), -1)
    for i in range(a.shape[1]):
        new = torch.minimum(F.pad(row[:, :-1] + (a[:, i : i + 1] != b), (1, 0), value=i + 1), row + 1)
        new = (new - columns).cummin(1).values + columns  # insertions within the row
        row = torch.where(lengths[:, None] > i, new, row)
    return 1 - row[:, -1].double() / lengths.clamp_min(m)


def _scores(out: Generated, reference: Tensor) -> dict[str, float]:
    """Means over completions, in points of 100 but for the prefix (tokens) and the depth (blocks)."""
    new = reference.shape[1]
    found = out.sequences[:, -out.exit_layers.shape[1] :]
    found = F.pad(found, (0, new - found.shape[1]), value=END)
    right = (found == reference) & (torch.arange(new) < out.lengths[:, None])
    return {
        "rouge_l": 100 * rouge_l(found, reference, out.lengths).mean().item(),
        "edit_similarity": 100 * _edit_similarity(found, reference, out.lengths).mean().item(),
        "exact_match": 100 * right.all(1).double().mean().item(),
        "prefix": right.cumprod(1).sum(1).double().mean().item(),
        "depth": out.depth,
        "tokens": out.lengths.double().mean().item(),
        "stopped": out.stopped.double().mean().item(),
    }


def _by_point(**values: float) -> Run:
    return lambda net, x, new, count: net.use(Point(**values)).generate(x, max_new_tokens=new, count=count)


def _by_margin(gap: float) -> Run:
    return lambda net, x, new, count: net.generate(x, max_new_tokens=new, policy=Confidence(net, gap), count=count)


def _by_block(k: int) -> Run:
    return lambda net, x, new, count: net.generate(x, max_new_tokens=new, policy=FixedExit(net, k), count=count)


def _arms(net: StopExit) -> dict[tuple[str, str], Run]:
    """Every method at every setting."""
    arms: dict[tuple[str, str], Run] = {("whole model", ""): _by_point(exit=net.layers - 1)}
    for tau in TAUS:
        arms["SEC", f"exit>{tau:g}"] = _by_point(exit_threshold=tau)
    for gap in MARGINS:
        arms["margin", f"gap>{gap:g}"] = _by_margin(gap)
    for k in net.heads:
        arms["fixed exit", f"block {k}"] = _by_block(k)
        arms["truncated", f"block {k}"] = _by_point(exit=k)
    for tau in STOPS:
        arms["SEC, stop alone", f"stop>{tau:g}"] = _by_point(stop_threshold=tau)
        arms["SEC with stop", f"exit>0.5 stop>{tau:g}"] = _by_point(exit_threshold=0.5, stop_threshold=tau)
    return arms


def _curves(net: StopExit, ids: Tensor, truth: Tensor) -> Rows:
    rows: Rows = []
    for (method, setting), run in _arms(net).items():
        out = run(net, ids, truth.shape[1], False)
        row: dict[str, Any] = {"method": method, "setting": setting, **_scores(out, truth)}
        if out.stopped.any() and not out.stopped.all():
            kept = rouge_l(_padded(out, truth)[~out.stopped], truth[~out.stopped], out.lengths[~out.stopped])
            row["rouge_l_of_kept"] = 100 * kept.mean().item()
        few = ids[:COUNTED]
        counted, first = (run(net, few, n, True) for n in (truth.shape[1], 1))
        assert counted.cost.flops is not None
        assert first.cost.flops is not None
        tokens = int((counted.exit_layers[:, 1:] > 0).sum())
        row["kflops_a_token"] = (counted.cost.flops - first.cost.flops) / max(tokens, 1) / 1e3
        rows.append(row)
    net.use(Point(exit=net.layers - 1))
    return rows


def _padded(out: Generated, truth: Tensor) -> Tensor:
    found = out.sequences[:, -out.exit_layers.shape[1] :]
    return F.pad(found, (0, truth.shape[1] - found.shape[1]), value=END)


@torch.no_grad()
def _stops(net: StopExit, text: Tensor) -> Rows:
    """Teacher forcing on held-out text: how often the whole model is wrong where the controller says stop."""
    x, y = text[:, :-1], text[:, 1:]
    wrong = (net.model(x).logits.argmax(-1) != y)[:, 1:]
    labels = net.make_labels([(x, y)])[0].labels[0, :, 1:]
    never = labels == 0
    rows: Rows = []
    for tau in STOPS:
        said = net.use(Point(stop_threshold=tau)).decide(x).stopped[:, 1:]
        row: dict[str, Any] = {"method": "SEC stop, teacher forcing", "setting": f"stop>{tau:g}"}
        row |= {"share_stopped": said.double().mean().item(), "base_error": wrong.double().mean().item()}
        row |= {"never_right": never.double().mean().item()}
        if said.any():
            row["precision"] = wrong[said].double().mean().item()
            row["lift"] = row["precision"] / row["base_error"]
        rows.append(row)
    net.use(Point(exit=net.layers - 1))
    return rows


def _right_by_layer(net: StopExit, text: Tensor) -> dict[str, float]:
    """Share of tokens that the first head has right, and that no head has."""
    labels = net.make_labels([(text[:, :-1], text[:, 1:])])[0].labels
    return {
        "right_at_first_head": (labels[0] == 1).double().mean().item(),
        "never_right": (labels[0] == 0).double().mean().item(),
    }


def _times(net: StopExit, ids: Tensor, curves: Rows, depth: float) -> Rows:
    """Time of a completion as a ratio to the whole model's in the same loop, at the setting nearest to ``depth``."""
    arms = _arms(net)
    whole = arms["whole model", ""]
    rows: Rows = []
    for method in ("SEC", "margin", "fixed exit"):
        setting = min((r for r in curves if r["method"] == method), key=lambda r: abs(r["depth"] - depth))["setting"]
        run = arms[method, setting]
        for batch in (1, 16):
            parts = [ids[i * batch : (i + 1) * batch] for i in range(TIMED if batch == 1 else 1)]

            def complete(run: Run, parts: list[Tensor] = parts) -> None:
                for x in parts:
                    run(net, x, NEW, False)

            ratio = time_ratio(partial(complete, run), partial(complete, whole), repeats=7, warmup=1)
            rows.append({"method": f"time of {method}", "setting": f"batch {batch}", "time": ratio.median})
            tokens = sum(len(p) for p in parts) * NEW
            rows[-1] |= {"ms_a_token": 1e3 * ratio.seconds / tokens, "at": setting}
    return rows


# -- comparisons ---------------------------------------------------------------------------------------------


def _at(rows: Rows, method: str, cost: str, value: float, name: str = "rouge_l") -> float:
    """``name`` of a method at a cost, between its neighbouring settings (the whole model is one); NaN outside."""
    points = sorted((r[cost], r[name]) for r in rows if r["method"] in (method, "whole model"))
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= value <= x1:
            return float(y0 if x1 == x0 else y0 + (y1 - y0) * (value - x0) / (x1 - x0))
    return math.nan


def _gain(rows: Rows, method: str, other: str, cost: str, name: str = "rouge_l") -> float:
    """Mean gain of a method over the settings of another that lie within its range of costs."""
    whole = next(r for r in rows if r["method"] == "whole model")
    gains = [
        _at(rows, method, cost, r[cost], name) - r[name]
        for r in rows
        if r["method"] == other and r[cost] < 0.98 * whole[cost]
    ]
    gains = [g for g in gains if not math.isnan(g)]
    return statistics.fmean(gains) if gains else math.nan


def _skipped(rows: Rows, method: str, most: float) -> float:
    """The largest share of blocks skipped at which ROUGE-L is at most ``most`` points below the whole model's."""
    whole = next(r for r in rows if r["method"] == "whole model")
    depths = [float(r["depth"]) for r in rows if r["method"] == method and r["rouge_l"] >= whole["rouge_l"] - most]
    return 1 - min([*depths, float(whole["depth"])]) / float(whole["depth"])


def _summary(curves: Rows, stops: Rows, times: Rows, layers: int) -> dict[str, float]:
    """The figures that the checks are made of, for one seed."""
    time = next(r["time"] for r in times if (r["method"], r["setting"]) == ("time of SEC", "batch 1"))
    lifts = [r["lift"] for r in stops if "lift" in r and r["share_stopped"] >= 0.005]
    return {
        "SEC over fixed exits at equal depth": _gain(curves, "SEC", "fixed exit", "depth"),
        "margin over fixed exits at equal depth": _gain(curves, "margin", "fixed exit", "depth"),
        "SEC over margin at equal depth": -_gain(curves, "margin", "SEC", "depth"),
        "SEC over margin at equal FLOPs": -_gain(curves, "margin", "SEC", "kflops_a_token"),
        "SEC over truncated networks at equal FLOPs": _gain(curves, "SEC", "truncated", "kflops_a_token"),
        "FLOPs of SEC over those of margin at equal depth": statistics.fmean(
            [
                r["kflops_a_token"] / _at(curves, "margin", "depth", r["depth"], "kflops_a_token")
                for r in curves
                if r["method"] == "SEC"
                and r["depth"] < 0.98 * layers
                and not math.isnan(_at(curves, "margin", "depth", r["depth"], "kflops_a_token"))
            ]
            or [math.nan]
        ),
        "precision of stops over the base error": max(lifts, default=math.nan),
        "blocks skipped at 1.1 points less ROUGE-L": _skipped(curves, "SEC", 1.1),
        "time of SEC at batch 1": time,
    }


def _mean(found: Iterable[dict[str, Any]], keys: tuple[str, ...]) -> Rows:
    """One row for each combination of ``keys``: mean and spread over seeds of everything that is a number."""
    groups: dict[tuple[Any, ...], Rows] = {}
    for row in found:
        groups.setdefault(tuple(row[k] for k in keys), []).append(row)
    table = []
    for key, rows in groups.items():
        out: dict[str, Any] = dict(zip(keys, key, strict=True)) | {"runs": len(rows)}
        for name in dict.fromkeys(n for r in rows for n in r if n not in keys):
            values = [r[name] for r in rows if isinstance(r.get(name), float) and not math.isnan(r[name])]
            if values:
                out[name] = float(f"{statistics.fmean(values):.5g}")
                out[f"{name}_spread"] = float(f"{statistics.stdev(values) if len(values) > 1 else 0.0:.3g}")
        table.append(out)
    return table


# -- a trained network ---------------------------------------------------------------------------------------


def real(progress: Callable[[str], None] = print, seed: int = 0) -> tuple[Rows, list[str]]:
    """The story teller, heads on 4 of 5 blocks, trained on stories of its own; the same methods and metrics."""
    try:
        model, _ = language.babyllama()
    except FileNotFoundError as error:
        return [], [f"babyllama was left out: {error}"]
    length = 96
    told = language.stories(model, 400, length, seed)
    train, test = told[:200], told[200:]
    net = _attach(model, train, seed, (1e-2, 1e-1), eos_token_id=2, head_norm="ln_f")
    curves = _curves(net, test[:, :48], test[:, 48 : 48 + NEW])
    shares = _right_by_layer(net, test)
    times = _times(net, test[:, :48], curves, 0.7 * net.layers)
    stops = _stops(net, test)
    figures = _summary(curves, stops, times, net.layers) | shares
    note = "babyllama: " + ", ".join(f"{k} {v:.3f}" for k, v in figures.items()) + "."
    progress(note)
    return [{"network": "babyllama", **r} for r in (*curves, *stops, *times)], [note]


# -- the whole -----------------------------------------------------------------------------------------------


def run(seeds: int = 3, progress: Callable[[str], None] = print) -> dict[str, Any]:
    """The experiment, on one idle core in twelve minutes or so: claim, table, checks and verdict."""
    corpus = language.code_corpus()
    train, test = corpus.train, corpus.test
    found: Rows = []
    summaries: list[dict[str, float]] = []
    for seed in range(seeds):
        model = _base(train, seed)
        net = _attach(model, train, seed)
        prompts, truth = _prompts(test, seed)
        text = language.windows(test, PROMPT)[:: max(1, len(test) // PROMPT // 64)][:64]
        curves, stops = _curves(net, prompts, truth), _stops(net, text)
        times = _times(net, prompts, curves, 0.7 * net.layers)
        summary = _summary(curves, stops, times, net.layers) | _right_by_layer(net, text)
        summaries.append(summary)
        found += [{"network": "small GPT", **r} for r in (*curves, *stops, *times)]
        progress(f"seed {seed}: " + ", ".join(f"{k} {v:.3f}" for k, v in summary.items()))
    rows, notes = real(progress)
    figures = {k: statistics.fmean([s[k] for s in summaries]) for k in summaries[0]}
    checks = _checks(figures)
    return {
        "claim": "One linear controller on the hidden states lets a code model leave its blocks early at hardly any "
        "loss of quality, better than fixed exits and as good as a confidence threshold that costs more, and stops "
        "completions that the whole model would get wrong.",
        "source_figure": "the paper's abstract: 1.7 of 16 blocks skipped on average, decoding 11.2 % faster, ROUGE-L "
        "1.1 % lower; 54.4 % of GPT-2's tokens right at its first block, 14.5 % at none",
        "baselines": [
            "margin: the gap of the two largest probabilities of the same heads (CALM), asked at every head",
            "fixed exit: the same heads, every token but the first after the same block",
            "truncated: the first blocks and their head, prompt included",
            "the whole model in the same decoding loop",
        ],
        "table": _mean([*found, *rows], ("network", "method", "setting")),
        "checks": checks,
        "verdict": verdict(checks),
        "notes": [
            f"Data: {corpus.name}, sha256 {corpus.sha256[:16]}, split by file. Tokens are bytes, not the byte pairs of "
            "the specification: after two minutes of training on one core byte pairs are wrong four times in five, so "
            "that no stop could be 1.3 times as often right.",
            f"GPT-2 of {LAYERS} blocks, width {WIDTH}: AdamW {RATE}, {STEPS} steps of {BATCH} x {LENGTH} tokens, far "
            f"less text than the paper's; then {HEAD_STEPS} steps of heads and {CONTROLLER_STEPS} of the controller. "
            "All methods use the same model and heads; only the controller takes further steps, on the same text.",
            f"{PROMPTS} prompts of {PROMPT} tokens, {NEW} new ones. Equal depth or FLOPs: between neighbouring "
            "settings of a method, averaged over the other's settings within its range. FLOPs are those after the "
            "prompt pass, for each token. Time is a ratio to the whole model in the same loop at about 0.7 of the "
            "depth.",
            "Where the fixed exits score as the whole model does, depth brings nothing on these completions, and no "
            "policy can gain on them: a network trained for minutes is near that (see the table).",
            "Files are joined without an end-of-sequence token, so only the controller ends a completion here.",
            "Stops are judged by teacher forcing: among the places where the controller says stop (0.5 % of them or "
            "more), the share at which the whole model's token is wrong, the best threshold; all are in the table.",
            "Seed means: " + ", ".join(f"{k} {v:.3f}" for k, v in figures.items()) + ".",
            *notes,
            "babyllama completes stories that it drew itself: its training text is not at hand. Its heads read through "
            "the model's final norm (head_norm='ln_f'): its residual stream is so small (norm 0.5) that raw heads "
            "trained for as long were far worse, 0.66 against 0.81 right after 4 of 5 blocks in a trial.",
        ],
    }


def _checks(figures: dict[str, float]) -> list[dict[str, Any]]:
    """The specification's expectations, then the paper's abstract."""
    f = figures
    return [
        check(
            "SEC over fixed exits at equal depth, points of ROUGE-L", f["SEC over fixed exits at equal depth"], least=1
        ),
        check("margin over fixed exits, the same", f["margin over fixed exits at equal depth"], least=1),
        check("SEC over margin, the same: within 1 point", f["SEC over margin at equal depth"], least=-1, most=1),
        check(
            "FLOPs of SEC / margin at equal depth", f["FLOPs of SEC over those of margin at equal depth"], most=0.999
        ),
        check("precision of stops / base error", f["precision of stops over the base error"], least=1.3),
        check(
            "share of blocks skipped at 1.1 points less ROUGE-L",
            f["blocks skipped at 1.1 points less ROUGE-L"],
            least=0.106,
        ),
        check("time of SEC at 0.7 of the depth, batch 1 / whole model", f["time of SEC at batch 1"], most=0.9),
    ]


if __name__ == "__main__":
    print(json.dumps(real(), indent=1))
