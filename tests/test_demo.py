"""The demonstration, and that it does not show what is not so."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

DEMO = Path(__file__).with_name("demo.py")
STOCK, OURS = "starlette.background", "postlude"
WRAPPED = f"{OURS}+middleware"


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
    assert max(map(len, shown.stdout.splitlines())) <= 80
    orders, deploys = shown.stdout.split("A deploy.")
    subject, _, rest = orders.partition("Starlette: ")
    stock, _, rest = rest.partition("postlude: ")
    ours, _, wrapped = rest.partition("postlude + middleware: ")

    assert "The second one fails.\n" in subject
    assert "from starlette.background import BackgroundTasks\n" in stock
    assert "2 of 4 tasks ran. The server closed the connection." in stock
    assert stock.count("never started\n") == 2
    assert "from postlude import BackgroundTasks\n" in ours
    assert "4 of 4 tasks ran. The server closed the connection." in ours
    assert "in background task 'starlette_app.book_courier'\n" in ours
    assert "app = BackgroundTasksMiddleware(app)\n" in wrapped
    assert "4 of 4 tasks ran. The next order came on the same connection." in wrapped
    assert "background task 'starlette_app.book_courier' failed\n" in wrapped
    for run in stock, ours, wrapped:
        assert run.count("LookupError after") == 1
        assert run.count("LookupError: no courier goes to Atlantis\n") == 1
    assert "never started" not in ours + wrapped
    assert "Exception in ASGI application" not in wrapped

    lost, named, kept = deploys.splitlines()[-3:]
    assert "lost, 1 of them in the log" in lost
    assert "lost, 1 of them in the log" not in named
    assert "50 of 50 ran, the server ended after" in kept

    shapes = [shape.get("class") for shape in ET.parse(image).iter()]
    assert shapes.count("missed") == 2 + 2
    assert shapes.count("ran") == 1 + 3 + 3 + 3
    assert shapes.count("failed") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--variants", STOCK, STOCK, WRAPPED],
            f"notify_warehouse runs with 'from {STOCK} import ",
        ),
        (
            ["--variants", OURS, OURS, WRAPPED],
            f"notify_warehouse never starts with 'from {OURS} import ",
        ),
        (
            ["--variants", STOCK, OURS, OURS],
            f"the connection is kept with 'from {OURS} import ",
        ),
        (["--grace=20"], f"a deploy loses tasks with 'from {STOCK} import "),
    ],
    ids=["nothing kept", "nothing lost", "no middleware", "time for all"],
)
def test_the_demo_fails_if_its_claims_are_false(
    arguments: list[str], message: str
) -> None:
    shown = demo(*arguments)
    assert shown.returncode == 1
    assert shown.stdout == ""
    assert shown.stderr.startswith(f"demo: it is not true that {message}")
    assert "Traceback" not in shown.stderr


def test_the_image_in_the_documentation_is_one_of_the_demo() -> None:
    tree = ET.parse(DEMO.parents[1] / "docs" / "timeline.svg")
    texts = [text.text for text in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("never started") == 2
    assert texts.count("4 of 4 tasks ran") == 2
    assert texts.count("connection kept") == 1
    assert "50 of 50 ran" in texts
