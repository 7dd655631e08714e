"""Properties of the fits, the optimal context and the planner, and the `advise` command."""
import json
import math

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ctxnb.cli import advise, best
from ctxnb.reports.tables import answers, headline, prob_best_grows, read_table
from ctxnb.stats.bootstrap import resample_means
from ctxnb.stats.curves import measured_curves
from ctxnb.stats.fitting import cells_of, check_runs, compare_laws, fit_joint, fit_law
from ctxnb.stats.laws import JOINT_LAWS, LAWS
from ctxnb.stats.solver import fit_curves, fit_reference
from ctxnb.theory.optimal_context import ContextLaw, critical_tokens, numeric_optimum, optimal_context
from ctxnb.theory.planner import Refusal, advise_from, fit_pilots, optimal_lengths, plan

LENGTHS = np.array([4.0, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192])
DIMENSION = np.array([1.2, 4.0, 60.0, 0.6, 0.2, 0.8])


def simulate_runs(form, parameters, noise, seed, seeds=3):
    """Pilot runs of a known law: 6 lengths, 5 sizes."""
    runs = pd.MultiIndex.from_product([(4, 8, 16, 32, 64, 128), (1e5, 3e5, 1e6, 3e6, 1e7), range(seeds)],
                                      names=["context_length", "train_tokens", "seed"]).to_frame(index=False)
    mean = JOINT_LAWS[form].evaluate(np.asarray(parameters, float), runs.context_length.to_numpy(float), runs.train_tokens.to_numpy(float))
    return runs.assign(loss=mean + noise * np.random.default_rng(seed).normal(size=len(runs)))


calm = settings(max_examples=40, deadline=None, derandomize=True, database=None,
                suppress_health_check=[HealthCheck.filter_too_much])


# --- fitting one curve ---------------------------------------------------------------------------------------------

SHAPES = {
    "power": (st.floats(0.1, 2.5),),
    "log": (),
    "exponential": (st.floats(4.0, 1000.0),),
    "stretched": (st.floats(4.0, 300.0), st.floats(0.3, 1.5)),
    "pure_power": (st.floats(0.02, 2.0),),
    "shifted_power": (st.floats(0.3, 1.5), st.floats(-3.0, 60.0)),
    "broken_power": (st.floats(0.05, 0.3), st.floats(0.6, 1.5), st.floats(20.0, 1000.0)),
}


@pytest.mark.parametrize("name", LAWS)
@calm
@given(data=st.data())
def test_noise_free_curves_come_back(name, data):
    form = LAWS[name]
    shape = [data.draw(s) for s in SHAPES[name]]
    gain, floor = data.draw(st.floats(0.5, 20.0)), data.draw(st.floats(0.2, 4.0))
    truth = np.array(([floor] if form.offset else []) + [gain] + shape)
    curve = form.evaluate(truth, LENGTHS)
    fit = fit_law(LENGTHS, curve, name)
    # 1e-6 relative; of the parameter's own size, or of the shortest length for the shift, which may be near zero
    size = np.where(np.array(form.names) == "s", np.maximum(np.abs(truth), LENGTHS[0]), np.abs(truth))
    assert np.all(np.abs(fit.parameters - truth) <= 1e-6 * size), fit.values
    assert fit.r2 > 1 - 1e-12


@calm
@given(scale=st.floats(0.1, 50.0), shift=st.floats(-5.0, 5.0), seed=st.integers(0, 10**6))
def test_units_of_the_loss_do_not_matter(scale, shift, seed):
    rng = np.random.default_rng(seed)
    curve = LAWS["power"].evaluate(np.array([1.9, 5.8, 0.53]), LENGTHS) + 0.02 * rng.normal(size=12)
    here, there = fit_law(LENGTHS, curve), fit_law(LENGTHS, scale * curve + shift)
    want = np.array([scale * here.values["C0"] + shift, scale * here.values["C"], here.values["gamma"]])
    assert np.allclose(there.parameters, want, rtol=1e-6, atol=1e-6 * scale)
    assert there.sigma == pytest.approx(scale * here.sigma, rel=1e-6)


