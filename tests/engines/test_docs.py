"""Each Python block of what the documentation tells of engines runs."""

from pathlib import Path

import pytest
from test_docs import ENGINES, each, run


@each(ENGINES)
def test_the_python_blocks_of_a_file_run_in_order(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Engines look at the module of a function.
    run(path, __name__=__name__)
