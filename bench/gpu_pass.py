"""The steps of a pass on one GPU; started by `bench/gpu_pass.sh`, which makes the environment.

1. Correctness: the tests marked `gpu`.
2. Speed: `bench_ways.py`, `bench_train.py`, `bench_measure.py`, `bench_synthetic.py` on CUDA.
3. The token-scale table: `data/grids/standard/train.toml` by `ctxnb run`, seed 0 first, the smallest data size first; steps in the way that step 2 found fastest.
   After seed 0, in seconds, the loss and the representations of its largest model (`measure_tokens.toml`): models are too large to be brought back.
4. Where time is left: the synthetic transformer at its standard sizes, the large cells of `limited.toml`.

Each step is a process with a time limit. What it says is appended to `log.txt`, and `report.json` and `report.md` are written after each, so that a cut
at any second loses at most one step. Limits are shares of the pass, or what is left of it; a step that hits its limit is no failure where it works in
pieces that are kept (`cut` in the report).
"""
import argparse
import datetime
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tomllib
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ctxnb.paths import write_atomic

ROOT = Path(__file__).resolve().parents[1]
CTXNB = [sys.executable, "-c", "from ctxnb.cli import main; main()"]
STANDARD = ROOT / "data/grids/standard"
NEEDED = ("torch", "transformers", "accelerate", "numpy", "pandas", "pyarrow", "tiktoken", "tokenizers", "safetensors", "scipy", "sklearn", "matplotlib", "psutil",
          "papermill", "execnb", "pebble", "pytest")
SPARE = 15.0  # seconds kept for the last report, the table and the archive
KEEP_EVERY = 30.0  # seconds between two saves of a step that works in pieces
SHORTEST = 8.0  # seconds without which no step is begun
# 225 in all; with 15 to spare one seed of the grid has the 330 of 570 seconds that its comment asks for. The ways come first: the grid takes the fastest.
SECONDS = {"correctness": 60, "speed: ways": 70, "speed: published shape": 55, "speed: measuring": 25, "speed: synthetic": 15}
SPEED = {
    "ways": ("bench_ways", "--steps", 20),
    "published shape": ("bench_train", "--json", "--shape", "published", "--steps", 3, "--share", 1, "--micro-tokens", 32768),
    "measuring": ("bench_measure", "--json", "--length", 2048, "--windows", 16),
    "synthetic": ("bench_synthetic", "--json", "--rounds", 1, "--samples", 0, "--micro-batch", 0, "--replicas", 8, "--replicas", 32, "--transformer"),
}
TINY_SPEED = {
    "ways": ("bench_ways", "--steps", 2, "--share", 2),
    "published shape": ("bench_train", "--json", "--shape", "tiny", "--steps", 2, "--share", 1),
    "measuring": ("bench_measure", "--json", "--length", 16, "--windows", 2, "--memory-length", 0, "--repeats", 1),
    "synthetic": ("bench_synthetic", "--json", "--rounds", 1, "--samples", 0, "--micro-batch", 0, "--replicas", 2, "--transformer", "--size", "tiny"),
}
# Other grids: what differs from their files, and which cells. The last two want more than ten minutes: the transformer is 40 M samples of 0.57 GFLOP in float32,
# 23 PFLOP; the large cells of `limited.toml` are 27 M tokens in 27,000 small steps each, and on a GPU runs of their own, with `device` for a parameter.
OTHERS = {
    "measure_tokens": ({}, []),
    "synthetic_transformer": ({}, ["seed=0"]),
    "limited": ({"device": "cuda"}, ["train_tokens=800000", "context_length=16,64,256"]),
}
# What makes a run of the rehearsal small; all else is the real grid's.
TINY = dict(tokenizer="bytes", min_tokens=1, max_context=16, segment_tokens=512, layers=1, heads=2, width=16, tokens_per_step=128,
            epochs=[0.5, 1.0], candidates=[[0.0, 0.1, 0.002], [0.1, 0.1, 0.002]], dev_targets=2, test_targets=2, train_targets=4, device="cpu")
