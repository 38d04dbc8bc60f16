"""The demonstration, and that it does not show what is not so."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

DEMO = Path(__file__).with_name("demo.py")
STOCK, OURS = "starlette.background", "postlude"


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DEMO), *arguments],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        check=False,
        timeout=60,
    )


def test_the_demo_shows_what_starlette_loses_and_postlude_keeps(tmp_path: Path) -> None:
    image = tmp_path / "timeline.svg"
    shown = demo("--svg", str(image))
    assert (shown.returncode, shown.stderr) == (0, "")
    ours, stock = shown.stdout.split("The same app and request")
    assert "from postlude import BackgroundTasks\n" in ours
    assert "LookupError: no courier goes to Atlantis\n" in ours
    assert "in background task 'starlette_app.book_courier'\n" in ours
    assert "4 of 4 tasks ran." in ours
    assert "never started" not in ours
    assert "from starlette.background import BackgroundTasks\n" in stock
    assert "2 of 4 tasks ran." in stock
    assert stock.count("never started\n") == 2
    assert ours.count("FAILED") == stock.count("FAILED") == 1

    shapes = [shape.get("class") for shape in ET.parse(image).iter()]
    assert shapes.count("missed") == 2
    assert shapes.count("ran") == 1 + 3
    assert shapes.count("failed") == 2


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ((STOCK, STOCK), f"notify_warehouse runs with 'from {STOCK} import "),
        ((OURS, OURS), f"notify_warehouse never starts with 'from {OURS} import "),
    ],
    ids=["nothing kept", "nothing lost"],
)
def test_the_demo_fails_if_its_claims_are_false(
    modules: tuple[str, str], message: str
) -> None:
    shown = demo("--modules", *modules)
    assert shown.returncode == 1
    assert shown.stdout == ""
    assert shown.stderr.startswith(f"demo: it is not true that {message}")
    assert "Traceback" not in shown.stderr


def test_the_image_in_the_documentation_is_one_of_the_demo() -> None:
    tree = ET.parse(DEMO.parents[1] / "docs" / "timeline.svg")
    texts = [text.text for text in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("never started") == 2
    assert "4 of 4 tasks ran" in texts
