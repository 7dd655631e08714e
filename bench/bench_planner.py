"""A benchmark for context planners: simulated worlds with a known best context length, most of them outside the planner's laws.

A world is a loss L(l, D) in nats, a scatter of runs and a design of pilots: unless said, 6 lengths (4 to 128), 5 sizes (1e5 to
1e7), 3 seeds and a noise of .01 nats. A planner gets the pilots and is asked for 1, 3 and 10 times the largest size. Its answer
is right when its interval reaches a length within .001 nats of the best one, or its pick costs at most .01 nats; an answer that
is neither is *confidently wrong*. Ten further worlds are drawn from a seed that no rule was tuned on. Last come our own tables: the
planner gets all sizes but the largest ("ours"), then all of them ("whole"), and is asked for the largest, whose measured means are the truth, to within their
paired scatter. Usage:

    OMP_NUM_THREADS=1 python bench/bench_planner.py [--tables 1] [--only memory] [--json] [--record data/results/planner_worlds.parquet]

The rows of an older planner: put an older `ctxnb` before this one (`git archive COMMIT ctxnb | tar x -C FOLDER`, then
`PYTHONPATH=FOLDER python -P bench/bench_planner.py --planner COMMIT --record ...`). Recorded rows replace those of the same planner.
"""
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import pandas as pd
from scipy import stats

from ctxnb.theory.planner import Refusal, advise_from, fit_pilots

LENGTHS, SIZES, SEEDS = (4, 8, 16, 32, 64, 128), (1e5, 3e5, 1e6, 3e6, 1e7), 3
FACTORS = (1, 3, 10)
GRID = np.geomspace(4, 1e4 * 128, 1500)  # where the truth is looked for: as far as the planner looks
HELD_OUT_SEED, HELD_OUT = 31_415, 10
Loss = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class World:
    """A simulated world.

    Args:
        loss: L(l, D), nats.
        family: whether the planner's list of laws holds it.
        noise: `(l, D, rng) -> nats`, the scatter of one run.
        level: standard deviation of a seed's level, shared by its lengths, nats.
        seeds: runs of each cell.
        keep: `table -> mask` of the runs that survive.
        lengths: of the pilots.
        slack: lengths within so much of the best one count as the best, nats.
    """

    loss: Loss
    family: bool = False
    noise: Callable = field(default=lambda l, d, rng: 0.01 * rng.normal(size=len(l)))
    level: float = 0.0
    seeds: int = SEEDS
    keep: Callable | None = None
    lengths: tuple = LENGTHS
    slack: float = 0.001


def power(l, c=4.0, gamma=0.6, floor=1.2):
    return floor + c * l**-gamma


def memory(l, end, c=4.0, gamma=0.6, floor=1.2):
    return floor + c * np.maximum(l**-gamma - float(end) ** -gamma, 0.0)


def cost(l, d, a=12.0, growth=0.5, alpha=0.35):
    return a * l**growth * d**-alpha


def dimension(l, d, a=60.0, alpha=0.2, kappa=0.8):
    return a * d ** (-alpha / (1 - kappa * l**-0.6))


def bump(l, at, size, width=0.4):
    return size * np.exp(-((np.log(l / at) / width) ** 2))


def xor_risk(l):
    """Steps: the share of 50 tasks that reach beyond l."""
    farther = np.array([int(6 * (50 / (51 - k)) ** (1 / 1.2)) + 1 for k in range(1, 51)])
    return np.log(2) * (farther[None] > np.asarray(l)[:, None]).mean(1)


def _normal(scale):
    return lambda l, d, rng: scale(l, d) * rng.normal(size=len(l))


