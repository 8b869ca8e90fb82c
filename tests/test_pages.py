"""README and the pages of `docs/`: as short as they should be, made from the committed results, and their code runs."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

import bench.__main__
import run
from bench.reporting import readme, training_page
from bench.reporting.records import read_results
from tests.processes import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Whose Python runs as it stands, block after block in one namespace; the others' is run by the tests of their subject.
RUN = ["idea.md", "quick_start.md", "plain_pytorch.md", "glossary.md", "faq.md"]


def without_results(text):
    """Return a page with nothing between its markers."""
    emptied = re.sub(r"(<!-- results:\w+ -->\n).*?\n(<!-- /)", r"\1\2", text, flags=re.DOTALL)
    assert len(emptied) < len(text) - 500
    return emptied


def test_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_readme_has_the_figures_of_the_committed_results():
    """Where it fails: `python -m bench readme`."""
    results, steps = read_results(readme.RESULTS), readme.Steps.read(readme.STEPS)
    assert readme.fill_sections(README, results, steps) == README
    drawn = readme.pictures(steps)
    assert {path.name for path in readme.PICTURES.iterdir()} == set(drawn)
    for name, drawing in drawn.items():
        assert (readme.PICTURES / name).read_text(encoding="utf-8") == drawing, name
        ElementTree.fromstring(drawing)


def test_the_command_writes_what_stands_there(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(without_results(README), encoding="utf-8")
    readme.write_readme(page, folder=tmp_path / "pictures")
    assert page.read_text(encoding="utf-8") == README
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["idea.svg", "step_time.svg"]


def test_the_page_of_training_has_the_figures_of_the_committed_steps():
    """Where it fails: `python -m bench training`."""
    page = training_page.PAGE.read_text(encoding="utf-8")
    assert training_page.fill_page(page) == page
    # Two rows of a table by hand are of the same files; those above them are of code that is no longer there.
    for row, file in (("SwiGLU's two products", readme.STEPS), ("one layer,", training_page.ONE_LAYER)):
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {row}"))
        measured = [readme.Steps.read(file).figure("B", 64, patch, "ours") for patch in (8, 4, 2, 1)]
        figures = ["-" if time is None else f"{time:.1f}" if time > 10 else f"{time:.2f}" for time in measured]
        assert line.strip("| ").split(" | ")[1:] == figures


def test_the_tables_of_training_are_written_by_their_command(tmp_path):
    committed = training_page.PAGE.read_text(encoding="utf-8")
    page = tmp_path / "training.md"
    page.write_text(without_results(committed), encoding="utf-8")
    assert bench.__main__.main(["training", "--page", str(page)]) == 0
    assert page.read_text(encoding="utf-8") == committed


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(page):
    """The site's build checks those between its pages, and their headings; this one needs no MkDocs, and has README."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("name", RUN)
def test_the_code_of_a_page_runs(name):
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    names = {"__name__": "page"}
    for snippet in snippets:
        exec(compile(snippet, name, "exec"), names)


def test_the_site_is_built_with_its_own_packages_alone():
    """run.py reads the list from setup.py: a page must not need torch to be made."""
    packages = run.requirements("docs")
    assert any(package.startswith("mkdocs-material") for package in packages)
    assert not any(package.startswith(("torch", "npp_kernels", ".")) for package in packages)
    with pytest.raises(ValueError, match="expected a list poems, found none"):
        run.requirements("poems")
