"""Twenty steps through the kernels are twenty steps through SDPA, or with dropout through plain PyTorch: losses and gradients, in fp32."""

from __future__ import annotations

import pytest
from training import STEPS, config_of, distance, train


@pytest.mark.parametrize(("family", "dropout"), [("gpt", 0.0), pytest.param("bert", 0.0, marks=pytest.mark.long), ("bert", 0.2)])
def test_training_through_the_kernels_is_training_through_pytorch(family: str, dropout: float) -> None:
    config = config_of(family, sequence=40, width=32, heads=2, layers=1, samples=1, dropout=dropout)  # more rows than one tile has
    (ours, our_gradients), (theirs, their_gradients) = (train(config, fused=fused) for fused in (True, False))
    assert theirs[-1] < 0.9 * theirs[0], "nothing was learned"
    assert ours == pytest.approx(theirs, rel=1e-5)
    for step in range(STEPS):
        assert distance(our_gradients[step : step + 1], their_gradients[step : step + 1]) < 1e-4, f"step {step}"
