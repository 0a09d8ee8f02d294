"""The server of the local page: its responses and refusals."""

import base64
import io
import json
import re
from http.client import HTTPConnection
from threading import Thread

import numpy as np
import pytest
from PIL import Image

from flax_resnetv2 import Predictor, UsageError
from flax_resnetv2.cli import tools
from flax_resnetv2.data import shapes
from flax_resnetv2.inference import serve
from flax_resnetv2.model import intermediates
from flax_resnetv2.training.augment import normalize
from tests.inference.test_predict_files import encoder, run  # noqa: F401  fixtures


@pytest.fixture(scope="module")
def server(run):  # noqa: F811
    with serve.make_server(str(run), port=0) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


def ask(server, method, path, body=None, **headers):
    """Status, type and content of an answer."""
    connection = HTTPConnection(*server.server_address[:2], timeout=60)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    return response.status, response.headers["Content-Type"], response.read()


@pytest.fixture(scope="module")
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 13, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pixels_of(address):
    content = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(content)))


def test_an_image_is_classified_as_by_the_predictor(server, run, picture):  # noqa: F811
    status, kind, content = ask(server, "POST", "/inspect", picture)
    assert (status, kind) == (200, "application/json")
    found = json.loads(content)
    predictor = Predictor.find(run)
    seen = predictor.load(io.BytesIO(picture))
    np.testing.assert_array_equal(pixels_of(found["image"]), seen)
    expected = dict(zip("abcd", predictor(seen[None])[0], strict=True))
    given = {c["name"]: c["probability"] for c in found["classes"]}
    assert given == pytest.approx(expected, rel=1e-5)
    assert list(given.values()) == sorted(given.values(), reverse=True)
    assert [p["name"] for p in found["parts"]] == ["stem", "stack1", "stack2"]
    x = normalize(seen[None], predictor.normalization, "float32")
    ratios = intermediates.residual_ratios(predictor.model, predictor.variables, x)
    maps = intermediates.activations(predictor.model, predictor.variables, x)
    for part in found["parts"]:
        value = np.asarray(maps[part["name"]])[0]
        assert part["shape"] == list(value.shape)
        assert part["ratios"] == pytest.approx(ratios.get(part["name"], []), rel=1e-4)
        assert len(part["maps"]) == min(value.shape[2], serve.MAPS)
        first = part["maps"][0]
        strongest = value[..., first["number"] - 1]
        assert strongest.std() == pytest.approx(value.std((0, 1)).max(), rel=1e-5)
        shown = pixels_of(first["image"])
        assert shown.shape == (*value.shape[:2], 3)
        # Red is above zero, blue below.
        clear = np.abs(strongest) > 0.1 * np.abs(strongest).max()
        np.testing.assert_array_equal(
            (shown[..., 0] > shown[..., 2])[clear], (strongest > 0)[clear]
        )


def test_the_page_asks_nobody_else(server):
    status, kind, content = ask(server, "GET", "/")
    assert (status, kind) == (200, "text/html; charset=utf-8")
    text = content.decode()
    assert not re.search(r"https?://|src=\"|@import|url\(", text)
    about = json.loads(ask(server, "GET", "/about")[2])
    assert "4 classes; trained on images of 8 x 8 x 3" in about["text"]
    status, kind, content = ask(server, "GET", "/example/13")
    assert (status, kind) == (200, "image/png")
    images, labels = shapes.draw_shapes("test")
    expected = images[labels == 3][0]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), expected)


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "words"),
    [
        ("POST", "/inspect", b"hello", {}, 400, "is not an image"),
        ("POST", "/inspect", b"", {}, 400, "is not an image"),
        (
            *("POST", "/inspect", b"x", {"Content-Length": str(2**40)}),
            *(413, "larger than 64 MB"),
        ),
        (
            "POST",
            "/inspect",
            b"x",
            {"Content-Length": "-1"},
            411,
            "no valid Content-Length",
        ),
        (
            *("POST", "/inspect", b"x", {"Content-Length": "1" * 5000}),
            *(411, "no valid Content-Length"),
        ),
        ("POST", "/other", b"x", {}, 404, "no such page"),
        ("GET", "/../config.json", None, {}, 404, "no such page"),
        ("GET", "/example/one", None, {}, 404, "no such page"),
    ],
    ids=["text", "empty", "large", "length", "digits", "post", "path", "example"],
)
def test_what_is_refused(server, method, path, body, headers, status, words):
    found, kind, content = ask(server, method, path, body, **headers)
    assert (found, kind) == (status, "application/json")
    assert words in json.loads(content)["error"]


def test_a_taken_port_is_refused(server, run, capsys):  # noqa: F811
    port = server.server_address[1]
    assert tools.main(["serve", str(run), "--port", str(port)]) == 2
    said = capsys.readouterr().err
    assert f"port={port} of host=127.0.0.1 cannot be opened (Address already" in said
    with pytest.raises(UsageError, match="port=70000"):
        serve.make_server(str(run), port=70_000)


def test_an_encoder_has_maps_and_no_classes(encoder, picture):  # noqa: F811
    inspector = serve.Inspector(Predictor.find(encoder), "it")
    found = inspector.inspect(picture)
    assert found["classes"] == []
    assert "an encoder" in inspector.describe()["text"]
    assert len(found["parts"]) == 3


def test_it_ends_in_order(run, monkeypatch, capsys):  # noqa: F811
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(serve.ThreadingHTTPServer, "serve_forever", interrupted)
    assert tools.main(["serve", str(run), "--port", "0"]) == 0
    assert re.search(r"open http://127.0.0.1:\d+/ in a", capsys.readouterr().out)


def test_a_map_of_zeros_is_white():
    assert (serve._colored(np.zeros((2, 3), np.float32)) == 255).all()