@calm
@given(order=st.permutations(range(12)), factor=st.floats(0.2, 5.0))
def test_order_and_unit_of_length_do_not_matter(order, factor):
    rng = np.random.default_rng(5)
    documents = LAWS["power"].evaluate(np.array([1.9, 5.8, 0.53]), LENGTHS) + 0.1 * rng.normal(size=(30, 12))
    order = np.array(order)
    here, there = fit_law(LENGTHS, documents, resamples=0), fit_law(LENGTHS[order], documents[:, order], resamples=0)
    assert np.allclose(here.parameters, there.parameters, rtol=1e-6)
    moved = fit_law(factor * LENGTHS, documents, resamples=0)
    assert moved.values["gamma"] == pytest.approx(here.values["gamma"], rel=1e-6)
    assert moved.values["C"] == pytest.approx(here.values["C"] * factor ** here.values["gamma"], rel=1e-6)


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(gamma=st.floats(0.2, 1.5), noise=st.floats(1e-4, 0.02), below=st.sampled_from([0.0, 1.5, 2.2]), seed=st.integers(0, 10**6))
def test_the_two_solvers_agree(gamma, noise, below, seed):
    """With a floor that is not active, nearly, and active: the mask of the offset is the same in every step."""
    rng = np.random.default_rng(seed)
    form, x = LAWS["power"], (LENGTHS,)
    curve = form.evaluate(np.array([1.9 - below, 5.8, gamma]), LENGTHS) + noise * rng.standard_t(3, size=12)
    ours, value, converged = fit_curves(form, x, curve, floor=True, keep=8)
    theirs, other = fit_reference(form, x, curve, floor=True)
    assert converged.all() and ours[0, 0] >= 0
    assert value[0] == pytest.approx(other, rel=1e-6)
    assert np.allclose(ours[0], theirs, rtol=1e-5, atol=1e-9)


def test_an_active_floor_reaches_the_minimum():
    """The losses at l = 4 on prose, against data: a free offset wants to be negative, and the exponent must be solved without one."""
    sizes, losses = np.array([16e3, 50e3, 160e3, 512e3]), np.array([2.166, 1.969, 1.827, 1.648])
    found, value, _ = fit_curves(LAWS["power"], (sizes,), losses, floor=True, keep=8)
    grid = np.linspace(0.03, 0.2, 20001)
    basis = sizes[:, None] ** -grid
    gain = (losses @ basis) / (basis**2).sum(0)
    brute = ((losses[:, None] - gain * basis) ** 2).sum(0)
    assert found[0, 0] == 0 and 2 * value[0] == pytest.approx(brute.min(), rel=1e-4)
    assert found[0, 2] == pytest.approx(grid[brute.argmin()], abs=2e-4)


def test_batched_fits_are_the_single_fits():
    rng = np.random.default_rng(2)
    curves = LAWS["power"].evaluate(np.array([1.9, 5.8, 0.53]), LENGTHS) + 0.05 * rng.normal(size=(20, 12))
    together = fit_curves(LAWS["power"], (LENGTHS,), curves)[0]
    assert np.allclose(together, [fit_law(LENGTHS, c).parameters for c in curves], rtol=1e-7)


def test_a_shortlist_changes_nothing_for_resamples():
    rng = np.random.default_rng(2)
    for name in ("stretched", "shifted_power", "broken_power"):
        curve = LAWS[name].evaluate(np.array({"stretched": [2.0, 3.0, 20.0, 0.6], "shifted_power": [1.9, 9.0, 0.7, 5.0],
                                              "broken_power": [5.0, 0.4, 0.05, 150.0]}[name]), LENGTHS)
        curves = curve + 0.005 * rng.normal(size=(50, 12))
        short, full = (fit_curves(LAWS[name], (LENGTHS,), curves, shortlist=s, keep=4)[1] for s in (200, None))
        assert np.allclose(short, full, rtol=1e-5), name