TINY_AXES = dict(train_tokens=[2000, 4000], context_length=[4, 16], seed=[0, 1])
TINY_OTHERS = {
    "measure_tokens": (dict(max_context=16, context_length=[4, 16], targets_per_document=8, layers=[0, -1]), []),
    "synthetic_transformer": (dict(epochs=1, width=16, layers=2, visible=[15, 60], train_samples=2000, dev_samples=500, test_samples=500, feature_samples=300), ["seed=0"]),
    "limited": (TINY | dict(train_tokens=[2000, 4000], context_length=[4, 16]), ["train_tokens=4000", "seed=0"]),
}


@dataclass
class Step:
    """One step as the report shows it.

    Args:
        name: what it does.
        verdict: `passed`, `failed`, `cut` at its time limit, `running`, or `left out` for want of time.
        seconds: wall time.
        limit: its time limit, seconds.
        figures: what it measured.
        said: its last words, where it failed.
    """

    name: str
    verdict: str
    seconds: float = 0.0
    limit: float = 0.0
    figures: dict = field(default_factory=dict)
    said: str = ""


class Pass:
    """A pass: its deadline, its folders, its report.

    Args:
        out: where results go.
        work: for what is not kept.
        deadline: when all has to be written, seconds since 1970.
        rehearse: tiny sizes on the CPU.
        grid: what step 3 trains; a rehearsal makes its own.
    """

    def __init__(self, out: Path, work: Path, deadline: float, rehearse: bool, grid: Path):
        self.out, self.work, self.deadline, self.rehearse = out, work, deadline, rehearse
        self.grid, self.text, self.model = grid, work / "words.jsonl", ROOT / "data/models/gpt-tokens-2048"
        if rehearse:
            self.grid, self.model = small_grid(work / "quick", self.text), work / "model"
        self.steps: list[Step] = []
        self.way = os.environ.get("CTXNB_STEP", "eager")  # how steps of a run get to the GPU, see `ctxnb.experiments.graph`
        self.proven = {"eager"}
        self.about = {"started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "rehearsal": rehearse, **machine()}
        self.log = (out / "log.txt").open("a")

    @property
    def left(self) -> float:
        """Seconds until the last report has to be written."""
        return self.deadline - SPARE - time.time()

    def step(self, name: str, command: list, limit: float, keep=None, environment: dict | None = None) -> Step:
        """Run a command as a step, and note how it ended.

        Args:
            name: for the report.
            command: what to run.
            limit: seconds at most, fewer where the pass ends before.
            keep: saves what the step has done so far; called every half minute and at the end. A step with it is `cut` at its limit, not failed.
            environment: variables beside the pass's own.

        Returns:
            The step; its figures are of the last line of its output that is a JSON object, if there is one.
        """
        step = Step(name, "left out", limit=round(min(limit, self.left), 1))
        self.steps.append(step)
        if step.limit >= SHORTEST:
            self.log.write(f"\n===== {name} (at most {step.limit:.0f} s): {' '.join(map(str, command))}\n")
            self.log.flush()
            step.verdict = "running"  # what a report says of the step that was cut with its pass
            self.report()
            self._run(step, command, keep, environment or {})
        self.report()
        return step

    def run_grid(self, name: str, grid: Path, changes: dict, cells: list[str]) -> None:
        """Run cells of a grid as a step.

        Args:
            name: for the report.
            grid: its file.
            changes: parameters other than the file's, in the runs and in their table.
            cells: values of axes, such as "seed=0"; the table has all finished runs.
        """
        sets = [word for key, value in changes.items() for word in ("--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}")]
        command = [*CTXNB, "run", grid, *sets, *(word for cell in cells for word in ("--only", cell))]
        self.step(name, command, self.left, lambda step: keep(self, step, grid, sets), {"CTXNB_STEP": self.way})

    def _run(self, step: Step, command: list, keep, environment: dict) -> None:
        began, output = time.time(), self.work / "output"
        with output.open("w") as file:
            # a group of its own to end it by, in the session of the pass, so that whoever ends that one ends both
            process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=os.environ | environment, process_group=0)
            try:
                while process.poll() is None and (over := step.limit - (time.time() - began)) > 0:
                    try:
                        process.wait(timeout=min(over, KEEP_EVERY))
                    except subprocess.TimeoutExpired:
                        if keep:
                            keep(step)
            finally:
                if in_time := process.poll() is not None:
                    step.verdict = "failed" if process.returncode else "passed"
                else:
                    step.verdict = "cut" if keep else "failed"
                    end(process)
        step.seconds = round(time.time() - began, 1)
        text = output.read_text(errors="replace")
        self.log.write(text)
        self.log.flush()
        step.figures = last_json(text)
        if keep:
            keep(step)
        elif step.figures and not in_time:
            step.verdict = "cut"  # a bench that said what it had measured
        if step.verdict == "failed":
            step.said = f"ended at its limit of {step.limit:.0f} s; " * (not in_time) + text.strip()[-600:]

    def report(self) -> None:
        """Write `report.json` and `report.md`."""
        content = self.about | {"way": self.way, "seconds_left": round(self.left, 1), "steps": [asdict(step) for step in self.steps]}
        write_atomic(self.out / "report.json", json.dumps(content, indent=1))
        write_atomic(self.out / "report.md", as_page(self.about, self.steps))


