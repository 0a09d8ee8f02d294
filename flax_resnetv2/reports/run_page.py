"""A run as one page: ``report.html``, which needs nothing but a browser.

What ``metrics.jsonl`` has, drawn; what the checkpoint answers on the test images; the
net, the configuration and the machine. The same run gives the same bytes.
"""

import base64
import html
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flax_resnetv2.data.datasets import Dataset, open_dataset
from flax_resnetv2.data.streaming import EvaluationRow
from flax_resnetv2.inference import scores
from flax_resnetv2.inference.predictor import Predictor
from flax_resnetv2.model import layer_table
from flax_resnetv2.model.drawing import draw_net
from flax_resnetv2.reports.reconstruction import picture
from flax_resnetv2.run.build import count_parameters
from flax_resnetv2.run.config import to_json
from flax_resnetv2.run.run_directory import read_metrics
from flax_resnetv2.run.trained import CheckpointChoice, TrainedNet, restore
from flax_resnetv2.system.files import write_whole

MATRIX = 20
"""Of more classes the confusion matrix is a list of the most frequent confusions."""
MISTAKES = 24
"""Pictures of wrong answers."""
BATCH = 250

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 62rem;
  padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.big { font-size: 2.4rem; margin: .4rem 0 0; font-weight: 600; }
p.note, figcaption { opacity: .75; font-size: .9rem; margin: .2rem 0; }
figure { margin: .8rem 0; } figure > img { max-width: 100%; background: #fff;
  border-radius: 6px; }
table { border-collapse: collapse; font-size: .9rem; }
td, th { padding: .15rem .6rem; border-bottom: 1px solid var(--line);
  text-align: right; } td:first-child, th:first-child { text-align: left; }
.wide { overflow-x: auto; }
.mistakes { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); }
.mistakes figure { margin: 0; } .mistakes img { width: 100%;
  image-rendering: pixelated; border-radius: 4px; }
.mistakes figcaption { line-height: 1.25; }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; font-size: .8rem; }
@media print { body { max-width: none; } h2 { break-after: avoid; }
  figure { break-inside: avoid; } }
"""


class TestPredictions(NamedTuple):
    """The test images' labels, and what the net says of each."""

    labels: np.ndarray
    probabilities: np.ndarray


def write_page(workdir: str | Path, checkpoint: CheckpointChoice = "newest") -> Path:
    """Write ``report.html`` into a run's directory.

    Args:
        workdir: of the run.
        checkpoint: which one answers.

    Raises:
        UsageError: as ``restore``, or the data are not there.
        RunError: the checkpoints are damaged, or the data could not be had.
    """
    net, lines = restore(workdir, checkpoint), read_metrics(workdir)
    lines = [line for line in lines if line["step"] <= net.step]
    sections = [_headline(net, workdir), _curves(lines)]
    if net.config.architecture.head == "latent":
        image = f'<img alt="test images, decoded" src="{_address(picture(net, 10))}">'
        sections.append(
            _section("<h2>Reconstructions</h2>", f"<figure>{image}</figure>")
        )
    elif not net.facts.get("multi_label", False):
        sections += _answers(net, open_dataset(net.config.data))
    sections += [_net(net), _settings(net)]
    title = html.escape(f"{Path(workdir).name}: {net.facts['name']}")
    text = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )
    path = Path(workdir) / "report.html"
    write_whole(path, text)
    return path


def test(net: TrainedNet, dataset: Dataset) -> TestPredictions:
    """Let the net answer every image of the split "test"."""
    predictor, labels, found = Predictor.of(net), [], []
    for image, label in _batches(net, dataset):
        labels.append(label)
        found.append(predictor.answer(image, BATCH).probabilities)
    return TestPredictions(np.concatenate(labels), np.concatenate(found))


