"""Every template still gives the numbers of its recipe, and its figures have alternative text."""

import pytest
from golden_cells import TEMPLATES, changed_defaults, figures_without_alt, golden_of, numbers_of, run_cell


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("golden")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_gives_the_numbers_of_its_recipe(name, folder):
    assert changed_defaults(name) == []
    state = run_cell(name, folder)
    assert (state.state, state.reason) == ("done", "")
    assert numbers_of(state) == pytest.approx(golden_of(name)["numbers"], rel=1e-6, abs=1e-6)
    assert figures_without_alt(state) == []
