"""Properties of the theory's estimators under many random inputs, bad inputs, and beside rivals."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxnb.stats.intrinsic_entropy import (
    kde_entropy,
    kozachenko_leonenko_entropy,
    levina_bickel_dimension,
    neighbour_distances,
    scott_bandwidth,
    two_nn_dimension,
)
from ctxnb.stats.sources import HiddenMarkovSource, MarkovSource, bayes_risk
from ctxnb.stats.spectrum import (
    PUBLISHED_THRESHOLDS,
    StreamingCovariance,
    dimension_by_threshold,
    eigenvalue_spectrum,
    gaussian_entropy,
    log_eigenvalue_sum,
    oas_weight,
    participation_ratio,
)
from ctxnb.theory.approximation import fit_exponent
from ctxnb.theory.decomposition import approximation_loss, count_model, cross_entropy

ROOT = Path(__file__).resolve().parents[1]
seeds = st.integers(0, 2**32 - 1)
modest = settings(max_examples=40, deadline=None)


def features_of(seed, n=60, d=4):
    """Correlated features with a mean, without coincidences."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


def accumulate(features):
    return StreamingCovariance(features.shape[1]).update(features)


def assert_same(a, b):
    # round-off of sums of a few hundred terms, relative to the largest entry
    tolerance = 1e-11 * max(float(a.scatter.abs().max()), 1e-300)
    assert a.count == b.count
    torch.testing.assert_close(a.scatter, b.scatter, rtol=0, atol=tolerance)
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-10, atol=1e-10)


# ---- streaming covariance -------------------------------------------------------------------------


@modest
@given(seeds, st.lists(st.integers(0, 40), min_size=2, max_size=6), st.sampled_from([1e-6, 1.0, 1e6]))
def test_any_split_and_any_order_of_merging_gives_the_same_covariance(seed, lengths, scale):
    rng = np.random.default_rng(seed)
    lengths = [*lengths, 2]
    x = scale * (rng.normal(size=(sum(lengths), 3)) + 5)
    parts = np.split(x, np.cumsum(lengths)[:-1])
    whole = accumulate(x)
    left, right = StreamingCovariance(3), StreamingCovariance(3)
    for part in parts:  # ((a b) c) d
        left.merge(accumulate(part))
    for part in reversed(parts):  # a (b (c d)), and in the other order
        right = accumulate(part).merge(right)
    streamed = StreamingCovariance(3, chunk_rows=7)
    for part in parts:
        streamed.update(part)
    for other in (left, right, streamed):
        assert_same(whole, other)
    np.testing.assert_allclose(whole.covariance().numpy(), np.cov(x.T), rtol=0, atol=1e-11 * scale**2 * 10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_floating_type_is_summed_in_float64(dtype):
    x = torch.randn(500, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    covariance = StreamingCovariance(5).update(x).covariance()
    assert covariance.dtype == torch.float64
    np.testing.assert_allclose(covariance.numpy(), np.cov(x.double().numpy().T), rtol=0, atol=1e-13)


def test_updating_leaves_the_features_alone():
    x = torch.ones(4, 2, dtype=torch.float64) * torch.arange(4)[:, None]
    before = x.clone()
    StreamingCovariance(2).update(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_value_adds_nothing(bad):
    x = np.zeros((600, 2))
    x[550, 1] = bad  # in the third chunk
    accumulator = StreamingCovariance(2)
    with pytest.raises(ValueError, match="row 550"):
        accumulator.update(x)
    assert accumulator.count == 0 and not accumulator.scatter.any()


@pytest.mark.gpu
def test_devices_agree():
    x = torch.as_tensor(features_of(0, 500, 20))
    on_gpu = StreamingCovariance(20, "cuda").update(x)
    np.testing.assert_allclose(on_gpu.eigenvalues(), eigenvalue_spectrum(x), rtol=1e-10)
    assert_same(StreamingCovariance(20).merge(on_gpu), accumulate(x))


def test_too_little_or_ill_shaped_input_is_named():
    with pytest.raises(ValueError, match="at least 2 samples, got 0"):
        StreamingCovariance(3).eigenvalues()
    with pytest.raises(ValueError, match=r"shape \[batch, 3\], got \(3,\)"):
        StreamingCovariance(3).update(np.zeros(3))
    with pytest.raises(ValueError, match="3 features, got 4"):
        StreamingCovariance(3).merge(StreamingCovariance(4))
    with pytest.raises(ValueError, match="n_features"):
        StreamingCovariance(2.5)


# ---- functions of the spectrum --------------------------------------------------------------------


@modest
@given(seeds, st.floats(1e-3, 1e3))
def test_spectrum_and_entropy_under_rotation_shift_and_scale(seed, scale):
    x = features_of(seed)
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(4, 4)))[0]
    values, moved = eigenvalue_spectrum(x), eigenvalue_spectrum(scale * x @ turn + 3)
    np.testing.assert_allclose(moved, scale**2 * values, rtol=1e-7, atol=1e-9 * scale**2 * values[0] + 1e-13)
    for correction in ("none", "wishart", "oas"):
        shift = gaussian_entropy(scale**2 * values, 60, correction) - gaussian_entropy(values, 60, correction)
        assert shift == pytest.approx(4 * np.log(scale), abs=1e-9)
    assert participation_ratio(scale * values) == pytest.approx(participation_ratio(values))
    assert (dimension_by_threshold(4.0 * values) == dimension_by_threshold(values)).all()


@modest
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=30))
def test_dimensions_are_ordered_and_bounded(values):
    counts = dimension_by_threshold(values)
    assert len(counts) == len(PUBLISHED_THRESHOLDS)
    assert (np.diff(counts) <= 0).all() and counts.min() >= 1 and counts.max() <= len(values)
    assert 1 - 1e-9 <= participation_ratio(values) <= len(values) + 1e-9
    sums = log_eigenvalue_sum(values, range(1, len(values) + 1))
    assert sums[0] == 0 and (np.diff(sums) <= 0).all()
    assert 0 <= oas_weight(values, 10) <= 1