def test_documents_are_resampled_whole():
    """A level per document moves the floor of every resample and no exponent."""
    rng = np.random.default_rng(0)
    curve = LAWS["power"].evaluate(np.array([1.9, 5.8, 0.53]), LENGTHS)
    fit = fit_law(LENGTHS, curve + rng.normal(size=(100, 1)))
    assert fit.samples[:, 2].std() < 1e-8
    # standard error of a mean of 100 documents; the bootstrap's own spread with 1,000 draws is 2 %
    assert fit.stderr["C0"] == pytest.approx(fit.samples[:, 0].std(), rel=1e-2)
    assert fit.stderr["C0"] == pytest.approx(0.1, rel=0.25)


def test_draws_of_few_units_have_students_tails():
    values = np.array([[0.0], [1.0], [2.0]])
    draws = resample_means(values, 200_000, seed=1)
    ends = np.quantile(draws, [0.025, 0.975])
    assert np.allclose(ends, 1 + np.array([-4.303, 4.303]) * np.sqrt(1 / 3), rtol=0.03)  # t with 2 degrees of freedom, se 1 / sqrt 3


def test_prediction_band_is_wider_than_the_mean_band():
    rng = np.random.default_rng(0)
    documents = LAWS["power"].evaluate(np.array([1.9, 5.8, 0.53]), LENGTHS) + 0.2 * rng.normal(size=(50, 12))
    for fit in (fit_law(LENGTHS, documents), fit_law(LENGTHS, documents.mean(axis=0))):
        inner, outer = fit.band(LENGTHS), fit.band(LENGTHS, observation=True)
        assert np.all(outer[1] - outer[0] > inner[1] - inner[0])


@pytest.mark.parametrize("l, loss, message", [
    ([8, 16], [2.0, 1.0], "parameters"),
    ([8, 16, 32, 64], [2.0] * 4, "constant"),
    ([8, 16, 32, 64], [2.0, math.nan, 1.0, 0.9], "finite"),
    ([8, 16, 32, 64], [2.0, math.inf, 1.0, 0.9], "finite"),
    ([0, 16, 32, 64], [2.0, 1.5, 1.2, 1.0], "above 0"),
    ([-8, 16, 32, 64], [2.0, 1.5, 1.2, 1.0], "above 0"),
    ([8, 8, 32, 64], [2.0, 1.5, 1.2, 1.0], "more than once"),
    ([8, 16, 32, 64], [2.0, 1.5, 1.2], "shape"),
    ([], [], "at least one"),
])
def test_degenerate_curves_are_refused(l, loss, message):
    with pytest.raises(ValueError, match=message):
        fit_law(l, loss)


def test_a_rising_loss_has_a_stated_status():
    fit = fit_law(LENGTHS, np.log(LENGTHS))
    assert "not identified" in fit.status and "C" in fit.at_bound and math.isnan(fit.stderr["gamma"])
    assert fit_law(LENGTHS[:3], [3.0, 2.0, 1.5]).status.startswith("as many parameters as points")


def test_the_law_that_made_the_data_wins():
    rng = np.random.default_rng(3)
    for name, truth in (("power", [1.9, 5.8, 0.53]), ("log", [4.2, 0.31]), ("exponential", [2.1, 1.7, 90.0])):
        curve = LAWS[name].evaluate(np.array(truth), LENGTHS) + 0.005 * rng.normal(size=12)
        table = compare_laws(LENGTHS, curve, fit_up_to=256)
        assert table.index[0] == name
        assert table.weight.sum() == pytest.approx(1.0)


# --- fits over context and data --------------------------------------------------------------------------------------