def _batches(
    net: TrainedNet, dataset: Dataset
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images and labels of the split "test", in its order."""
    split = dataset.splits["test"]
    for first in range(0, split.num_images, BATCH):
        last = min(first + BATCH, split.num_images)
        if dataset.in_memory():
            image, label = (np.asarray(x[first:last]) for x in split)
        else:
            row = EvaluationRow(split, net.config.augment.test_crop)
            rows = [row(place)[:2] for place in range(first, last)]
            image, label = map(np.stack, zip(*rows, strict=True))
        yield image, label


def _headline(net: TrainedNet, workdir: str | Path) -> str:
    architecture, facts, line = net.config.architecture, net.facts, net.test or {}
    parameters = count_parameters(net.config, tuple(facts["image_shape"]))
    big = "not tested yet"
    if "accuracy" in line:
        big = f"{line['accuracy']:.2%} of {line['count']:,} test images"
    elif "squared_error" in line:
        big = f"squared error {line['squared_error']:.4f} on {line['count']:,} images"
    notes = [
        f"{facts['name']}; {facts['num_images']['train']:,} training images; a net of "
        f"{architecture.depth} layers, {parameters:,} parameters; after step "
        f"{net.step:,}"
        + (f", epoch {line['epoch']:g}, {line['seconds']:,.0f} s" if line else "")
    ]
    if bounds := scores.interval(line, facts.get("multi_label", False)):
        low, high = bounds
        notes.append(
            f"One run. By chance of the {line['count']:,} images alone the true share "
            f"lies, at 95 %, between {low:.2%} and {high:.2%} (Wilson); what another "
            "seed would change is not in it."
        )
    return _section(
        f"<h1>{html.escape(Path(workdir).name)}</h1>",
        f'<p class="big">{html.escape(big)}</p>',
        *(f'<p class="note">{html.escape(note)}</p>' for note in notes),
    )


def _curves(lines: list[dict[str, Any]]) -> str:
    """Loss, accuracy or errors, rate, gradients and residuals over the epochs."""
    if not lines:
        return ""
    shown = [
        name
        for name in ("loss", "accuracy", "squared_error", "kl")
        if any(name in line for line in lines)
    ]
    figure = _figure(3, -(-(len(shown) + 3) // 3))
    axes = figure.subplots(-(-(len(shown) + 3) // 3), 3, squeeze=False).ravel()
    splits = [s for s in ("train", "validation", "test") if _of(lines, s)]
    for place, name in zip(axes, shown, strict=False):
        for number, split in enumerate(splits):
            points = [(x["epoch"], x[name]) for x in _of(lines, split) if name in x]
            if points:
                style = "-" if split == "train" else "o-"
                place.plot(
                    *zip(*points, strict=True),
                    style,
                    color=f"C{number}",
                    label=split,
                    markersize=3,
                    linewidth=1.2,
                )
        place.set_title(name.replace("_", " "))
        place.legend()
    rate, gradient, residual = axes[len(shown) : len(shown) + 3]
    train, test = _of(lines, "train"), _of(lines, "test")
    epochs = [line["epoch"] for line in train]
    rate.plot(epochs, [line["learning_rate"] for line in train], color="C3")
    rate.set_title("learning rate")
    parts = train[0]["gradient_norm"] if train else {}
    for part in sorted(parts):
        norms = [line["gradient_norm"][part] for line in train]
        gradient.plot(epochs, norms, label=part, linewidth=1)
    gradient.set_yscale("log")
    gradient.set_title("norm of the gradient")
    gradient.legend()
    for stack in sorted(test[0]["residual_ratio"] if test else {}):
        points = [(x["epoch"], np.mean(x["residual_ratio"][stack])) for x in test]
        residual.plot(*zip(*points, strict=True), "o-", markersize=3, label=stack)
    residual.set_title("residual / identity, mean of units")
    residual.legend()
    for place in axes[len(shown) + 3 :]:
        place.remove()
    for place in axes[: len(shown) + 3]:
        place.set_xlabel("epoch")
    text = (
        "Residual / identity is the norm of what a residual unit adds over the norm of "
        "what its shortcut carries, a mean over the test images."
    )
    return _section("<h2>Training</h2>", _img(figure, text))


def _answers(net: TrainedNet, dataset: Dataset) -> list[str]:
    """What the net gets right and wrong on the test images."""
    tested = test(net, dataset)
    names = [html.escape(name) for name in net.facts["class_names"]]
    matrix = scores.confusion(tested.probabilities, tested.labels)
    return [
        _section("<h2>Classes</h2>", *_classes(matrix, names)),
        _section("<h2>Calibration</h2>", _calibration(tested)),
        _section("<h2>Surest mistakes</h2>", _mistakes(net, dataset, tested, names)),
    ]


def _classes(matrix: np.ndarray, names: Sequence[str]) -> Iterator[str]:
    count, right = matrix.sum(1), matrix.diagonal()
    said = matrix.sum(0)
    with np.errstate(invalid="ignore"):
        recall, precision = right / count, right / said
    if len(names) <= MATRIX:
        figure = _figure(2.1, 1.9)
        axes = figure.subplots()
        shares = matrix / np.maximum(count, 1)[:, None]
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for i, j in np.ndindex(*matrix.shape):
            if matrix[i, j]:
                color = "white" if shares[i, j] > 0.5 else "black"
                axes.text(
                    *(j, i, str(matrix[i, j])),
                    color=color,
                    ha="center",
                    va="center",
                    fontsize=7,
                )
        plain = [html.unescape(name) for name in names]
        axes.set_xticks(range(len(names)), plain, rotation=45, ha="right", fontsize=8)
        axes.set_yticks(range(len(names)), plain, fontsize=8)
        axes.set_xlabel("said")
        axes.set_ylabel("true class")
        yield _img(figure, "Test images by true class (rows) and answer (columns).")
    else:
        wrong = matrix.copy()
        np.fill_diagonal(wrong, 0)
        order = np.argsort(-wrong, axis=None, kind="stable")[:MATRIX]
        rows = [
            (names[i], names[j], f"{wrong[i, j]:,}")
            for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True)
            if wrong[i, j]
        ]
        yield _table(("true class", "said", "images"), rows)
    worst_first = np.argsort(recall, kind="stable")[: 2 * MATRIX]
    yield _table(
        ("class", "test images", "recall", "precision"),
        [
            (names[k], f"{count[k]:,}", _share(recall[k]), _share(precision[k]))
            for k in worst_first
        ],
    )


def _calibration(tested: TestPredictions) -> str:
    found = scores.calibration(tested.probabilities, tested.labels)
    figure = _figure(2, 1.1)
    left, right = figure.subplots(1, 2)
    there = found.images > 0
    left.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    left.plot(found.confidence[there], found.accuracy[there], "o-", markersize=4)
    left.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    edges = np.linspace(0, 1, len(found.images) + 1)
    right.stairs(found.images, edges, fill=True)
    right.set(xlabel="confidence", ylabel="test images", xlim=(0, 1))
    text = (
        f"Expected calibration error {found.error:.2%} ({len(found.images)} bins). "
        "Below the diagonal the net is surer than it is right, above it less sure."
    )
    return _img(figure, text)


def _mistakes(
    net: TrainedNet, dataset: Dataset, tested: TestPredictions, names: Sequence[str]
) -> str:
    places = scores.worst(tested.probabilities, tested.labels, MISTAKES)
    if not len(places):
        return "<p>None: every test image is answered rightly.</p>"
    split, cells = dataset.splits["test"], []
    for place in places:
        if dataset.in_memory():
            pixels = np.asarray(split.image[place])
        else:
            pixels = EvaluationRow(split, net.config.augment.test_crop)(int(place))[0]
        row = tested.probabilities[place]
        said = names[row.argmax()]
        cells.append(
            f'<figure><img alt="test image {place}" src="{_png(pixels)}">'
            f"<figcaption>{names[tested.labels[place]]}<br>said {said} {row.max():.0%}"
            "</figcaption></figure>"
        )
    return f'<div class="mistakes">{"".join(cells)}</div>'


def _net(net: TrainedNet) -> str:
    shape = _input_shape(net)
    drawing = draw_net(net.model.plan, shape).encode()
    rows = layer_table.fold(layer_table.unit_table(net.model.plan, shape))
    total = [sum(getattr(r, n) for r in rows) for n in ("parameters", "multiply_adds")]
    cells = [
        (
            html.escape(row.name),
            " x ".join(map(str, row.shape)),
            f"{row.parameters:,}",
            f"{row.multiply_adds:,}",
        )
        for row in rows
    ]
    cells.append(("total", "", *(f"{x:,}" for x in total)))
    source = "data:image/svg+xml;base64," + base64.b64encode(drawing).decode()
    return _section(
        "<h2>Net</h2>",
        '<div class="wide">',
        _table(("part", "maps out", "parameters", "multiply-adds"), cells),
        "</div>",
        f'<figure><img alt="the net, drawn" src="{source}"></figure>',
    )


def _settings(net: TrainedNet) -> str:
    texts = {
        "Configuration": to_json(net.config),
        "Environment": json.dumps(net.environment, indent=2),
    }
    return _section(
        *(
            f"<h2>{title}</h2><details><summary>as JSON</summary>"
            f"<pre>{html.escape(text)}</pre></details>"
            for title, text in texts.items()
        )
    )


def _input_shape(net: TrainedNet) -> tuple[int, int, int]:
    return net.config.augment.input_shape(tuple(net.facts["image_shape"]))


def _of(lines: list[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["split"] == split]


def _section(*parts: str) -> str:
    return f"<section>{''.join(parts)}</section>"


def _share(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.1%}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """``rows`` are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _figure(columns: float, rows: float) -> Any:
    from matplotlib.figure import Figure

    return Figure((4 * columns, 2.8 * rows), layout="constrained")


def _img(figure: Any, caption: str) -> str:
    """A figure as an image within the page; the same bytes each time."""
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "report", "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    source = base64.b64encode(file.getvalue()).decode()
    words = html.escape(caption)
    return (
        f'<figure><img alt="{words}" src="data:image/svg+xml;base64,{source}">'
        f"<figcaption>{words}</figcaption></figure>"
    )


def _png(pixels: np.ndarray) -> str:
    """uint8 [H, W, C] as a data address."""
    from PIL import Image

    file = io.BytesIO()
    gray = pixels.shape[-1] == 1
    Image.fromarray(pixels[..., 0] if gray else pixels).save(file, "PNG")
    return _address(file.getvalue())


def _address(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
