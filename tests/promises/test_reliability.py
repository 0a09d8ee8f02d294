"""Nothing lost, nothing silently wrong: what docs/reliability.md promises."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from flax_resnetv2 import (
    Checkpointer,
    Execution,
    Predictor,
    RunError,
    TrainState,
    UsageError,
    create_model,
)
from flax_resnetv2.data.batch import Split, evaluation_order, gather_batch
from flax_resnetv2.errors import Stopped
from flax_resnetv2.run import checkpoint, loop, run_directory, trainer
from flax_resnetv2.system import signals
from flax_resnetv2.training.augment import AugmentConfig, normalize, positions
from tests.support import tiny
from tests.support.runs import (
    CONFIG,
    EVERY_5,
    VALIDATED,
    Chunked,
    configuration,
    data,
    lines_of,
    ready_state,
    run_fit,
    stop_after,
    untimed,
)

STEPS = 12
"""Steps of CONFIG."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run, with checkpoints inside its epochs too."""
    directory = tmp_path_factory.mktemp("whole")
    run_fit(directory, EVERY_5, dataset=VALIDATED)
    return directory


@pytest.fixture
def go_on(tmp_path):
    """Run in a directory of this test."""
    return lambda config=EVERY_5, dataset=VALIDATED, workdir="run", **more: run_fit(
        tmp_path / workdir, config, dataset=dataset, **more
    )


@pytest.fixture
def copied(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def stored(directory, step):
    """The bytes of every array of a checkpoint, by orbax alone."""
    import orbax.checkpoint as ocp

    # Where the arrays lie does not matter here, which orbax warns of.
    with warnings.catch_warnings(action="ignore"), ocp.PyTreeCheckpointer() as reader:
        tree = reader.restore(directory / "checkpoints" / str(step) / "state")
    return {
        jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def assert_same_run(one, other, step=STEPS):
    assert untimed(lines_of(one)) == untimed(lines_of(other))
    assert stored(one, step) == stored(other, step)


# Exact resume


@pytest.mark.parametrize("steps", [1, 4, 6, 11])
def test_a_run_stopped_at_any_step_is_the_run_that_was_not(
    go_on, whole, monkeypatch, tmp_path, steps
):
    """In a line's window, at its end, before an evaluation, and before the last."""
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(Stopped, match=f"after step {steps} of 12; everything is"):
            go_on()
    assert max(map(int, os.listdir(tmp_path / "run" / "checkpoints"))) == steps
    go_on()
    assert_same_run(tmp_path / "run", whole)


def test_a_run_stopped_after_each_step_is_the_run_that_was_not(
    go_on, whole, monkeypatch, tmp_path
):
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        for _ in range(STEPS):
            with pytest.raises(Stopped):
                go_on()
    go_on()
    assert_same_run(tmp_path / "run", whole)
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert [start["step"] for start in starts] == list(range(STEPS + 1))


def test_a_signal_gives_up_an_evaluation_and_the_next_start_makes_up_for_it(
    go_on, whole, monkeypatch, tmp_path
):
    evaluate = trainer.Trainer.evaluate

    def interrupted(self, state, name, stop):
        stops = iter([False, True])
        return evaluate(self, state, name, lambda: next(stops))

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "evaluate", interrupted)
        with pytest.raises(Stopped, match="after step 6 of 12"):
            go_on()
    assert lines_of(tmp_path / "run")[-1]["split"] == "train"
    go_on()
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("fewer", [2, 3, 4])
def test_lines_of_a_checkpoint_that_was_killed_with_its_evaluation_are_completed(
    go_on, whole, copied, fewer
):
    """Whichever of the lines after its last checkpoint a killed run had written."""
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copied / "metrics.jsonl").write_text("".join(lines[: -fewer + 1]))
    shutil.rmtree(copied / "checkpoints" / "12")
    go_on()
    assert_same_run(copied, whole)


def test_chunks_of_steps_resume_as_single_steps_do(go_on, monkeypatch, tmp_path):
    """As on accelerators: stopped between two chunks, the bits are the same."""
    monkeypatch.setattr(loop, "Trainer", Chunked)
    go_on(workdir="straight")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)  # chunks: to the lines at 4, 8, ... and to 5, 6, 10
        with pytest.raises(Stopped, match="after step 5 of 12"):
            go_on()
    go_on()
    assert_same_run(tmp_path / "run", tmp_path / "straight")


# Evaluation counts each image once

