"""The picture shows what the plan says."""

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from flax_resnetv2 import ARTICLE, PRESETS, TIMM, Architecture
from flax_resnetv2.model.drawing import draw_net
from flax_resnetv2.model.planning import plan

DOCS = Path(__file__).parents[2] / "docs"
X = "\N{MULTIPLICATION SIGN}"


def picture(architecture, image_shape=(32, 32, 3)):
    """The root, all texts, and how many elements have each class."""
    root = ElementTree.fromstring(
        draw_net(plan(architecture, image_shape), image_shape)
    )
    tag = "{http://www.w3.org/2000/svg}"
    texts = [node.text for node in root.iter(f"{tag}text")]
    kinds = [word for node in root.iter() for word in node.get("class", "").split()]
    return root, texts, {kind: kinds.count(kind) for kind in kinds}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_drawn_within_its_picture(name):
    root, _, kinds = picture(PRESETS[name].architecture, (64, 64, 3))
    width, height = int(root.get("width")), int(root.get("height"))
    for node in root.iter():
        assert 0 <= float(node.get("x", 0)) <= width
        assert 0 <= float(node.get("y", 0)) <= height
    assert kinds["stack"] == len(PRESETS[name].architecture.units)


def test_the_articles_figure():
    """Four stacks of 3, 6, 6, 3; only unit 1 of the smaller ones is special."""
    _, texts, kinds = picture(PRESETS["article-figure"].architecture)
    assert kinds["special"] == 3
    assert texts.count("identity") == 5
    assert "units 2 to 6" in texts
    assert f"1{X}1 → 128 /2" in texts
    assert [text for text in texts if text.startswith("stack ")] == [
        "stack 1: 3 units",
        "stack 2: 6 units",
        "stack 3: 6 units",
        "stack 4: 3 units",
    ]
    # The very first layer has no BN-ReLU: its unit has one less than the next.
    assert f"4{X}4{X}512" in texts


def test_bridges_heads_and_version_1_are_named():
    post = replace(ARTICLE, order="post", final_norm=False)
    net = Architecture(
        units=(1, 2),
        widths=(64, 128),
        strides=(1, 2),
        bridge=True,
        semantics=post,
        hidden=(50,),
        head="latent",
        latent=7,
        latent_variance=True,
    )
    _, texts, kinds = picture(net)
    assert kinds["bridge"] == 2
    assert {"bridge: identity", f"bridge: 1{X}1 → 128 /2"} <= set(texts)
    assert texts.count("ReLU") == 3
    assert any("FC 50 · ReLU · FC → 7 latent · log-variance" in text for text in texts)


def test_shortcuts_say_what_they_do():
    averaging = replace(TIMM, shortcut_pool="average")
    _, texts, _ = picture(Architecture(semantics=averaging))
    assert any(f"average 2{X}2 · 1{X}1 → 128" in text for text in texts)
    _, texts, _ = picture(PRESETS["keras-resnet50v2"].architecture, (64, 64, 3))
    assert texts.count(f"one pixel of 2{X}2") == 3


@pytest.mark.parametrize("name", ["article-figure", "he2016-resnet164"])
def test_the_pictures_in_the_docs_are_of_now(name):
    expected = draw_net(plan(PRESETS[name].architecture, (32, 32, 3)), (32, 32, 3))
    path = DOCS / f"{name}.svg"
    assert re.sub(r"\s+", " ", path.read_text()) == re.sub(r"\s+", " ", expected), (
        f"draw it again: python -m flax_resnetv2 show {name} --svg {path}"
    )
