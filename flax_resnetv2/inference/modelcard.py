"""The card of a trained net, from its own records: no number is typed by hand."""

from flax_resnetv2.inference import scores
from flax_resnetv2.run.build import count_parameters
from flax_resnetv2.run.trained import TrainedNet


def card(net: TrainedNet, name: str) -> str:
    """Write what a user of the net must know, as Markdown.

    Args:
        net: of ``restore`` or ``modelfile.load``.
        name: what ``predict.py`` calls it.
    """
    config, facts, line = net.config, net.facts, net.test
    a, t = config.architecture, config.train
    parameters = count_parameters(config, tuple(facts["image_shape"]))
    size = " x ".join(map(str, facts["image_shape"]))
    known = sorted(net.environment["versions"].items())
    versions = ", ".join(f"{name} {version}" for name, version in known)
    devices = net.environment["devices"]
    text = [
        f"# {name}",
        "",
        f"A ResNet V2 of {a.depth} layers ({a.unit} units {a.units}, widths "
        f"{a.widths}) with {parameters:,} parameters, trained on "
        f"{facts['num_images']['train']:,} images of {size} ({facts['name']}).",
        "",
        "```",
        f"python predict.py {name} image.png",
        "```",
        "",
        "## How well it does",
        "",
        _result(net),
        "",
        "## How it was trained",
        "",
        "| | |",
        "|---|---|",
        f"| epochs, steps | {t.epochs}, {net.step:,} |",
        f"| optimizer, highest rate, schedule | {t.optimizer}, {t.learning_rate:g}, "
        f"{t.schedule} |",
        f"| batch, weight decay, label smoothing | {t.batch_size}, {t.weight_decay:g}, "
        f"{t.label_smoothing:g} |",
        f"| averaged variables | {f'share kept {t.ema_decay:g}' if t.ema_decay else 'no'} |",
        f"| seed | {config.seed} |",
        f"| time | {line['seconds']:,.0f} s on {len(devices)} x {devices[0]} "
        f"({net.environment['platform']}) |"
        if line
        else "| time | unknown |",
        f"| commit | {net.environment['commit'] or 'unknown'} |",
        f"| versions | Python {net.environment['python']}, {versions} |",
        "",
        "The whole configuration is in the file itself.",
        "",
        "## For what, and for what not",
        "",
        "To try the package, to look at maps and latent vectors, to begin other "
        "trainings from. "
        + _limits(net, size)
        + " Nobody has examined how it does on pictures from elsewhere, or whom its "
        "errors would hit; decide nothing about people with it.",
        "",
    ]
    return "\n".join(text)


def _result(net: TrainedNet) -> str:
    line = net.test
    if line is None:
        return "It was never tested."
    if "accuracy" not in line:
        return f"Squared error {line['squared_error']:.4f} on {line['count']:,} images."
    chance = "n = 1 run"
    if bounds := scores.interval(line, net.facts.get("multi_label", False)):
        low, high = bounds
        chance += f"; at 95 % the images alone leave {low:.2%} to {high:.2%}"
    return (
        f"{line['accuracy']:.2%} on all {line['count']:,} test images, after epoch "
        f"{line['epoch']:g} of {net.config.train.epochs} ({chance}). {_selected(net)}"
    )


def _selected(net: TrainedNet) -> str:
    """What this result was chosen by."""
    target = net.config.target_accuracy
    if target is None:
        return "Nothing was selected on the test images."
    if net.config.data.validation:
        return f"It ended when it reached {target:.2%} on images held out."
    return (
        f"It was to end when it reached {target:.2%} on these images: they selected "
        "their own result."
    )


def _limits(net: TrainedNet, size: str) -> str:
    if net.config.architecture.head != "classifier":
        return f"It sees images scaled to {size}."
    names = ", ".join(net.facts["class_names"][:20])
    return (
        f"It sees images scaled to {size}, and knows {len(net.facts['class_names'])} "
        f"classes ({names}): whatever is on a picture gets one of these names."
    )
