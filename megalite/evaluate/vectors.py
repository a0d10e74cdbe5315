"""`megalite embed`: a vector for every text, and which texts are alike.

In: a checkpoint or Hugging Face model, rows of text.  Out: (n, d) fp32 as .npy, or .parquet with the texts; for a query the nearest rows by
cosine. A vector is the mean of the last hidden state over a text's tokens (Reimers and Gurevych 2019, arXiv:1908.10084), or that of
its first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import PositiveInt

from megalite.config import Section
from megalite.convert.memory import Loaded, load
from megalite.data.rows import Faults, read_rows
from megalite.errors import UserError


class Embedding(Section):
    model: tuple[str, ...] = ()
    """A checkpoint, a run folder, or a Hugging Face folder or name."""
    data: tuple[str, ...]
    """Texts: .txt (one a line), or rows of .tsv .csv .jsonl .parquet or hf:NAME."""
    column: str = "text"
    """Column that holds the text."""
    output: str | None = None
    """FILE.npy or FILE.parquet; left out: nothing is written, for a query alone."""
    pool: Literal["mean", "cls"] = "mean"
    """mean: over all tokens; cls: the first token of a BERT."""
    query: tuple[str, ...] = ()
    """Texts whose nearest neighbours are shown."""
    top: PositiveInt = 5
    """How many of them."""
    batch: PositiveInt = 32
    """Texts at once."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of weights and activations."""


def embed(request: Embedding, *, say: Callable[[str], None]) -> None:
    """Carry it out."""
    if len(request.model) != 1:
        raise UserError("megalite embed needs one model: megalite embed runs/NAME --data FILE --output vectors.npy")
    request.require(top="query")
    if request.output is None and not request.query:
        raise UserError("megalite embed needs --output FILE.npy or FILE.parquet, or --query TEXT")
    if request.output and not request.output.endswith((".npy", ".parquet")):
        raise UserError(f"--output {request.output} is neither .npy nor .parquet; name it so")
    texts = _texts(request)
    loaded = load(request.model[0], dtype=request.dtype)
    if request.pool == "cls" and loaded.family != "bert":
        raise UserError("--pool cls is a BERT's first token; a GPT's first token has seen nothing: use --pool mean")
    vectors = encode(loaded, texts, pool=request.pool, batch=request.batch)
    if request.output:
        _write(Path(request.output), texts, vectors)
        say(f"{len(texts):,} vectors of {vectors.shape[1]} numbers in {request.output}")
    for query, found in zip(request.query, search(encode(loaded, request.query, pool=request.pool), vectors, top=request.top), strict=True):
        say(query)
        for place, cosine in found:
            say(f"  {cosine:.3f}  {texts[place]}")


def _texts(request: Embedding) -> list[str]:
    found: list[str] = []
    for name in request.data:
        if name.endswith(".txt"):
            try:
                found += [line for line in Path(name).read_text("utf-8").splitlines() if line.strip()]
            except (OSError, UnicodeDecodeError) as problem:
                raise UserError(f"{name} cannot be read ({problem}); give UTF-8 text, one a line") from None
        else:
            found += [str(row.values[0]) for row in read_rows([name], [request.column], Faults(refuse=True))]
    if not found:
        raise UserError(f"{' '.join(request.data)} holds no text")
    return found


@torch.no_grad()
def encode(loaded: Loaded, texts: Sequence[str], *, pool: str, batch: int = 32) -> np.ndarray:
    """(n, d), fp32. Texts of like length go together; what is too long is cut."""
    special, tokens = loaded.tokenizer.special, [ids.tolist() for ids in loaded.tokenizer.encode_batch(list(texts))]
    if loaded.family == "bert":
        tokens = [[special["cls"], *ids[: loaded.longest - 2], special["sep"]] for ids in tokens]
    tokens = [ids[: loaded.longest] or [special.get("eos", 0)] for ids in tokens]
    order = sorted(range(len(tokens)), key=lambda place: len(tokens[place]))
    trunk = loaded.model.base_model
    vectors: list[Any] = [None] * len(tokens)
    for at in range(0, len(order), batch):
        places = order[at : at + batch]
        size = max(len(tokens[place]) for place in places)
        ids = torch.tensor([tokens[place] + [0] * (size - len(tokens[place])) for place in places], device=loaded.device)
        mask = torch.tensor([[1] * len(tokens[place]) + [0] * (size - len(tokens[place])) for place in places], device=loaded.device)
        hidden = trunk(ids, attention_mask=mask).last_hidden_state.float()  # (b, s, d)
        weights = mask[..., None].float()
        pooled = hidden[:, 0] if pool == "cls" else (hidden * weights).sum(1) / weights.sum(1)
        for place, vector in zip(places, pooled.cpu().numpy(), strict=True):
            vectors[place] = vector
    return np.stack(vectors).astype(np.float32) if vectors else np.empty((0, loaded.model.config.hidden_size), np.float32)


def search(queries: np.ndarray, vectors: np.ndarray, *, top: int) -> list[list[tuple[int, float]]]:
    """For every query the `top` rows whose cosine is largest, with it."""
    unit = [each / np.maximum(np.linalg.norm(each, axis=1, keepdims=True), 1e-12) for each in (queries, vectors)]
    cosines = unit[0] @ unit[1].T
    return [[(int(place), float(row[place])) for place in np.argsort(-row, kind="stable")[:top]] for row in cosines]


def _write(path: Path, texts: Sequence[str], vectors: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, vectors)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = pa.array(vectors.reshape(-1))
    pq.write_table(pa.table({"text": list(texts), "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])}), path)
