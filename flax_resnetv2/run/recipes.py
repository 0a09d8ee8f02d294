"""The recipes that ``train.py`` knows by name."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from flax_resnetv2.data.datasets import DataConfig
from flax_resnetv2.model.architecture import Architecture, Execution
from flax_resnetv2.model.presets import PRESETS
from flax_resnetv2.run.config import Config
from flax_resnetv2.training.augment import AugmentConfig
from flax_resnetv2.training.optimizers import TrainConfig


@dataclass(frozen=True)
class Recipe:
    """A configuration with a name, and its purpose in one line."""

    config: Config
    description: str
    published: str | None = None
    """Test accuracy that others report for this training; None: no report."""


_ONE_CYCLE = TrainConfig(
    epochs=30,
    learning_rate=0.4,
    weight_decay=5e-4,
    schedule="one_cycle",
    label_smoothing=0.1,
)
_QUICKSTART = Config(
    # Half the resolution from the stem on: a minute on two CPU cores.
    architecture=Architecture(
        units=(2, 2, 2), widths=(32, 64, 128), stem_width=32, stem_stride=2
    ),
    data=DataConfig(name="embedded_shapes"),
    train=replace(_ONE_CYCLE, epochs=8, batch_size=64, learning_rate=0.2),
)
# Basic units at half the resolution from stack 1 on, as is usual for fast training.
_FAST = Config(
    architecture=Architecture(
        units=(2, 2, 2),
        widths=(128, 384, 512),
        strides=(2, 2, 2),
        unit="basic",
        reduction=1,
        stem_width=64,
    ),
    execution=Execution(dtype="bfloat16"),
    augment=AugmentConfig(cutout=8, test_flip=True),
    train=replace(
        _ONE_CYCLE,
        epochs=40,
        batch_size=512,
        eval_batch_size=2000,
        optimizer="muon",
        learning_rate=0.004,
        momentum=0.95,
        weight_decay=0.1,
    ),
    evaluate_every=1000,
    checkpoint_every=1000,
)
# 18 layers at full resolution, which 96 % is known to need.
_ACCURATE = replace(
    _FAST,
    architecture=replace(
        _FAST.architecture,
        units=(2, 2, 2, 2),
        widths=(64, 128, 256, 512),
        strides=(1, 2, 2, 2),
    ),
    augment=AugmentConfig(cutout=12, test_flip=True),
    train=replace(_FAST.train, epochs=80),
)
_CPU_HOUR = Config(
    architecture=replace(_FAST.architecture, widths=(64, 128, 256), stem_width=32),
    augment=AugmentConfig(test_flip=True),
    train=replace(_ONE_CYCLE, epochs=24, learning_rate=0.2),
    evaluate_every=8,
)
# He et al. 2016 for as long as their code trains (resnet-1k-layers: 200 epochs, and
# fb.resnet.torch drops the rate after 80 and 121); the paper's 64,000 steps are 164.
_PAPER = Config(
    train=TrainConfig(nesterov=False, warmup_epochs=1.0, lr_drops=(80 / 200, 121 / 200))
)
# Atienza's script, except that it shifts images by 10 % and repeats their border,
# subtracts the mean of each pixel, does not decay the classifier's kernel, and halves
# the rate at its last drop. Keras's l2(1e-4) is a decay of 2e-4.
_BOOK = Config(
    augment=AugmentConfig(crop_padding=3),
    train=TrainConfig(
        batch_size=32,
        optimizer="adam_l2",
        learning_rate=1e-3,
        weight_decay=2e-4,
        lr_drops=(81 / 200, 121 / 200, 161 / 200, 181 / 200),
    ),
)
# The article's author on this net in his posts of 2024; the rate is Atienza's, and the
# decay the lowest for which he saw the test loss oscillate.
_ADAMW = Config(
    augment=AugmentConfig(crop_padding=2),
    train=TrainConfig(
        epochs=30,
        batch_size=64,
        optimizer="adamw",
        learning_rate=1e-3,
        weight_decay=0.1,
        schedule="cosine",
    ),
)
_REPORTED = (
    ("he2016-resnet164", "paper", "94.54 %, median of 5"),
    ("he2016-resnet1001", "paper", "95.08 %, median of 5"),
    ("basic-resnet110", "paper", "93.63 %, median of 5"),
    ("atienza-resnet20v2", "book", "left open"),
    ("atienza-resnet56v2", "book", "93.01 %"),
    ("atienza-resnet110v2", "book", "93.15 %"),
    ("atienza-resnet164v2", "book", "left open"),
    ("atienza-resnet56v2", "adamw", "92 % within 21 epochs, on the way"),
)
"""Nets, their training, and the test accuracy that is reported for it."""
_TRAININGS = {
    "paper": (_PAPER, "as He et al. train"),
    "book": (_BOOK, "as Atienza trains"),
    "adamw": (_ADAMW, "as the article's author trains it, AdamW and cosine"),
}
"""The trainings of these nets, and what their descriptions say."""
_SMALL_SETS = (
    ("cifar100", "CIFAR-100", ("article", "he2016-resnet164"), {}, {}),
    ("cifar100_coarse", "the 20 coarse classes of CIFAR-100", ("article",), {}, {}),
    (
        *("mnist", "MNIST", ("article",)),
        {"crop_padding": 2, "flip": False},  # a mirrored digit is another or none
        {"epochs": 15, "learning_rate": 0.2},
    ),
    ("fashion_mnist", "Fashion-MNIST", ("article",), {"crop_padding": 2}, {}),
)
"""Data sets, titles, nets, augmentation, and changes of the one-cycle training."""
# Goyal et al. 2017, arXiv 1706.02677, but with batches of 256 instead of 8192.
_IMAGENET = Config(
    execution=Execution(dtype="bfloat16"),
    data=DataConfig(name="imagenet2012", image_size=224, stream=True),
    augment=AugmentConfig(
        crop_padding=0,
        crop_scale=(0.08, 1.0),
        test_crop=0.875,
        # The usual values, which were computed once over the whole data set.
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    ),
    train=TrainConfig(
        epochs=90,
        batch_size=256,
        eval_batch_size=256,
        warmup_epochs=5.0,
        lr_drops=(1 / 3, 2 / 3, 8 / 9),
    ),
)
# Big Transfer's recipe on a smaller scale: a low rate, no decay, images scaled up (its
# crops of 128 come from 160), and few epochs.
_TRANSFER = Config(
    augment=AugmentConfig(resize=128, crop_padding=16),
    train=TrainConfig(
        epochs=10,
        learning_rate=0.01,
        weight_decay=0.0,
        schedule="cosine",
        warmup_epochs=0.5,
        nesterov=False,
    ),
)
_PUBLISHED = {
    "keras-resnet50v2": "resnet50v2_weights_tf_dim_ordering_tf_kernels_notop.h5",
    "timm-resnetv2-50": "model.safetensors",
    "bit-r50x1": "BiT-M-R50x1.npz",
}
"""File names of the published weights of presets."""


def _net(preset: str, **changes: object) -> Architecture:
    return replace(PRESETS[preset].architecture, **changes)


def _recipes() -> Iterator[tuple[str, Config, str] | tuple[str, Config, str, str]]:
    """Yield name, configuration, description and reported accuracy of each recipe."""
    about = "a small net of the article on ten drawn shapes; no download"
    yield "quickstart", _QUICKSTART, about
    about = "14 layers of basic units, bfloat16, Muon; CIFAR-10 on one large GPU"
    yield "cifar10-fast", _FAST, about
    about = "18 layers of basic units at full resolution, bfloat16, Muon; CIFAR-10 on"
    yield "cifar10-accurate", _ACCURATE, f"{about} one large GPU, for 96 %"
    about = "14 layers of basic units; CIFAR-10 in an hour on two CPU cores"
    yield "cifar10-cpu-hour", _CPU_HOUR, about
    for name, preset in PRESETS.items():
        if preset.architecture.num_classes == 10:
            config = Config(architecture=preset.architecture, train=_ONE_CYCLE)
            size = (
                f"{preset.architecture.depth} layers, {preset.parameters:,} parameters"
            )
            yield f"cifar10-{name}", config, f"{size}; CIFAR-10, one cycle"
    for name, kind, reported in _REPORTED:
        config, about = _TRAININGS[kind]
        net = _net(name)
        about = f"{net.depth} layers; CIFAR-10, {about}"
        yield (
            f"cifar10-{name}-{kind}",
            replace(config, architecture=net),
            about,
            reported,
        )
    for data, title, names, augment, train in _SMALL_SETS:
        for name in names:
            net = _net(name, num_classes=None)
            config = Config(
                architecture=net,
                data=DataConfig(name=data),
                augment=AugmentConfig(**augment),
                train=replace(_ONE_CYCLE, **train),
            )
            about = f"{net.depth} layers; {title}, one cycle"
            yield f"{data.replace('_', '-')}-{name}", config, about
    # Half the resolution from the stem on: 64x64 -> 8x8.
    net = _net("article", num_classes=None, stem_stride=2)
    train = replace(_ONE_CYCLE, epochs=15, learning_rate=0.2, label_smoothing=0.0)
    about = "29 layers; the 40 attributes of CelebA, which TFDS prepared; one cycle"
    celeba = DataConfig(name="celeba", image_size=64)
    yield "celeba-article", Config(architecture=net, data=celeba, train=train), about
    for name in ("he2016-resnet200", "keras-resnet50v2", "timm-resnetv2-50"):
        config = replace(_IMAGENET, architecture=_net(name))
        about = "ImageNet 2012, which TFDS prepared, 90 epochs"
        yield f"imagenet-{name}", config, f"{_net(name).depth} layers; {about}"
    train = replace(_ONE_CYCLE, learning_rate=0.1, batch_size=64)
    folder = DataConfig(name="folder:images", image_size=64)
    about = "29 layers; your own images: --data.name folder:PATH, a class a sub-folder"
    yield "folder", Config(architecture=net, data=folder, train=train), about
    for name, file in _PUBLISHED.items():
        net = _net(name, num_classes=10)
        config = replace(_TRANSFER, architecture=net, weights=file)
        about = "from published weights (--weights FILE) to CIFAR-10, scaled to 128x128"
        yield f"cifar10-transfer-{name}", config, about
    article = Config(architecture=_net("article"), train=_ONE_CYCLE)
    for name, start, base, data in (
        ("quickstart", "quickstart", _QUICKSTART, "drawn shapes"),
        ("cifar10", "cifar10-article", article, "CIFAR-10"),
    ):
        about = f"the net of {start} as the encoder of"
        for kind, title in (
            ("autoencoder", "an autoencoder"),
            ("vae", "a variational autoencoder"),
        ):
            config = _encoder(base, variational=kind == "vae")
            yield f"{name}-{kind}", config, f"{about} {title}; {data}"


def _encoder(config: Config, variational: bool) -> Config:
    """Turn a classifier's configuration into that of an autoencoder."""
    # Averages over a map would lose where in the image something is.
    head = {"head": "latent", "head_input": "flattened", "latent_variance": variational}
    # A shifted image has a border that the latent vector need not store.
    augment = replace(config.augment, crop_padding=0)
    adamw = {"optimizer": "adamw", "learning_rate": 2e-3, "weight_decay": 1e-2}
    train = replace(config.train, label_smoothing=0.0, **adamw)
    net = replace(config.architecture, **head)
    return replace(config, architecture=net, augment=augment, train=train)


RECIPES: dict[str, Recipe] = {name: Recipe(*rest) for name, *rest in _recipes()}
"""All recipes, by the names that ``train.py`` takes."""
