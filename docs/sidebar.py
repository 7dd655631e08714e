"""The site's sidebar, from `sidebar.toml` and the notebooks that there are."""
import tomllib
from collections.abc import Iterable
from pathlib import Path


def target(entry: str) -> str:
    """The page of an entry of the sidebar: `Other title <page>` or `page`."""
    return entry.rpartition("<")[2].rstrip(">")


def read_sidebar(nbs: Path) -> list[dict]:
    """Groups of `sidebar.toml`, each with those of its pages that exist below the folder of notebooks; what no line names is at the end of its folder's group or section."""
    paths = [path.relative_to(nbs) for path in nbs.rglob("*.ipynb")]
    pages = {path.as_posix().removesuffix(".ipynb") for path in paths if not any(part.startswith((".", "_")) for part in path.parts)} - {"index"}
    groups = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))["group"]
    sections = groups[-1]["section"]
    for section in sections:
        section["pages"] = [f"{section['folder']}/{name}" for name in section.get("pages", [])]
    named = {target(entry) for part in (*groups, *sections) for entry in part.get("pages", [])}
    home = {part["folder"]: part for part in (*groups, *sections) if "folder" in part}
    for page in sorted(pages - named):
        folder = str(Path(page).parent)
        if folder not in home:
            sections.append({"title": folder.capitalize(), "folder": folder, "pages": []})
            home[folder] = sections[-1]
        home[folder]["pages"].append(page)
    for part in (*groups, *sections):
        part["pages"] = [entry for entry in part.get("pages", []) if target(entry) in pages]
    return groups


def front_matter(groups: list[dict], modules: Iterable[str]) -> tuple[str, dict[str, str]]:
    """The sidebar as hidden toctrees of the front page, and the pages (name -> text) that fold the sections and the modules, which autosummary describes."""
    listed, texts, trees = "\n".join(f"   {module}" for module in modules), {}, {group["title"]: [*group["pages"]] for group in groups}
    texts["reference/gallery.md"] = '# Gallery of figures\n\nThe figures of all results and chapters. Each leads to its page.\n\n<div class="gallery"></div>\n'
    trees[groups[0]["title"]].append("reference/gallery")
    for section in filter(lambda section: section["pages"], groups[-1]["section"]):
        name = f"reference/{Path(section['folder']).name or 'project'}"
        texts[f"{name}.md"] = f"# {section['title']}\n\n{section.get('text', '')}\n\n```{{toctree}}\n\n" + "\n".join(f"/{page}" for page in section["pages"]) + "\n```\n"
        trees[groups[-1]["title"]].append(name)
    if listed:
        trees[groups[-1]["title"]].append("api/index")
        texts["api/index.rst"] = ("Modules\n=======\n\nWhat the notebooks export, by module. Losses are in nats.\n\n"
                                  f".. autosummary::\n   :toctree: .\n   :template: reference.rst\n\n{listed}\n")
    sidebar = "\n\n".join(f"```{{toctree}}\n:hidden:\n:caption: {title}\n\n" + "\n".join(pages) + "\n```" for title, pages in trees.items() if pages)
    return sidebar, texts
