"""The whole loop on tiny data: files, resuming, devices, and what is refused."""

import gzip
import io
import json
import logging
import shutil
import time
from dataclasses import replace

import jax
import numpy as np
import pytest
import rich
from rich.console import Console

from flax_resnetv2 import (
    Checkpointer,
    Execution,
    Predictor,
    UsageError,
    create_model,
)
from flax_resnetv2.cli import exits
from flax_resnetv2.data.batch import Split
from flax_resnetv2.run import loop, metrics_log, placement, trainer, validate
from flax_resnetv2.run.metrics_log import Reporter
from flax_resnetv2.run.run_directory import load_config
from flax_resnetv2.run.tracing import Tracer
from flax_resnetv2.training import step
from flax_resnetv2.training.augment import AugmentConfig, normalize
from tests.support import runs, tiny
from tests.support.runs import (
    CONFIG,
    VALIDATED,
    configuration,
    data,
    differing,
    lines_of,
    losses,
    ready_state,
    run_fit,
    untimed,
)


@pytest.fixture
def log(caplog):
    """The lines that a person sees, as one text."""
    caplog.set_level(logging.INFO, "flax_resnetv2")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


@pytest.fixture
def fit(tmp_path):
    """``run_fit`` in directories of this test."""
    return lambda *args, workdir="run", **more: run_fit(
        tmp_path / workdir, *args, **more
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run: its directory, and what ``run_fit`` gave."""
    directory = tmp_path_factory.mktemp("finished")
    return directory, *run_fit(directory, CONFIG, dataset=VALIDATED)


@pytest.fixture
def copied(finished, tmp_path):
    """The run in a directory that may be changed."""
    shutil.copytree(finished[0], tmp_path / "run", dirs_exist_ok=True)
    return tmp_path / "run"


def test_a_run_leaves_its_files(finished):
    directory, result, lines, state = finished
    saved = load_config(directory)
    mean, std = VALIDATED.channel_statistics()
    augment = replace(CONFIG.augment, mean=mean, std=std)
    settled = replace(CONFIG, augment=augment, data=replace(CONFIG.data, stream=False))
    assert saved == settled
    (environment,) = json.loads((directory / "environment.json").read_text())
    assert environment["step"] == 0
    assert environment["versions"]["jax"] == jax.__version__
    assert len(environment["devices"]) == 2
    facts = json.loads((directory / "dataset.json").read_text())
    assert facts["class_names"] == ["a", "b", "c", "d"]
    assert facts["image_shape"] == [8, 8, 3]
    assert facts["num_images"] == {"train": 50, "test": 23, "validation": 9}
    assert sorted(p.name for p in (directory / "checkpoints").iterdir()) == ["12", "6"]
    assert result == lines[-1]
    assert int(state.step[0]) == 12


def test_the_lines_of_metrics_keep_the_contract(finished):
    lines = finished[2]
    order = [(line["split"], line["step"], line["count"]) for line in lines]
    assert order == [
        ("train", 4, 32),
        ("train", 6, 16),
        ("validation", 6, 9),
        ("test", 6, 23),
        ("train", 8, 16),
        ("train", 12, 32),
        ("validation", 12, 9),
        ("test", 12, 23),
    ]
    common = {"step", "epoch", "split", "loss", "accuracy", "count", "seconds"}
    own = {
        "train": {"images_per_second", "learning_rate", "gradient_norm"},
        "test": {"residual_ratio"},
        "validation": {"residual_ratio"},
    }
    for line in lines:
        assert set(line) == common | own[line["split"]]
        assert line["epoch"] == pytest.approx(line["step"] / 6, abs=1e-6)
        assert 0 <= line["accuracy"] <= 1
        assert line["accuracy"] * line["count"] == pytest.approx(
            round(line["accuracy"] * line["count"]), abs=1e-9
        )
    assert set(lines[0]["gradient_norm"]) == {"stem", "stack1", "stack2", "head"}
    assert {k: len(v) for k, v in lines[-1]["residual_ratio"].items()} == {
        "stack1": 1,
        "stack2": 1,
    }
    # The rate of the last step that the line counts: cosine over 12 steps.
    expected = 0.05 * (1 + np.cos(np.pi * 3 / 12)) / 2
    assert lines[0]["learning_rate"] == pytest.approx(expected, rel=1e-5)
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)


def test_a_strict_user_can_train_and_predict(tmp_path):
    """The tests forbid promotion of dtypes and ranks already; this one, transfers."""
    config = replace(CONFIG, train=replace(CONFIG.train, epochs=1))
    with jax.transfer_guard("disallow"):
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed"):
            jax.jit(lambda x: x + 1)(np.float32(1))
        run_fit(tmp_path, config)
        images = data().splits["test"].image
        assert Predictor.find(tmp_path)(images).shape == (23, 4)


def test_a_run_learns_and_keeps_its_intervals(fit, tmp_path):
    train = replace(CONFIG.train, epochs=8, learning_rate=0.1)
    config = replace(CONFIG, train=train, evaluate_every=5, checkpoint_every=3)
    result, lines, _ = fit(config)
    assert result["accuracy"] > 0.6
    # The last epoch is evaluated and saved, whatever the intervals are.
    tests = [line["step"] for line in lines if line["split"] == "test"]
    assert tests == [30, 48]
    saved = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == [36, 48]


@pytest.mark.parametrize(("devices", "batch"), [(1, 7), (3, 23), (8, 5), (8, 64)])
def test_evaluation_counts_every_image_once(devices, batch):
    config = configuration(batch_size=24, eval_batch_size=batch)
    mean, std = data().channel_statistics()
    pixels = AugmentConfig(mean=mean, std=std)
    config = replace(config, augment=pixels)
    run = tiny.trainer_of(config, data(), jax.devices()[:devices])
    model = create_model(tiny.SMALL)
    variables = tiny.variables_of(model)
    # The averages are what is evaluated.
    nothing = jax.tree.map(jax.numpy.zeros_like, variables)
    state = step.TrainState(
        0, nothing["params"], nothing["batch_stats"], None, variables
    )
    sums = run.evaluate(run.placement.replicate(state), "test")
    image, label = data().splits["test"]
    images = normalize(jax.numpy.asarray(image), pixels, "float32")
    logits = np.asarray(model.apply(variables, images, train=False))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert int(sums["count"]) == 23
    assert int(sums["correct"]) == (logits.argmax(-1) == label).sum()
    assert float(sums["loss"]) == pytest.approx(-log_p[range(23), label].sum(), 1e-5)


def test_resumed_is_uninterrupted_bit_for_bit(fit, monkeypatch, finished):
    straight = finished[1:]

    class Interrupted(Exception):
        pass

    def until_step_8(self, done, *rest, original=Reporter.training, **more):
        if done == 8:
            raise Interrupted
        original(self, done, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "training", until_step_8)
        with pytest.raises(Interrupted):
            fit(CONFIG, dataset=VALIDATED)
    resumed = fit(CONFIG, dataset=VALIDATED)
    assert untimed(resumed[1]) == untimed(straight[1])
    assert untimed([resumed[0]]) == untimed([straight[0]])
    jax.tree.map(np.testing.assert_array_equal, resumed[2], straight[2])


def test_a_run_killed_while_it_wrote_a_line_goes_on(fit, copied, finished):
    with (copied / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "spl')
    assert fit(CONFIG, dataset=VALIDATED)[1] == finished[2]


def test_a_finished_run_gives_its_result_again(fit, copied, finished, monkeypatch):
    monkeypatch.setattr(trainer.Trainer, "evaluate", None)
    again, same, _ = fit(CONFIG, dataset=VALIDATED)
    assert again == finished[1]
    assert same == finished[2]


def test_a_finished_run_without_its_lines_is_evaluated_again(fit, copied, finished):
    (copied / "metrics.jsonl").unlink()
    result, *_ = fit(CONFIG, dataset=VALIDATED)
    assert untimed([result]) == untimed([finished[1]])


def test_an_interrupted_run_waits_for_its_checkpoint(fit, monkeypatch):
    closed = []
    close = Checkpointer.close
    monkeypatch.setattr(
        Checkpointer, "close", lambda self: (closed.append(1), close(self))
    )
    monkeypatch.setattr(Reporter, "training", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(CONFIG, dataset=VALIDATED)
    assert closed


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (replace(CONFIG, seed=2), r"\(seed: 0 -> 2\); give the same flags"),
        (
            replace(CONFIG, train=replace(CONFIG.train, epochs=3, momentum=0.5)),
            r"train\.epochs: 2 -> 3; train\.momentum: 0\.9 -> 0\.5",
        ),
        (replace(CONFIG, augment=AugmentConfig()), r"crop_padding: 1 -> 4"),
    ],
)
def test_a_directory_of_another_configuration_is_refused(fit, copied, other, message):
    before = (copied / "config.json").read_bytes()
    with pytest.raises(UsageError, match=message):
        fit(other, dataset=VALIDATED)
    assert (copied / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("config", "dataset", "message"),
    [
        (configuration(batch_size=12), data(), r"=12 .* 8 devices; .* 8, as 8 or 16"),
        (configuration(batch_size=7), data(), r"batch_size=7 .* multiple of 8, as 8$"),
        (
            configuration(batch_size=24, accumulation_steps=2),
            data(),
            r"=24 cannot .* in train.accumulation_steps=2 parts .* of 16, as 16 or",
        ),
        (configuration(batch_size=56), data(), r"=56 is more than the 50 .* 1 to 50"),
        (
            replace(configuration(), architecture=replace(tiny.SMALL, num_classes=10)),
            data(),
            r"num_classes=10, but tiny has 4 .* --architecture.num_classes 4",
        ),
        (
            replace(configuration(), architecture=replace(tiny.SMALL, reduction=3)),
            None,
            r"reduction=3 does not divide width=4",
        ),
        (replace(configuration(), log_every=0), None, "log_every=0 must be .* from 1"),
        (configuration(epochs=0), None, "train.epochs=0"),
    ],
)
def test_what_does_not_fit_together_is_refused(fit, config, dataset, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        fit(config, devices=8, dataset=dataset)
    assert not (tmp_path / "run").exists()


def test_what_is_refused_leaves_a_directory_to_be_used(fit, monkeypatch, tmp_path):
    """The repair that a refusal names works in the same directory."""
    with pytest.raises(UsageError, match="profile=7:99"):
        fit(CONFIG, dataset=VALIDATED, profile=(7, 99))
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_mistake_is_found_before_data_are_read(monkeypatch, tmp_path):
    monkeypatch.setattr(validate, "open_dataset", lambda *_: pytest.fail("was read"))
    wrong = replace(configuration(), architecture=replace(tiny.SMALL, kernel=2))
    with pytest.raises(UsageError, match="kernel"):
        loop.fit(wrong, tmp_path)
    with pytest.raises(UsageError, match="batch_size=12"):
        loop.fit(configuration(batch_size=12), tmp_path)


def test_chunks_of_steps_give_what_single_steps_give(fit, monkeypatch, finished):
    single, calls = finished[1:], []

    class Counted(runs.Chunked):
        def train(self, *given):
            calls.append(given)
            return super().train(*given)

    monkeypatch.setattr(loop, "Trainer", Counted)
    chunked = fit(CONFIG, dataset=VALIDATED)
    assert [int(given[-1]) for given in calls] == [4, 2, 2, 4]
    for a, b in zip(single[1], chunked[1], strict=True):
        assert (a["step"], a["split"], a["count"]) == (
            b["step"],
            b["split"],
            b["count"],
        )
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        if a["split"] == "train":
            assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-3)


def test_a_trace_of_some_steps_changes_nothing_else(fit, tmp_path, finished, log):
    result, lines, _ = fit(CONFIG, dataset=VALIDATED, profile=(3, 5))
    assert result["loss"] == finished[1]["loss"]
    assert [a["loss"] for a in lines] == [a["loss"] for a in finished[2]]
    [trace] = (tmp_path / "run" / "profile").rglob("*.trace.json.gz")
    text = gzip.decompress(trace.read_bytes()).decode()
    assert "ThunkExecutor::Execute" in text
    assert "trace of the steps from 3 to 4" in log()


def test_a_chunk_of_steps_never_ends_inside_a_trace():
    tracer = Tracer((3, 5), None)
    events = [tracer.next_event(done, 8) for done in range(8)]
    assert events == [3, 3, 3, 5, 5, 8, 8, 8]
    assert Tracer(None, None).next_event(2, 8) == 8


@pytest.mark.parametrize("steps", [(5, 5), (6, 3), (0, 13)])
def test_steps_that_the_run_has_not_are_refused(fit, steps):
    with pytest.raises(UsageError, match="0 <= FIRST < END <= 12"):
        fit(CONFIG, dataset=VALIDATED, profile=steps)


def test_a_batch_that_cannot_fit_is_refused_with_one_that_can(fit, monkeypatch):
    monkeypatch.setattr(loop, "memory_limit", lambda _: 1000)
    with pytest.raises(UsageError, match=r"batch_size=8 needs at least .* smaller"):
        fit(CONFIG, dataset=VALIDATED)


def test_the_second_epoch_has_its_own_order_and_compiles_nothing(fit, monkeypatch):
    events, epochs, asked, order = [], [], [], trainer.epoch_order

    def noted(*given):
        epochs.append(len(events))
        asked.append(given)
        return order(*given)

    monkeypatch.setattr(trainer, "epoch_order", noted)

    def listen(name, *_, **__):
        if name == "/jax/core/compile/backend_compile_duration":
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        fit(CONFIG, dataset=VALIDATED)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    first, second = epochs
    assert len(events) == second > first
    assert asked == [(50, 8, 0, 0), (50, 8, 0, 1)]


# Ending at a target

REACHED = replace(
    CONFIG, train=replace(CONFIG.train, epochs=8, learning_rate=0.1), log_every=6
)


@pytest.mark.parametrize("dataset", [VALIDATED, data()], ids=["validation", "test"])
def test_a_run_ends_where_it_reaches_its_target(fit, tmp_path, caplog, log, dataset):
    name = "validation" if "validation" in dataset.splits else "test"
    accuracies = iter([0.1, 0.6, 0.9])

    def evaluate(self, state, split, stop):
        sums = {"loss": 1.0, "count": 100.0, "residual_ratio": {}}
        return sums | {"correct": 100 * next(accuracies) if split == name else 100.0}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "evaluate", evaluate)
        config = replace(REACHED, target_accuracy=0.6)
        result, lines, state = fit(config, dataset=dataset)
        assert [x["accuracy"] for x in lines if x["split"] == name] == [0.1, 0.6]
        assert [x.get("epochs_to") for x in lines if x["split"] == name] == [None, 2]
        assert int(state.step[0]) == lines[-1]["step"] == 12
        assert (result["split"], result["step"], result["epochs_to"]) == ("test", 12, 2)
        saved = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()]
        assert max(saved) == 12
        assert f"is reached on '{name}': the run ends; epochs_to 2" in log()
        # Once more: the log says it again, and nothing is trained.
        caplog.clear()
        assert fit(config, dataset=dataset)[:2] == (result, lines)
        assert "the run ends; epochs_to 2" in log()
        # With a higher target the run continues.
        higher = replace(config, target_accuracy=0.9)
        result, lines, _ = fit(higher, dataset=dataset)
        assert (result["step"], result["epochs_to"]) == (18, 3)
        assert "changed: target_accuracy: 0.6 -> 0.9" in log()


def test_a_target_that_is_not_reached_changes_nothing(fit, finished):
    config = replace(CONFIG, target_accuracy=1.0)
    result, lines, state = fit(config, dataset=VALIDATED)
    assert untimed(lines) == untimed(finished[2])
    assert "epochs_to" not in result
    jax.tree.map(np.testing.assert_array_equal, state, finished[3])


# The same on any number of devices


ALONE = {"devices": 1, "create": ready_state, "workdir": "alone"}
SHARED = {"create": ready_state, "workdir": "shared"}


@pytest.mark.parametrize("devices", [2, 8])
def test_losses_do_not_depend_on_the_devices(fit, float64, devices):
    config = replace(
        configuration(epochs=1, ema_decay=0.9), execution=Execution(dtype="float64")
    )
    _, expected, _ = fit(config, **ALONE)
    assert len(set(losses(expected))) == 6
    _, lines, state = fit(config, devices=devices, create=ready_state, workdir="many")
    for ours, theirs in zip(lines, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-10)
        assert ours["accuracy"] == theirs["accuracy"]
    assert len(state.step) == devices
    assert differing(state) == []


def test_options_do_not_depend_on_the_devices_either(tmp_path, float64):
    """All that draws, mixes or takes parts of the global batch, together."""
    config = configuration(
        epochs=1,
        batch_size=16,
        accumulation_steps=2,
        clip_norm=1.0,
        stochastic_depth=0.5,
    )
    drawn = AugmentConfig(
        crop_padding=1,
        color_jitter=0.4,
        randaugment=1,
        cutout=3,
        mixup=1.0,
        cutmix=1.0,
    )
    config = replace(config, augment=drawn, execution=Execution(dtype="float64"))
    found = []
    for devices in (1, 8):
        directory = tmp_path / str(devices)
        _, lines, state = run_fit(directory, config, devices, create=ready_state)
        found.append(lines)
        assert differing(state) == []
    for ours, theirs in zip(*found, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-10)
        assert ours["accuracy"] == theirs["accuracy"]
    assert len(set(losses(found[0]))) == 3


def test_one_step_in_float32_does_not_depend_on_the_devices(fit):
    config = configuration(
        epochs=1, momentum=0.0, weight_decay=0.0, schedule="constant"
    )
    one_step = data(train=8)
    _, (alone, *_), before = fit(config, dataset=one_step, **ALONE)
    _, (shared, *_), after = fit(config, dataset=one_step, devices=8, **SHARED)
    assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    for part, norm in alone["gradient_norm"].items():
        assert shared["gradient_norm"][part] == pytest.approx(norm, rel=1e-5)
    # Without momentum the parameters differ as the gradients do.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6),
        *(
            jax.tree.map(lambda x: x[0], s.params, is_leaf=lambda x: type(x) is list)
            for s in (before, after)
        ),
    )
    assert differing(after) == []


def test_statistics_of_each_device_alone_are_averaged_all_the_same(fit):
    config = configuration(epochs=1, sync_batch_norm=False)
    run = tiny.trainer_of(config, data(), jax.devices()[:2])
    assert (run.placement.axis, run.model.execution.batch_norm_axis) == (
        placement.AXIS,
        None,
    )
    _, _, state = fit(config, dataset=data(train=8), **SHARED)
    assert differing(state) == []


def test_a_gradient_that_was_not_added_up_is_seen(fit, monkeypatch):
    psum = jax.lax.psum
    # The gradient travels in a tuple, beside loss and hits; the count travels alone.
    forgetful = lambda x, axis: x if isinstance(x, tuple) else psum(x, axis)  # noqa: E731
    monkeypatch.setattr(step.lax, "psum", forgetful)
    _, _, state = fit(configuration(epochs=1), dataset=data(train=8), **SHARED)
    assert any("params" in path for path in differing(state))


# What a person sees


SUMS = {"loss": 20.0, "correct": 5, "count": 10}


def shown(tmp_path, monkeypatch, terminal, level=logging.INFO):
    """What the command line prints of a few lines."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=100)
    monkeypatch.setattr(rich, "get_console", lambda: console)

    def work():
        exits.LOGGER.setLevel(level)
        with Reporter(tmp_path, began=0.0, total=12, done=0, batch_size=5) as reporter:
            reporter.say("tiny: 50 training images [not markup]")
            reporter.progress(1)
            reporter.training(2, 0.5, SUMS, learning_rate=0.1)
            reporter.evaluation("test", 4, 1.0, SUMS)
            assert reporter.last["test"]["accuracy"] == 0.5

    assert exits.guarded(work) == 0
    return screen.getvalue()


def test_without_a_terminal_there_are_plain_lines(tmp_path, monkeypatch):
    first, training_line, test_line = shown(tmp_path, monkeypatch, False).splitlines()
    assert first == "tiny: 50 training images [not markup]"
    assert training_line.startswith("step 2/12  loss 2.000  accuracy 0.500  ")
    assert training_line.endswith(" left")
    assert test_line == "epoch 1  test loss 2.000  accuracy 0.5000 (5 of 10)"


def test_on_a_terminal_there_is_a_bar(tmp_path, monkeypatch):
    text = shown(tmp_path, monkeypatch, True)
    assert "\x1b[" in text
    assert "2/12" in text
    assert "loss 2.000" in text
    assert "epoch 1  test loss 2.000" in text
    assert "step 2/12  loss" not in text


def test_a_library_prints_nothing(tmp_path, monkeypatch, capsys):
    assert shown(tmp_path, monkeypatch, True, logging.WARNING) == ""
    with Reporter(tmp_path, began=0.0, total=12, done=0, batch_size=5) as reporter:
        reporter.evaluation("test", 4, 1.0, SUMS)
    assert capsys.readouterr() == ("", "")


def test_top_5_accuracy_is_shown_if_it_was_counted(tmp_path, log):
    sums = {**SUMS, "correct_top5": 8}
    with Reporter(tmp_path, began=0.0, total=12, done=0, batch_size=5) as reporter:
        assert reporter.evaluation("test", 4, 1.0, sums)["top5"] == 0.8
    assert lines_of(tmp_path)[0]["top5"] == 0.8
    assert log().endswith("(5 of 10)  top 5 0.8000")


def test_lines_after_the_checkpoint_are_dropped(tmp_path):
    lines = [
        {"step": k, "split": s, "seconds": 5.0}
        for k in (2, 4)
        for s in ("train", "test")
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    with Reporter(tmp_path, began=0.0, total=9, done=3, batch_size=5) as reporter:
        assert reporter.last == {"train": lines[0], "test": lines[1]}
    assert lines_of(tmp_path) == lines[:2]


def test_the_clock_of_a_run_goes_on(tmp_path):
    path, line = tmp_path / "metrics.jsonl", {"step": 2, "split": "train"}
    path.write_text(json.dumps({**line, "seconds": 1000.0}) + "\n")
    written, now = path.stat().st_ino, time.perf_counter()
    with Reporter(tmp_path, now, total=9, done=2, batch_size=5) as reporter:
        reporter.evaluation("test", 4, 1.0, {"loss": 1.0, "correct": 1, "count": 2})
    assert 1000 <= lines_of(tmp_path)[-1]["seconds"] < 1060
    assert path.stat().st_ino == written, "rewritten, though no line was dropped"


def test_utilization_is_shown_if_the_peak_is_known(tmp_path, log):
    known = {"flops": 3.0, "peak": 100.0}
    with Reporter(tmp_path, 0.0, total=9, done=0, batch_size=5, **known) as reporter:
        reporter.dispatched()
        reporter.training(2, 0.5, SUMS)
    [line] = lines_of(tmp_path)
    share = line["images_per_second"] * 3 / 100
    assert line["flops_utilization"] == pytest.approx(share)
    assert "of peak FLOP/s" in log()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.4, "12 s"), (180, "3 min"), (5400, "90 min"), (7200, "2.0 h")],
)
def test_a_time_is_said_in_its_unit(seconds, text):
    assert metrics_log._clock(seconds) == text


def test_a_channel_that_never_changes_stays_finite():
    train, test = (
        Split(s.image.copy(), s.label) for s in tiny.dataset().splits.values()
    )
    train.image[..., 1] = 77
    flat = replace(tiny.dataset(), splits={"train": train, "test": test})
    found = validate.fill_in(tiny.config(), flat).augment
    assert found.std[1] == 1.0
    assert found.mean[1] == pytest.approx(77 / 255)
    assert 0 < found.std[0] < 1


def test_a_warm_up_may_be_most_of_one_epoch(tmp_path):
    """The state's shapes were once computed for epochs of one step."""
    config = replace(tiny.config(epochs=1, warmup_epochs=0.6), architecture=tiny.SMALL)
    config = validate.fill_in(config, tiny.dataset())
    run = tiny.trainer_of(config, tiny.dataset(), jax.devices()[:1])
    assert run.state_shapes().step.shape == ()
