"""Each Python block of the README, the documentation and the docstrings runs."""

from pathlib import Path

import pytest
from sybil import Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers import myst, rest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
MODULES = sorted(ROOT.glob("src/postlude/**/*.py"))

SYBIL = Sybil(
    [myst.PythonCodeBlockParser(), myst.SkipParser(), rest.PythonCodeBlockParser()],
    document_types={".py": PythonDocStringDocument},
)


@pytest.mark.parametrize(
    "path", [*PAGES, *MODULES], ids=lambda path: str(path.relative_to(ROOT))
)
def test_the_python_blocks_of_a_file_run_in_order(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for example in SYBIL.parse(path).examples():
        example.evaluate()


@pytest.mark.parametrize(
    ("path", "count"),
    [(ROOT / "README.md", 2), (ROOT / "src/postlude/_tasks.py", 3)],
    ids=["page", "module"],
)
def test_the_blocks_are_found(path: Path, count: int) -> None:
    assert len([*SYBIL.parse(path).examples()]) == count