WORLDS: dict[str, World] = {
    "dimension": World(lambda l, d: power(l) + dimension(l, d), True),
    "amplitude": World(lambda l, d: power(l) + cost(l, d), True),
    "exponent": World(lambda l, d: power(l) + 20 * d ** (-0.35 * l**-0.12), True),
    "no cost": World(lambda l, d: power(l) + 60 * d**-0.35, True, _normal(lambda l, d: 0.003)),
    "horizon plateau": World(lambda l, d: 1.2 + 4 * (l**-4.0 + (0.5 * d**0.3) ** -4.0) ** 0.15, True),
    "alpha = 4/(4+dim)": World(lambda l, d: power(l) + 20 * d ** (-4 / (4 + 8 * (1 - 0.8 * l**-0.6))), True),
    "memory ends at 48": World(lambda l, d: memory(l, 48) + cost(l, d), True),
    "memory 48, noise .03": World(lambda l, d: memory(l, 48) + cost(l, d), True, _normal(lambda l, d: 0.03)),
    "risk exp(-l/8), amplitude": World(lambda l, d: 1.2 + 2 * np.exp(-l / 8) + cost(l, d), True),
    "risk exp(-l/20), amplitude": World(lambda l, d: 1.2 + 2 * np.exp(-l / 20) + cost(l, d, growth=0.3), True),
    "risk exp(-l/20), exponent": World(lambda l, d: 1.2 + 2 * np.exp(-l / 20) + 20 * d ** (-0.35 * l**-0.08), True),
    "stretched risk": World(lambda l, d: 1.2 + 3 * np.exp(-((l / 8) ** 0.6)) + cost(l, d), True),
    "memory 24, no cost": World(lambda l, d: memory(l, 24) + 60 * d**-0.35),
    "memory 48, exponent": World(lambda l, d: memory(l, 48) + 20 * d ** (-0.35 * l**-0.1)),
    "drop near 250": World(lambda l, d: power(l) + 0.1 / (1 + (l / 250) ** 4) + cost(l, d)),
    "second structure at 600": World(lambda l, d: power(l) + 0.3 / (1 + (l / 600) ** 2) + cost(l, d, growth=0.3)),
    "long lengths badly optimised": World(lambda l, d: power(l) + 60 * d**-0.35 + 0.04 * np.maximum(np.log2(l / 32), 0)),
    "one bad length": World(lambda l, d: power(l) + 60 * d**-0.35 + bump(l, 128, 0.05, 0.2)),
    "l* falls with D": World(lambda l, d: power(l) + 0.002 * l**0.5 * (d / 1e5) ** 0.1 + 30 * d**-0.35),
    "small D under-annealed": World(lambda l, d: power(l) + 60 * d**-0.35 + 0.08 * (d < 2e5)),
    "alpha = .5 - .05 ln l": World(lambda l, d: power(l) + 60 * d ** -(0.5 - 0.05 * np.log(l))),
    "wider model at large D": World(lambda l, d: power(l) + cost(l, d) * np.where(d > 2e6, 0.8, 1.0)),
    "log-periodic": World(lambda l, d: power(l) + cost(l, d) + 0.05 * np.sin(2 * np.pi * np.log(l) / np.log(8))),
    "XOR steps": World(lambda l, d: xor_risk(l) + 0.2 * l**2 * d**-0.8),
    "saturating cost": World(lambda l, d: power(l) + 20 * d**-0.35 * (1 - np.exp(-l / 16))),
    "alpha and A rising": World(lambda l, d: power(l) + 4 * l**1.2 * d ** -(0.3 + 0.02 * np.log(l))),
    "capacity floor": World(lambda l, d: power(l) + np.maximum(cost(l, d), 0.02 * l**0.3)),
    "alpha drops beyond the pilots": World(lambda l, d: power(l) + cost(l, np.minimum(d, 2e7) * (np.maximum(d, 2e7) / 2e7) ** 0.3)),
    "U-penalty": World(lambda l, d: power(l) + 60 * d**-0.35 + 0.12 * np.log(l / 24) ** 2 / 4),
    "epochs floor": World(lambda l, d: power(l) + np.maximum(cost(l, d), 0.15 * (l / 128) ** 0.5)),
    "random failures": World(lambda l, d: power(l) + 60 * d**-0.35, False, lambda l, d, rng: 0.01 * rng.normal(size=len(l)) + 0.3 * (rng.random(len(l)) < 0.08)),
    "noise grows with l": World(lambda l, d: power(l) + cost(l, d), True, _normal(lambda l, d: 0.004 * l**0.35)),
    "t-distributed noise": World(lambda l, d: power(l) + cost(l, d), True, lambda l, d, rng: 0.006 * rng.standard_t(2, size=len(l))),
    "noise by D": World(lambda l, d: power(l) + cost(l, d), True, _normal(lambda l, d: 0.03 * (d / 1e5) ** -0.35)),
    "shared subset level": World(lambda l, d: power(l) + cost(l, d), True, level=0.03),
    "censored runs": World(lambda l, d: power(l) + cost(l, d), True, keep=lambda t: ~((t.context_length >= 64) & (t.train_tokens <= 3e5))),
    "one seed": World(lambda l, d: power(l) + cost(l, d), True, seeds=1),
}


