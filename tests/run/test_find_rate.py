"""The range test on a tiny net: what it leaves, where it ends, what it suggests."""

import json

import jax
import pytest

from flax_resnetv2 import RunError, UsageError
from flax_resnetv2.run import find_rate as find_rate_module
from flax_resnetv2.run.find_rate import find_rate
from tests.support import tiny

CONFIG = tiny.replace(tiny.config(schedule="one_cycle"), architecture=tiny.SMALL)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    tiny.patch_dataset(monkeypatch, tiny.dataset())


def run(directory, **more):
    return find_rate(CONFIG, directory, devices=jax.devices()[:1], **more)


def test_the_rate_rises_until_training_diverges(tmp_path):
    rate = run(tmp_path / "rates", steps=40, highest=1e6)
    assert {p.name for p in (tmp_path / "rates").iterdir()} == {
        "rates.jsonl",
        "learning_rate.png",
    }
    picture = (tmp_path / "rates" / "learning_rate.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    text = (tmp_path / "rates" / "rates.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    # From 1 to 10^6 in 40 steps, and no further than to where the loss explodes.
    assert 3 < len(lines) < 40
    for step, line in enumerate(lines):
        assert line["step"] == step
        expected = 10 ** (6 * (step + 1) / 40)
        assert line["learning_rate"] == pytest.approx(expected, rel=1e-4)
    losses = [line["loss"] for line in lines]
    average, weights = 0.0, 0.0
    for loss, line in zip(losses, lines, strict=True):
        average, weights = 0.9 * average + 0.1 * loss, 0.9 * weights + 0.1
        assert line["smoothed"] == pytest.approx(average / weights, rel=1e-9)
    lowest = min(lines, key=lambda line: line["smoothed"])
    assert rate == pytest.approx(lowest["learning_rate"] / 10)


def test_a_figure_that_cannot_be_drawn_loses_no_rate(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise ValueError("no LaTeX")

    monkeypatch.setattr(find_rate_module, "_draw", fail)
    assert run(tmp_path / "rates", steps=40, highest=1e6) > 0
    assert "learning_rate.png was not drawn (no LaTeX)" in caplog.text


def test_a_rate_that_never_was_too_high_is_no_answer(tmp_path):
    with pytest.raises(
        RunError, match=r"still falling at the highest rate, 0.05; give"
    ):
        run(tmp_path / "rates", steps=100, highest=0.05)


def test_a_run_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        UsageError, match="holds a run, which find-rate does not change"
    ):
        run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_memory_is_counted_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr("flax_resnetv2.run.find_rate.memory_limit", lambda _: 10_000)
    with pytest.raises(UsageError, match="memory"):
        run(tmp_path / "rates", steps=40, highest=1.0)
    assert not (tmp_path / "rates").exists()
