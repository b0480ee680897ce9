"""What the documentation says to type runs, and its links lead somewhere."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from doc_pages import ROOT, RUNS, Block, blocks, prose, run_page

pytestmark = [pytest.mark.timeout(1800), pytest.mark.filterwarnings("ignore")]

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", DOCS / "training.md", DOCS / "planning.md"]
PAGES += [DOCS / "comparison.md", DOCS / "migration.md", *sorted((DOCS / "guide").glob("*.md"))]
BUILT = DOCS / "_build"
WRITTEN = [p for p in sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")]) if BUILT not in p.parents]
EVERY_BLOCK = [block for page in PAGES for block in blocks(page)]
_LINK = re.compile(r"\[[^\]]*\]\(<?(?P<target>[^)\s>]+)>?(?: \"[^\"]*\")?\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.language in RUNS for b in blocks(page))], ids=_name)
@pytest.mark.long
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    run_page(page, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({b.page for b in EVERY_BLOCK if b.kind == "slow"}), ids=_name)
def test_the_slow_code_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    run_page(page, tmp_path, slow=True)


@pytest.mark.parametrize("block", [b for b in EVERY_BLOCK if b.kind == "skip"], ids=str)
def test_code_that_cannot_run_here(block: Block) -> None:
    pytest.skip(block.why)


def test_every_block_runs_or_is_output() -> None:
    assert len(EVERY_BLOCK) > 30
    assert not [str(block) for block in EVERY_BLOCK if block.language not in (*RUNS, "text", "yaml", "json")]
    marked = sum(len(re.findall("^<!-- skip:", page.read_text(encoding="utf-8"), re.MULTILINE)) for page in PAGES)
    assert marked == sum(block.kind == "skip" for block in EVERY_BLOCK), "a marker stands before no block"


def _anchors(page: Path) -> set[str]:
    """GitHub's anchors of the headings, which MyST makes too."""
    headings = [re.sub(r"[`*]|\]\([^)]*\)|\[", "", title) for title in _HEADING.findall(prose(page))]
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", WRITTEN, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for link in _LINK.finditer(prose(page)):
        target = link["target"]
        parts = urlsplit(target)
        if parts.scheme:
            if parts.scheme not in ("https", "mailto") or (parts.scheme == "https" and "." not in parts.netloc):
                dead.append(target)
            continue
        file = (page.parent / parts.path).resolve() if parts.path else page
        if not file.exists() or (parts.fragment and file.suffix == ".md" and parts.fragment not in _anchors(file)):
            dead.append(target)
    assert not dead, f"{_name(page)} links to {dead}"


def test_every_page_is_in_the_contents() -> None:
    listed = (DOCS / "index.md").read_text(encoding="utf-8").splitlines()
    listed += [f"api/{line}" for line in (DOCS / "api" / "index.md").read_text(encoding="utf-8").splitlines()]
    pages = {str(p.relative_to(DOCS).with_suffix("")) for p in WRITTEN if DOCS in p.parents} - {"index"}
    assert not {page for page in pages if not any(fnmatch(page, line) for line in listed)}


def test_files_named_for_a_change_are_there() -> None:
    named = set(re.findall(r"`([\w/]+\.py)`", (DOCS / "where-to-change.md").read_text(encoding="utf-8")))
    roots = (ROOT / "src" / "lema", ROOT / "tests", ROOT)
    assert len(named) > 20
    assert not [name for name in sorted(named) if not any((root / name).is_file() for root in roots)]


def test_every_run_is_listed() -> None:
    listed = (DOCS / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert not [
        p.name for p in (DOCS / "benchmarks").glob("*.md") if p.name != "README.md" and f"({p.name})" not in listed
    ]
