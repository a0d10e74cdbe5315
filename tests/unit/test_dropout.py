"""Dropout's masks: a function of seed, step, sample, place, site and feature, and by all measures as good as drawn."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megalite_kernels.dropout import draws, drop  # pyright: ignore[reportMissingImports]
from megalite_kernels.randomness import kept, streams  # pyright: ignore[reportMissingImports]

from megalite import models
from megalite.config import Model
from megalite.models.dropout import Dropout, name_sites, sample_keys

ROWS = streams(sample_keys(torch.arange(64), seed=1, step=0)[:, None], torch.arange(64), site=3)  # (64, 64)


def _dropped(seeds: torch.Tensor, rate: float, width: int = 512) -> torch.Tensor:
    return drop(torch.ones(*seeds.shape, width), seeds, round(rate * 65536)) == 0


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped_is_the_rate(rate: float) -> None:
    found = _dropped(ROWS, rate).double().mean().item()
    assert abs(found - rate) <= 4 * math.sqrt(rate * (1 - rate) / (64 * 64 * 512)) + 2**-17


def test_the_mean_is_kept_and_what_stays_is_scaled_alike() -> None:
    x = drop(torch.ones(64, 64, 512), ROWS, round(0.3 * 65536))
    assert x.unique().numel() == 2 and x.mean().item() == pytest.approx(1, abs=3e-3)


@pytest.mark.parametrize(("dim", "shift"), [(0, 1), (1, 1), (1, 7), (2, 1), (2, 4), (2, 64)])
def test_neighbours_are_dropped_independently(dim: int, shift: int) -> None:
    dropped = _dropped(ROWS, 0.5).double() - 0.5
    together = (dropped * dropped.roll(shift, dims=dim)).mean().item() / 0.25
    assert abs(together) < 4 / math.sqrt(dropped.numel())


def test_seeds_steps_samples_places_and_sites_have_masks_of_their_own() -> None:
    def mask(seed: int = 1, step: int = 0, sample: int = 0, place: int = 0, site: int = 0) -> torch.Tensor:
        key = sample_keys(torch.tensor([sample]), seed=seed, step=step)
        return _dropped(streams(key, torch.tensor([place]), site=site), 0.5, 4096)

    masks = [mask(), mask(seed=2), mask(step=1), mask(sample=1), mask(place=1), mask(site=1)]
    for number, one in enumerate(masks):
        for other in masks[:number]:
            assert abs((one == other).double().mean().item() - 0.5) < 0.05


@given(st.integers(1, 9), st.integers(0, 3))
def test_a_part_of_the_rows_or_features_is_dropped_as_in_the_whole(width: int, first: int) -> None:
    seeds = ROWS[:2, :5]
    whole = _dropped(seeds, 0.5, 16)
    assert torch.equal(_dropped(seeds[:, first:], 0.5, 16), whole[:, first:])
    assert torch.equal(_dropped(seeds, 0.5, width), whole[..., :width])


def test_a_validation_drops_nothing_and_a_training_step_does() -> None:
    layer, x = Dropout(0.5), torch.ones(2, 3, 8)
    assert torch.equal(layer(x, {}), x)
    keys = {"samples": torch.tensor([1, 2])}
    assert (layer(x, keys) == 0).any()
    assert torch.equal(layer(x, {}, 3 * x), 4 * x)
    assert torch.equal(layer(x, keys, 3 * x), layer(x, keys) + 3 * x)


def test_every_site_of_a_model_has_a_number_of_its_own() -> None:
    model = Model(layers=3, width=16, heads=2, vocab=11, sequence=8, dropout=0.1, attention_dropout=0.1)
    sites = [module.site for module in models.build(model, seed=1).modules() if hasattr(module, "site")]
    assert len(sites) == 1 + 3 * 3 == len(set(sites)) and 0 not in sites


def test_a_site_is_called_alike_in_the_whole_model_and_in_a_layer_alone() -> None:
    model = Model(layers=2, width=16, heads=2, vocab=11, sequence=8)
    whole, (name, make) = models.build(model, seed=1), models.layers(model)[2]
    alone = make()
    name_sites(alone, name)
    assert alone.mlp_dropout.site == whole.get_submodule(name).mlp_dropout.site  # type: ignore[union-attr]


def _attention(samples: torch.Tensor, heads: torch.Tensor, *, length: int = 96, site: int = 3, rate: float = 0.3) -> torch.Tensor:
    """1 where a weight is dropped, (b, h, s, s)."""
    return 1 - kept(draws(samples, heads, length, site=site), dropout_p=rate).double()


def test_attention_drops_evenly_and_independently() -> None:
    """Rates, neighbours along every dim, rows against keys, and four weights of two rows and two keys, within five standard deviations."""
    rate, dropped = 0.3, _attention(sample_keys(torch.arange(8), seed=1, step=0), torch.arange(6))
    z = (dropped - rate) / math.sqrt(rate * (1 - rate))
    assert abs(z.mean()) < 5 / math.sqrt(z.numel())
    for dim in range(4):
        pairs = z.narrow(dim, 1, z.shape[dim] - 1) * z.narrow(dim, 0, z.shape[dim] - 1)
        assert abs(pairs.mean()) < 5 / math.sqrt(pairs.numel()), f"neighbours along {dim}"
    mirrored = z * z.transpose(2, 3)
    assert abs(mirrored[..., ~torch.eye(96, dtype=torch.bool)].mean()) < 5 * math.sqrt(2 / z.numel()), "rows draw what keys draw"
    corners = z[:, :, 1:, 1:] * z[:, :, :-1, 1:] * z[:, :, 1:, :-1] * z[:, :, :-1, :-1]
    assert abs(corners.mean()) < 5 / math.sqrt(corners.numel())


def test_heads_and_a_longer_sequence_draw_as_in_the_whole_and_sites_and_samples_of_their_own() -> None:
    samples = sample_keys(torch.arange(3), seed=1, step=0)
    whole = _attention(samples, torch.arange(8))
    assert torch.equal(_attention(samples[1:], torch.arange(4, 6)), whole[1:, 4:6])
    assert torch.equal(_attention(samples, torch.arange(8), length=40), whole[:, :, :40, :40])
    for other in (_attention(samples, torch.arange(8), site=4), _attention(samples.roll(1), torch.arange(8))):
        assert abs(float((other * whole).mean()) - 0.3**2) < 0.005
