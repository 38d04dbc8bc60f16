"""The plugin for pytest: the tools of `postlude.testing` as fixtures.

It is no module of the package, and imports that only when a fixture is used: pytest
loads plugins at its start, when nothing measures coverage yet.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from postlude.testing import CapturedTasks


@pytest.fixture
def captured_tasks() -> Generator[CapturedTasks]:
    """Records background tasks instead of running them, as capture_tasks() does."""
    from postlude.testing import capture_tasks  # noqa: PLC0415 - only now

    with capture_tasks() as captured:
        yield captured


@pytest.fixture
def raised_failures() -> Generator[None]:
    """Raises the failures of tasks when the test has ended, as raise_failures() does.

    Use it before the fixture that makes the client, or as an autouse fixture.
    """
    from postlude.testing import raise_failures  # noqa: PLC0415 - likewise

    with raise_failures():
        yield
