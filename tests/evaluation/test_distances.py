"""Distances between sets of features: against torch-fidelity, clean-fid and torchmetrics on the same features, brute
force, and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference_metrics as reference
import torch
from torch import Tensor

from darkroom.evaluation import distances
from darkroom.evaluation.distances import (
    NeighbourSearch,
    density_coverage,
    frechet,
    inception_score,
    kernel_distance,
    nearest_neighbours,
    neighbour_radii,
    precision_recall,
    unbiased_mmd,
)
from darkroom.evaluation.metrics import Moments

SAME = 1e-4  # what independent implementations may differ by, relatively


def features(count: int, width: int = 24, seed: int = 0, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    """Positive and correlated, as those behind a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5
    normal = torch.randn(count, width, generator=generator) * scale
    return torch.relu(normal @ mixing + 0.5 + shift).float()


@pytest.fixture(scope="module")
def sets() -> tuple[Tensor, Tensor]:
    return features(300), features(220, seed=1, shift=0.15, scale=1.1)


def moments(samples: Tensor, batch: int = 64) -> Moments:
    result = Moments(samples.shape[1])
    for rows in samples.split(batch):
        result.update(rows)
    return result


# ------------------------------------------------------------------------------------------------------------- Frechet


def test_frechet_equals_torch_fidelity_and_torchmetrics(sets: tuple[Tensor, Tensor]) -> None:
    real, generated = sets
    ours = frechet(moments(real), moments(generated))
    statistics = [reference.fidelity_fid.fid_features_to_statistics(x.double()) for x in sets]
    fidelity = reference.fidelity_fid.fid_statistics_to_metric(*statistics, verbose=False)
    assert ours == pytest.approx(fidelity["frechet_inception_distance"], rel=SAME)
    torchmetrics = reference.metrics_fid._compute_fid(*_mean_cov(real), *_mean_cov(generated))
    assert ours == pytest.approx(float(torchmetrics), rel=SAME)


