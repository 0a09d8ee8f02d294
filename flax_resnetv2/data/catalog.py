"""What is known of a data set before anything is opened: facts, no logic.

Names, sizes and classes are those of the makers' own pages and of TFDS's builders.
"""

import math
from dataclasses import dataclass
from typing import Literal

from flax_resnetv2.data import shapes


@dataclass(frozen=True)
class DatasetSummary:
    """A data set before its images are decoded."""

    image_shape: tuple[int, int, int]
    """(height, width, channels) of a decoded image."""
    class_names: tuple[str, ...]
    """In the order of the logits."""
    num_images: dict[str, int]
    """How many of the splits "train" and "test"."""
    notes: tuple[str, ...] = ()
    """What a person may not expect of it."""

    @property
    def size(self) -> int:
        """Bytes of all images, decoded."""
        return sum(self.num_images.values()) * math.prod(self.image_shape)


@dataclass(frozen=True)
class DatasetSpec:
    """A data set of ours, or of TFDS, by what never changes of it."""

    title: str
    """What its makers call it."""
    stored: str
    """Its name, and directory, among TFDS data sets."""
    image_shape: tuple[int, int, int]
    """(height, width, channels) of every image."""
    num_images: dict[str, int]
    """How many a split has."""
    classes: dict[str, tuple[str, ...]]
    """The names of each feature that is a label."""
    label: str = "label"
    """The one of these that the net learns."""
    source: Literal["archive", "files", "drawn", "tfds"] = "archive"
    """What it is prepared from: an archive, four files, nothing at all; or TFDS has to
    prepare it."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the label that the net learns, in the order of the logits."""
        return self.classes[self.label]


def _cifar(
    title: str, stored: str, classes: dict[str, str], label: str = "label"
) -> DatasetSpec:
    return DatasetSpec(
        title,
        stored,
        (32, 32, 3),
        {"train": 50_000, "test": 10_000},
        {feature: tuple(names.split()) for feature, names in classes.items()},
        label,
    )


def _mnist(title: str, stored: str, *names: str) -> DatasetSpec:
    return DatasetSpec(
        title,
        stored,
        (28, 28, 1),
        {"train": 60_000, "test": 10_000},
        {"label": names},
        source="files",
    )


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
"""In the order of the two bytes before an image."""

_ATTRIBUTES = """
    5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips
    Big_Nose Black_Hair Blond_Hair Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin
    Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones Male Mouth_Slightly_Open
    Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline
    Rosy_Cheeks Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat
    Wearing_Lipstick Wearing_Necklace Wearing_Necktie Young
"""
"""Of CelebA, in the order of the alphabet, which is its makers', too."""

DATASETS: dict[str, DatasetSpec] = {
    "cifar10": _cifar(
        "CIFAR-10",
        "cifar10",
        {"label": "airplane automobile bird cat deer dog frog horse ship truck"},
    ),
    # Names of their own rather than a field: what is asked of the net is another thing,
    # and the number of its classes with it.
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
        source="drawn",
    ),
}
"""By the word of ``data.name``."""
