"""What MkDocs calls while it builds the site: pages that lie outside of `docs/`, and links to them.

README is the first page. The benchmarks' reports, CONTRIBUTING and CHANGELOG keep their paths; an example is a page
with its source. Links are written for those who read the files where they lie, so they are turned here.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "bench" / "results"
PAGES = [
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(str(path.relative_to(ROOT)) for path in sorted(REPORTS.glob("*/report.md"))),
]
PICTURES = [str(path.relative_to(ROOT)) for path in sorted(REPORTS.glob("*/*.png"))]
EXAMPLES = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "examples").glob("[!_]*.py"))]

# Where a file of the repository stands in the site, for those that do not lie in docs/.
PLACES = {"README.md": "index.md"} | {name: name for name in (*PAGES, *PICTURES)}
PLACES |= {name: name.removesuffix(".py") + ".md" for name in EXAMPLES}
SOURCES = {place: name for name, place in PLACES.items()}

PICTURE = re.compile(r"(?m)^!\[([^\]]*)\]\((\S+\.png)\)$")
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config: Any) -> Files:
    """Add what lies outside of `docs/`."""
    for name, place in PLACES.items():
        if name.endswith(".py"):
            files.append(File.generated(config, place, content=example_page(ROOT / name)))
        elif name.endswith(".md"):
            files.append(File.generated(config, place, content=(ROOT / name).read_text(encoding="utf-8")))
        else:
            files.append(File.generated(config, place, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    place = page.file.src_uri
    folder = posixpath.dirname(SOURCES.get(place, "docs/" + place))

    def turned(match: re.Match[str]) -> str:
        before, target, anchor, after = match.groups()
        name = posixpath.normpath(posixpath.join(folder, target))
        if "://" in target or not (ROOT / name).exists():
            return match.group(0)
        there = PLACES.get(name, name.removeprefix("docs/"))
        return before + posixpath.relpath(there, posixpath.dirname(place) or ".") + (anchor or "") + after

    markdown = PICTURE.sub(r"[![\1](\2)](\2)", markdown)  # a plot opens in its full size
    return LINK.sub(turned, markdown)


def example_page(path: Path) -> str:
    """Return the page of an example: its source, under the first line of its docstring."""
    source = path.read_text(encoding="utf-8")
    first = re.match(r'"""(.*?)(\n\n|""")', source, flags=re.DOTALL)
    about = " ".join(first.group(1).split()) if first else ""
    return f"# {path.stem}\n\n{about} The file is `{path.relative_to(ROOT)}`.\n\n```python\n{source}```\n"
