"""Each Python block of the README, the documentation and the docstrings runs."""

import logging
from collections.abc import Generator
from pathlib import Path

import prometheus_client
import pytest
from sybil import Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers import myst, rest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
MODULES = sorted(ROOT.glob("src/postlude/**/*.py"))
# What needs the libraries of the engines is run where the tests of these are.
ENGINES = [
    ROOT / "docs/engines.md",
    *sorted(ROOT.glob("src/postlude/engines/[!_]*.py")),
]

SYBIL = Sybil(
    [myst.PythonCodeBlockParser(), myst.SkipParser(), rest.PythonCodeBlockParser()],
    document_types={".py": PythonDocStringDocument},
)


@pytest.fixture(autouse=True)
def as_if_nothing_had_been_run() -> Generator[None]:
    """Undoes what a page sets up for a whole process."""
    logger, registry = logging.getLogger("postlude"), prometheus_client.REGISTRY
    handlers, collectors = {*logger.handlers}, {*registry._collector_to_names}
    level = logger.level
    yield
    logger.setLevel(level)
    for handler in {*logger.handlers} - handlers:
        logger.removeHandler(handler)
    for collector in {*registry._collector_to_names} - collectors:
        registry.unregister(collector)


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "path", paths, ids=lambda path: str(path.relative_to(ROOT))
    )


def run(path: Path, **namespace: object) -> None:
    document = SYBIL.parse(path)
    document.namespace.update(namespace)
    for example in document.examples():
        example.evaluate()


@each([path for path in [*PAGES, *MODULES] if path not in ENGINES])
def test_the_python_blocks_of_a_file_run_in_order(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(path)


@pytest.mark.parametrize(
    ("path", "count"),
    [(ROOT / "README.md", 2), (ROOT / "src/postlude/_tasks.py", 3)],
    ids=["page", "module"],
)
def test_the_blocks_are_found(path: Path, count: int) -> None:
    assert len([*SYBIL.parse(path).examples()]) == count