JOINT = {
    "constant": [1.2, 4.0, 60.0, 0.6, 0.35], "amplitude": [1.2, 4.0, 12.0, 0.6, 0.35, 0.3],
    "exponent": [1.2, 4.0, 20.0, 0.6, 0.35, 0.12], "dimension": DIMENSION.tolist(),
    "finite": [1.2, 4.0, 12.0, 0.6, 0.35, 0.3, 50.0], "exponential": [1.2, 2.0, 12.0, 12.0, 0.35, 0.3],
    "exponential_exponent": [1.2, 2.0, 12.0, 12.0, 0.35, 0.1], "stretched": [1.2, 3.0, 12.0, 8.0, 0.35, 0.3, 0.6],
    "horizon": [1.2, 4.0, 0.6, 0.3, 0.5],
}


@pytest.mark.parametrize("name", JOINT_LAWS)
def test_noise_free_tables_come_back(name):
    fit = fit_joint(simulate_runs(name, JOINT[name], 0.0, seed=0), name, resamples=0)
    assert np.allclose(fit.parameters, JOINT[name], rtol=1e-6)


def test_runs_of_one_subset_share_their_error():
    """A level that all lengths of a seed share is in the covariance of the cells; without it the cells are independent."""
    rng = np.random.default_rng(0)
    table = simulate_runs("amplitude", JOINT["amplitude"], 0.01, seed=4, seeds=6)
    level = pd.Series(rng.normal(size=30) * 0.05, index=pd.MultiIndex.from_product([table.train_tokens.unique(), range(6)]))
    shared = table.assign(loss=table.loss + level.loc[list(zip(table.train_tokens, table.seed))].to_numpy())
    for runs, low, high in ((table, -0.1, 0.4), (shared, 0.8, 1.0)):
        root = cells_of(check_runs(runs)).root
        covariance = np.linalg.inv(root.T @ root)
        correlation = covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
        assert low <= correlation <= high
        assert abs(covariance[0, -1]) < 1e-12  # another data size


# --- the optimal context ---------------------------------------------------------------------------------------------

@st.composite
def worlds(draw, valley=False):
    """A law and D; with `valley`, such that the loss has a local minimum at a chosen dimension m < d."""
    d, missing, gain = draw(st.floats(1, 200)), draw(st.floats(0.3, 0.99)), draw(st.floats(0.1, 10))
    gamma, tokens = draw(st.floats(0.1, 3)), 10 ** draw(st.floats(2, 16))
    if valley:  # x = z m / d and kappa = z^2 exp(-z): the condition of the chapter, solved for x and the reach
        z = draw(st.floats(2.5, 8))
        x = z * (1 - draw(st.floats(0.1, 0.9)) * missing)
        reach = x / (z**2 * math.exp(-z))
    else:
        x, reach = draw(st.floats(0.05, 6)), math.exp(draw(st.floats(-0.5, 5)))
    slope = missing * d / gain
    return ContextLaw(gain, gamma, reach * d / slope, x * d / math.log(tokens), d, slope), tokens


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(world=worlds())
def test_closed_form_is_the_brute_force_minimum(world):
    law, tokens = world
    best, (_, value) = optimal_context(law, tokens), numeric_optimum(law, tokens)
    scale = max(1.0, law.penalty)
    assert best.loss <= value + 1e-12 * scale and value <= best.loss + 1e-9 * scale


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(world=worlds(valley=True), more=st.floats(1.001, 100))
def test_more_data_never_shortens_an_interior_optimum(world, more):
    law, tokens = world
    here = optimal_context(law, tokens)
    assume(here.kind == "interior")  # the valley can lie above the plain at infinity
    assert optimal_context(law, tokens * more).context_length >= here.context_length * (1 - 1e-9)


@settings(calm, max_examples=100)
@given(world=worlds(), beyond=st.floats(1.02, 3))
def test_beyond_the_critical_size_there_is_no_interior_optimum(world, beyond):
    law, _ = world
    critical = critical_tokens(law)
    assume(1 < critical < 1e80)
    assert optimal_context(law, critical**beyond).kind == "unbounded"


# --- the planner -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pilots():
    return simulate_runs("dimension", DIMENSION, 0.01, seed=11)


