"""A local web page: drop an image, see the predictions and the feature maps.

>>> server = make_server("runs/quickstart-1", port=8000)
>>> server.serve_forever()

The page contacts only this server. Images arrive as bytes, so the server opens no path
that a request names. One compiled program processes one image at a time.
"""

import base64
import io
import json
import re
import sys
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Annotated, Any

import jax
import numpy as np

from flax_resnetv2.data import shapes
from flax_resnetv2.data.decoding import to_png
from flax_resnetv2.errors import UsageError
from flax_resnetv2.inference.predictor import Predictor
from flax_resnetv2.model.intermediates import activations, unit_ratios
from flax_resnetv2.training.augment import normalize
from flax_resnetv2.validation import Range, check_arguments

PAGE = Path(__file__).with_name("serve.html")
MAX_BYTES = 64 * 2**20
"""Size limit of an image file."""
CLASSES, MAPS = 10, 16
"""Number of classes, and of feature maps per part of the net, that the page shows."""
NO_PAGE = {"error": "there is no such page"}


class Inspector:
    """Computes what the page shows, for any thread of the server."""

    def __init__(self, predictor: Predictor, name: str) -> None:
        self._predictor, self._lock, self.name = predictor, Lock(), name
        self._compiled = jax.jit(self._maps_and_ratios)

    def describe(self) -> dict[str, str]:
        """Return the name and a description of the net."""
        p = self._predictor
        parameters = sum(x.size for x in jax.tree.leaves(p.variables["params"]))
        units = sum(len(stack.units) for stack in p.model.plan.stacks)
        kind = f"{len(p.class_names)} classes" if p.class_names else "an encoder"
        return {
            "name": self.name,
            "text": f"{parameters:,} parameters in {units} residual units; {kind}; "
            f"trained on images of {' x '.join(map(str, p.image_shape))}",
        }

    @jax.transfer_guard("allow")
    def inspect(self, content: bytes) -> dict[str, Any]:
        """Return predictions and feature maps for the content of an image file.

        Raises:
            UsageError: the content is not an image.
        """
        predictor, file = self._predictor, io.BytesIO(content)
        file.name = "the file"
        pixels = predictor.load(file)
        with self._lock:
            probabilities = predictor.predict(pixels[None]).probabilities
            found = self._compiled(predictor.variables, pixels[None])
            maps, ratios = jax.device_get(found)
        classes = []
        if probabilities is not None:
            classes = predictor.top_classes(probabilities[0], CLASSES)
        return {
            "image": _data_url(pixels),
            "shape": list(pixels.shape),
            "classes": [{"name": name, "probability": p} for name, p in classes],
            "parts": [
                {
                    "name": part,
                    "shape": list(value.shape[1:]),
                    "ratios": [float(x[0]) for x in ratios.get(part, [])],
                    "maps": _strongest_maps(value[0]),
                }
                # jit sorts the keys of a dict; the stem comes first.
                for part, value in sorted(maps.items(), key=lambda x: x[0] != "stem")
            ],
        }

    def example(self, number: int) -> bytes:
        """Return an image of the data set embedded_shapes as PNG."""
        return to_png(self._examples[number % len(self._examples)])

    @cached_property
    def _examples(self) -> np.ndarray:
        """The first image of each class; drawing the data set takes a second."""
        images, labels = shapes.draw_shapes("test")
        return images[[np.argmax(labels == k) for k in np.unique(labels)]]

    def _maps_and_ratios(self, variables: Any, images: jax.Array) -> tuple[dict, dict]:
        p = self._predictor
        x = normalize(images, p.normalization, p.model.execution.param_dtype)
        found = activations(p.model, variables, x)
        maps = {k: v for k, v in found.items() if "/" not in k and k != "head"}
        return maps, unit_ratios(p.model, variables, x)


def make_server(
    net: str, *, host: str = "127.0.0.1", port: Annotated[int, Range(0, 65_535)] = 8000
) -> ThreadingHTTPServer:
    """Load a net and open the port.

    Args:
        net: as of ``Predictor.find``.
        host: the address to listen on; the default accepts only this machine.
        port: 0 chooses a free one.

    Raises:
        UsageError: there is no such net, or the port is taken.
        RunError: the net's checkpoints are damaged.
    """
    check_arguments(make_server, {"port": port})
    inspector = Inspector(Predictor.find(net), Path(net).name)
    try:
        server = _Server((host, port), _Handler)
    except OSError as error:
        raise UsageError(
            f"port={port} of host={host} cannot be opened ({error.strerror}); choose "
            "another --port, for example 8001"
        ) from error
    server.inspector = inspector
    return server


class _Server(ThreadingHTTPServer):
    def handle_error(self, *which: Any) -> None:
        """Say nothing of a browser that closed its connection."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*which)


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        """Send the page, the description of the net, or an example."""
        if self.path == "/":
            self._send(HTTPStatus.OK, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif self.path == "/about":
            self._send_json(HTTPStatus.OK, self.server.inspector.describe())
        elif self.path.startswith("/example/") and self.path[9:].isdecimal():
            content = self.server.inspector.example(int(self.path[9:][:9]))
            self._send(HTTPStatus.OK, content, "image/png")
        else:
            self._send_json(HTTPStatus.NOT_FOUND, NO_PAGE)

    def do_POST(self) -> None:
        """Inspect an image."""
        length = self.headers.get("Content-Length", "")
        if self.path != "/inspect":
            self._send_json(HTTPStatus.NOT_FOUND, NO_PAGE)
        elif not re.fullmatch("[0-9]{1,18}", length):
            error = {"error": "the request has no valid Content-Length"}
            self._send_json(HTTPStatus.LENGTH_REQUIRED, error)
        elif int(length) > MAX_BYTES:
            limit = f"{MAX_BYTES // 2**20} MB"
            error = {"error": f"the image is larger than {limit}; scale it down"}
            self.close_connection = True
            self._send_json(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, error)
        else:
            try:
                found = self.server.inspector.inspect(self.rfile.read(int(length)))
                self._send_json(HTTPStatus.OK, found)
            except UsageError as error:
                self._send_json(HTTPStatus.BAD_REQUEST, {"error": str(error)})

    def log_message(self, *_: Any) -> None:
        """Log no requests."""

    def _send_json(self, status: HTTPStatus, value: Any) -> None:
        self._send(status, json.dumps(value).encode(), "application/json")

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _strongest_maps(maps: np.ndarray) -> list[dict[str, Any]]:
    """Draw the maps [h, w, C] of largest standard deviation; numbers count from 1."""
    order = np.argsort(-maps.std((0, 1)), kind="stable")[:MAPS]
    return [
        {"number": int(k) + 1, "image": _data_url(_colored(maps[..., k]))}
        for k in order
    ]


def _colored(values: np.ndarray) -> np.ndarray:
    """Color a map [h, w] as uint8 [h, w, 3]: blue below zero, white, red above zero."""
    share = values / max(float(np.abs(values).max()), 1e-12)
    high, low = np.clip(share, 0, 1), np.clip(-share, 0, 1)
    colors = np.stack([1 - low, 1 - 0.75 * (low + high), 1 - high], axis=-1)
    return (255 * colors).round().astype(np.uint8)


def _data_url(pixels: np.ndarray) -> str:
    """Return an image, uint8 [H, W, C], as a PNG data URL."""
    return f"data:image/png;base64,{base64.b64encode(to_png(pixels)).decode()}"
