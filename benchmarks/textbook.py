"""A textbook PyTorch loop with the net, data, recipe and time of one of our runs.

    python -m benchmarks.textbook cifar10-cpu-hour --seconds 2834

The net as modules in channels_last with PyTorch's own initial values, one loop over
shuffled batches, SGD with Nesterov momentum, a one-cycle schedule, crops and mirror
images, and at the end the mean logits of each test image and its mirror image. It first
times a few steps, and then trains for as many epochs as the seconds allow. Its line
goes to ``results/recipes.jsonl``. ``benchmarks/requirements.txt`` has the version of
PyTorch. Only recipes with these settings are supported.
"""

import argparse
import math
import platform
import time
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks import studies
from benchmarks.measure import provenance, usable_cores
from benchmarks.peers import torch_net
from flax_resnetv2 import RECIPES
from flax_resnetv2.data.datasets import Dataset, open_dataset
from flax_resnetv2.errors import UsageError
from flax_resnetv2.model.layer_table import layer_table
from flax_resnetv2.model.planning import plan
from flax_resnetv2.run.build import count_parameters
from flax_resnetv2.run.config import Config

TIMED = 20
"""Number of timed steps, after five others."""


def check(config: Config) -> None:
    """Refuse a recipe with settings that the loop does not have.

    Raises:
        UsageError: names the setting and a recipe that works.
    """
    t, a = config.train, config.augment
    plain = t.optimizer, t.schedule, t.ema_decay, t.stochastic_depth, a.mixup, a.cutmix
    if plain != ("sgd", "one_cycle", 0, 0, None, None) or a.cutout or a.randaugment:
        raise UsageError(
            "the textbook loop has SGD, one cycle, crops and mirror images only; "
            "choose cifar10-cpu-hour, or another recipe of that kind"
        )


class Loop:
    """Net, optimizer, schedule and images.

    Images enter as NHWC uint8 arrays; inside they are NCHW float32 tensors, channels
    last in memory.
    """

    def __init__(self, config: Config, dataset: Dataset) -> None:
        import torch

        self.config, self.shape = config, dataset.image_shape
        self.images, labels = dataset.splits["train"]
        self.labels = torch.from_numpy(np.asarray(labels)).long()
        self.test, truth = dataset.splits["test"]
        self.truth = torch.from_numpy(np.asarray(truth)).long()
        self.mean, self.std = (
            torch.tensor(x).view(1, 3, 1, 1) for x in dataset.channel_statistics()
        )
        self.steps_per_epoch = len(self.images) // config.train.batch_size

    def begin(self, steps: int) -> None:
        """Initialize the net and the schedule for ``steps`` steps."""
        import torch

        t = self.config.train
        net = torch_net(plan(self.config.architecture, self.shape))
        self.net = net.to(memory_format=torch.channels_last)
        kernels = [w for w in net.parameters() if w.ndim > 1]
        rest = [w for w in net.parameters() if w.ndim == 1]
        self.optimizer = torch.optim.SGD(
            [{"params": kernels, "weight_decay": t.weight_decay}, {"params": rest}],
            t.learning_rate,
            t.momentum,
            nesterov=t.nesterov,
            fused=True,
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, t.learning_rate, steps, cycle_momentum=False
        )

    def normalize(self, images: np.ndarray) -> Any:
        """Normalize uint8 [B, H, W, 3] to float32 [B, 3, H, W]."""
        import torch

        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        return (x - self.mean) / self.std

    def augment(self, x: Any) -> Any:
        """Crop and mirror each image of [B, 3, H, W]."""
        import torch

        p, count = self.config.augment.crop_padding, len(x)
        row, column = (
            torch.randint(0, 2 * p + 1, (count, 1)) + torch.arange(x.shape[2])
            for _ in range(2)
        )
        column = torch.where(torch.rand(count, 1) < 0.5, column.flip(1), column)
        some = torch.arange(count)[:, None, None]
        x = torch.nn.functional.pad(x, (p, p, p, p))
        # Indexed this way the channels stay last in memory.
        x = x.permute(0, 2, 3, 1)[some, row[:, :, None], column[:, None, :]]
        return x.permute(0, 3, 1, 2)

    def step(self, chosen: np.ndarray) -> Any:
        """Train on the images of these indices, int [B]; return the loss."""
        import torch

        self.optimizer.zero_grad(set_to_none=True)
        logits = self.net(self.augment(self.normalize(self.images[chosen])))
        loss = torch.nn.functional.cross_entropy(
            logits,
            self.labels[chosen],
            label_smoothing=self.config.train.label_smoothing,
        )
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss

    def evaluate(self) -> dict[str, Any]:
        """Return ``loss``, ``accuracy`` and ``count`` of all test images."""
        import torch

        self.net.eval()
        logits = []
        with torch.inference_mode():
            for first in range(0, len(self.test), 500):
                x = self.normalize(self.test[first : first + 500])
                both = [x, x.flip(3)] if self.config.augment.test_flip else [x]
                logits.append(sum(self.net(view) for view in both) / len(both))
            found = torch.cat(logits)
            correct = (found.argmax(1) == self.truth).sum().item()
            loss = torch.nn.functional.cross_entropy(found, self.truth).item()
        count = len(self.test)
        return {"loss": loss, "accuracy": correct / count, "count": count}