def truth_at(tokens):
    return optimal_lengths(JOINT_LAWS["dimension"], DIMENSION, tokens, 4, 128)[0]


def test_the_planner_finds_the_optimum(pilots):
    advice = plan(pilots, 3e7)
    low, high = advice.interval
    assert advice.bracketed and not advice.unbounded
    assert low <= truth_at(3e7) <= high and low <= advice.context_length + 0.5 and advice.context_length - 0.5 <= high
    assert set(advice.regret) >= {4, 8, 16, 32, 64, 128, advice.context_length}
    assert min(advice.regret.values()) >= -1e-9 and advice.regret[advice.context_length] < 1e-3


def test_the_order_of_rows_does_not_matter(pilots):
    shuffled = pilots.sample(frac=1, random_state=1)
    assert plan(pilots, 3e7, resamples=200) == plan(shuffled, 3e7, resamples=200)


def test_no_cost_of_length_is_unbounded():
    advice = plan(simulate_runs("constant", JOINT["constant"], 0.003, seed=5), 3e7)
    assert advice.unbounded and not advice.bracketed and advice.context_length == 128 and advice.interval[1] is None


@pytest.mark.parametrize("change, tokens, message", [
    (lambda t: t[t.context_length <= 16], 3e7, "3 context lengths"),
    (lambda t: t[t.train_tokens <= 3e5], 1e6, "2 data sizes"),
    (lambda t: t[t.seed == 0].iloc[::4], 3e7, "too few"),
    (lambda t: t, 2e9, "at most a factor of 10"),
    (lambda t: t, 1e3, "less than a tenth"),
    (lambda t: t.assign(loss=2.0), 3e7, "constant"),
    (lambda t: t.assign(loss=np.random.default_rng(0).normal(3, 1, len(t))), 3e7, "of the variance"),
    (lambda t: simulate_runs("amplitude", JOINT["amplitude"], 0.003, seed=1), 1e8, "times beyond the longest pilot|factor of 16"),
    (lambda t: t.assign(loss=t.loss + 0.1 * np.sin(2.2 * np.log(t.context_length))), 3e7, "no law of the list describes"),
])
def test_the_planner_refuses_what_it_cannot_know(pilots, change, tokens, message):
    with pytest.raises(Refusal, match=message):
        plan(change(pilots), tokens)


@pytest.fixture(scope="module")
def fitted(pilots):
    return {"dimension": fit_pilots(pilots, resamples=200), "plateau": fit_pilots(simulate_runs("horizon", JOINT["horizon"], 0.01, 5), resamples=200)}


@calm
@given(data=st.data())
def test_an_interval_contains_its_own_advice(fitted, data):
    found = fitted[data.draw(st.sampled_from(sorted(fitted)))]
    try:
        advice = advise_from(found, data.draw(st.floats(2e4, 1e8)), tolerance=data.draw(st.floats(0.001, 0.1)))
    except Refusal:
        return
    low, high = advice.interval
    assert low <= advice.context_length and (high is None or advice.context_length <= high)
    assert (high is None) == advice.unbounded
    assert advice.economical_interval[0] <= advice.economical <= advice.economical_interval[1]


@pytest.mark.parametrize("change, message", [
    (lambda t: t.assign(tokens_per_step=np.where(t.context_length > 16, 512, 256)), r"differ in tokens_per_step \(256, 512\)"),
    (lambda t: t[(t.context_length > 16) == (t.seed == 1)], "no seed has run at lengths of both groups"),
    (lambda t: t[(t.context_length > 16) == (t.train_tokens > 3e5)], "share no context length"),
])
def test_confounded_designs_are_refused_by_name(pilots, change, message):
    with pytest.raises(Refusal, match=message):
        plan(change(pilots), 3e7)


