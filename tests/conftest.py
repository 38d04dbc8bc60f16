import logging
from collections.abc import Callable

import pytest
from loops import BACKENDS, Backend
from places import Place


@pytest.fixture(params=BACKENDS)
def anyio_backend(request: pytest.FixtureRequest) -> Backend:
    """Runs each async test on asyncio, uvloop and Trio."""
    return BACKENDS[request.param]


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