def train(
    config: Config, dataset: Dataset, seconds: float, seed: int
) -> dict[str, Any]:
    """Train for ``seconds``, testing included; return the results."""
    import torch

    began, batch = time.perf_counter(), config.train.batch_size
    torch.set_num_threads(usable_cores())
    torch.manual_seed(seed)
    rng, loop = np.random.default_rng(seed), Loop(config, dataset)
    loop.begin(5 + TIMED)
    for number in range(5 + TIMED):
        if number == 5:
            timed = time.perf_counter()
        loop.step(rng.integers(0, len(loop.images), batch))
    each = (time.perf_counter() - timed) / TIMED
    left = seconds - (time.perf_counter() - began)
    # Testing takes a third of a step, twice for the mirror images.
    testing = 2 / 3 * each * len(loop.test) / batch
    epochs = max(1, int((left - testing) / (each * loop.steps_per_epoch)))
    print(f"{batch / each:.0f} images/s: epochs: {epochs}", flush=True)
    log = ""

    loop.begin(epochs * loop.steps_per_epoch)
    for epoch in range(epochs):
        order = rng.permutation(len(loop.images))[: loop.steps_per_epoch * batch]
        for chosen in order.reshape(loop.steps_per_epoch, batch):
            loss = loop.step(chosen)
        seen = time.perf_counter() - began
        log += f"epoch {epoch + 1}  last loss {loss.item():.4f}  {seen:.0f} s\n"
        print(log.splitlines()[-1], flush=True)
    return {
        "log": log,
        "test": loop.evaluate(),
        "validation": None,
        "steps": epochs * loop.steps_per_epoch,
        "epochs": epochs,
        "seconds": round(time.perf_counter() - began, 3),
    }


def main() -> None:
    """Train, store the line, and write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.textbook", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--seconds", type=float, default=3600, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, help="the first so many only, to try it")
    given = parser.parse_args()
    config = RECIPES[given.recipe].config
    check(config)
    dataset = open_dataset(config.data)
    if given.images:
        some = {n: s.take(0, given.images) for n, s in dataset.splits.items()}
        dataset = replace(dataset, splits=some)
    found = train(config, dataset, given.seconds, given.seed)
    log = found.pop("log")
    shape = dataset.image_shape
    about = provenance()
    line = {
        "words": f"{given.recipe} in PyTorch",
        "override": "",
        "seed": given.seed,
        "status": "done",
        **found,
        "parameters": count_parameters(config, shape),
        "multiply_adds": sum(
            row.multiply_adds
            for row in layer_table(plan(config.architecture, shape), shape)
        ),
        "commit": about["commit"],
        "python": platform.python_version(),
        "versions": {"torch": about["versions"]["torch"]},
        "platform": "cpu",
        "devices": ["cpu"],
    }
    accuracy = found["test"]["accuracy"]
    print(f"test accuracy {accuracy:.4f} in {found['seconds']:.0f} s")
    if given.images is None and not math.isnan(found["test"]["loss"]):
        studies.keep("recipes", [line])
        studies.keep_log(line["words"], given.seed, log)
        studies.write_page()


if __name__ == "__main__":
    main()