MANY = tiny.dataset(train=8, test=10_000)


@pytest.fixture(scope="module")
def counted():
    """Logits of 10,000 images by one device, without batches of a run."""
    model = create_model(tiny.SMALL)
    variables = tiny.variables_of(model)
    pixels = AugmentConfig(mean=(0.4,) * 3, std=(0.25,) * 3)
    images = normalize(jax.numpy.asarray(MANY.splits["test"].image), pixels, "float32")
    apply = jax.jit(lambda images: model.apply(variables, images, train=False))
    return variables, pixels, np.asarray(apply(images))


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_any_devices_and_batches_count_ten_thousand_images(counted, devices):
    """Batches that divide 10,000, and that do not."""
    variables, pixels, logits = counted
    for batch in (1000, 768):
        config = configuration(batch_size=8, eval_batch_size=batch)
        config = replace(config, augment=pixels)
        run = tiny.trainer_of(config, MANY, jax.devices()[:devices])
        zeros = jax.tree.map(jax.numpy.zeros_like, variables)
        state = run.placement.replicate(
            TrainState(0, zeros["params"], {}, None, variables)
        )
        sums = run.evaluate(state, "test")
        labels = MANY.splits["test"].label
        right = int((logits.argmax(-1) == labels).sum())
        assert sums["count"] == 10_000
        assert abs(sums["correct"] - right) <= 1
        log_p = jax.nn.log_softmax(logits.astype(np.float64))
        loss = -np.asarray(log_p)[np.arange(10_000), labels].sum()
        assert sums["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_logits_do_not_depend_on_the_devices(counted, devices):
    variables, pixels, logits = counted
    config = replace(configuration(batch_size=8, eval_batch_size=1000), augment=pixels)
    run = tiny.trainer_of(config, MANY, jax.devices()[:devices])
    share = run.eval_batch // devices

    def gathered(variables, split, order, start):
        places = start + positions(share, run.placement.axis)
        batch = gather_batch(split, order, places)
        images = normalize(batch.image, pixels, "float32")
        mine = run.model.apply(variables, images, train=False)
        mine = jax.numpy.where(batch.mask[:, None], mine, 0)
        if run.placement.axis is None:
            return mine
        return jax.lax.all_gather(mine, run.placement.axis, tiled=True)

    whole = run.placement.map(gathered)
    order = run.placement.replicate(evaluation_order(10_000, run.eval_batch))
    found = [
        np.asarray(
            whole(run.placement.replicate(variables), run.split("test"), order, start)
        )
        for start in range(0, len(order), run.eval_batch)
    ]
    found = np.concatenate(found)
    np.testing.assert_allclose(found[:10_000], logits, rtol=1e-5, atol=1e-5)
    assert not found[10_000:].any()


# Another number of devices, another executor


def test_another_number_of_devices_goes_on_to_the_same_loss(
    go_on, monkeypatch, float64
):
    config = replace(
        configuration(ema_decay=0.9),
        execution=Execution(dtype="float64"),
    )
    given = {"dataset": data(), "create": ready_state}
    _, straight, _ = go_on(config, devices=1, workdir="straight", **given)
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Stopped):
            go_on(config, devices=2, **given)
    _, resumed, _ = go_on(config, devices=1, **given)
    assert [line["step"] for line in resumed] == [line["step"] for line in straight]
    for a, b in zip(straight, resumed, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-10)


def test_jit_with_named_shardings_takes_the_place_of_pmap(
    go_on, whole, monkeypatch, tmp_path
):
    """Bit for bit, and each goes on with the checkpoints of the other."""
    fit = loop.fit
    with monkeypatch.context() as patch:
        patch.setattr(loop, "fit", lambda *a, **k: fit(*a, executor="jit", **k))
        stop_after(patch, 7)
        with pytest.raises(Stopped):
            go_on()
    go_on()
    assert_same_run(whole, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "fit", lambda *a, **k: fit(*a, executor="jit", **k))
        go_on(workdir="other")
    assert_same_run(whole, tmp_path / "other")


def test_an_unknown_executor_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"executor='vmap' is unknown; choose .*'jit'"):
        loop.fit(configuration(), tmp_path / "run", executor="vmap")


# Damaged checkpoints


# Reads that orbax began and left when another one failed.
damaging = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def files_of(directory):
    """Of a checkpoint, those that a state or its record is read from."""
    return sorted(
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_file()
    )


