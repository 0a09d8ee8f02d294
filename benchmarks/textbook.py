"""The same time for a textbook PyTorch loop: the net, data and recipe of one of ours.

    python -m benchmarks.textbook cifar10-cpu-hour --seconds 2834

As one would write it: the net as modules in channels_last with PyTorch's own initial
values, one loop over shuffled batches, SGD with Nesterov's momentum, a one-cycle
schedule, crops and mirror images, and at the end the mean logits of each test image and
its mirror image. It first times a few steps, and then trains for as many epochs as the
seconds allow. Its line goes to ``results/recipes.jsonl``. PyTorch is named in
``benchmarks/requirements.txt``; only recipes of that kind can be had.
"""

import argparse
import math
import platform
import time
from typing import Any

import numpy as np

from benchmarks import studies
from benchmarks.measure import provenance, usable_cores
from benchmarks.peers import torch_net
from flax_resnetv2 import RECIPES
from flax_resnetv2.assembly import count_parameters
from flax_resnetv2.config import Config
from flax_resnetv2.counting import layer_table
from flax_resnetv2.data import Dataset, open_dataset
from flax_resnetv2.errors import UsageError
from flax_resnetv2.planning import plan

TIMED = 20
"""Steps, after five that are not."""


def check(config: Config) -> None:
    """Refuse what the loop does not have.

    Raises:
        UsageError: the recipe asks for something else.
    """
    t, a = config.train, config.augment
    plain = t.optimizer, t.schedule, t.ema, t.stochastic_depth, a.mixup, a.cutmix
    if plain != ("sgd", "one_cycle", 0, 0, None, None) or a.cutout or a.randaugment:
        raise UsageError(
            "the textbook loop has SGD, one cycle, crops and mirror images only; "
            "choose cifar10-cpu-hour, or another recipe of that kind"
        )


def train(
    config: Config, dataset: Dataset, seconds: float, seed: int
) -> dict[str, Any]:
    """Train for so many seconds, testing included, and give the line."""
    import torch
    from torch.nn import functional

    began, t = time.perf_counter(), config.train
    torch.set_num_threads(usable_cores())
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in dataset.channel_statistics())
    images, labels = dataset.splits["train"]
    labels = torch.from_numpy(np.asarray(labels)).long()
    side, p = images.shape[1], config.augment.crop_padding
    steps_per_epoch = len(images) // t.batch_size

    def normalised(chosen: np.ndarray) -> torch.Tensor:
        x = torch.from_numpy(chosen).permute(0, 3, 1, 2).float() / 255
        return (x - mean) / std

    def augmented(x: torch.Tensor) -> torch.Tensor:
        count = len(x)
        x = functional.pad(x, (p, p, p, p))
        row, column = (
            torch.randint(0, 2 * p + 1, (count, 1)) + torch.arange(side)
            for _ in range(2)
        )
        column = torch.where(torch.rand(count, 1) < 0.5, column.flip(1), column)
        some = torch.arange(count)[:, None, None]
        # Indexed this way the channels come last, as the net wants them in memory.
        x = x.permute(0, 2, 3, 1)[some, row[:, :, None], column[:, None, :]]
        return x.permute(0, 3, 1, 2)

    def build(total: int) -> tuple[Any, Any, Any]:
        net = torch_net(plan(config.architecture, dataset.image_shape))
        net = net.to(memory_format=torch.channels_last)
        kernels = [w for w in net.parameters() if w.ndim > 1]
        rest = [w for w in net.parameters() if w.ndim == 1]
        optimizer = torch.optim.SGD(
            [{"params": kernels, "weight_decay": t.weight_decay}, {"params": rest}],
            t.learning_rate,
            t.momentum,
            nesterov=t.nesterov,
            fused=True,
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, t.learning_rate, total, cycle_momentum=False
        )
        return net, optimizer, schedule

    def step(net: Any, optimizer: Any, schedule: Any, chosen: np.ndarray) -> Any:
        optimizer.zero_grad(set_to_none=True)
        logits = net(augmented(normalised(images[chosen])))
        loss = functional.cross_entropy(
            logits, labels[chosen], label_smoothing=t.label_smoothing
        )
        loss.backward()
        optimizer.step()
        schedule.step()
        return loss

    # A net of its own to time steps on.
    some, rate = build(100), 0.0
    for number in range(5 + TIMED):
        if number == 5:
            rate = time.perf_counter()
        step(*some, rng.integers(0, len(images), t.batch_size))
    each = (time.perf_counter() - rate) / TIMED
    left = seconds - (time.perf_counter() - began)
    # Testing takes a third of a step, twice for the mirror images.
    testing = 2 / 3 * each * dataset.splits["test"].images / t.batch_size
    epochs = max(1, int((left - testing) / (each * steps_per_epoch)))
    print(f"{t.batch_size / each:.0f} images/s: {epochs} epochs", flush=True)

    net, optimizer, schedule = build(epochs * steps_per_epoch)
    for epoch in range(epochs):
        order = rng.permutation(len(images))[: steps_per_epoch * t.batch_size]
        for chosen in order.reshape(steps_per_epoch, t.batch_size):
            loss = step(net, optimizer, schedule, chosen)
        seen = time.perf_counter() - began
        print(f"epoch {epoch + 1}  loss {loss.item():.3f}  {seen:.0f} s", flush=True)
    net.eval()
    test, truth = dataset.splits["test"]
    logits = []
    with torch.inference_mode():
        for first in range(0, len(test), 500):
            x = normalised(test[first : first + 500])
            both = [x, x.flip(3)] if config.augment.test_flip else [x]
            logits.append(sum(net(each) for each in both) / len(both))
        all_logits = torch.cat(logits)
        target = torch.from_numpy(np.asarray(truth)).long()
        correct = (all_logits.argmax(1) == target).sum().item()
        loss = functional.cross_entropy(all_logits, target).item()
    count = len(test)
    return {
        "test": {"loss": loss, "accuracy": correct / count, "count": count},
        "validation": None,
        "steps": epochs * steps_per_epoch,
        "epochs": epochs,
        "seconds": round(time.perf_counter() - began, 3),
    }


def main() -> None:
    """Train, keep the line, and write the page."""
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
        for name, split in dataset.splits.items():
            dataset.splits[name] = split.take(0, given.images)
    found = train(config, dataset, given.seconds, given.seed)
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
            row.multiply_adds for row in layer_table(config.architecture, shape)
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
        studies.write_page()


if __name__ == "__main__":
    main()