def end(process: subprocess.Popen) -> None:
    """Interrupt a process and all that it started, so that checkpoints are left whole; then kill what is left."""
    for number, patience in ((signal.SIGINT, 4), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=patience)
        except (subprocess.TimeoutExpired, ProcessLookupError):
            continue


def machine() -> dict:
    """Device and versions, for the report."""
    import numpy
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    return {"device": device, "load": round(os.getloadavg()[0], 1), "python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda or "none",
            "transformers": transformers.__version__, "numpy": numpy.__version__}


def last_json(text: str) -> dict:
    """The last line of a text that is a JSON object."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                continue
    return {}


def as_page(about: dict, steps: list[Step]) -> str:
    """The report for a reader."""
    lines = [f"# A pass on {about['device']}", "", ", ".join(f"{name} {value}" for name, value in about.items()), "",
             "| step | seconds | limit | verdict | figures |", "|---|---|---|---|---|"]
    for step in steps:
        figures = ", ".join(f"{name} {value}" for name, value in step.figures.items() if not isinstance(value, list | dict))
        lines.append(f"| {step.name} | {step.seconds:.1f} | {step.limit:.0f} | {step.verdict} | {figures} |")
    for step in steps:
        for row in step.figures.get("results", []):
            lines.append("- " + step.name + ": " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    lines += [f"\n## {step.name} failed\n\n```\n{step.said}\n```" for step in steps if step.verdict == "failed"]
    return "\n".join(lines) + "\n"


def correctness(run: Pass) -> None:
    """The tests marked `gpu`; in a rehearsal on the CPU."""
    limit = run.left if run.rehearse else SECONDS["correctness"]
    workers = [] if run.rehearse else ["-n", 4]  # each imports PyTorch, for which two cores are too few
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-v", "-p", "no:cacheprovider", "--durations=8", *workers]
    step = run.step("correctness", command, limit, environment={"CTXNB_GPU_REHEARSAL": "1"} if run.rehearse else {})
    verdicts = test_verdicts((run.work / "output").read_text() if step.seconds else "")
    step.figures = {word.lower(): sum(verdict == word for verdict in verdicts.values()) for word in ("PASSED", "FAILED", "SKIPPED")}
    step.figures["failures"] = [name for name, verdict in verdicts.items() if verdict == "FAILED"]
    run.proven = proven_ways(verdicts)
    if step.figures["skipped"] and step.verdict == "passed" and not run.rehearse:
        step.verdict = "failed"  # here every test has its GPU
        step.said = "tests were skipped"
    run.report()


def test_verdicts(text: str) -> dict[str, str]:
    """Name of each finished test -> PASSED, FAILED or SKIPPED, from pytest's verbose lines with and without workers; also of a run that was cut."""
    found = re.findall(r"^\S+::(\S+) (PASSED|FAILED|SKIPPED)|^\[gw\d+\].*? (PASSED|FAILED|SKIPPED) \S+::(\S+)", text, re.MULTILINE)
    return {first or second: one or other for first, one, other, second in found}


