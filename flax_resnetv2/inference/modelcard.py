"""The model card of a trained net, written from its own records."""

from flax_resnetv2.inference import scores
from flax_resnetv2.run.build import count_parameters
from flax_resnetv2.run.trained import TrainedNet


def card(net: TrainedNet, name: str) -> str:
    """Return the model card as Markdown.

    Args:
        net: of ``restore`` or ``modelfile.load``.
        name: what ``predict.py`` calls the net.
    """
    config, summary, environment = net.config, net.summary, net.environment
    a, t = config.architecture, config.train
    parameters = count_parameters(config, tuple(summary["image_shape"]))
    size = " x ".join(map(str, summary["image_shape"]))
    versions = {"Python": environment["python"], **environment["versions"]}
    seconds = f"{net.test['seconds']:,.0f} s" if net.test else "unknown time"
    devices = environment["devices"]
    averaged = f"decay {t.ema_decay:g}" if t.ema_decay else "no"
    limits = f"It sees images scaled to {size}"
    if a.head == "classifier":
        names = summary["class_names"]
        limits += f" and assigns each to one of {len(names)} classes "
        limits += f"({', '.join(names[:20])}), whatever the image shows"
    return f"""# {name}

A ResNet V2 with {a.depth} layers ({a.unit} units {a.units}, widths {a.widths}) and \
{parameters:,} parameters, trained on {summary["num_images"]["train"]:,} images of \
{size} ({summary["name"]}).

```
python predict.py {name} image.png
```

## Accuracy

{_result(net)}

## Training

| | |
|---|---|
| epochs, steps | {t.epochs}, {net.step:,} |
| optimizer, peak learning rate, schedule | {t.optimizer}, {t.learning_rate:g}, \
{t.schedule} |
| batch size, weight decay, label smoothing | {t.batch_size}, {t.weight_decay:g}, \
{t.label_smoothing:g} |
| exponential moving average of the variables | {averaged} |
| seed | {config.seed} |
| time | {seconds} on {len(devices)} x {devices[0]} ({environment["platform"]}) |
| commit | {environment["commit"] or "unknown"} |
| versions | {", ".join(f"{k} {v}" for k, v in sorted(versions.items()))} |

The file itself holds the whole configuration.

## Intended use and limits

For trying the package, inspecting feature maps and latent vectors, and starting other \
trainings. {limits}. Its accuracy on images from other sources, and how its \
errors affect different groups of people, have not been examined: do not use it for \
decisions about people.
"""


def _result(net: TrainedNet) -> str:
    """State the test metrics, with their uncertainty and how they were selected."""
    line, target = net.test, net.config.target_accuracy
    if line is None:
        return "It was never evaluated on the test images."
    if "accuracy" not in line:
        return f"Squared error {line['squared_error']:.4f} on {line['count']:,} images."
    uncertainty = "one run"
    if bounds := scores.interval(line, net.summary["multi_label"]):
        low, high = bounds
        uncertainty += f"; 95 % interval from the images alone: {low:.2%} to {high:.2%}"
    selected = "Nothing was selected on the test images."
    if target is not None:
        held_out = "held-out validation images"
        here = "these images, so this result was selected on them"
        images = held_out if net.config.data.validation else here
        selected = f"Training was set to end at {target:.2%} on {images}."
    return (
        f"{line['accuracy']:.2%} on all {line['count']:,} test images, after epoch "
        f"{line['epoch']:g} of {net.config.train.epochs} ({uncertainty}). {selected}"
    )
