"""Every notebook runs from top to bottom, as a person would run it, and shows results.

The code cells run in one fresh interpreter, without a notebook server: the project's
users need none to run the tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def code_cells(path):
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path):
    code = "\n".join("".join(cell["source"]) for cell in code_cells(path))
    environment = os.environ | {"MPLBACKEND": "agg", "PYTHONPATH": str(path.parents[1])}
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_its_outputs(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(o["output_type"] == "error" for c in cells for o in c["outputs"])
    assert (
        sum("image/png" in o.get("data", {}) for c in cells for o in c["outputs"]) > 0
    )


def test_there_are_notebooks():
    assert NOTEBOOKS