def test_gaps_are_named(pilots):
    short = pilots[~((pilots.context_length == 128) & (pilots.train_tokens == 1e5))]
    short = short[~((short.context_length == 4) & (short.train_tokens == 3e6) & (short.seed == 2))]
    short["epochs"] = np.where(short.train_tokens > 1e6, 2.0, 4.0)
    notes = " ".join(plan(short, 3e7, resamples=200).notes)
    assert "1 of 30 cells" in notes and "128 at 1e+05" in notes and "at 3e+06 seed 2 lacks" in notes and "epochs changes with the data size" in notes


def test_costs_are_those_of_the_pilots(pilots):
    """6 N + 6 layers width (l + 1) FLOPs a token, 4 passes, and a speed that halves at 128."""
    table = pilots.assign(tokens_seen=4 * pilots.train_tokens, tokens_per_s=np.where(pilots.context_length == 128, 500.0, 1000.0), parameters=100_000, layers=2, width=64,
                          peak_memory_mb=10.0 * pilots.context_length)
    advice = plan(table, 3e7, resamples=200)
    assert advice.cost[4].flops == pytest.approx(4 * 3e7 * (6 * (100_000 - 5 * 64) + 6 * 2 * 64 * 5)) and advice.cost[128].hours == pytest.approx(4 * 3e7 / 500 / 3600)
    assert advice.cost[128].memory_mb == 1280 and min(c.equal_flops for c in advice.cost.values()) == 0
    assert advice.cost[128].equal_flops > advice.regret[128]  # it gets less data at the same FLOPs
    assert plan(pilots, 3e7, resamples=200).cost == {}


def test_a_law_that_misses_the_visible_minimum_is_not_asked(pilots):
    """A sharp dip at 32 tokens, at the largest size only, that no law of the list has."""
    odd = pilots.assign(loss=pilots.loss - 0.15 * ((pilots.context_length == 32) & (pilots.train_tokens == 1e7)))
    with pytest.raises(Refusal, match="no law of the list describes these runs"):
        plan(odd, 1.2e7)


def test_finite_memory_is_found_or_refused():
    """Memory ends at 48 tokens: the laws without one said 73 (67 to 77)."""
    truth = [1.2, 4.0, 12.0, 0.6, 0.35, 0.5, 48.0]
    for seed in range(2):
        try:
            advice = plan(simulate_runs("finite", truth, 0.01, seed), 3e7, resamples=300)
        except Refusal:
            continue
        assert advice.interval[0] <= optimal_lengths(JOINT_LAWS["finite"], np.array(truth), 3e7, 4, 128)[0] * 1.03
        assert advice.interval[1] is None or advice.interval[1] >= 46


def test_front_page_best_and_planner_say_the_same_of_one_table():
    """`best`, the page's answers and the planner's measured lengths come from one curve."""
    table = read_table("data/results/train-quick.parquet", "runs")
    said = answers(measured_curves(table))
    shown = CliRunner().invoke(best, ["data/results/train-quick.parquet"]).output
    for curve in fit_pilots(table, resamples=100).curves:  # what the planner calls measured
        assert curve.best == said.loc[curve.size, "best"]
        assert f"D = {curve.size:,}: best l = {curve.best} (" in shown
        assert (curve.excess().worse.to_numpy() == ~np.isin(curve.context_length, said.loc[curve.size, "not_worse"])).all()


def test_best_reads_a_csv_as_it_reads_parquet(tmp_path):
    table = pd.read_parquet("data/results/synthetic-quick.parquet")[["train_samples", "context_length", "seed", "loss"]]
    table.to_csv(tmp_path / "runs.csv", index=False)
    table.to_parquet(tmp_path / "runs.parquet")
    from_csv, from_parquet = (CliRunner().invoke(best, [str(tmp_path / name)]) for name in ("runs.csv", "runs.parquet"))
    assert from_csv.exit_code == 0 and from_csv.output == from_parquet.output and "best l = " in from_csv.output


