"""Golden cells: one small run of each template in nbs/runs, whose losses must not move while its recipe stays.

    python tests/golden_cells.py check      a changed default without a new recipe; executes nothing
    python tests/golden_cells.py write      run every cell and write tests/golden/*.json anew

`tests/golden/<template>.json` holds the recipe and the defaults of the template, the parameters of the cell, and the numbers it recorded. A new template
gets its file by hand, with `parameters`; `write` fills in the rest. test_golden.py runs the cells. They are computed on the CPU with one thread.
"""

import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from ctxnb.batch.execute import execute_run  # noqa: E402
from ctxnb.batch.record import RESULT  # noqa: E402
from ctxnb.batch.runs import Run  # noqa: E402
from ctxnb.batch.states import NOTEBOOK, RunState, states_of  # noqa: E402
from ctxnb.batch.template import Template, read_template  # noqa: E402
from ctxnb.paths import data_dir, write_atomic  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
TEMPLATES = sorted(path.stem for path in (ROOT / "nbs" / "runs").glob("*.ipynb"))


def template_of(name: str) -> Template:
    return read_template(ROOT / "nbs" / "runs" / f"{name}.ipynb")


def golden_of(name: str) -> dict:
    file = GOLDEN / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def changed_defaults(name: str) -> list[str]:
    """What a template changed without a new recipe; a parameter that was added or removed is none, as long as the numbers stay."""
    template, golden = template_of(name), golden_of(name)
    if not golden:
        return [f"{name}: tests/golden/{name}.json is missing"]
    if template.recipe != golden.get("recipe"):
        return [f"{name}: has recipe {template.recipe}, its golden cell recipe {golden.get('recipe')}: run make golden"]
    return [
        f"{name}: the default of {key} was {value!r} and is {template.defaults[key]!r}: raise its recipe, then make golden"
        for key, value in golden["defaults"].items()
        if key in template.defaults and template.defaults[key] != value
    ]


def tiny_model(folder: Path) -> None:
    """A GPT-2 with random weights of seed 0, for the templates that measure a model."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=257, n_positions=256, n_embd=32, n_layer=2, n_head=2, bos_token_id=256, eos_token_id=256)
    GPT2LMHeadModel(config).save_pretrained(folder)


def run_cell(name: str, folder: Path) -> RunState:
    """Execute a template's golden cell in a folder, in a process of its own."""
    template, runs = template_of(name), folder / "runs"
    if not (folder / "model").is_dir():
        tiny_model(folder / "model")
    os.environ["CTXNB_DATA"] = str(data_dir())  # the cell works in another folder, on the project's texts
    run = Run(template, template.defaults | golden_of(name)["parameters"], base=folder)
    process = multiprocessing.get_context("fork").Process(target=execute_run, args=(run, "golden", "shell", runs))
    process.start()
    process.join()
    (state,) = states_of([run], runs)
    return state


def numbers_of(state: RunState) -> dict[str, float]:
    """The mean of each column of losses that a run recorded."""
    result = json.loads((state.folder / RESULT).read_text(encoding="utf-8"))
    return {name: mean for name, value in result.items() if "loss" in name and (mean := _mean(value)) is not None}


def _mean(value) -> float | None:
    while isinstance(value, list) and any(isinstance(item, list) for item in value):
        value = [leaf for item in value for leaf in (item if isinstance(item, list) else [item])]
    numbers = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, (int, float))]
    return sum(numbers) / len(numbers) if numbers else None


def figures_without_alt(state: RunState) -> list[str]:
    """Sources of cells of the executed notebook that show a figure and have no `fig-alt`."""
    cells = json.loads((state.folder / NOTEBOOK).read_text(encoding="utf-8"))["cells"]
    drawn = [cell for cell in cells if any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))]
    return [source for source in ("".join(cell["source"]) for cell in drawn) if "#| fig-alt: " not in source]


def write(names: list[str]) -> None:
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            state = run_cell(name, Path(folder))
            if state.state != "done":
                sys.exit(f"{name}: {state.state}, {state.reason}")
            content = dict(recipe=template_of(name).recipe, defaults=template_of(name).defaults, parameters=golden_of(name)["parameters"],
                           numbers=numbers_of(state))
            write_atomic(GOLDEN / f"{name}.json", json.dumps(content, indent=1) + "\n")
            print(f"{name}: {state.seconds:.1f} s, {len(content['numbers'])} numbers, loss {content['numbers']['loss']:.6f}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["check"]:
            if wrong := [line for name in TEMPLATES for line in changed_defaults(name)]:
                sys.exit("\n".join(wrong))
        case ["write", *names]:
            write(names or TEMPLATES)
        case _:
            sys.exit(__doc__)
