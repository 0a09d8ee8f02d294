"""A run as one page: ``report.html``, a single file for any browser.

It shows the metrics over the epochs, the checkpoint's predictions on the test images,
the net, the configuration and the environment. The same run gives the same bytes.
"""

import base64
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from flax_resnetv2.data.datasets import open_dataset
from flax_resnetv2.data.decoding import to_png
from flax_resnetv2.inference import scores
from flax_resnetv2.inference.predictor import Predictor
from flax_resnetv2.model import layer_table
from flax_resnetv2.model.drawing import draw_net
from flax_resnetv2.reports.formats import encode, label, new_figure, plain_style
from flax_resnetv2.reports.reconstruction import draw_reconstructions, read_images
from flax_resnetv2.run.build import count_parameters
from flax_resnetv2.run.config import to_json
from flax_resnetv2.run.run_directory import read_metrics
from flax_resnetv2.run.trained import CheckpointChoice, TrainedNet, restore
from flax_resnetv2.system.files import printable, write_whole

MATRIX = 20
"""Largest confusion matrix that is drawn; otherwise the top confusions are listed."""
MISTAKES = 24
"""Number of misclassified test images that the page shows."""
BATCH = 250
"""Test images per call of the net."""
TEMPLATE = Path(__file__).with_name("run_page.html")


@plain_style()
def write_page(workdir: str | Path, checkpoint: CheckpointChoice = "newest") -> Path:
    """Write ``report.html`` into a run directory and return its path.

    Raises:
        UsageError: as of ``restore``, or the data set is missing.
        RunError: the checkpoints are damaged, or the data set could not be downloaded.
    """
    net, lines = restore(workdir, checkpoint), read_metrics(workdir)
    lines = [line for line in lines if line["step"] <= net.step]
    sections = [_curves(lines) if lines else ""]
    if net.config.architecture.head == "latent":
        alt, drawing = "test images and reconstructions", draw_reconstructions(net, 10)
        sections.append(f"<h2>Reconstructions</h2>{_image(drawing, alt)}")
    elif not net.summary["multi_label"]:
        sections.append(_predictions(net))
    texts = {
        "name": Path(workdir).name,
        "data": net.summary["name"],
        **_headline(net),
        "configuration": to_json(net.config),
        "environment": json.dumps(net.environment, indent=2),
    }
    page = Template(TEMPLATE.read_text()).substitute(
        {key: _escape(text) for key, text in texts.items()},
        sections="\n".join([*sections, _net(net)]),
    )
    path = Path(workdir) / "report.html"
    write_whole(path, page)
    return path


