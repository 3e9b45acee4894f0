"""The directory of methods: plain data, importing nothing heavy. The classes are imported when they are asked for."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One published system: what changes, by whom it is chosen, and when."""

    slug: str
    path: str
    title: str
    year: int
    arxiv: str
    what: str
    by: str
    when: str
    task: str
    extra: str = ""

    @property
    def family(self) -> str:
        """The room that the method lives in: elastic, sparsity, routing, ..."""
        return self.path.split(".")[1]

    @property
    def name(self) -> str:
        """The class's name."""
        return self.path.partition(":")[2]

    def load(self) -> Any:
        """The method's class."""
        module, _, name = self.path.partition(":")
        return getattr(importlib.import_module(module), name)


METHODS = (
    Entry(
        slug="sortednet",
        path="pliant.elastic.sortednet:SortedNet",
        title="SortedNet: a scalable and generalized framework for training modular deep neural networks",
        year=2023,
        arxiv="2309.00255",
        what="width and depth of one set of weights",
        by="the caller's budget",
        when="per request or deployment",
        task="images",
    ),
    Entry(
        slug="bignas",
        path="pliant.elastic.bignas:BigNAS",
        title="BigNAS: scaling up neural architecture search with big single-stage models",
        year=2020,
        arxiv="2003.11142",
        what="resolution, width, depth, kernel size and expansion of one set of weights",
        by="a coarse-to-fine search under a cap of FLOPs or measured latency",
        when="per deployment",
        task="images",
    ),
    Entry(
        slug="proard",
        path="pliant.elastic.proard:ProARD",
        title="ProARD: progressive adversarial robustness distillation: provide wide range of robust students",
        year=2025,
        arxiv="2506.07666",
        what="width, depth, expansion and filter size of one adversarially robust set of weights",
        by="a search over predicted accuracy and robustness",
        when="per deployment",
        task="images",
        extra="search",
    ),
    Entry(
        slug="sn-net",
        path="pliant.elastic.stitching:StitchNet",
        title="Stitchable neural networks",
        year=2023,
        arxiv="2302.06586",
        what="the path: which of several networks, where it is left, where the next is entered",
        by="the caller's budget",
        when="per request or deployment",
        task="images",
    ),
    Entry(
        slug="self-expanding",
        path="pliant.elastic.self_expanding:SelfExpanding",
        title="Self-expanding neural networks (SENN), and self expanding convolutional neural networks (SECNN)",
        year=2024,
        arxiv="2401.05686",
        what="the number of units and layers, growing",
        by="the natural expansion score of candidate additions",
        when="during training",
        task="images",
    ),
    Entry(
        slug="rd-pruning",
        path="pliant.sparsity.rd_pruning:RDPruning",
        title="Efficient joint optimization of layer-adaptive weight pruning in deep neural networks",
        year=2023,
        arxiv="2308.10438",
        what="which weights are zero",
        by="dynamic programming over measured distortion curves",
        when="after training, once or in rounds",
        task="images",
    ),
    Entry(
        slug="dsnot",
        path="pliant.sparsity.dsnot:DSnoT",
        title="Dynamic sparse no training: training-free fine-tuning for sparse LLMs",
        year=2023,
        arxiv="2310.08915",
        what="which weights are zero, of language models above all",
        by="the expected error of each output row",
        when="after training, once, without gradients",
        task="language",
        extra="language",
    ),
    Entry(
        slug="dsl",
        path="pliant.sparsity.sparse_learning:SparseLearning",
        title="Dynamic sparse learning: a novel paradigm for efficient recommendation",
        year=2024,
        arxiv="2402.02855",
        what="which entries of weights and embedding tables exist, within a fixed budget",
        by="magnitude (drop) and gradient (grow)",
        when="during training, every so many steps",
        task="recommendation",
    ),
    Entry(
        slug="ftwt",
        path="pliant.sparsity.ftwt:FTWT",
        title="Fire together wire together: a dynamic pruning approach with self-supervised mask prediction",
        year=2021,
        arxiv="2110.08232",
        what="which filters of each convolution are computed",
        by="a linear head before each layer, trained on labels that the network makes itself",
        when="per input",
        task="images",
    ),
    Entry(
        slug="consensus-subnetwork",
        path="pliant.sparsity.consensus:Consensus",
        title="Learning a consensus sub-network with polarization regularization and one pass training",
        year=2023,
        arxiv="2302.10798",
        what="which residual branches or channels exist",
        by="binary gates that a regulariser makes agree about all inputs",
        when="during one training; a plain network afterwards",
        task="images",
    ),
    Entry(
        slug="structured-pruning-adapters",
        path="pliant.sparsity.pruning_adapters:PruningAdapters",
        title="Structured pruning adapters (SPLoRA, SPPaRA, SPLoPA)",
        year=2022,
        arxiv="2211.10155",
        what="for each task a low-rank change of frozen weights, and the channels or blocks that are left",
        by="gradient descent, and a structured pruning score",
        when="while adapting to a task; fused and cut afterwards",
        task="images",
    ),
    Entry(
        slug="jei-dnn",
        path="pliant.routing.jei_dnn:JEIDNN",
        title="Jointly-learned exit and inference for a dynamic neural network",
        year=2023,
        arxiv="2310.09163",
        what="the number of blocks that run",
        by="a learned gate at each exit",
        when="per input",
        task="images",
    ),
    Entry(
        slug="code-completion-exit",
        path="pliant.routing.stop_exit:StopExit",
        title="When neural code completion models size up the situation: cheaper and faster completion through dynamic "
        "model inference",
        year=2024,
        arxiv="2401.09964",
        what="depth of each generated token, and the length of the completion",
        by="one linear controller shared by all blocks, with two thresholds",
        when="per token",
        task="language",
        extra="language",
    ),
    Entry(
        slug="duo-llm",
        path="pliant.routing.duo_llm:DuoLLM",
        title="Duo-LLM: a framework for studying adaptive computation in large language models",
        year=2024,
        arxiv="2410.10846",
        what="a big, a small or no feed-forward network",
        by="random paths, an oracle, learned routers",
        when="per token and layer",
        task="language",
        extra="language",
    ),
    Entry(
        slug="dynamic-dino",
        path="pliant.routing.dynamic_dino:DynamicDINO",
        title="Dynamic-DINO: fine-grained mixture of experts tuning for real-time open-vocabulary object detection",
        year=2025,
        arxiv="2507.17436",
        what="which slices of a trained feed-forward network process a token",
        by="a router that starts so that nothing changes",
        when="per token",
        task="detection",
    ),
    Entry(
        slug="alf-lb",
        path="pliant.routing.loss_free_balancing:LossFreeBalancer",
        title="A theoretical framework for auxiliary-loss-free load balancing of sparse mixture-of-experts",
        year=2025,
        arxiv="2512.03915",
        what="which experts a token uses",
        by="router scores and prices of the experts, which follow the measured load",
        when="per token; prices once per optimiser step in training",
        task="language",
    ),
    Entry(
        slug="weight-compander",
        path="pliant.weights.weight_compander:WeightCompander",
        title="Weight Compander: a simple weight reparameterization for regularization",
        year=2023,
        arxiv="2306.16993",
        what="the map from stored to used weights",
        by="gradient descent",
        when="during training; merged away afterwards",
        task="images",
    ),
)


def find(slug: str) -> Entry:
    """The entry of ``slug``.

    Raises:
        ValueError: there is none; the message names those that there are.
    """
    for entry in METHODS:
        if entry.slug == slug:
            return entry
    raise ValueError(f"method: unknown {slug!r}; allowed: {', '.join(e.slug for e in METHODS)}")
