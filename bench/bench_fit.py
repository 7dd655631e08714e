"""1,000 bootstrap refits of a 12-point curve: ours against a plain loop over scipy.optimize.curve_fit.

Both sides fit the same 1,000 resampled curves of 400 simulated documents in the same process, in turns, and the
best of several rounds counts, so that the ratio depends little on the machine. Usage:

    OMP_NUM_THREADS=1 python bench/bench_fit.py [--rounds 5] [--json]
"""
import json
import time
import warnings
from collections.abc import Callable

import click
import numpy as np
from scipy.optimize import curve_fit

from ctxnb.stats.bootstrap import resample_means
from ctxnb.stats.fitting import fit_law
from ctxnb.stats.laws import LAWS
from ctxnb.stats.solver import SHORTLIST, fit_curves

LENGTHS = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)

RESAMPLES = 1000


def simulate_documents(documents: int, seed: int) -> np.ndarray:
    """[U, 12] losses of made-up documents: a power law, a level for each document, independent scatter."""
    rng = np.random.default_rng(seed)
    mean = LAWS["power"].evaluate(np.array([1.9, 5.8, 0.53]), np.array(LENGTHS, float))
    return mean + 0.4 * rng.normal(size=(documents, 1)) + 0.15 * rng.normal(size=(documents, len(mean)))


def power(l: np.ndarray, floor: float, gain: float, gamma: float) -> np.ndarray:
    """The law as a user of curve_fit would write it."""
    return floor + gain * l**-gamma


def loop(l: np.ndarray, curves: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
    """One curve_fit a curve: plain (scipy's own start at ones), or warm, from the fit of the mean curve."""
    return np.array([curve_fit(power, l, curve, p0=start)[0] for curve in curves])


def best_of(rounds: int, *sides: Callable[[], object]) -> list[float]:
    """Best wall time of each side, in turns, seconds."""
    times = [[] for _ in sides]
    for _ in range(rounds):
        for record, side in zip(times, sides):
            began = time.perf_counter()
            side()
            record.append(time.perf_counter() - began)
    return [min(record) for record in times]


@click.command()
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(rounds: int, as_json: bool) -> None:
    """Time both sides, check that they agree, print the ratio."""
    l = np.array(LENGTHS, float)
    documents = simulate_documents(400, seed=0)
    curves = resample_means(documents, RESAMPLES)
    start = fit_law(l, documents, resamples=0).parameters

    ours = fit_curves(LAWS["power"], (l,), curves, shortlist=SHORTLIST)[0]
    theirs = loop(l, curves)
    # curve_fit stops at a relative change of 1.5e-8 of the sum of squares, that is about 1e-4 of a parameter's
    # bootstrap spread
    gap = np.abs(ours - theirs).max(axis=0) / ours.std(axis=0)
    if not (gap < 1e-2).all():
        raise click.ClickException(f"the two sides disagree by {gap} bootstrap standard deviations")

    fit_only, whole, plain, warm = best_of(
        rounds, lambda: fit_curves(LAWS["power"], (l,), curves, shortlist=SHORTLIST),
        lambda: fit_law(l, documents, resamples=RESAMPLES), lambda: loop(l, curves), lambda: loop(l, curves, start))
    result = {"resamples": RESAMPLES, "points": len(l), "refits_s": fit_only, "fit_law_s": whole,
              "curve_fit_s": plain, "curve_fit_warm_s": warm, "ratio": plain / fit_only,
              "ratio_warm": warm / fit_only, "disagreement_sd": float(gap.max())}
    if as_json:
        print(json.dumps(result, indent=2))
        return
    print(f"{RESAMPLES} refits of {len(l)} points: ours {fit_only:.4f} s ({whole:.4f} s with resampling 400 documents and "
          f"the point fit)\nplain curve_fit loop {plain:.3f} s, ratio {result['ratio']:.1f} (aim 20)\n"
          f"curve_fit loop started at the mean's fit {warm:.3f} s, ratio {result['ratio_warm']:.1f}\n"
          f"largest disagreement {gap.max():.1e} bootstrap standard deviations")


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # curve_fit warns where a covariance cannot be estimated; not of interest here
    main()