def flip(path, at=None):
    bits = bytearray(path.read_bytes())
    bits[len(bits) // 2 if at is None else at] ^= 1
    path.write_bytes(bits)


DAMAGES = {
    "flipped": flip,
    "flipped at the start": lambda path: flip(path, 0),
    "flipped at the end": lambda path: flip(path, -1),
    "truncated": lambda path: path.write_bytes(
        path.read_bytes()[: path.stat().st_size // 2]
    ),
    "missing": Path.unlink,
}


@damaging
@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damage_of_a_file_changes_what_is_restored(copied, damage):
    """Each file of a checkpoint in turn: refused, or the same bits as without it."""
    directory = copied / "checkpoints" / "10"
    refused = 0
    with Checkpointer(copied / "checkpoints") as checkpoints:
        like = state_like(copied)
        reference, notes = checkpoints.restore(10, like)
        leaves = map(np.asarray, jax.tree.leaves(reference))
        by_orbax = stored(copied, 10).values()
        assert sorted(leaf.tobytes() for leaf in leaves) == sorted(by_orbax)
        for name in files_of(directory):
            path = directory / name
            original = path.read_bytes()
            if not original:
                continue
            DAMAGES[damage](path)
            try:
                found, said = checkpoints.restore(10, like)
            except checkpoint.DamagedError as error:
                assert str(directory) in str(error)
                refused += 1
            else:
                jax.tree.map(np.testing.assert_array_equal, found, reference)
                assert said == notes
            path.write_bytes(original)
        assert refused >= 4


def state_like(directory):
    config = run_directory.load_config(directory)
    run = tiny.trainer_of(config, VALIDATED, jax.devices()[:2])
    return run.state_shapes()


def heaviest(directory):
    return max(
        (p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )


@damaging
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_run_goes_on_from_the_newest_whole_checkpoint(
    go_on, whole, copied, caplog, damage
):
    DAMAGES[damage](heaviest(copied / "checkpoints" / "12" / "state"))
    DAMAGES[damage](heaviest(copied / "checkpoints" / "10" / "record"))
    go_on()
    assert_same_run(copied, whole)
    said = [r.getMessage() for r in caplog.records if "damaged" in r.getMessage()]
    assert len(said) == 2
    assert all(text.endswith("resuming from step 6") for text in said)
    names = {path.name for path in (copied / "checkpoints").iterdir()}
    assert {"damaged-12-1", "damaged-10-1", "10", "12"} <= names


@damaging
def test_without_a_whole_checkpoint_a_run_stops_and_touches_nothing(go_on, copied):
    for step in os.listdir(copied / "checkpoints"):
        flip(heaviest(copied / "checkpoints" / step / "state"))
    before = sorted(copied.rglob("*"))
    with pytest.raises(
        RunError, match=r"all checkpoints of .* are damaged: .*from a copy"
    ):
        go_on()
    assert sorted(copied.rglob("*")) == before


@damaging
def test_a_predictor_reads_the_newest_whole_checkpoint_and_changes_nothing(copied):
    whole = Predictor.find(copied)
    flip(heaviest(copied / "checkpoints" / "12" / "state"))
    before = sorted(copied.rglob("*"))
    older = Predictor.find(copied)
    assert sorted(copied.rglob("*")) == before
    images = VALIDATED.splits["test"].image
    assert (older(images) != whole(images)).any()


# The best


def test_the_best_on_the_validation_split_stays(go_on, monkeypatch, tmp_path):
    """Worse ones push only others out."""
    config = replace(CONFIG, keep_checkpoints=1, evaluate_every=1)
    config = replace(config, train=replace(config.train, epochs=4))
    accuracies = iter([0.5, 0.75, 0.25, 0.25])
    record = loop.Reporter._record

    def graded(self, split, *rest, **more):
        line = record(self, split, *rest, **more)
        if split == "validation":
            line["accuracy"] = next(accuracies)
        return line

    monkeypatch.setattr(loop.Reporter, "_record", graded)
    go_on(config)
    checkpoints = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert checkpoints == {"12", "24"}


def test_the_best_is_the_first_of_the_highest():
    scores = {"1": 0.9, "2": 0.7, "3": 0.7, "4": 0.6}
    assert checkpoint.best_step(scores, [4, 3, 2]) == 2
    assert checkpoint.best_step(scores, [5]) is None


def test_the_best_can_be_asked_for(copied):
    """Whatever became of the lines."""
    scores = {
        str(line["step"]): line["accuracy"]
        for line in lines_of(copied)
        if line["split"] == "validation"
    }
    best = checkpoint.best_step(scores, [5, 6, 10, 12])
    (copied / "metrics.jsonl").unlink()
    predictor = Predictor.find(copied, "best")
    saved = stored(copied, best)
    kernel = predictor.variables["params"]["head"]["classifier"]["kernel"]
    assert np.asarray(kernel).tobytes() in saved.values()


def test_without_a_validation_split_there_is_no_best(go_on, tmp_path):
    go_on(configuration(epochs=1), data(), devices=1, create=ready_state)
    with pytest.raises(UsageError, match=r"no best checkpoint.*--data\.validation"):
        Predictor.find(tmp_path / "run", "best")


# Numbers that are not finite


@pytest.mark.parametrize("one_by_one", [True, False])
def test_a_loss_that_is_not_finite_stops_the_run(
    go_on, monkeypatch, tmp_path, one_by_one
):
    """At step 8 of a window of three; the state of step 6 is the last that is saved."""
    config = replace(configuration(), log_every=3, checkpoint_steps=2)
    make = trainer.make_train_step

    def poisoned(*arguments, **more):
        step = make(*arguments, **more)

        def spoil(state, batch):
            state, metrics = step(state, batch)
            bad = state.step >= 8
            metrics["loss"] = jax.numpy.where(bad, jax.numpy.nan, metrics["loss"])
            metrics["finite_steps"] = jax.numpy.where(bad, 0, 1)
            return state, metrics

        return spoil

    monkeypatch.setattr(trainer, "make_train_step", poisoned)
    if not one_by_one:
        monkeypatch.setattr(loop, "Trainer", Chunked)
    with pytest.raises(
        RunError, match="at step 8 is not a finite number; the checkpoint of step 6 "
    ):
        go_on(config, data(), devices=1, create=ready_state)
    assert max(map(int, os.listdir(tmp_path / "run" / "checkpoints"))) == 6
    lines = lines_of(tmp_path / "run")
    assert [line["step"] for line in lines if line["split"] == "train"] == [3, 6]


def test_a_learning_rate_without_bounds_is_seen(go_on):
    config = configuration(learning_rate=1e6, weight_decay=1e6)
    with pytest.raises(RunError, match="not a finite number; no checkpoint was saved"):
        go_on(config, data(), devices=1, create=ready_state)


def test_an_evaluation_that_is_not_finite_stops_the_run(go_on, monkeypatch):
    evaluate = trainer.Trainer.evaluate

    def bad(self, *rest):
        return {**evaluate(self, *rest), "loss": float("inf")}

    monkeypatch.setattr(trainer.Trainer, "evaluate", bad)
    with pytest.raises(RunError, match="test loss after step 6 is not a finite number"):
        go_on(configuration(), data(), devices=1, create=ready_state)


# Files that cannot be written, and other processes


def test_a_full_disk_under_the_lines_is_one_message(go_on, whole, copied, monkeypatch):
    """/dev/full says what a full disk says."""
    shutil.rmtree(copied / "checkpoints" / "12")
    enter = loop.Reporter.__enter__

    def full(self):
        self._file.close()
        self._file = open("/dev/full", "w", buffering=1)  # noqa: SIM115
        return enter(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Reporter, "__enter__", full)
        with pytest.raises(RunError, match=r"used \(No space left .*free some space"):
            go_on()
    go_on()
    assert_same_run(copied, whole)


LIMITED = """
import resource, sys
import jax
from pathlib import Path
from tests.support.runs import EVERY_5, VALIDATED, run_fit
from flax_resnetv2.system.runtime import silence_orbax
silence_orbax()
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    run_fit(Path(sys.argv[1]), EVERY_5, dataset=VALIDATED)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    go_on, whole, copied
):
    """A limit on the size of files fails the write as a full disk does."""
    for step in ("10", "12"):
        shutil.rmtree(copied / "checkpoints" / step)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(copied), "6000"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.splitlines()[-1].startswith("RunError a checkpoint cannot be ")
    assert "the newest is of step 6; free some space" in done.stdout
    assert "Traceback" not in done.stderr
    go_on()
    assert_same_run(copied, whole)


@pytest.mark.parametrize(
    "lost", [["config.json"], ["dataset.json"], list(run_directory.RECORDS)]
)
def test_lost_records_come_back_from_a_checkpoint(copied, whole, go_on, lost, caplog):
    """Before they are compared, so another configuration is refused as ever."""
    caplog.set_level("INFO", "flax_resnetv2")
    for name in lost:
        (copied / name).unlink()
    with pytest.raises(UsageError, match=r"another configuration .*seed: 0 -> 1"):
        go_on(replace(EVERY_5, seed=1))
    for name in lost:
        assert (copied / name).read_text() == (whole / name).read_text()
        (copied / name).unlink()
    go_on()
    assert_same_run(copied, whole)
    for name in lost:
        assert f"{name} was missing: restored from a checkpoint" in caplog.text


def test_without_a_copy_of_its_records_a_run_is_refused(copied, go_on, monkeypatch):
    (copied / "config.json").unlink()
    monkeypatch.setattr(checkpoint.Checkpointer, "notes", lambda *_: {})
    with pytest.raises(RunError, match="has a copy of the run's records; restore"):
        go_on()
    assert not (copied / "config.json").exists()


@pytest.mark.parametrize("name", ["a[0.1]", "b*", "c?", "d\\e", "in[0]/f"])
def test_a_path_that_orbax_reads_as_a_pattern_is_refused(go_on, tmp_path, name):
    with pytest.raises(UsageError, match=r"must have none of \[ \] \* \? "):
        go_on(workdir=name)
    assert not list(tmp_path.iterdir())


def test_lines_that_were_cut_off_are_missed(copied, go_on, caplog):
    caplog.set_level("INFO", "flax_resnetv2")
    lines = (copied / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copied / "metrics.jsonl").write_text(lines[0])
    go_on()
    assert (
        "was cut short: it ends at step 4, the checkpoint is of step 12" in caplog.text
    )
    assert "scores on validation: " in caplog.text


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (jax.enable_x64(True), "JAX_ENABLE_X64 is True, and was False"),
        (jax.threefry_partitionable(False), "JAX_THREEFRY_PARTITIONABLE is False"),
        (jax.default_matmul_precision("highest"), "JAX_DEFAULT_MATMUL_PRECISION"),
    ],
)
def test_other_numerics_are_refused(copied, go_on, setting, words):
    with setting, pytest.raises(UsageError, match=words):
        go_on()


def test_what_may_change_the_last_bits_is_said(copied, go_on, monkeypatch, caplog):
    caplog.set_level("INFO", "flax_resnetv2")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_ftz=true")
    path = copied / "environment.json"
    starts = json.loads(path.read_text())
    starts[-1]["numerics"]["cores"] = 99
    path.write_text(json.dumps(starts))
    go_on()
    assert "XLA_FLAGS" in caplog.text
    assert "cores 99 -> " in caplog.text
    assert "the last bits may differ from those of an undisturbed run" in caplog.text


def test_a_directory_in_use_is_refused(go_on, copied):
    with (
        run_directory.locked(copied),
        pytest.raises(UsageError, match=rf"in use by process {os.getpid()} on"),
    ):
        go_on()


HOLDING = """
import sys, time
from pathlib import Path
from flax_resnetv2.run.run_directory import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_crash_leaves_no_lock(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    with holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match=f"process {holder.pid} on"):
            run_directory.locked(tmp_path).__enter__()
        holder.kill()
    with run_directory.locked(tmp_path):
        pass


# Another configuration


def test_what_decides_no_number_may_change(go_on, copied, whole, caplog):
    caplog.set_level(logging.INFO, "flax_resnetv2")
    shutil.rmtree(copied / "checkpoints" / "12")
    other = replace(
        EVERY_5,
        data=replace(EVERY_5.data, dir=str(copied)),
        checkpoint_every=2,
        keep_checkpoints=3,
    )
    go_on(other)
    assert_same_run(copied, whole)
    assert "changed: keep_checkpoints: 9 -> 3" in caplog.text
    assert run_directory.load_config(copied).keep_checkpoints == 3


def test_a_constant_schedule_may_get_more_epochs(go_on, tmp_path):
    short = configuration(schedule="constant", epochs=1)
    longer = configuration(schedule="constant", epochs=2)
    given = {"dataset": data(), "devices": 1, "create": ready_state}
    go_on(short, **given)
    go_on(longer, **given)
    go_on(longer, workdir="straight", **given)
    assert_same_run(tmp_path / "run", tmp_path / "straight")


def test_another_schedule_may_not(go_on):
    given = {"dataset": data(), "devices": 1, "create": ready_state}
    go_on(configuration(epochs=1), **given)
    with pytest.raises(UsageError, match=r"\(train\.epochs: 1 -> 2\)"):
        go_on(configuration(epochs=2), **given)


def test_fewer_epochs_than_are_done_are_refused(go_on):
    given = {"dataset": data(), "devices": 1, "create": ready_state}
    go_on(configuration(schedule="constant", epochs=2), **given)
    with pytest.raises(UsageError, match=r"epochs=1 is less than this run has done: 2"):
        go_on(configuration(schedule="constant", epochs=1), **given)


@pytest.mark.parametrize("name", ["train", "validation"])
def test_other_images_are_refused(go_on, copied, name):
    """And the same in another order."""
    splits = dict(VALIDATED.splits)
    splits[name] = Split(*(x[::-1].copy() for x in splits[name]))
    mixed = replace(VALIDATED, splits=splits)
    with pytest.raises(UsageError, match=rf"not those that .* \(the splits {name}\)"):
        go_on(dataset=mixed)


def test_lines_that_say_nothing_are_left_out(go_on, copied, whole):
    (copied / "metrics.jsonl").write_text(
        '5\n{"stfp": 4}\nnull\n[]\n' + (whole / "metrics.jsonl").read_text()
    )
    go_on()
    assert_same_run(copied, whole)


def test_a_trace_that_is_over_does_not_keep_a_run_from_going_on(
    go_on, whole, monkeypatch, tmp_path, caplog
):
    caplog.set_level(logging.INFO, "flax_resnetv2")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Stopped):
            go_on(profile=(3, 11))
    go_on(profile=(3, 11))
    assert "not traced: step 3 is done already" in caplog.text
    assert_same_run(tmp_path / "run", whole)


def test_the_first_error_is_the_one_that_is_said(go_on, monkeypatch, caplog):
    """Not that of closing the checkpoints after it."""
    monkeypatch.setattr(loop.Reporter, "training", lambda *_, **__: 1 / 0)

    def fail(self):
        raise RunError("cannot be written")

    monkeypatch.setattr(Checkpointer, "wait", fail)
    with pytest.raises(ZeroDivisionError):
        go_on()
    assert "cannot be written" in caplog.text


def test_another_net_is_no_damage(copied):
    like = replace(state_like(copied), ema=None)
    with (
        Checkpointer(copied / "checkpoints") as checkpoints,
        pytest.raises(RunError, match=r"is of another net.*\.ema") as caught,
    ):
        checkpoints.restore_newest(like)
    assert not isinstance(caught.value, checkpoint.DamagedError)


# What is due


def test_something_is_due_only_at_events():
    """In steps of 7 an epoch, 21 in all, a line every 3, a checkpoint every 5."""
    config = replace(configuration(epochs=3), log_every=3, checkpoint_steps=5)
    config = replace(config, evaluate_every=2, checkpoint_every=3)
    due = loop.EventSchedule(config, 7)
    lines = [k for k in range(1, 22) if due.line(k)]
    assert lines == [3, 6, 7, 9, 12, 14, 15, 18, 21]
    assert [k for k in range(22) if due.evaluation(k)] == [14, 21]
    assert [k for k in range(22) if due.checkpoint(k)] == [5, 10, 15, 20, 21]
    done, events = 0, []
    while done < due.total:
        done = due.next_event(done)
        events.append(done)
    assert events == sorted({*lines, 5, 10, 15, 20})


# Signals


def test_the_second_signal_ends_a_process_at_once(tmp_path):
    code = (
        "import os, signal, sys, time\n"
        "from flax_resnetv2.system.signals import Stop\n"
        "with Stop() as stop:\n"
        "    stop.listen()\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(stop.requested, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still here')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 128 + signal.SIGINT
    assert done.stdout == "SIGTERM\n"
    assert "SIGTERM: saving; a second one ends at once" in done.stderr


def test_a_signal_that_comes_twice_at_once_counts_once():
    """A cluster tells every process, and a sweep passes on what it was told."""
    with signals.Stop() as stop:
        stop.listen()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == "SIGTERM"


def test_a_signal_that_the_shell_ignores_stays_ignored():
    """As SIGINT of a command in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.Stop() as stop:
            stop.listen()
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.requested is None
            assert signal.getsignal(signal.SIGTERM) == stop._note
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_signals_are_given_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with signals.Stop() as stop:
        stop.listen()
        stop.listen()
        assert signal.getsignal(signal.SIGTERM) == stop._note
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