def drawn_worlds() -> dict[str, World]:
    """Ten worlds from a seed that no rule was tuned on: risk, cost, noise and level drawn independently."""
    rng, worlds = np.random.default_rng(HELD_OUT_SEED), {}
    for k in range(HELD_OUT):
        gamma, end, time_, c = rng.uniform(0.3, 1.2), rng.uniform(20, 300), rng.uniform(5, 40), rng.uniform(1, 4)
        growth, alpha, a, q, amount = rng.uniform(0.1, 1), rng.uniform(0.25, 0.6), rng.uniform(5, 40), rng.uniform(0.02, 0.12), rng.uniform(0, 0.06)
        risk = [lambda l, c=c, g=gamma: power(l, c, g), lambda l, c=c, g=gamma, e=end: memory(l, e, c, g), lambda l, c=c, t=time_: 1.2 + c * np.exp(-l / t),
                lambda l, c=c, g=gamma, s=amount: power(l, c, g) + s * np.sin(np.log(l)), lambda l, c=c, e=end: 1.2 + c / (1 + (l / e) ** 1.5)][rng.integers(5)]
        price = [lambda l, d, a=a, g=growth, p=alpha: a / 4 * l**g * d**-p, lambda l, d, a=a, p=alpha, q=q: a * d ** (-p * l**-q), lambda l, d, a=a, p=alpha: a * d**-p,
                 lambda l, d, a=a, p=alpha, e=end: a * d**-p * (1 - np.exp(-l / e))][rng.integers(4)]
        noise, level = 10 ** rng.uniform(-2.5, -1.5), rng.choice([0.0, 0.02])
        worlds[f"drawn {k}"] = World(lambda l, d, r=risk, p=price: r(l) + p(l, d), False, _normal(lambda l, d, s=noise: s), level)
    return worlds


def pilots_of(world: World, seed: int) -> pd.DataFrame:
    """The pilots' table of a world."""
    rng = np.random.default_rng(seed)
    table = pd.MultiIndex.from_product([SIZES, range(world.seeds), world.lengths], names=["train_tokens", "seed", "context_length"]).to_frame(index=False)
    l, d = table.context_length.to_numpy(float), table.train_tokens.to_numpy(float)
    level = np.repeat(rng.normal(size=len(SIZES) * world.seeds), len(world.lengths)) * world.level
    table["loss"] = world.loss(l, d) + world.noise(l, d, rng) + level
    return table[world.keep(table)] if world.keep else table


def verdict(world: World, tokens: float, pick: float, low: float, high: float) -> dict:
    """Score of an answer. Without an upper end the pick is the longest *measured* length, and is compared with those measured."""
    truth = world.loss(GRID, np.full(len(GRID), tokens))
    near = GRID[truth <= truth.min() + world.slack]
    covers = bool(((near >= low / 1.02) & (near <= high * 1.02)).any())
    allowed = GRID <= max(world.lengths) if np.isinf(high) else np.full(len(GRID), True)
    regret = float(world.loss(np.array([pick]), np.array([tokens]))[0] - truth[allowed].min())
    return {"verdict": "right" if covers else "harmless" if regret <= 0.01 else "confidently wrong", "best": float(GRID[truth.argmin()]), "regret": regret}


def fitted(table: pd.DataFrame, measured: bool):
    """The pilots with their laws, why there are none, or the measured curve of the largest size alone."""
    if measured:
        from ctxnb.stats.curves import measured_curves

        return measured_curves(table[table.train_tokens == table.train_tokens.max()])[0]
    try:
        return fit_pilots(table, resamples=300)
    except Refusal as refusal:
        return refusal


def judge(world: World, pilots, tokens: float) -> dict:
    """Answer to one target, with its score."""
    if hasattr(pilots, "best_interval"):  # the baseline: the best length of the largest pilots, whatever is asked
        low, high = pilots.best_interval()
        return verdict(world, tokens, float(pilots.best), low, high) | {"pick": float(pilots.best), "low": float(low), "high": float(high), "law": "none"}
    if isinstance(pilots, Refusal):
        return {"verdict": "refused", "why": str(pilots)}
    try:
        advice = advise_from(pilots, tokens)
    except Refusal as refusal:
        return {"verdict": "refused", "why": str(refusal)}
    low, high, pick = advice.interval[0], advice.interval[1] or np.inf, float(advice.context_length)
    return verdict(world, tokens, pick, low, high) | {"pick": pick, "low": low, "high": high, "law": advice.form}


RESULTS = Path(__file__).parents[1] / "data" / "results"
TABLES = ("train-quick", "train_bytes-standard", "synthetic-quick", "synthetic-standard", "contest_counts")
PILOT_COLUMNS = ["context_length", "train_tokens", "seed", "loss"]


def measured_world(rows: pd.DataFrame) -> World:
    """The measured means of one data size as a world: linear in ln l between the lengths, level beyond the longest."""
    runs = rows.pivot(index="seed", columns="context_length", values="loss").dropna()
    residual = runs.sub(runs.mean(axis=0), axis=1).sub(runs.mean(axis=1), axis=0) + runs.to_numpy().mean()
    dof = (len(runs) - 1) * (runs.shape[1] - 1)
    half = stats.t.ppf(0.975, dof) * np.sqrt(2 * (residual.to_numpy() ** 2).sum() / dof / len(runs))  # 95 % of a paired difference
    lengths = runs.columns.to_numpy(float)
    return World(lambda l, d: np.interp(np.log(l), np.log(lengths), runs.mean(axis=0).to_numpy()), lengths=tuple(lengths), slack=max(0.001, float(half)))