@pytest.mark.parametrize(
    "values, message",
    [
        ([0.0, 0.0], "constant"),
        ([1.0, -1.0], ">= 0"),
        ([np.nan], "finite"),
        ([], "one-dimensional"),
        ([[1.0]], "one-dimensional"),
    ],
)
@pytest.mark.parametrize(
    "function",
    [participation_ratio, dimension_by_threshold, gaussian_entropy, lambda v: log_eigenvalue_sum(v, 1)],
)
def test_bad_spectra_are_refused(function, values, message):
    with pytest.raises(ValueError, match=message):
        function(values)


# ---- neighbour and kernel estimators --------------------------------------------------------------


@modest
@given(seeds, st.floats(0.01, 100))
def test_neighbour_estimators_under_rotation_shift_and_scale(seed, scale):
    x = features_of(seed)
    moved = scale * x @ np.linalg.qr(np.random.default_rng(seed).normal(size=(4, 4)))[0] + 1
    np.testing.assert_allclose(neighbour_distances(moved, 3), scale * neighbour_distances(x, 3), rtol=1e-6)
    for dimension in (two_nn_dimension, levina_bickel_dimension):
        assert dimension(moved) == pytest.approx(dimension(x), rel=1e-5)
    shift = 4 * np.log(scale)
    assert kozachenko_leonenko_entropy(moved) - kozachenko_leonenko_entropy(x) == pytest.approx(
        shift, abs=1e-5
    )


@modest
@given(seeds)
def test_kde_entropy_under_any_invertible_map(seed):
    rng = np.random.default_rng(seed)
    x, map_ = rng.normal(size=(60, 3)), np.linalg.qr(rng.normal(size=(3, 3)))[0] * [0.1, 1.0, 7.0]
    for leave_one_out in (True, False):
        shift = kde_entropy(x @ map_, leave_one_out=leave_one_out) - kde_entropy(
            x, leave_one_out=leave_one_out
        )
        assert shift == pytest.approx(np.log(0.7), abs=1e-8)


@modest
@given(seeds)
def test_distances_are_those_of_brute_force(seed):
    x = features_of(seed, 40)
    brute = np.sort(np.linalg.norm(x[:, None] - x, axis=2), axis=1)[:, 1:6]
    np.testing.assert_allclose(neighbour_distances(x, 5), brute, rtol=1e-9)


def test_resubstitution_is_the_log_determinant_in_high_dimension():
    n, d = 400, 120
    gaps = []
    for seed in range(3):
        x = np.random.default_rng(seed).laplace(size=(n, d)) * np.linspace(0.1, 3 + seed, d)
        gaps.append(kde_entropy(x, leave_one_out=False) - np.linalg.slogdet(np.cov(x.T))[1] / 2)
    constant = d / 2 * np.log(2 * np.pi) + d * np.log(scott_bandwidth(n, d)) + np.log(n)
    np.testing.assert_allclose(gaps, constant, rtol=0, atol=1e-8)


NEIGHBOUR = [
    lambda x: neighbour_distances(x, 1),
    two_nn_dimension,
    lambda x: levina_bickel_dimension(x, 2),
    lambda x: kozachenko_leonenko_entropy(x, 1),
]


