"""What mkdocs adds to the pages of docs/ (`make docs`): README as the start page, the API, and links that lead there.

Pages are written for the forge, where links are paths between files. Here each becomes a path between pages.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = {  # file of the repository: its place in the site
    "README.md": "index.md",
    "README.zh-CN.md": "index.zh-CN.md",
    **{name: name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "CODE_OF_CONDUCT.md")},
    **{name: name for name in ("CITATION.cff", "LICENSE", "cluster.yaml")},
}
API = {
    "client": ("Client of the service", ["m2d.serving.client"]),
    "pipeline": ("Pipeline", ["m2d.export.pipeline"]),
    "generator": (
        "Checkpoints and the generator",
        ["m2d.models.checkpoint", "m2d.generation.generator", "m2d.generation.plan"],
    ),
    "classes": ("Classes", ["m2d.classes"]),
    "extractors": ("Feature extractors", ["m2d.models.extractors.base", "m2d.models.extractors"]),
    "diffusion": ("Diffusion", [f"m2d.diffusion.{name}" for name in ("interpolant", "solver", "feature_prior")]),
    "losses": ("Losses", ["m2d.training.losses"]),
    "metrics": (
        "Metrics",
        [f"m2d.metrics.{name}" for name in ("distances", "scores", "neighbours", "bootstrap", "linear_probe")],
    ),
    "errors": ("Errors", ["m2d.errors"]),
}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for name, uri in OUTSIDE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    for name, (title, modules) in API.items():
        content = "\n\n".join([f"# {title}", *(f"::: {module}" for module in modules)])
        files.append(File.generated(config, f"api/{name}.md", content=content))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages."""
    uri = page.file.src_uri
    if uri.startswith("index."):
        page.meta["hide"] = ["navigation"]  # a tab of one page
    source = next((name for name, place in OUTSIDE.items() if place == uri), f"docs/{uri}")

    def between_pages(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        if (ROOT / target).is_dir():
            target += "/README.md"
        place = OUTSIDE.get(target, target.removeprefix("docs/"))
        return f"]({posixpath.relpath(place, posixpath.dirname(uri) or '.')}"

    return re.sub(r"\]\(([^)#:\s]+)(?=[)#])", between_pages, markdown)


def on_post_page(output: str, *, page: Page, config: MkDocsConfig) -> str:
    """Say the page's language, by which browsers choose glyphs, and readers their voice."""
    return output.replace('<html lang="en"', '<html lang="zh-CN"', 1) if ".zh-CN." in page.file.src_uri else output
