import logging
from collections.abc import Callable
from typing import Any

import pytest
from places import Place


@pytest.fixture(
    params=[
        pytest.param(("asyncio", {"debug": True}), id="asyncio"),
        pytest.param(("asyncio", {"debug": True, "use_uvloop": True}), id="uvloop"),
        pytest.param(("trio", {}), id="trio"),
    ]
)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """Runs each async test on asyncio, uvloop and Trio."""
    backend: tuple[str, dict[str, Any]] = request.param
    return backend


@pytest.fixture(params=[None, False, True], ids=["alone", "attached", "detached"])
def place(request: pytest.FixtureRequest) -> Place:
    """Runs each test without the middleware, and with it in both modes."""
    return Place(request.param)


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[str]]:
    """Returns what was logged at a level by then."""
    caplog.set_level(logging.INFO, "postlude")

    def at(level: str) -> list[str]:
        return [
            record.getMessage()
            for record in caplog.records
            if record.levelname == level and record.name == "postlude"
        ]

    return at
