"""Run timm's own nets, and keep what the tests compare with.

    pip install torch timm torchvision safetensors
    python -m tests.support.peers.make_timm

Writes for each preset NAME.json (tensors and shapes) and, for one shallow and one deep
net of a kind, NAME.npz: for each size of images "stack1" ... "stack4" (``sample`` of
the stage's maps), their "std", and "logits". Everything in float64, which PyTorch
keeps.
"""

import json

import numpy as np
import torch

from tests.support import peers

# timm imports torchvision, and torchvision's build for CUDA has no operators beside
# PyTorch's build for the CPU: it only wants to see that they are declared.
try:
    import torchvision  # noqa: F401
except RuntimeError:
    _operators = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _operators.define(f"{_name}(Tensor d, Tensor s, float t) -> Tensor")

import timm

NETS = {
    "timm-resnetv2-18": "resnetv2_18",
    "timm-resnetv2-34": "resnetv2_34",
    "timm-resnetv2-50": "resnetv2_50",
    "timm-resnetv2-50d": "resnetv2_50d",
    "timm-resnetv2-101": "resnetv2_101",
    "timm-resnetv2-152": "resnetv2_152",
    "bit-r50x1": "resnetv2_50x1_bit",
    "bit-r101x1": "resnetv2_101x1_bit",
    "bit-r50x3": "resnetv2_50x3_bit",
    "bit-r101x3": "resnetv2_101x3_bit",
    "bit-r152x2": "resnetv2_152x2_bit",
    "bit-r152x4": "resnetv2_152x4_bit",
}
RUN = (
    "timm-resnetv2-18",
    "timm-resnetv2-50d",
    "timm-resnetv2-152",
    "bit-r50x1",
    "bit-r101x1",
)


def main() -> None:
    """Write all files."""
    for preset, name in NETS.items():
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=1000)
        shapes = {
            key: list(tensor.shape)
            for key, tensor in model.state_dict().items()
            if not key.endswith("num_batches_tracked")
        }
        lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in shapes.items()]
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        (peers.HERE / f"{preset}.json").write_text(text)
        if preset in RUN:
            kept = run(timm.create_model(name, num_classes=1000).double().eval())
            np.savez_compressed(peers.HERE / f"{preset}.npz", **kept)
        print(preset, "written")


def run(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Fill the net, and follow images through it."""
    state = model.state_dict()
    for key, tensor in state.items():
        if not key.endswith("num_batches_tracked"):
            tensor.copy_(torch.from_numpy(peers.fill(key, tuple(tensor.shape))))
    model.load_state_dict(state)
    maps: list[torch.Tensor] = []
    for stage in model.stages:
        stage.register_forward_hook(lambda _, __, output: maps.append(output))
    kept = {}
    for side in peers.SIDES:
        maps.clear()
        with torch.no_grad():
            images = torch.from_numpy(peers.images(side)).permute(0, 3, 1, 2)
            kept[f"{side}/logits"] = model(images).numpy()
        for number, output in enumerate(maps, start=1):
            assert output.dtype == torch.float64
            values = output.permute(0, 2, 3, 1).numpy()
            kept[f"{side}/stack{number}"] = peers.sample(values)
            kept[f"{side}/stack{number}/std"] = values.std()
    return kept


if __name__ == "__main__":
    main()
