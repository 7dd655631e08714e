"""Sphinx settings of the site. `docs/build.py` prepares the sources and calls Sphinx with this file."""

import html
import re
import sys
from collections import Counter
from configparser import ConfigParser
from pathlib import Path

import click
from docutils import nodes
from myst_parser.mdit_to_docutils.base import make_document
from myst_parser.mocking import MockRSTParser
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # autodoc reads this project's modules, whatever else is installed

settings = ConfigParser(delimiters=["="])
settings.read(ROOT / "settings.ini", encoding="utf-8")

project = settings["DEFAULT"]["title"]
author = settings["DEFAULT"]["author"]
copyright = settings["DEFAULT"]["copyright"]
version = release = settings["DEFAULT"]["version"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "sphinx_click",
    "sphinx_copybutton",
]
copybutton_selector = "div.highlight:not(.cell_output *) > pre"  # code to run, not what it printed

# notebooks: shown as they were run, never run by Sphinx
nb_execution_mode = "off"
nb_output_stderr = "remove"  # progress bars and warnings that name this machine's folders
nb_merge_streams = True
suppress_warnings = ["mystnb.unknown_mime_type"]  # an output in one more form, for other pages to read
nb_render_markdown_format = "myst"  # tables that a result page computes
nb_code_prompt_show = "Show code"
nb_code_prompt_hide = "Hide code"
nb_ipywidgets_js = {}  # the default is a script of somebody else's server
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath", "html_image"]
myst_heading_anchors = 3
myst_dmath_double_inline = True
numfig = True
smartquotes_action = "qe"  # -- begins an option
math_number_all = True
math_numfig = True
math_eqref_format = "Eq. {number}"

# docstrings: Google style, single backticks for code
default_role = "literal"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes in the class's text: no second description of the same name
autodoc_member_order = "bysource"
autosummary_ignore_module_all = False  # a module's page holds what it exports
templates_path = [str(ROOT / "docs" / "_templates")]
autodoc_preserve_defaults = True  # a default that is a folder stays an expression, not this machine's path
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
add_module_names = False
viewcode_follow_imported_members = False  # the source of what a page describes, not of what it comes from

# MathJax from the page's own folder; `docs/build.py` puts it there
mathjax_path = "mathjax/tex-chtml-full.js"
mathjax3_config = {"options": {"enableMenu": False}}  # the menu's extras are files that are not shipped

html_theme = "sphinx_book_theme"
html_context = {"default_mode": "auto"}
html_title = project
html_static_path = ["_static", str(ROOT / "_proc" / "static")]
html_css_files = ["ctxnb.css"]
html_js_files = ["site.js"]
html_search_scorer = str(ROOT / "docs" / "scorer.js")
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_search_summary = False  # fetched page by page, which a browser refuses under file://
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # the search field stands in the sidebar
}

class ReStructuredText(SphinxDirective):
    """reST in a notebook, for autodoc.

    MyST's own `eval-rst` puts an empty line before it for every line of the file, and MyST-NB counts 10,000
    lines a cell: an entry in cell 30 would be parsed behind 300,000 empty lines.
    """

    has_content = True

    def run(self) -> list[nodes.Node]:
        parsed = make_document(self.state.document["source"])
        parsed.settings = self.state.document.settings
        parsed.reporter = self.state.document.reporter
        MockRSTParser().parse("\n".join(self.content), parsed)
        return parsed.children


class LinkExportedNames(SphinxPostTransform):
    """Inline code that is the name of an exported function or class links to its reference."""

    default_priority = 900

    def run(self, **kwargs) -> None:
        known = described_names(self.env)
        for literal in list(self.document.findall(nodes.literal)):
            text = literal.astext()
            name = text.removesuffix("()")
            # `loss` or `plan` is mostly a word, `bayes_risk`, `FitResult` or `plan()` is a name
            if name not in known or not (name != text or re.search("[_A-Z.]", name)):
                continue
            if any(isinstance(p, (nodes.reference, nodes.title)) for p in _ancestors(literal)):
                continue
            page, anchor = known[name]
            if page != self.env.docname:
                link = make_refnode(self.app.builder, self.env.docname, page, anchor, literal.deepcopy())
                literal.replace_self(link)


class LinkFullImages(SphinxPostTransform):
    """A figure leads to its file, which a browser shows at any size."""

    default_priority = 900
    formats = ("html",)

    def run(self, **kwargs) -> None:
        for image in list(self.document.findall(nodes.image)):
            if image["uri"] in self.env.images and not isinstance(image.parent, nodes.reference):
                link = nodes.reference(refuri="../" * self.env.docname.count("/") + f"_images/{self.env.images[image['uri']][1]}")
                image.replace_self(link)
                link += image


def described_names(env) -> dict[str, tuple[str, str]]:
    """Name of a function or class, in full and short where it is the only one -> page and anchor of its description."""
    entries = {name: entry for name, entry in env.domaindata["py"]["objects"].items() if entry.objtype in ("function", "class", "exception")}
    short = Counter(name.rpartition(".")[2] for name in entries)
    return {alias: (entry.docname, entry.node_id) for name, entry in entries.items() for alias in (name, name.rpartition(".")[2])
            if alias == name or short[alias] == 1}


def _ancestors(node: nodes.Node):
    while node.parent is not None:
        node = node.parent
        yield node


