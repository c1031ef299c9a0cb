"""mixup and CutMix: the equations, and that a batch and its blocks give the same bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nearkin.data.mixing import mix
from nearkin.errors import ConfigError

V, B, C, H, W, K = 2, 32, 3, 10, 12, 5


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(V, B, C, H, W, generator=generator)
    labels = torch.randint(K, (B,), generator=generator)
    return images, labels, torch.arange(100, 100 + B)


def mixed(batch, *, mixup=0.0, cutmix=0.0, seed=1, step=0, offset=0):
    return mix(*batch, classes=K, mixup=mixup, cutmix=cutmix, seed=seed, step=step, offset=offset)


def rows_of(batch, start, stop):
    images, labels, index = batch
    return images[:, start:stop], labels[start:stop], index[start:stop]


STRENGTHS = [{"mixup": 0.2}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}]


def shares(batch, out) -> torch.Tensor:
    """lam of each row, from the labels; where both labels are the same it cannot be told: nan."""
    _, labels, index = batch
    _, soft, pairs = out
    partners = pairs[:, 1] - index[0]
    own = soft.gather(1, labels[:, None])[:, 0]
    return torch.where(labels == labels[partners], torch.nan, own)


@pytest.mark.parametrize("strengths", STRENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_batch_mixes_as_its_blocks_do(batch, strengths, dtype):
    batch = (batch[0].to(dtype), *batch[1:])
    for step in range(6):
        whole = mixed(batch, step=step, **strengths)
        for size in (8, 16):
            for start in range(0, B, size):
                part = mixed(
                    rows_of(batch, start, start + size), step=step, offset=start, **strengths
                )
                assert torch.equal(part[0], whole[0][:, start : start + size])
                assert torch.equal(part[1], whole[1][start : start + size])
                assert torch.equal(part[2], whole[2][start : start + size])


@pytest.mark.parametrize("strengths", STRENGTHS)
def test_partners_are_others_of_the_same_block(batch, strengths):
    seen = set()
    for step in range(20):
        pairs = mixed(batch, step=step, **strengths)[2]
        assert torch.equal(pairs[:, 0], batch[2])
        own, partner = (pairs - 100).T
        assert torch.equal(own // 8, partner // 8)
        assert (own != partner).all()
        assert sorted(partner.tolist()) == list(range(B))  # everyone is a partner once
        seen |= set(((partner - own) % 8).tolist())
    assert seen == set(range(1, 8))


@pytest.mark.parametrize("strengths", STRENGTHS)
def test_labels_are_shares_that_sum_to_one(batch, strengths):
    _, labels, index = batch
    for step in range(5):
        out = mixed(batch, step=step, **strengths)
        partners = out[2][:, 1] - index[0]
        assert out[1].shape == (B, K)
        assert torch.allclose(out[1].sum(1), torch.ones(B), atol=1e-6)
        strange = out[1].clone()
        strange[torch.arange(B), labels] = 0
        strange[torch.arange(B), labels[partners]] = 0
        assert (strange == 0).all()


def test_mixup_is_the_weighted_sum_in_every_view(batch):
    out = mixed(batch, mixup=1.0)
    lam = shares(batch, out).double()
    known = ~lam.isnan()
    assert known.sum() > B / 2
    partners = out[2][:, 1] - 100
    images = batch[0].double()
    expected = (
        lam[:, None, None, None] * images + (1 - lam)[:, None, None, None] * images[:, partners]
    )
    assert (out[0].double() - expected)[:, known].abs().max() < 1e-6
    for block in lam.view(-1, 8):  # one lam per block
        told = block[~block.isnan()]
        assert (told == told[0]).all()
    assert len(set(lam[known].tolist())) > 1


def test_cutmix_shares_are_the_true_areas(batch):
    images = torch.arange(B, dtype=torch.float32)[None, :, None, None, None].expand(V, B, C, H, W)
    clipped = 0
    for step in range(30):
        out = mixed((images, *batch[1:]), cutmix=1.0, step=step)
        lam = shares(batch, out)
        for row in range(B):
            foreign = out[0][:, row] != row
            assert (foreign == foreign[0, 0]).all()  # the same box in all views and channels
            box = foreign[0, 0]
            partner = int(out[2][row, 1]) - 100
            assert (out[0][0, row, 0][box] == partner).all()
            area = box.float().mean()
            assert lam[row].isnan() or abs(lam[row] - (1 - area)) < 1e-6
            if box.any():
                lines, columns = (box.any(axis).nonzero()[:, 0] for axis in (1, 0))
                assert box.sum() == len(lines) * len(columns)  # a rectangle without holes
                assert lines.diff().eq(1).all()
                clipped += bool(lines[0] == 0)
    assert clipped > 0


def draws(strengths, steps=1500):
    """lam and whether a box was cut, for the first block of many steps."""
    images = torch.zeros(1, 8, 1, 40, 40)
    images[:, 0] = 1
    labels, index = torch.arange(8), torch.arange(8)
    found = []
    for step in range(steps):
        pixels, soft, _ = mix(
            images,
            labels,
            index,
            classes=8,
            **({"mixup": 0.0, "cutmix": 0.0} | strengths),
            seed=0,
            step=step,
            offset=0,
        )
        inner = pixels[0, 0].unique()
        found.append((float(soft[0, 0]), len(inner) > 1 or inner[0] in (0, 1)))
    return np.array(found)


def test_mixup_draws_from_the_beta_distribution():
    from scipy.stats import beta, kstest

    lam = draws({"mixup": 0.4})[:, 0]
    assert kstest(lam, beta(0.4, 0.4).cdf).pvalue > 1e-3


def test_one_of_both_for_each_step_in_equal_parts():
    cut = draws({"mixup": 1.0, "cutmix": 1.0}, steps=1000)[:, 1]
    assert abs(cut.mean() - 0.5) < 0.08  # five deviations


def test_of_both_each_has_its_own_strength():
    from scipy.stats import beta, kstest

    lam, cut = draws({"mixup": 0.2, "cutmix": 1.0}, steps=600).T
    assert kstest(lam[cut == 0], beta(0.2, 0.2).cdf).pvalue > 1e-3
    areas = box_areas(100_000)
    deviation = areas.std() / np.sqrt(cut.sum())
    assert (1 - lam[cut == 1]).mean() == pytest.approx(areas.mean(), abs=5 * deviation)


def box_areas(count, size=40):
    """Shares of the image in boxes of the share 1 - lam, clipped at its edges; lam is uniform. As in the paper's
    code."""
    rng = np.random.default_rng(0)
    half = (size * np.sqrt(1 - rng.random(count))).astype(int) // 2
    centres = rng.integers(size, size=(2, count))
    sides = np.clip(centres + half, 0, size) - np.clip(centres - half, 0, size)
    return sides.prod(0) / size**2


def test_steps_and_seeds_differ(batch):
    base = mixed(batch, mixup=1.0)
    assert not torch.equal(mixed(batch, mixup=1.0, step=1)[0], base[0])
    assert not torch.equal(mixed(batch, mixup=1.0, seed=2)[0], base[0])
    assert torch.equal(mixed(batch, mixup=1.0)[0], base[0])


def test_nothing_is_drawn_from_global_states_and_nothing_is_changed(batch):
    before, state = batch[0].clone(), torch.get_rng_state()
    numbers = np.random.get_state()[1].copy()  # noqa: NPY002 - the global state is meant
    mixed(batch, mixup=1.0, cutmix=1.0)
    assert torch.equal(batch[0], before)
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numbers).all()  # noqa: NPY002


def test_what_does_not_fit_is_refused(batch):
    for part, options in [
        (rows_of(batch, 0, 12), {"mixup": 1.0}),
        (batch, {"mixup": 1.0, "offset": 4}),
    ]:
        with pytest.raises(ConfigError, match="multiple of 8"):
            mixed(part, **options)
    with pytest.raises(ConfigError, match="above 0"):
        mixed(batch)
