"""Every notebook runs from top to bottom and is stored with its outputs.

The code cells run in one fresh interpreter, so the tests need no notebook server. The
settings of the first cell are replaced by smaller ones.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flax_resnetv2 import DataConfig
from flax_resnetv2.data.datasets import prepared_directory

HAS_CIFAR10 = prepared_directory(DataConfig(name="cifar10")) is not None
SMOKE = {
    "01_first_network": {"STEPS": 40},
    "02_inside_a_residual_unit": {"STEPS": 24, "EVERY": 8, "UNITS": 2},
    "03_train_cifar10": {
        "DATA": "cifar10" if HAS_CIFAR10 else "embedded_shapes",
        "TRAIN_IMAGES": 1_024,
        "TEST_IMAGES": 300,
        "EPOCHS": 1,
        "PRESET": "he2016-resnet20",
    },
    "04_latents_and_transfer": {"STEPS": 30, "ENCODER_STEPS": 15, "FEW": 10},
    "05_many_devices": {"STEPS": 2, "DEVICES": 4},
}
"""Settings that replace those of the first cell."""
NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def code_cells(path):
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path):
    first, *rest = ("".join(cell["source"]) for cell in code_cells(path))
    for name, value in SMOKE[path.stem].items():
        first, count = re.subn(rf"(?m)^{name} = [^#\n]*", f"{name} = {value!r}", first)
        assert count == 1, name
    code = "\n".join([first, *rest])
    environment = os.environ | {"MPLBACKEND": "agg", "PYTHONPATH": str(path.parents[2])}
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
    assert {path.stem for path in NOTEBOOKS} == set(SMOKE)