def _mean_cov(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.double().mean(0), torch.cov(x.double().T)


def test_frechet_equals_clean_fid(sets: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    # SciPy no longer takes the argument by which clean-fid asks for an error estimate that it does not use.
    plain = reference.clean.linalg.sqrtm
    monkeypatch.setattr(reference.clean.linalg, "sqrtm", lambda matrix, disp=True: (plain(matrix), 0.0))
    expected = reference.clean.fid_from_feats(*(x.double().numpy() for x in sets))
    assert frechet(*map(moments, sets)) == pytest.approx(expected, rel=SAME)


def test_frechet_of_two_gaussians_and_of_one_set() -> None:
    """Axis-aligned normal distributions: |m - m'|^2 + sum (s - s')^2."""
    normal = torch.randn(4000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    normal = (normal - normal.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(normal.T))).T  # exactly white
    one, other = normal * torch.tensor([1.0, 2.0, 0.5]), normal * torch.tensor([2.0, 2.0, 1.5]) + 1.0
    assert frechet(moments(one), moments(other)) == pytest.approx(3.0 + 1.0 + 1.0, rel=1e-9)
    assert frechet(moments(one), moments(one)) == pytest.approx(0.0, abs=1e-9)


# ------------------------------------------------------------------------------------------------------------- kernels


def test_kernel_distance_equals_three_libraries(sets: tuple[Tensor, Tensor]) -> None:
    """Of sets of one size in one subset, so that there is nothing to draw."""
    real, generated = sets[0][:200].double(), sets[1][:200].double()
    ours = kernel_distance(real, generated, subsets=1, subset_size=200)
    options = {"kid_subsets": 1, "kid_subset_size": 200, "rng_seed": 0, "verbose": False}
    fidelity = reference.fidelity_kid.kid_features_to_metric(real, generated, **options)
    assert ours.mean == pytest.approx(fidelity["kernel_inception_distance_mean"], rel=SAME)
    assert ours.mean == pytest.approx(float(reference.metrics_kid.poly_mmd(real, generated)), rel=SAME)
    clean = reference.clean.kernel_distance(real.numpy(), generated.numpy(), num_subsets=1, max_subset_size=200)
    assert ours.mean == pytest.approx(clean, rel=SAME)
    assert ours.std == 0.0


def test_kernel_distance_over_subsets(sets: tuple[Tensor, Tensor]) -> None:
    ours = kernel_distance(*sets, subsets=200, subset_size=50, seed=3)
    assert ours == kernel_distance(*sets, subsets=200, subset_size=50, seed=3)
    assert ours != kernel_distance(*sets, subsets=200, subset_size=50, seed=4)
    options = {"kid_subsets": 200, "kid_subset_size": 50, "rng_seed": 0, "verbose": False}
    fidelity = reference.fidelity_kid.kid_features_to_metric(*(x.double() for x in sets), **options)
    error = 4 * ours.std * math.sqrt(2 / 200)  # other subsets are drawn there
    assert ours.mean == pytest.approx(fidelity["kernel_inception_distance_mean"], abs=error)
    assert ours.std == pytest.approx(fidelity["kernel_inception_distance_std"], rel=0.3)
    # No subset is larger than the smaller set.
    assert kernel_distance(sets[0], sets[1][:40], subsets=5).std > 0


def test_mmd_by_its_definition_and_between_equal_distributions() -> None:
    x, y = features(7, 4).double(), features(5, 4, seed=1).double()

    def kernel(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / 4 + 1) ** 3

    def within(z: Tensor) -> float:
        pairs = [kernel(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j]
        return sum(pairs) / len(pairs)

    across = sum(kernel(a, b) for a in x for b in y) / 35
    assert unbiased_mmd(x, y) == pytest.approx(within(x) + within(y) - 2 * across, rel=1e-12)
    # Unbiased: of samples of one distribution it is zero in the mean, and as often negative.
    found = [unbiased_mmd(features(40, seed=2 * i), features(40, seed=2 * i + 1)) for i in range(60)]
    assert min(found) < 0 < max(found)
    assert abs(np.mean(found)) < 4 * np.std(found) / math.sqrt(len(found))


@pytest.mark.parametrize("sizes", [(1, 10), (10, 1)])
def test_kernel_distance_needs_two_samples(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="needs 2 samples"):
        kernel_distance(features(sizes[0]), features(sizes[1]))


# ------------------------------------------------------------------------------------------------------ Inception score


@pytest.mark.parametrize("splits", [1, 7])
def test_inception_score_equals_torch_fidelity(splits: int) -> None:
    logits = torch.randn(100, 12, generator=torch.Generator().manual_seed(0)) * 2
    expected = reference.fidelity_isc.isc_features_to_metric(logits, splits=splits, shuffle=False)
    ours = inception_score(logits.softmax(1), splits=splits, seed=None)
    assert ours.mean == pytest.approx(expected["inception_score_mean"], rel=SAME)
    assert ours.std == pytest.approx(expected["inception_score_std"], rel=SAME, abs=1e-12)


def test_inception_score_of_known_probabilities() -> None:
    sure = torch.eye(8).repeat(10, 1)  # every class as often, each without doubt
    assert inception_score(sure, splits=1).mean == pytest.approx(8.0)
    assert inception_score(torch.full((20, 8), 1 / 8), splits=4) == pytest.approx((1.0, 0.0))
    by_class = torch.eye(8).repeat_interleave(10, 0)  # class by class: parts of one class say nothing
    assert inception_score(by_class, splits=8, seed=None).mean == pytest.approx(1.0)
    assert inception_score(by_class, splits=8, seed=0).mean > 3.0
    with pytest.raises(ValueError, match="9 splits"):
        inception_score(sure[:8], splits=9)


# ---------------------------------------------------------------------------------------------------------- neighbours


@pytest.fixture(params=[None, 600])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything at once, and a few rows and columns at a time."""
    if request.param is not None:
        for name, value in (("BLOCK", request.param), ("LEAST", 1), ("COLUMNS", 37)):
            monkeypatch.setattr(distances, name, value)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("save_memory", [False, True])
def test_precision_recall_equal_torch_fidelity(sets: tuple[Tensor, Tensor], k: int, save_memory: bool) -> None:
    real, generated = sets
    options = {"prc_neighborhood": k, "prc_batch_size": 64, "save_cpu_ram": save_memory, "verbose": False}
    expected = reference.fidelity_prc.prc_features_to_metric(generated.double(), real.double(), **options)
    ours = precision_recall(real, generated, k=k)
    assert ours == pytest.approx((expected["precision"], expected["recall"]), rel=SAME)
    assert 0 < ours.precision < 1 and 0 < ours.recall < 1  # or nothing has been compared


@pytest.mark.usefixtures("block")
def test_density_coverage_by_brute_force(sets: tuple[Tensor, Tensor]) -> None:
    """The sums of Naeem et al. 2020, eq. 5 and 6, one sample at a time."""
    real, generated = (x.double().numpy() for x in sets)
    k = 5
    radii = np.array([np.sort(np.linalg.norm(real - x, axis=1))[k] for x in real])
    np.testing.assert_allclose(neighbour_radii(sets[0], k).numpy(), radii, rtol=1e-9)
    inside = np.array([[np.linalg.norm(y - x) < r for x, r in zip(real, radii, strict=True)] for y in generated])
    ours = density_coverage(*sets, k=k)
    assert ours.density == pytest.approx(inside.sum() / (k * len(generated)), rel=1e-12)
    assert ours.coverage == pytest.approx(inside.any(0).mean(), rel=1e-12)
    assert ours.density > 0.1 and 0.1 < ours.coverage < 1


@pytest.mark.usefixtures("block")
def test_sets_that_are_the_same_and_sets_that_lie_apart(sets: tuple[Tensor, Tensor]) -> None:
    real = sets[0]
    assert precision_recall(real, real.clone()) == (1.0, 1.0)
    assert precision_recall(real, real + 100.0) == (0.0, 0.0)
    # Each ball holds its centre and k - 1 neighbours, the k-th is on its edge: in the mean a sample lies inside of k.
    assert density_coverage(real, real.clone(), k=4) == (1.0, 1.0)
    assert density_coverage(real, real + 100.0) == (0.0, 0.0)


def test_copies_lie_at_distance_zero() -> None:
    """Every sample three times: the second neighbour of each is a copy, and the balls have no inside."""
    thrice = features(30).repeat(3, 1) + 1000.0
    assert float(neighbour_radii(thrice, 2).max()) == 0.0
    assert precision_recall(thrice, thrice, k=2) == (1.0, 1.0)
    assert density_coverage(thrice, thrice, k=2) == (0.0, 0.0)


def test_radii_need_enough_samples() -> None:
    with pytest.raises(ValueError, match="no 3-th neighbour"):
        precision_recall(features(3), features(10), k=3)
    with pytest.raises(ValueError, match="features of shapes"):
        precision_recall(features(9), features(9, width=5))


@pytest.mark.usefixtures("block")
def test_nearest_neighbours_by_brute_force(sets: tuple[Tensor, Tensor]) -> None:
    queries, samples = sets[1][:20], sets[0]
    expected = np.linalg.norm(queries.double().numpy()[:, None] - samples.double().numpy()[None], axis=2)
    found = nearest_neighbours(queries, samples, k=4)
    order = expected.argsort(1)[:, :4]
    assert found.number.tolist() == order.tolist()
    np.testing.assert_allclose(found.distance.numpy(), np.take_along_axis(expected, order, 1), rtol=1e-6)


@pytest.mark.usefixtures("block")
def test_a_stream_finds_what_the_whole_set_has(sets: tuple[Tensor, Tensor]) -> None:
    queries, samples = sets[1][:20], torch.cat([sets[0], sets[0]])  # twice, so that there are ties
    whole = nearest_neighbours(queries, samples, k=3)
    search = NeighbourSearch(queries, k=3)
    for batch in samples.split(37):
        search.update(batch)
    streamed = search.result()
    assert streamed.number.equal(whole.number) and streamed.distance.equal(whole.distance)
    assert bool((whole.number[:, 1] == whole.number[:, 0] + len(sets[0])).all())  # the copy comes second


def test_neighbours_of_too_few_samples() -> None:
    with pytest.raises(ValueError, match="2 samples have no 3"):
        nearest_neighbours(features(1), features(2), k=3)
