"""Where in what travels a gradient lies."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from megalite.parallel.buckets import _put_flat, _put_sharded


@given(num=st.integers(1, 5), shapes=st.lists(st.sampled_from([(1,), (7,), (3, 5), (4, 6), (2, 3, 2)]), min_size=1, max_size=4))
def test_every_rank_finds_its_part_of_each_weight_in_its_row(num: int, shapes: list[tuple[int, ...]]) -> None:
    gradients = [torch.rand(shape).transpose(0, -1) for shape in shapes]  # not every one is contiguous
    lengths = [-(-gradient.numel() // num) for gradient in gradients]
    width, before = sum(lengths), 0
    buffer = torch.zeros(num * width)
    for gradient, length in zip(gradients, lengths, strict=True):
        for _ in range(2):
            _put_sharded(width, range(before, before + length), buffer, gradient)
        padded = torch.cat([gradient.flatten(), torch.zeros(num * length - gradient.numel())])
        assert torch.equal(buffer.view(num, width)[:, before : before + length], 2 * padded.view(num, length))
        before += length
    assert before == width


def test_a_weight_lies_in_its_groups_buffer_as_in_its_own() -> None:
    buffer, gradient = torch.zeros(10), torch.arange(6.0).view(2, 3)
    _put_flat(3, gradient.shape, buffer, gradient)
    _put_flat(3, gradient.shape, buffer, gradient)
    assert buffer.tolist() == [0, 0, 0, 0, 2, 4, 6, 8, 10, 0]