@pytest.mark.parametrize("estimator", [*NEIGHBOUR, kde_entropy])
def test_degenerate_features_are_refused(estimator):
    good = features_of(1, 20)
    broken = good.copy()
    broken[3, 1] = np.nan
    with pytest.raises(ValueError, match="finite.*row 3"):
        estimator(broken)
    with pytest.raises(ValueError, match="at least"):
        estimator(good[:1])
    with pytest.raises(ValueError, match="constant"):
        estimator(np.ones((20, 4)))
    with pytest.raises(ValueError, match="shape"):
        estimator(good[0])


@pytest.mark.parametrize("estimator", NEIGHBOUR)
def test_coinciding_samples_are_refused(estimator):
    x = features_of(2, 20)
    with pytest.raises(ValueError, match="2 of 21 samples coincide"):
        estimator(np.vstack([x, x[:1]]))


@pytest.mark.parametrize(
    "estimator", [two_nn_dimension, levina_bickel_dimension, kozachenko_leonenko_entropy]
)
def test_dropping_copies_gives_the_estimate_without_them(estimator):
    x = features_of(3, 50)
    assert estimator(np.vstack([x, x[:9]]), duplicates="drop") == pytest.approx(estimator(x), rel=1e-12)


@pytest.mark.parametrize("k", [0, 20, 1.5])
def test_impossible_numbers_of_neighbours_are_refused(k):
    with pytest.raises(ValueError, match="n_neighbours"):
        kozachenko_leonenko_entropy(features_of(4, 20), k)


def test_torch_features_are_welcome():
    x = features_of(5)
    tensor = torch.tensor(x, requires_grad=True)
    assert two_nn_dimension(tensor) == two_nn_dimension(x)
    assert kde_entropy(tensor) == kde_entropy(x)


def test_dimensions_agree_with_scikit_dimension():
    """Values that scikit-dimension 0.5.0 gave for these features: TwoNN(discard, method="mle") and MLE with 20 neighbours."""
    x = features_of(6, 400, 5)
    assert two_nn_dimension(x, 0.0) == pytest.approx(3.841071928310755, rel=1e-8)  # the last digits of a product depend on the processor
    assert two_nn_dimension(x, 0.1) == pytest.approx(3.846066448676945, rel=1e-8)
    assert levina_bickel_dimension(x, 20) == pytest.approx(3.7344343403948352, rel=1e-8)


# ---- decomposition and approximation --------------------------------------------------------------


@modest
@given(seeds, st.integers(2, 3), st.integers(0, 3), st.integers(0, 4))
def test_decomposition_on_random_sources(seed, n_tokens, order, length):
    rng = np.random.default_rng(seed)
    markov = MarkovSource(rng.dirichlet(np.ones(n_tokens), size=n_tokens**order) * 0.98 + 0.02 / n_tokens)
    hidden = HiddenMarkovSource(
        rng.dirichlet(np.ones(3), size=3) * 0.98 + 0.02 / 3, rng.dirichlet(np.ones(n_tokens), size=3)
    )
    assert markov.order == order
    for source in (markov, hidden):
        joint = source.joint(length)
        assert joint.sum() == pytest.approx(1, abs=1e-12)
        model = count_model(source.sample(3, 40, 0), length, 4, n_tokens)
        total = bayes_risk(source, length) + approximation_loss(joint, model)
        assert cross_entropy(joint, model) == pytest.approx(total, abs=1e-10)
        assert approximation_loss(joint, model) >= 0
        assert bayes_risk(source, length + 1) <= bayes_risk(source, length) + 1e-12


def test_a_model_that_rules_out_what_happens_has_infinite_loss():
    assert cross_entropy(np.array([[0.5, 0.5]]), [[1.0, 0.0]]) == np.inf


def test_exponent_intervals_cover_the_truth_about_as_often_as_they_should():
    rng, sizes = np.random.default_rng(1), np.array([100, 1000, 10_000])
    inside = 0
    for _ in range(200):
        noise = np.exp(0.1 * rng.normal(size=(12, 3)))
        fit = fit_exponent(sizes, 2 * sizes**-0.4 * noise, n_resamples=500)
        inside += fit.low <= 0.4 <= fit.high
    assert 181 <= inside <= 198  # Student's intervals cover 95 %: 190 of 200, give or take 3


# ---- bench ----------------------------------------------------------------------------------------


def test_streaming_spectrum_stays_below_three_covariances():
    # fewer samples than the full bench, the same 2,000 features: the peak does not depend on the samples
    command = [
        sys.executable,
        str(ROOT / "bench" / "bench_spectrum.py"),
        "--samples",
        "1000",
        "--methods",
        "streaming",
        "--json",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["streaming"]["peak_over_covariance"] < 3
