"""Data sets that TFDS itself writes, small, in the format that it writes large ones."""

import io

import tensorflow_datasets as tfds
from PIL import Image


def prepare(root, name, splits, *, classes, shape=(None, None, 3), encoding="png"):
    """Write a data set of labeled images; give its directory.

    Args:
        root: a directory of TFDS data sets.
        name: as "imagenet2012".
        splits: {"train": [(uint8 [H, W, C], label), ...]}.
        classes: how many.
        shape: of every image; None: they differ.
        encoding: of the files, "png" or "jpeg".
    """

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=shape, encoding_format=encoding),
                "label": tfds.features.ClassLabel(num_classes=classes),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            for number, (image, label) in enumerate(splits[split]):
                file = io.BytesIO()
                Image.fromarray(image).save(file, encoding)
                file.seek(0)
                yield number, {"image": file, "label": int(label)}

    Builder.name, Builder.pkg_dir_path = name, None
    tfds.disable_progress_bar()
    Builder(data_dir=root, file_format="array_record").download_and_prepare()
    return root / name / "1.0.0"