def predict_split(net: TrainedNet, split: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities float [N, K] and labels int [N] of all images of a split."""
    predictor, labels, probabilities = Predictor.from_net(net), [], []
    for first in range(0, split.num_images, BATCH):
        indices = range(first, min(first + BATCH, split.num_images))
        image, label = read_images(split, indices, net.config.augment.test_crop)
        labels.append(label)
        probabilities.append(predictor.predict(image, BATCH).probabilities)
    return np.concatenate(probabilities), np.concatenate(labels)


def _headline(net: TrainedNet) -> dict[str, str]:
    """Return the test score, a description of the run, and the score's interval."""
    summary, line, score, interval = net.summary, net.test or {}, "Not evaluated", ""
    parameters = count_parameters(net.config, tuple(summary["image_shape"]))
    run = (
        f"{summary['name']}, {summary['num_images']['train']:,} training images; "
        f"{net.config.architecture.depth} layers, {parameters:,} parameters; after "
        f"step {net.step:,}"
    )
    if line:
        metric = "accuracy" if "accuracy" in line else "squared_error"
        value = format(line[metric], ".2%" if metric == "accuracy" else ".4f")
        score = f"Test {metric.replace('_', ' ')} {value} ({line['count']:,} images)"
        run += f", epoch {line['epoch']:g}, {line['seconds']:,.0f} s"
    if bounds := scores.interval(line, summary["multi_label"]):
        low, high = bounds
        interval = (
            f"95 % interval (Wilson): {low:.2%} to {high:.2%}. It reflects the number "
            "of test images only, not the variation between seeds."
        )
    return {"score": score, "run": run, "interval": interval}


def _curves(lines: list[dict[str, Any]]) -> str:
    """Draw metrics, learning rate, gradient norms and residual ratios by epoch."""
    names = ("train", "validation", "test")
    splits = {name: [x for x in lines if x["split"] == name] for name in names}
    metrics = ("loss", "accuracy", "squared_error", "kl")
    metrics = [metric for metric in metrics if any(metric in x for x in lines)]
    panels = [*metrics, "learning rate", "gradient norm", "residual / identity"]
    rows = -(-len(panels) // 3)
    figure = new_figure(12, 2.8 * rows)
    grid = figure.subplots(rows, 3, squeeze=False).ravel()
    for unused in grid[len(panels) :]:
        unused.remove()
    axes = dict(zip(panels, grid, strict=False))

    def plot(panel: str, some: list, values: list[float], **style: Any) -> None:
        axes[panel].plot([x["epoch"] for x in some], values, markersize=3, **style)

    for metric in metrics:
        for number, (split, some) in enumerate(splits.items()):
            if some := [x for x in some if metric in x]:
                style = {"marker": "" if split == "train" else "o", "label": split}
                values = [x[metric] for x in some]
                plot(metric, some, values, color=f"C{number}", **style)
    train, test = splits["train"], splits["test"]
    plot("learning rate", train, [x["learning_rate"] for x in train], color="C3")
    for part in sorted(train[0]["gradient_norm"] if train else ()):
        norms = [x["gradient_norm"][part] for x in train]
        plot("gradient norm", train, norms, label=part, linewidth=1)
    axes["gradient norm"].set_yscale("log")
    for stack in sorted(test[0]["residual_ratio"] if test else ()):
        ratios = [np.mean(x["residual_ratio"][stack]) for x in test]
        plot("residual / identity", test, ratios, label=stack, marker="o")
    for name, panel in axes.items():
        panel.set(title=name.replace("_", " "), xlabel="epoch")
        if panel.get_legend_handles_labels()[0]:
            panel.legend()
    caption = (
        "Residual / identity: the norm of a unit's residual branch divided by the norm "
        "of its shortcut, averaged over the test images and the units of a stack."
    )
    return f"<h2>Training</h2>{_drawing(figure, 'metrics by epoch', caption)}"


def _predictions(net: TrainedNet) -> str:
    """Show what the net gets right and wrong on the test images."""
    split = open_dataset(net.config.data).splits["test"]
    found = predict_split(net, split)
    return (
        f"<h2>Classes</h2>{_classes(scores.confusion(*found), net)}"
        f"<h2>Calibration</h2>{_calibration(scores.calibration(*found))}"
        f"<h2>Most confident errors</h2>{_mistakes(net, split, *found)}"
    )


def _classes(matrix: np.ndarray, net: TrainedNet) -> str:
    """Show confusions, recall and precision; the classes of lowest recall first."""
    names = net.summary["class_names"]
    count, predicted, correct = matrix.sum(1), matrix.sum(0), matrix.diagonal()
    if len(names) <= MATRIX:
        confusions = _matrix(matrix, names)
    else:
        wrong = matrix - np.diag(correct)
        order = np.argsort(-wrong, axis=None, kind="stable")[:MATRIX]
        pairs = zip(*np.unravel_index(order, wrong.shape), strict=True)
        rows = [
            (names[i], names[j], f"{wrong[i, j]:,}") for i, j in pairs if wrong[i, j]
        ]
        confusions = _table(("true class", "predicted class", "images"), rows)
    with np.errstate(invalid="ignore"):
        recall, precision = correct / count, correct / predicted
    rows = [
        (names[k], f"{count[k]:,}", _percent(recall[k]), _percent(precision[k]))
        for k in np.argsort(recall, kind="stable")[: 2 * MATRIX]
    ]
    return confusions + _table(("class", "test images", "recall", "precision"), rows)


def _matrix(matrix: np.ndarray, names: Sequence[str]) -> str:
    """Draw a confusion matrix."""
    figure = new_figure(8.4, 5.3)
    axes = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(1), 1)[:, None]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    center = {"ha": "center", "va": "center", "fontsize": 7}
    for i, j in np.argwhere(matrix):
        color = "white" if shares[i, j] > 0.5 else "black"
        axes.text(j, i, str(matrix[i, j]), color=color, **center)
    labels = [label(name) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), labels, fontsize=8)
    axes.set(xlabel="predicted class", ylabel="true class")
    return _drawing(figure, "confusion matrix", "Number of test images.")