def escape_markup(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are plain text with `code` and $formulas$: what else reST takes for markup is escaped; a module's names its notebook."""
    for i, line in enumerate(lines):
        # as a field: napoleon would take what stands before a colon for the type, which the signature has
        if line.strip() in ("Returns:", "Yields:") and i + 1 < len(lines):
            lines[i], lines[i + 1] = "", f":{line.strip().lower()} {lines[i + 1].strip()}"
    for i, line in enumerate(lines):
        line = re.sub(
            r"\{(eq|numref|ref|doc|math)\}(?=`)", r":\1:", line
        )  # MyST's roles, as in the notebooks
        line = re.sub(r"^(\s+\w+: \w{1,3})\.(?= |$)", r"\1\.", line)  # "levels: L." begins no list
        parts = re.split(r"(``[^`]+``|^:\w+:|:\w+:`[^`]+`|`[^`]+`|\$[^$]+\$)", line)
        for j, part in enumerate(parts):
            if j % 2 == 0:
                part = re.sub(r"\*(?=\S)|(?<=\S)\*", r"\*", part)
                part = re.sub(r"\|(?=\S)|(?<=\S)\|", r"\|", part)
                part = re.sub(r"(?<=\w)_(?!\w)", r"\_", part)
                part = re.sub(r"^(?=\w)", "\\ ", part) if j else part  # `unit`s: text may touch code
                part = re.sub(r"(?<=\w)$", "\\ ", part) if j + 1 < len(parts) else part
            elif part.startswith("$"):
                part = f":math:`{part[1:-1]}`"
            parts[j] = part
        lines[i] = "".join(parts)
    if what == "module":
        notebook = re.search(r"File to edit: (?:\.\./)+nbs/(.+)\.ipynb", Path(obj.__file__).read_text(encoding="utf-8"))
        lines += ["", f"Shown and tested in :doc:`/{notebook[1]}`.", ""] if notebook else []
        lines += commands(obj)


def plain_factories(app, what, name, obj, options, signature, returns) -> tuple[str, str] | None:
    """A dataclass's defaults that are made anew are written as dots: `<factory>` is no Python, and a signature that does not parse is shown raw."""
    return (signature.replace("<factory>", "..."), returns) if signature and "<factory>" in signature else None


def commands(module) -> list[str]:
    """Lines for the commands of a module, which autodoc passes over; each with the anchor to which its source links back."""
    found = {name: value for name in getattr(module, "__all__", []) if isinstance(value := getattr(module, name), click.Command)}
    lines = [f'   <p id="{module.__name__}.{name}"><code>{html.escape(value.name)}</code> {html.escape(value.get_short_help_str(200))}</p>' for name, value in found.items()]
    return [".. raw:: html", "", *lines, ""] if found else []


def source_links_to_reference(app, env) -> None:
    """From a module's source back to its reference: viewcode takes the first page that shows a name, a notebook's without the anchor."""
    for module, entry in getattr(env, "_viewcode_modules", {}).items():
        if entry:
            used = entry[2]
            used.update(dict.fromkeys(used, f"api/{module}"))


def number_figures_by_page(app, env) -> None:
    """Each page begins with Fig. 1: a new page leaves the numbers of the others as they were."""
    for figures in [numbers for kinds in env.toc_fignumbers.values() for numbers in kinds.values()]:
        figures.update({anchor: (i,) for i, anchor in enumerate(figures, start=1)})


def add_scripts(app, page, template, context, doctree) -> None:
    """The script of the planner on a page that holds one, and the pages' subtitles for the results of a search; a module's source has another title than its reference."""
    if page.startswith("_modules/"):
        context["title"] = f"Source of {context['title']}"
    if '<div class="planner">' in context.get("body", ""):
        app.add_js_file("planner.js")
    if page == "search":
        app.add_js_file("subtitles.js", priority=100)


def fill_gallery(app, page, template, context, doctree) -> None:
    """All figures of chapters and results on one page, each with the beginning of its caption and a link to where it is."""
    if page != "reference/gallery":
        return
    parts = []
    for name in (name for name in app.env.toctree_includes[app.config.root_doc] if name.startswith(("results/", "theory/"))):
        shown = []
        for figure in app.env.get_doctree(name).findall(nodes.figure):
            image, caption = (next(iter(figure.findall(kind)), None) for kind in (nodes.image, nodes.caption))
            if image is not None and caption is not None and image["uri"] in app.env.images:
                file, alt = app.env.images[image["uri"]][1], html.escape(image.get("alt", ""), quote=True)
                words = "".join(rf'<span class="math">\({html.escape(part.astext())}\)</span>' if isinstance(part, nodes.math) else html.escape(part.astext()) for part in caption.children)
                shown.append(f'<a href="../{name}.html#{figure["ids"][0] if figure["ids"] else ""}"><img src="../_images/{file}" alt="{alt}"><span>{words.partition(". ")[0]}</span></a>')
        if shown:
            parts.append(f'<h2><a href="../{name}.html">{html.escape(app.env.titles[name].astext())}</a></h2><div class="gallery">{"".join(shown)}</div>')
    context["body"] = context["body"].replace('<div class="gallery"></div>', "".join(parts))


def setup(app) -> None:
    app.connect("env-updated", source_links_to_reference)
    app.connect("env-check-consistency", number_figures_by_page)  # Sphinx has numbered them by then
    app.connect("sphinx-click-process-epilog", lambda app, context, lines: lines.clear())  # the page has it as lists
    app.connect("html-page-context", add_scripts)
    app.connect("html-page-context", fill_gallery)
    app.set_html_assets_policy("always")  # a title with a formula stands in every page's sidebar
    app.add_directive("rst", ReStructuredText)
    app.add_post_transform(LinkExportedNames)
    app.add_post_transform(LinkFullImages)
    app.connect("autodoc-process-docstring", escape_markup, priority=100)  # before napoleon
    app.connect("autodoc-process-signature", plain_factories)
