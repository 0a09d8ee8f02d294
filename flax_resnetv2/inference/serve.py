"""A page of one's own machine: drop an image, see the answer and the maps behind it.

>>> server = make_server("runs/quickstart-1", port=8000)
>>> server.serve_forever()

The page asks only this server, which opens no path that it is sent: an image comes as
bytes. One image is computed at a time, by one compiled program.
"""

import base64
import io
import json
from collections.abc import Callable
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Annotated, Any

import jax
import numpy as np

from flax_resnetv2.data import shapes
from flax_resnetv2.errors import UsageError
from flax_resnetv2.inference.predictor import Predictor
from flax_resnetv2.model.intermediates import activations, unit_ratios
from flax_resnetv2.training.augment import normalize
from flax_resnetv2.validation import Range, check_arguments

PAGE = Path(__file__).with_name("serve.html")
LARGEST = 64 * 2**20
"""Bytes of an image that are accepted."""
TOP, MAPS = 10, 16
"""Classes and maps of a part that are shown."""
Port = Annotated[int, Range(0, 65_535)]


class Inspector:
    """What the page says of an image."""

    def __init__(self, predictor: Predictor, name: str) -> None:
        self._predictor, self._lock, self.name = predictor, Lock(), name
        self._look = jax.jit(self._traced)

    def about(self) -> dict[str, str]:
        """The page's head."""
        p = self._predictor
        parameters = sum(x.size for x in jax.tree.leaves(p.variables["params"]))
        units = sum(len(stack.units) for stack in p.model.plan.stacks)
        said = f"{len(p.class_names)} classes" if p.class_names else "an encoder"
        return {
            "name": self.name,
            "text": f"{parameters:,} parameters in {units} residual units; {said}; "
            f"trained on images of {' x '.join(map(str, p.image_shape))}",
        }

    def answer(self, content: bytes) -> dict[str, Any]:
        """Answer the bytes of an image file.

        Raises:
            UsageError: they are no image.
        """
        file = io.BytesIO(content)
        file.name = "the file"
        pixels = self._predictor.load(file)
        with self._lock:
            answer = self._predictor.answer(pixels[None])
            maps, ratios = jax.device_get(
                self._look(self._predictor.variables, pixels[None])
            )
        classes = []
        if answer.probabilities is not None:
            row = answer.probabilities[0]
            classes = [
                {"name": self._predictor.class_names[k], "probability": float(row[k])}
                for k in np.argsort(-row, kind="stable")[:TOP]
            ]
        return {
            "image": _png(pixels),
            "shape": list(pixels.shape),
            "classes": classes,
            "parts": [
                {
                    "name": part,
                    "shape": list(value.shape[1:]),
                    "ratios": [float(x[0]) for x in ratios.get(part, [])],
                    "maps": _strongest(value[0]),
                }
                # Through ``jit`` a dict comes out sorted; the stem comes first.
                for part, value in sorted(maps.items(), key=lambda x: x[0] != "stem")
            ],
        }

    def example(self, number: int) -> bytes:
        """One of the drawn shapes, as a PNG."""
        return _png_bytes(self._examples[number % len(self._examples)])

    @cached_property
    def _examples(self) -> np.ndarray:
        images, labels = shapes.draw_shapes("test")
        return np.stack(
            [images[labels == k][0] for k in range(len(shapes.SHAPE_CLASSES))]
        )

    def _traced(self, variables: Any, images: jax.Array) -> tuple[dict, dict]:
        p = self._predictor
        x = normalize(images, p.normalization, p.model.execution.param_dtype)
        found = activations(p.model, variables, x)
        maps = {k: v for k, v in found.items() if "/" not in k and k != "head"}
        return maps, unit_ratios(p.model, variables, x)


def make_server(
    net: str, *, host: str = "127.0.0.1", port: Port = 8000
) -> ThreadingHTTPServer:
    """Load a net and take the port.

    Args:
        net: as of ``Predictor.find``.
        host: the address to listen at; of this machine alone by itself.
        port: 0: any that is free.

    Raises:
        UsageError: there is no such net, or the port is taken.
        RunError: the net's checkpoints are damaged.
    """
    check_arguments(make_server, {"port": port})
    looking = Inspector(Predictor.find(net), Path(net).name)

    class Handler(_Handler):
        looked_into = looking

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise UsageError(
            f"port={port} of host={host} cannot be had ({error.strerror}); choose "
            "another --port, as 8001"
        ) from error


class _Handler(BaseHTTPRequestHandler):
    looked_into: Inspector

    def do_GET(self) -> None:
        """The page, its head, or an example."""
        if self.path == "/":
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", PAGE.read_bytes())
        elif self.path == "/about":
            self._json(HTTPStatus.OK, self.looked_into.about())
        elif self.path.startswith("/example/") and self.path[9:].isdecimal():
            content = self.looked_into.example(int(self.path[9:][:9]))
            self._send(HTTPStatus.OK, "image/png", content)
        else:
            self._json(HTTPStatus.NOT_FOUND, {"error": "there is no such page"})

    def do_POST(self) -> None:
        """An image."""
        length = self.headers.get("Content-Length", "")
        if self.path != "/answer":
            self._json(HTTPStatus.NOT_FOUND, {"error": "there is no such page"})
        elif not length.isdecimal():
            text = "the length of the image was not said"
            self._json(HTTPStatus.LENGTH_REQUIRED, {"error": text})
        elif int(length) > LARGEST:
            text = f"the image is larger than {LARGEST // 2**20} MB; scale it down"
            self.close_connection = True
            self._json(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"error": text})
        else:
            self._answered(lambda: self.rfile.read(int(length)))

    def log_message(self, *_: Any) -> None:
        """Say nothing of requests."""

    def _answered(self, read: Callable[[], bytes]) -> None:
        try:
            self._json(HTTPStatus.OK, self.looked_into.answer(read()))
        except UsageError as error:
            self._json(HTTPStatus.BAD_REQUEST, {"error": str(error)})

    def _json(self, status: HTTPStatus, value: Any) -> None:
        self._send(status, "application/json", json.dumps(value).encode())

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _strongest(maps: np.ndarray) -> list[dict[str, Any]]:
    """The maps [h, w, C] that vary most, blue below zero and red above, from 1."""
    order = np.argsort(-maps.std((0, 1)), kind="stable")[:MAPS]
    return [
        {"number": int(k) + 1, "image": _png(_colored(maps[..., k]))} for k in order
    ]


def _colored(values: np.ndarray) -> np.ndarray:
    """float [h, w] -> uint8 [h, w, 3]: white is 0."""
    share = values / max(float(np.abs(values).max()), 1e-12)
    high, low = np.clip(share, 0, 1), np.clip(-share, 0, 1)
    colors = np.stack([1 - low, 1 - 0.75 * (low + high), 1 - high], axis=-1)
    return (255 * colors).round().astype(np.uint8)


def _png_bytes(pixels: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    gray = pixels.shape[-1] == 1
    Image.fromarray(pixels[..., 0] if gray else pixels).save(file, "PNG")
    return file.getvalue()


def _png(pixels: np.ndarray) -> str:
    """uint8 [H, W, C] as a data address."""
    content = base64.b64encode(_png_bytes(pixels)).decode()
    return f"data:image/png;base64,{content}"