def _calibration(bins: scores.Calibration) -> str:
    """Draw accuracy over confidence."""
    figure = new_figure(8, 3.1)
    left, right = figure.subplots(1, 2)
    filled = bins.images > 0
    left.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    left.plot(bins.confidence[filled], bins.accuracy[filled], "o-", markersize=4)
    left.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    right.stairs(bins.images, np.linspace(0, 1, len(bins.images) + 1), fill=True)
    right.set(xlabel="confidence", ylabel="test images", xlim=(0, 1))
    caption = (
        f"Expected calibration error {bins.error:.2%} ({len(bins.images)} bins). The "
        "net is overconfident below the diagonal and underconfident above it."
    )
    return _drawing(figure, "accuracy over confidence", caption)


def _mistakes(
    net: TrainedNet, split: Any, probabilities: np.ndarray, labels: np.ndarray
) -> str:
    """Show the test images that the net misclassifies with the highest confidence."""
    indices = scores.worst(probabilities, labels, MISTAKES)
    if not len(indices):
        return "<p>None: all test images are classified correctly.</p>"
    names, cells = net.summary["class_names"], []
    images, _ = read_images(split, indices, net.config.augment.test_crop)
    for index, pixels in zip(indices, images, strict=True):
        label, row = names[labels[index]], probabilities[index]
        caption = f"{label}\npredicted {names[row.argmax()]}, {row.max():.0%}"
        cells.append(_image(to_png(pixels), f"test image {index}", caption))
    return f'<div class="mistakes">{"".join(cells)}</div>'


def _net(net: TrainedNet) -> str:
    """Show the parts of the net as a table and as a drawing."""
    shape = net.config.augment.input_shape(tuple(net.summary["image_shape"]))
    rows = layer_table.fold(layer_table.unit_table(net.model.plan, shape))
    sums = [sum(getattr(x, n) for x in rows) for n in ("parameters", "multiply_adds")]
    rows.append(layer_table.LayerRow("total", (), 0, 0, *sums))
    join = " x ".join
    cells = [
        (x.name, join(map(str, x.shape)), f"{x.parameters:,}", f"{x.multiply_adds:,}")
        for x in rows
    ]
    head = ("part", "output shape", "parameters", "multiply-adds")
    drawing = draw_net(net.model.plan, shape).encode()
    return (
        f'<h2>Net</h2><div class="wide">{_table(head, cells)}</div>'
        f"{_image(drawing, 'diagram of the net', kind='svg+xml')}"
    )


def _escape(text: str) -> str:
    """Return plain text as HTML, with its line breaks."""
    return "\n".join(map(printable, html.escape(text).split("\n")))


def _percent(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.1%}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return an HTML table of plain text."""

    def line(tag: str, cells: Sequence[str]) -> str:
        cells = (f"<{tag}>{_escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{''.join(cells)}</tr>"

    body = "".join(line("td", cells) for cells in rows)
    return f"<table><thead>{line('th', head)}</thead><tbody>{body}</tbody></table>"


def _drawing(figure: Any, alt: str, caption: str) -> str:
    """Return an HTML figure of a matplotlib figure."""
    return _image(encode(figure, "svg"), alt, caption, kind="svg+xml")


def _image(content: bytes, alt: str, caption: str = "", kind: str = "png") -> str:
    """Return an HTML figure that embeds an image file of the media type image/kind."""
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    text = f"<figcaption>{_escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{_escape(alt)}" src="{source}">{text}</figure>'
