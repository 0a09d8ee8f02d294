"""Facts about data sets that are known before any file is opened.

Names, sizes and classes are those of the authors' pages and of TFDS's builders.
"""

import math
from dataclasses import dataclass
from typing import Literal

from flax_resnetv2.data import shapes

TEST_EVERY = 10
"""Without a test split, every tenth image is a test image."""


@dataclass(frozen=True)
class DatasetSummary:
    """A data set before its images are decoded."""

    image_shape: tuple[int, int, int]
    """Shape of a decoded image, (height, width, channels)."""
    class_names: tuple[str, ...]
    """Names in the order of the logits."""
    num_images: dict[str, int]
    """Number of images of the splits "train" and "test"."""
    notes: tuple[str, ...] = ()
    """Properties that a user may not expect, for example ignored files."""

    @property
    def size(self) -> int:
        """Bytes of all decoded images."""
        return sum(self.num_images.values()) * math.prod(self.image_shape)


@dataclass(frozen=True)
class DatasetSpec:
    """The constant properties of a named data set."""

    title: str
    """The name that its authors gave it."""
    stored: str
    """Its name in TFDS, and of its directory."""
    image_shape: tuple[int, int, int]
    """Shape of every image, (height, width, channels)."""
    num_images: dict[str, int]
    """Number of images of each split."""
    classes: dict[str, tuple[str, ...]]
    """Class names of each feature that is a label."""
    label: str = "label"
    """The feature that the net learns."""
    source: Literal["official files", "drawing", "tfds"] = "official files"
    """What it is prepared from; "tfds": only TFDS itself prepares it."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names of the label that the net learns, in the order of the logits."""
        return self.classes[self.label]


def _cifar(
    title: str, stored: str, classes: dict[str, str], label: str = "label"
) -> DatasetSpec:
    counts = {"train": 50_000, "test": 10_000}
    names = {feature: tuple(names.split()) for feature, names in classes.items()}
    return DatasetSpec(title, stored, (32, 32, 3), counts, names, label)


def _mnist(title: str, stored: str, *names: str) -> DatasetSpec:
    counts = {"train": 60_000, "test": 10_000}
    return DatasetSpec(title, stored, (28, 28, 1), counts, {"label": names})


_CIFAR100 = {
    "coarse_label": """
        aquatic_mammals fish flowers food_containers fruit_and_vegetables
        household_electrical_devices household_furniture insects large_carnivores
        large_man-made_outdoor_things large_natural_outdoor_scenes
        large_omnivores_and_herbivores medium_mammals non-insect_invertebrates people
        reptiles small_mammals trees vehicles_1 vehicles_2
    """,
    "label": """
        apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy
        bridge bus butterfly camel can castle caterpillar cattle chair chimpanzee clock
        cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
        forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion
        lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange
        orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
        possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper
        snail snake spider squirrel streetcar sunflower sweet_pepper table tank
        telephone television tiger tractor train trout tulip turtle wardrobe whale
        willow_tree wolf woman worm
    """,
}
"""Features in the order of the two label bytes of an archive."""

_ATTRIBUTES = """
    5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips
    Big_Nose Black_Hair Blond_Hair Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin
    Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones Male Mouth_Slightly_Open
    Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline
    Rosy_Cheeks Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat
    Wearing_Lipstick Wearing_Necklace Wearing_Necktie Young
"""
"""The attributes of CelebA, in alphabetical order, as its authors list them."""

DATASETS: dict[str, DatasetSpec] = {
    "cifar10": _cifar(
        "CIFAR-10",
        "cifar10",
        {"label": "airplane automobile bird cat deer dog frog horse ship truck"},
    ),
    # Two names instead of a field, because the number of classes differs.
    "cifar100": _cifar("CIFAR-100", "cifar100", _CIFAR100),
    "cifar100_coarse": _cifar("CIFAR-100", "cifar100", _CIFAR100, "coarse_label"),
    "mnist": _mnist("MNIST", "mnist", *"0123456789"),
    "fashion_mnist": _mnist(
        "Fashion-MNIST",
        "fashion_mnist",
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    "celeba": DatasetSpec(
        "CelebA",
        "celeb_a",
        (218, 178, 3),
        {"train": 162_770, "test": 19_962},
        {"attributes": tuple(_ATTRIBUTES.split())},
        label="attributes",
        source="tfds",
    ),
    shapes.NAME: DatasetSpec(
        "the embedded shapes",
        shapes.NAME,
        (shapes.SIZE, shapes.SIZE, 3),
        {split: 10 * count for split, count in shapes.PER_CLASS.items()},
        {"label": shapes.SHAPE_CLASSES},
        source="drawing",
    ),
}
"""Data sets by ``data.name``."""