def held_out_tables() -> dict[str, tuple[World, pd.DataFrame, float]]:
    """Our tables: the truth at the largest data size, all runs, and that size."""
    found = {}
    for file in TABLES:
        table = pd.read_parquet(RESULTS / f"{file}.parquet").rename(columns={"train_samples": "train_tokens"})
        for language, part in table.groupby("language") if "language" in table else [("", table)]:
            largest = part.train_tokens.max()
            found[f"{file} {language}".strip()] = (measured_world(part[part.train_tokens == largest]), part[PILOT_COLUMNS], float(largest))
    return found


def run_tables(only: str, measured: bool = False) -> dict[str, pd.DataFrame]:
    """Our tables, asked for their largest size: with that size held out, and whole."""
    rows = {"ours": [], "whole": []}
    for name, (world, table, tokens) in held_out_tables().items():
        if only not in name:
            continue
        for part, pilots in (("ours", table[table.train_tokens < tokens]), ("whole", table)):
            if pilots.train_tokens.nunique() < 3:  # no law can be fitted to what a hold-out leaves
                continue
            about = {"world": name, "family": False, "table": 0, "factor": tokens / pilots.train_tokens.max()}
            rows[part].append(about | judge(world, fitted(pilots, measured), tokens))
            click.echo(f"{name}, {part}: {rows[part][-1]['verdict']}", err=True)
    return {part: pd.DataFrame(found) for part, found in rows.items() if found}


def run(worlds: dict[str, World], tables: int, first_seed: int = 0, measured: bool = False) -> pd.DataFrame:
    """Every world, table and target."""
    rows = []
    for name, world in worlds.items():
        for k in range(tables):
            began, table = time.perf_counter(), pilots_of(world, first_seed + k)
            pilots = fitted(table, measured)
            for factor in FACTORS:
                rows.append({"world": name, "family": world.family, "table": k, "factor": factor} | judge(world, pilots, factor * SIZES[-1]))
            click.echo(f"{name} {k}: {', '.join(r['verdict'] for r in rows[-3:])} ({time.perf_counter() - began:.0f} s)", err=True)
    return pd.DataFrame(rows)


def summary(rows: pd.DataFrame) -> dict:
    """Shares of all answers."""
    return {"answers": len(rows), "confidently wrong": float((rows.verdict == "confidently wrong").mean()),
            "covered or refused": float(rows.verdict.isin(["right", "refused"]).mean()), "refused": float((rows.verdict == "refused").mean()),
            "largest regret": float(rows.regret.max()) if "regret" in rows else 0.0}


@click.command()
@click.option("--tables", type=click.IntRange(min=1), default=1, show_default=True, help="Tables of each world.")
@click.option("--only", default="", help="Worlds whose name contains this.")
@click.option("--first-seed", type=int, default=0, show_default=True)
@click.option("--record", type=click.Path(path_type=Path), help="Also write the rows to this Parquet file, in place of those of the same planner.")
@click.option("--planner", default="today", show_default=True, help="Name of the planner in the table.")
@click.option("--measured", is_flag=True, help="Score a baseline without laws: the best length of the largest pilots.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(tables: int, only: str, first_seed: int, record: Path | None, planner: str, measured: bool, as_json: bool) -> None:
    """Score the planner on known worlds, on drawn ones, and on our own tables."""
    parts = {"known": {n: w for n, w in WORLDS.items() if only in n}, "drawn": {n: w for n, w in drawn_worlds().items() if only in n}}
    found = {part: run(worlds, tables, first_seed, measured) for part, worlds in parts.items() if worlds}
    found |= run_tables(only, measured)
    scores = {part: summary(rows) for part, rows in found.items()}
    rows = pd.concat([part.assign(part=name, planner=planner) for name, part in found.items()], ignore_index=True)
    if record:
        old = pd.read_parquet(record) if record.is_file() else rows.iloc[:0]
        pd.concat([old[old.planner != planner], rows], ignore_index=True).to_parquet(record, index=False)
    if as_json:
        click.echo(json.dumps({"scores": scores, "rows": json.loads(rows.to_json(orient="records"))}))
        return
    click.echo(rows.drop(columns=["why", "family"], errors="ignore").to_string(index=False))
    for part, score in scores.items():
        click.echo(f"{part}: " + ", ".join(f"{name} {value:.3g}" for name, value in score.items()))


if __name__ == "__main__":
    main()
