"""`attend` and `rotate` over packed documents: each document is computed as if it were alone."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from megalite_kernels import draws

from megalite.models.attention import attend, rotate

ENDS = [0, 5, 6, 14, 20]
DOCUMENTS = torch.repeat_interleave(torch.arange(4), torch.tensor(ENDS).diff())[None].expand(2, -1)
POSITIONS = torch.cat([torch.arange(b - a) for a, b in pairwise(ENDS)])[None].expand(2, -1)


@pytest.mark.parametrize("causal", [False, True])
def test_documents_do_not_see_each_other(causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 20, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    together = attend(rotate(q, 1e4, POSITIONS), rotate(k, 1e4, POSITIONS), v, causal=causal, documents=DOCUMENTS)
    for a, b in pairwise(ENDS):
        part = [t[:, a:b] for t in (q, k, v)]
        alone = attend(rotate(part[0], 1e4), rotate(part[1], 1e4), part[2], causal=causal)
        torch.testing.assert_close(together[:, a:b], alone)


@pytest.mark.parametrize("causal", [False, True])
def test_dropout_keeps_documents_apart_too(causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 20, 4, 8, dtype=torch.float64) for _ in range(3))
    drawn = draws(torch.arange(2), torch.arange(4), 20, site=1)
    together = attend(q, k, v, causal=causal, documents=DOCUMENTS, dropout=(0.3, drawn))
    assert not torch.allclose(together, attend(q, k, v, causal=causal, documents=DOCUMENTS))
    for a, b in pairwise(ENDS):
        part = [t[:, a:b] for t in (q, k, v)]
        alone = attend(*part, causal=causal, dropout=(0.3, type(drawn)(*(side[..., a:b] for side in drawn))))
        torch.testing.assert_close(together[:, a:b], alone, rtol=0, atol=6e-7)  # the softmax is in fp32: five roundings of numbers up to 2


def test_positions_in_order_change_nothing() -> None:
    x = torch.randn(2, 20, 4, 8)
    assert torch.equal(rotate(x, 1e4), rotate(x, 1e4, torch.arange(20).expand(2, -1)))