def proven_ways(verdicts: dict[str, str]) -> set[str]:
    """Ways of a step whose tests all passed; those of masked windows say nothing about the grid, whose windows stay inside documents."""
    tests = {"compile": "test_compiled_gives", "graph": "test_graph_gives", "compile+graph": "test_compiled_blocks_in_a_graph"}
    of = {way: {verdict for name, verdict in verdicts.items() if name.startswith(test) and "masked" not in name} for way, test in tests.items()}
    return {"eager"} | {way for way, found in of.items() if found == {"PASSED"}}


def speed(run: Pass) -> None:
    """Every benchmark that has a CUDA side, each by its own command."""
    device = ["--device", "cpu" if run.rehearse else "cuda"]
    sizes = TINY_SPEED if run.rehearse else SPEED
    for name, (script, *options) in sizes.items():
        limit = run.left if run.rehearse else SECONDS[f"speed: {name}"]
        step = run.step(f"speed: {name}", [sys.executable, f"bench/{script}.py", *device, *options], limit)
        if name == "ways":
            run.way = fastest_way(step.figures.get("results", []), run.proven)


def fastest_way(rows: list[dict], proven: set[str]) -> str:
    """The way of a step in which a run of the grid is over first, of those that gave the right loss and whose tests passed.

    Args:
        rows: results of `bench_ways.py`, all or those before a cut.
        proven: see `proven_ways`.

    Returns:
        "eager" where nothing was measured, else a key of `STEP_WAYS`.
    """
    seconds = {row["way"]: row["run_s"] for row in rows if "run_s" in row and row["way"] in proven}
    return min(seconds, key=seconds.get) if seconds else "eager"


def small_grid(folder: Path, corpus: Path) -> Path:
    """Write the grid of a rehearsal into a folder, and its generated text: the real grid's template, runner and table, at tiny sizes."""
    from ctxnb.batch.grid import grid_toml

    words = random.Random(0).sample([a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in "lnrst"], 200)
    chance = random.Random(1)
    corpus.write_text("".join(json.dumps({"text": " ".join(chance.choices(words, range(1, 201), k=120))}) + "\n" for _ in range(120)))
    content = tomllib.loads((STANDARD / "train.toml").read_text())
    parameters = content["parameters"] | TINY | {"corpus": str(corpus)}
    folder.mkdir()
    grid = folder / "train.toml"
    grid.write_text(grid_toml(ROOT / content["notebook"], content["data"], parameters, TINY_AXES, {"workers": 2, "minutes": 0.1}))
    return grid


def science(run: Pass) -> None:
    """The token-scale table through template, runner and result row: one seed after the other, and in each the smallest data size first.

    Several runs share the GPU, so the gaps between one run's small kernels are filled by the others. Steps get to it in the way that was measured as
    fastest for a whole run, with what a compilation or a recording costs each of the 40 runs of a seed.
    """
    seeds = tomllib.loads(run.grid.read_text())["axes"]["seed"]
    measured = run.rehearse or run.grid == STANDARD / "train.toml"  # not a grid of somebody's own
    for seed in seeds:
        run.run_grid(f"train: seed {seed}", run.grid, {}, [f"seed={seed}"])
        if measured and seed == seeds[0] and take_largest_model(run):
            other_grid(run, "measure_tokens")


