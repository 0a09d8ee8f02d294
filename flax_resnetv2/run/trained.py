"""A trained net, restored from a checkpoint of its run."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from flax_resnetv2.errors import UsageError
from flax_resnetv2.model.autoencoder import Autoencoder
from flax_resnetv2.model.modules import ResNetV2
from flax_resnetv2.run import run_directory
from flax_resnetv2.run.build import create_net
from flax_resnetv2.run.checkpoint import Checkpointer, best_step
from flax_resnetv2.run.config import Config
from flax_resnetv2.training.step import train_state_shapes
from flax_resnetv2.validation import check_choice

CheckpointChoice = Literal["newest", "best"]
"""The newest whole checkpoint, or the best one on the split "validation"."""


class TrainedNet(NamedTuple):
    """A net with its variables and the records of the run that trained it."""

    config: Config
    summary: dict[str, Any]
    """Summary of the data set, as ``load_dataset_summary`` returns it."""
    step: int
    """Number of training steps."""
    model: ResNetV2 | Autoencoder
    variables: dict[str, Any]
    """Parameters and batch statistics; their moving averages, if the run keeps them."""
    test: dict[str, Any] | None
    """The last metrics on the split "test" up to this step; None before the first."""
    environment: dict[str, Any]
    """Commit, versions and devices of the run's last start."""


def restore(workdir: str | Path, checkpoint: CheckpointChoice = "newest") -> TrainedNet:
    """Load a checkpoint of a run, finished or still training, on one device.

    Raises:
        UsageError: ``workdir`` is not a run directory, or has no such checkpoint.
        RunError: the checkpoints are damaged.
    """
    check_choice("checkpoint", checkpoint, ("newest", "best"))
    config = run_directory.load_config(workdir)
    summary = run_directory.load_dataset_summary(workdir)
    classes, asked = len(summary["class_names"]), config.architecture.num_classes
    if config.architecture.head == "classifier" and classes != asked:
        raise UsageError(
            f"{workdir}/dataset.json names {classes} classes, but the net has {asked}; "
            "bring back the file of this run"
        )
    image_shape = tuple(summary["image_shape"])
    model = create_net(config, image_shape)
    input_shape = config.augment.input_shape(image_shape)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here),
        train_state_shapes(model, config.train, input_shape),
    )
    directory = Path(workdir) / "checkpoints"
    missing = UsageError(f"{workdir} holds no checkpoint yet; train at least one epoch")
    if not directory.is_dir():
        raise missing
    with Checkpointer(directory) as checkpoints:
        if checkpoint == "best":
            steps = checkpoints.steps()
            scores = checkpoints.notes(steps[-1])["validation"] if steps else {}
            step = best_step(scores, steps)
            if step is None:
                raise UsageError(
                    f"{workdir} has no best checkpoint, because it has no split "
                    "'validation'; choose the newest, or train with --data.validation"
                )
            state, _ = checkpoints.restore(step, like)
        elif (found := checkpoints.restore_newest(like)) is None:
            raise missing
        else:
            step, state, _ = found
    tests = [x for x in run_directory.read_metrics(workdir) if x["split"] == "test"]
    test = next((x for x in reversed(tests) if x["step"] <= step), None)
    environment = run_directory.load_environment(workdir)[-1]
    variables = state.variables()
    return TrainedNet(config, summary, step, model, variables, test, environment)
