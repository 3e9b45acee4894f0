"""The main job and the command line, on a small task."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from typer.testing import CliRunner

from pliant import Frontier, Point, cli, compare, recipes, report, tasks
from pliant.core.frontier import Row
from pliant.reproduce import reproduce

CODE = """
import torch
from torch import nn
def block():
    return nn.Sequential(nn.Linear(12, 12), nn.ReLU())
def network():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Sequential(block(), block(), block()), nn.Linear(12, 3))
def dictionary():
    class D(nn.Module):
        def __init__(self):
            super().__init__(); self.l = nn.Linear(6, 3)
        def forward(self, x):
            return {"scores": self.l(x), "boxes": self.l(x)}
    return D()
def loaders():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=g); y = x[:, :3].argmax(1)
    d = lambda a, b: torch.utils.data.TensorDataset(x[a:b], y[a:b])
    return d(0, 256), d(256, 320), d(320, 400)
def empty():
    return [], [], []
def two():
    return [], []
number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments))


def test_compare_on_your_own_network(own: Path) -> None:
    arguments = ["compare", "--model", "mine:network", "--data", "mine:loaders", "--epochs", "2", "--seeds", "2"]
    result = run(*arguments, "--budget", "parameters=400", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    names = [r["name"] for r in found["results"]]
    assert names == [
        "baseline", "SortedNet (one training)", "trained separately", "RD pruning", "global magnitude",
        "JEI-DNN (learned gates)", "confidence threshold", "cut off after block k",
    ]  # fmt: skip
    assert all(len(r["test"]) == 2 and len(r["validation"]) == 2 for r in found["results"])
    for name in ("frontier.png", "frontier.svg", "results.json", "networks/sortednet", "networks/rd-pruning"):
        assert (own / "out" / name).exists(), name
    # The winner is the best on validation within the budget, and its plain form needs no pliant.
    within = [
        (row["quality"], r["name"], row["point"])
        for r in found["results"] for row in r["validation"][-1] if row["parameters"] <= 400
    ]  # fmt: skip
    assert found["winner"]["quality"] <= 1
    assert max(q for q, _, _ in within) == next(
        q for q, n, p in within if n == found["winner"]["name"] and p == found["winner"]["point"]
    )
    plain = torch.export.load(own / "out" / "best.pt2").module()
    assert plain(torch.randn(5, 6)).shape == (5, 3)
    assert not list((own / "out").glob(".*"))  # no half-written files


MINE = ["compare", "--model", "mine:network", "--data", "mine:loaders", "--epochs", "1", "--methods", "sortednet"]


def test_a_budget_by_time_is_met_and_what_to_take_is_said(own: Path) -> None:
    result = run(*MINE, "--budget", "latency=1.5")
    assert result.exit_code == 0, result.output
    shown = " ".join(result.output.split())
    assert "the full network: flops=" in shown
    assert "its smallest slice (width=0.25 depth=1): flops=" in shown
    assert "best within latency <= 1.5" in shown
    assert "fastest without loss on validation: " in shown
    assert "front" in shown
    # Costs rise from the slice to the whole, as told before anything was trained.
    task = compare.own_task("mine:network", "mine:loaders")
    full, small = (dict(p.split("=") for p in line.split(": ")[1].split()) for line in compare.reach(task))
    for cost in ("flops", "parameters", "bytes"):
        assert float(small[cost]) < float(full[cost])


def test_a_budget_that_nothing_meets_tells_the_smallest_of_all_behind_the_table(own: Path) -> None:
    result = run(*MINE, "--budget", "latency=0.000001")
    assert result.exit_code == 1
    assert "SortedNet (one training)" in result.output  # the table
    found = json.loads((own / "out" / "results.json").read_text())
    least = min(row["latency"] for r in found["results"] for f in r["test"] for row in f)
    assert f"budget: no point fits latency=1e-06; the smallest measured here: latency {least:g}" in str(
        result.exception
    )


def test_fronts_and_recommendation_are_the_brute_force_ones() -> None:
    def row(name: str, quality: float, flops: int, latency: float) -> Row:
        point = Point(at=name)
        return Row(point, quality, flops, flops, flops, 4 * flops, latency, latency, latency, True)

    rows = [row("a", 0.5, 10, 0.3), row("b", 0.7, 20, 0.6), row("c", 0.6, 15, 0.7), row("d", 0.89, 25, 0.5)]
    base = [row("full", 0.9, 40, 1.0)]
    done = compare.Comparison(cast(Any, None), networks={"ours": cast(Any, None), "baseline": cast(Any, None)})
    for name, kind, found in (("baseline", "baseline", base), ("ours", "method", rows)):
        untimed = tuple(replace(r, latency=math.nan) for r in found)
        done.results.append(
            compare.Result(
                name, cast(Any, kind), "sortednet", [Frontier(untimed)], [Frontier(tuple(found))], seconds=[1.0]
            )
        )
    marks = {(r["network"], r["point"]): r["front"] for r in compare.table(done)}
    assert marks == {
        ("baseline", "at=full"): "FT", ("ours", "at=a"): "FT", ("ours", "at=b"): "F", ("ours", "at=c"): "F",
        ("ours", "at=d"): "FT",
    }  # fmt: skip
    told = compare.recommendation(done)
    assert told[0] == "fastest without loss on validation: the baseline; no point here is faster"
    assert told[1].startswith("fastest within one hundredth on validation: the baseline")  # 0.89 < 0.9 * 0.99
    assert done.best(latency=0.55).row.point == Point(at="d")
    done.results[1].validation[0] = Frontier(tuple(replace(r, quality=r.quality + 0.05) for r in rows))
    assert compare.recommendation(done)[0].startswith("fastest without loss on validation: ours at at=d, 89.0 %")


def test_the_line_of_a_curve_joins_what_no_cheaper_point_equals() -> None:
    curve = report.Curve("x", (1.0, 2.0, 3.0, 3.0, 4.0), (5.0, 4.0, 6.0, 7.0, 7.0), (0.0,) * 5)
    assert curve.front() == [0, 3]
    assert replace(curve, lower_is_better=True).front() == [0, 1]


def test_the_module_is_the_command(tmp_path: Path) -> None:
    found = subprocess.run([sys.executable, "-m", "pliant", "list"], capture_output=True, text=True, check=False)
    assert found.returncode == 0
    assert "sortednet" in found.stdout


def test_the_elastic_family_on_your_own_network(own: Path) -> None:
    arguments = ["compare", "--model", "mine:network", "--data", "mine:loaders", "--epochs", "1", "--family", "elastic"]
    result = run(*arguments, "--budget", "parameters=400", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [r["name"] for r in found["results"]] == [
        "baseline", "SortedNet (one training)", "trained separately", "BigNAS (one training)", "SN-Net (stitched)",
        "self-expanding (its growth)", "ProARD (robust, one training)",
    ]  # fmt: skip
    for slug in ("sortednet", "bignas", "sn-net", "self-expanding", "proard"):
        assert (own / "out" / "networks" / slug).exists()


def test_the_sparsity_family_on_your_own_network_and_what_does_not_fit_it(own: Path) -> None:
    arguments = [
        "compare",
        "--model",
        "mine:network",
        "--data",
        "mine:loaders",
        "--epochs",
        "1",
        "--family",
        "sparsity",
    ]
    result = run(*arguments, "--budget", "nonzero_flops=200", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [r["name"] for r in found["results"]] == [
        "baseline", "RD pruning", "global magnitude", "DSnoT (no training)", "Wanda", "DSL (sparse training)",
        "static random mask", "consensus (a training each)", "SPLoRA (frozen weights)", "torch-pruning",
    ]  # fmt: skip
    assert "no convolution" in found["skipped"]["ftwt"]  # a network of linear layers
    saved = {p.name for p in (own / "out" / "networks").iterdir()}
    assert {"rd-pruning", "rd-pruning-global", "dsnot", "structured-pruning-adapters", "dsl-sparsity=0.8"} <= saved
    assert {"consensus-subnetwork-keep=0.75", "consensus-subnetwork-keep=0.5"} <= saved
    again = run("compare", "--model", "mine:network", "--data", "mine:loaders", "--epochs", "1", "--methods", "ftwt")
    assert again.exit_code == 1  # asked for alone, it is an error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "nothing"], "allowed: sortednet"),
        (["compare", "--task", "nothing"], "unknown image data 'nothing'"),
        (["compare", "--methods", "weight-compander"], "not part of the comparison"),
        (["compare", "--methods", "x"], "unknown 'x'"),
        (["compare", "--family", "weights"], "no method of 'weights'"),
        (["compare", "--budget", "flops"], "such as flops=3e6"),
        (["compare", "--budget", "watts=3"], "unknown cost 'watts'"),
        (["compare", "--model", "mine:network"], "go together"),
        (["compare", "--model", "mine", "--data", "mine:loaders"], "module:function"),
        (["compare", "--model", "nowhere:f", "--data", "mine:loaders"], "cannot import 'nowhere'"),
        (["compare", "--model", "mine:g", "--data", "mine:loaders"], "has no 'g'"),
        (["compare", "--model", "mine:number", "--data", "mine:loaders"], "is not a function"),
        (["compare", "--model", "mine:loaders", "--data", "mine:loaders"], "must return an nn.Module"),
        (["compare", "--model", "mine:network", "--data", "mine:two"], "three loaders"),
        (["compare", "--model", "mine:network", "--data", "mine:empty"], "empty part"),
        (
            ["compare", "--model", "mine:dictionary", "--data", "mine:loaders"],
            "beside an output dict of 2 cannot be known; give criterion=",
        ),
        (["compare", "--seeds", "0", "--task", "digits"], "seeds: 0"),
        (["reproduce", "nothing"], "unknown 'nothing'"),
        (["reproduce", "sortednet", "--seeds", "0"], "seeds: 0"),
    ],
)
def test_errors_are_one_clear_line(
    own: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["pliant", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    shown = capsys.readouterr().err.strip().splitlines()
    assert shown[-1].startswith("error: ")
    assert message in shown[-1]
    assert "Traceback" not in "".join(shown)


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["pliant", "--debug", "show", "nothing"])
    with pytest.raises(ValueError, match="unknown"):
        cli.main()


def test_an_output_folder_that_cannot_be_written_is_said_before_training(own: Path) -> None:
    (own / "file").write_text("")
    with pytest.raises(OSError, match="out: cannot write"):
        compare.compare(compare.own_task("mine:network", "mine:loaders"), out=own / "file" / "below")


def test_interruption_leaves_what_is_finished(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(recipes.RECIPES, "rd-pruning", stop)
    result = run("compare", "--model", "mine:network", "--data", "mine:loaders", "--epochs", "1")
    assert result.exit_code == 130
    found = json.loads((own / "out" / "results.json").read_text())
    assert [r["name"] for r in found["results"]] == ["baseline", "SortedNet (one training)", "trained separately"]


def test_list_show_version() -> None:
    assert {e["slug"] for e in json.loads(run("list", "--json").stdout)} >= {"sortednet", "jei-dnn"}
    assert "rd-pruning" in run("list").stdout
    assert json.loads(run("show", "rd-pruning", "--json").stdout)["arxiv"] == "2308.10438"
    assert run("--version").stdout.startswith("pliant 0.")


def test_evidence_is_written_by_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pliant.reproduce import sortednet

    answer = {"claim": "c", "table": [], "checks": [], "verdict": "holds"}
    monkeypatch.setattr(sortednet, "run", lambda seeds, progress: dict(answer))
    found = reproduce("sortednet", seeds=2, folder=tmp_path)
    assert json.loads((tmp_path / "sortednet.json").read_text()) == found
    assert found["seeds"] == 2
    assert {"machine", "versions", "commit", "date", "seconds"} <= set(found)
    assert not (tmp_path / "sortednet.png").exists()
    drawn = []
    monkeypatch.setattr(sortednet, "plot", lambda evidence, path: drawn.append((evidence, path)), raising=False)
    found = reproduce("sortednet", folder=tmp_path)
    assert drawn == [(found, tmp_path / "sortednet.png")]
    answer["verdict"] = "wonderful"
    with pytest.raises(ValueError, match="verdict"):
        reproduce("sortednet", folder=tmp_path)


def test_the_regret_of_the_balancer_is_drawn_from_its_evidence(tmp_path: Path) -> None:
    from pliant.reproduce import alf_lb

    evidence = json.loads((Path(__file__).parents[1] / "evidence" / "alf-lb.json").read_text())
    alf_lb.plot(evidence, tmp_path / "regret.png")
    assert (tmp_path / "regret.png").stat().st_size > 10_000
    assert [p.name for p in tmp_path.iterdir()] == ["regret.png"]


def test_tasks() -> None:
    task = tasks.load("fashion-mnist")
    x, _ = next(iter(task.train))
    assert x.shape == (64, 1, 28, 28)
    assert torch.equal(task.model(0)(x), task.model(0).train()(x))
    assert len(task.train.dataset) == 12_000
    assert len(task.test.dataset) == 5_000
    counts = torch.bincount(task.validation.dataset.tensors[1])
    assert counts.tolist() == [200] * 10
    assert tasks.load("digits").example.shape == (2, 1, 8, 8)


def test_missing_data_tells_the_ways(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pliant.tasks import images

    def refuse(*_: Any) -> Path:
        raise ImportError("no pooch")

    monkeypatch.setenv("PLIANT_DATA", str(tmp_path))
    monkeypatch.setattr(images, "_cached", refuse)
    with pytest.raises(FileNotFoundError, match=r"mnist\.npz.*PLIANT_DATA.*pliant\[data\].*fashion-mnist"):
        images.load("mnist")


def test_short_numbers() -> None:
    assert [report.short(v) for v in (11075968, 174970, 512, 0.5249)] == ["11.1M", "175k", "512", "0.525"]