def others(run: Pass) -> None:
    """Where time is left: each a grid of its own, whose table grows with each pass."""
    for name in ("synthetic_transformer", "limited"):
        other_grid(run, name)


def other_grid(run: Pass, name: str) -> None:
    """Run one of `OTHERS`; a rehearsal gives it tiny sizes, and its own text and model."""
    changes, cells = (TINY_OTHERS if run.rehearse else OTHERS)[name]
    own = {"measure_tokens": {"model": str(run.model), "corpus": str(run.text)}, "limited": {"corpus": str(run.text)}}
    run.run_grid(name, STANDARD / f"{name}.toml", changes | (own.get(name, {}) if run.rehearse else {}), cells)


def take_largest_model(run: Pass) -> bool:
    """Copy the model of the first seed's largest context and data size to where `measure_tokens.toml` expects it, if this pass has just trained it."""
    import pandas

    table = run.out / f"{run.grid.stem}.parquet"
    rows = pandas.read_parquet(table) if table.is_file() else pandas.DataFrame()
    if rows.empty:
        return False
    axes = tomllib.loads(run.grid.read_text())["axes"]
    largest = {name: values[0] if name == "seed" else values[-1] for name, values in axes.items()}
    names = rows[(rows[list(largest)] == pandas.Series(largest)).all(axis=1)].run
    found = [model for name in names if (model := Path(os.environ["CTXNB_RUNS"]) / name / "model").is_dir()]
    for model in found:
        shutil.copytree(model, run.model, dirs_exist_ok=True)
    return bool(found)


def keep(run: Pass, step: Step, grid: Path, sets: list[str]) -> None:
    """Write the table of a grid's runs so far, and an archive of the small files of all finished runs."""
    import pandas

    table = run.out / f"{grid.stem}.parquet"
    try:
        subprocess.run([*CTXNB, "results", grid, *sets, "-o", table], cwd=ROOT, stdout=run.log, stderr=run.log, timeout=60)
    except subprocess.TimeoutExpired:
        run.log.write(f"the table of {grid.stem} took more than a minute: left as it was\n")  # the runs are kept all the same
    if table.is_file() and len(rows := pandas.read_parquet(table)):
        step.figures = {"runs in the table": len(rows), "seconds a run": round(float(rows.seconds.median()), 1)}
    runs, partial = Path(os.environ["CTXNB_RUNS"]), run.work / "runs.tar.gz"
    with tarfile.open(partial, "w:gz", compresslevel=3) as archive:
        for file in sorted(runs.glob("*-*/*")):
            if file.suffix in (".json", ".ipynb", ".log") and not file.parent.name.endswith(".partial"):
                archive.add(file, file.relative_to(runs))
    write_atomic(run.out / "runs.tar.gz", partial.read_bytes())
    run.report()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seconds", type=float, default=570)
    parser.add_argument("--began", type=float, default=time.time(), help="when the pass began, seconds since 1970")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at tiny sizes")
    parser.add_argument("--only", choices=["correctness", "speed", "science", "others"], help="only this part")
    parser.add_argument("--grid", type=Path, default=STANDARD / "train.toml", help="what step 3 trains")
    arguments = parser.parse_args()
    if lacking := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise SystemExit(f"neither on this machine nor in the bundle: {', '.join(lacking)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a step ends with its pass
    if arguments.rehearse:
        os.environ["CTXNB_DATA"] = str(arguments.work / "data")  # its token stores are not kept
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny products wait for each other's threads on a busy machine
    run = Pass(arguments.out, arguments.work, arguments.began + arguments.seconds, arguments.rehearse, arguments.grid.resolve())
    run.report()  # there is one also where the parts that were asked for have no step
    for part in (correctness, speed, science, others):
        if arguments.only in (None, part.__name__):
            part(run)
    print((run.out / "report.md").read_text())
    return int(any(step.verdict == "failed" for step in run.steps))


if __name__ == "__main__":
    sys.exit(main())