def test_a_flat_curve_has_no_star_and_no_growth():
    rng = np.random.default_rng(3)
    rows = [dict(train_tokens=d, context_length=l, seed=s, loss=2 + 0.01 * rng.normal()) for d in (1000, 8000) for l in (4, 8, 16, 32) for s in range(3)]
    curves = measured_curves(pd.DataFrame(rows))
    assert not any(c.bracketed for c in curves) and 0.02 < prob_best_grows(curves) < 0.98
    assert "not bracketed" in headline(curves)


def write(table, path):
    table.to_csv(path, index=False) if path.suffix == ".csv" else table.to_parquet(path)
    return str(path)


def run(*arguments):
    return CliRunner().invoke(advise, [str(a) for a in arguments])


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_advise_prints_json(pilots, tmp_path, suffix):
    result = run(write(pilots, tmp_path / f"runs{suffix}"), "--train-tokens", "3e7", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    low, high = said["interval"]
    assert low <= truth_at(3e7) <= high
    assert said["bracketed"] is True and said["law"].startswith("C0 + C l^-gamma")
    assert {"4", "128"} <= set(said["regret"]) and all(isinstance(v, float) for v in said["regret"].values())
    assert said["context_length"] == plan(pilots, 3e7).context_length


def test_advise_speaks(pilots, tmp_path):
    result = run(write(pilots, tmp_path / "runs.csv"), "--train-tokens", "3e7")
    assert result.exit_code == 0 and "Measured: at 1e+05 tokens" in result.output and "regret" in result.output


def test_unbounded_is_valid_json(tmp_path):
    table = simulate_runs("constant", JOINT["constant"], 0.003, seed=5)
    result = run(write(table, tmp_path / "runs.csv"), "--train-tokens", "3e7", "--json")
    said = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert result.exit_code == 0 and said["unbounded"] is True and said["interval"][1] is None


def test_a_refusal_gives_its_reason_and_what_was_measured(pilots, tmp_path):
    result = run(write(pilots, tmp_path / "runs.csv"), "--train-tokens", "2e9", "--json")
    assert result.exit_code == 3 and result.stdout == "" and "at most a factor of 10" in result.stderr and all(part in result.stderr for part in ("With the most data", "To choose now", "regret"))


@pytest.mark.parametrize("spoil, message", [
    (lambda t: t.drop(columns="loss"), "lacks the columns loss"),
    (lambda t: t.assign(loss=t.loss.where(t.index != 3)), "loss in row 4 is"),
    (lambda t: t.assign(context_length=t.context_length.where(t.index != 3, 0)), "context_length in row 4 is 0"),
    (lambda t: t.assign(train_tokens=t.train_tokens.astype(object).where(t.index != 3, "many")), "train_tokens in row 4 is 'many'"),
    (lambda t: pd.concat([t, t]), "two rows"),
    (lambda t: t.iloc[:0], "has no rows"),
    (lambda t: t.assign(tokenizer=["bytes", "bpe:1024"] * (len(t) // 2)), "differ in tokenizer"),
])
def test_bad_tables_are_named(pilots, tmp_path, spoil, message):
    result = run(write(spoil(pilots), tmp_path / "runs.csv"), "--train-tokens", "3e7")
    assert result.exit_code == 2 and message in result.output, result.output


def test_bad_files_and_values_are_named(pilots, tmp_path):
    path = write(pilots, tmp_path / "runs.csv")
    assert "not found" in run(tmp_path / "none.csv", "--train-tokens", "3e7").output
    (tmp_path / "runs.txt").write_text("x")
    assert "expected a .csv or .parquet" in run(tmp_path / "runs.txt", "--train-tokens", "3e7").output
    (tmp_path / "broken.parquet").write_text("not parquet")
    assert "cannot be read" in run(tmp_path / "broken.parquet", "--train-tokens", "3e7").output
    (tmp_path / "empty.csv").write_text("")
    assert "cannot be read" in run(tmp_path / "empty.csv", "--train-tokens", "3e7").output
    for bad in ("-5", "0", "nan", "many"):
        result = run(path, "--train-tokens", bad)
        assert result.exit_code == 2 and "train" in result.output, result.output
    assert run(path).exit_code == 2
