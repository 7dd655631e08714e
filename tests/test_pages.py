"""Result pages keep their outputs; an output that its own code and table no longer give is stale."""
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NBS = Path(__file__).parents[1] / "nbs"
pytestmark = pytest.mark.slow  # each page runs top to bottom
PAGES = [*sorted((NBS / "results").glob("*.ipynb")), *(NBS / f"{name}.ipynb" for name in ("about/claims", "about/cite", "about/command", "index"))]


def said(notebook) -> list[str]:
    """What a page says in words. Figures are left out (they differ by font and version), tables in HTML hold links to local runs."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    streams = [output.text for output in outputs if output.output_type == "stream" and output.name == "stdout"]
    return streams + [output.data["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {})]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_outputs_are_what_the_code_gives_now(page):
    notebook = nbformat.read(page, as_version=4)
    before = said(notebook)
    assert before, f"{page.name} has no outputs: run it and commit it with them"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(page.parent)}}).execute()
    assert said(notebook) == before, f"{page.name} is stale: run it top to bottom and commit it"
