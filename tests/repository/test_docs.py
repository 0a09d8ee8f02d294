"""The pages: what is generated is current, what is quoted exists, links lead somewhere.

``python -m tests.repository.test_docs`` writes ``docs/recipes.md`` and ``docs/api.md``.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

import flax_resnetv2
from benchmarks import studies
from flax_resnetv2 import RECIPES
from flax_resnetv2.cli.tools import COMMANDS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def recipes():
    """The page on recipes, from themselves."""
    lines = [
        "# Recipes",
        "",
        "What `python train.py RECIPE` can be told to do; every field is a flag, and",
        "`python train.py RECIPE --help` lists them. Test accuracies are those of the",
        "final epoch, ± over n seeds, or with the interval of the images; seconds,",
        "versions and commits stand in `results/README.md`. *Not run*: not to its end.",
        "(This page is written by `python -m tests.repository.test_docs`.)",
        "",
        "| recipe | what it is | data | epochs | batch | optimizer, rate, schedule "
        "| test accuracy |",
        "|---|---|---|---:|---:|---|---|",
    ]
    for name, recipe in RECIPES.items():
        c, t = recipe.config, recipe.config.train
        classifies = c.architecture.head == "classifier"
        known = studies.certificate(name) if classifies else ""
        lines.append(
            f"| `{name}` | {recipe.description} | `{c.data.name}` | {t.epochs} | "
            f"{t.batch_size} | {t.optimizer}, {t.learning_rate:g}, {t.schedule} | "
            f"{known} |"
        )
    return "\n".join(lines) + "\n"


def reference():
    """The page on the public names, module by module."""
    lines = [
        "# Reference",
        "",
        "Every public name of `flax_resnetv2`, from its docstring. (Written by",
        "`python -m tests.repository.test_docs`.)",
    ]
    for module, names in flax_resnetv2._HOME.items():
        lines += ["", f"## {module}", "", f"::: flax_resnetv2.{module}", "    options:"]
        lines += ["      show_root_heading: false", "      show_root_toc_entry: false"]
        lines += ["      members:", *(f"        - {name}" for name in names)]
    return "\n".join(lines) + "\n"


GENERATED = {"recipes.md": recipes, "api.md": reference}


@pytest.mark.parametrize("name", GENERATED)
def test_a_generated_page_is_current(name):
    assert (DOCS / name).read_text() == GENERATED[name](), (
        "python -m tests.repository.test_docs"
    )


def test_every_page_has_its_place_in_the_order():
    named = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(named) == sorted(path.name for path in DOCS.glob("*.md"))


def strings_of_the_package():
    found = []
    for path in (ROOT / "flax_resnetv2").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [
                    part.value if isinstance(part, ast.Constant) else "{}"
                    for part in node.values
                ]
                found.append("".join(parts))
    return found


def test_the_messages_that_troubleshooting_quotes_are_printed():
    text = (DOCS / "troubleshooting.md").read_text()
    first_cells = re.findall(r"^\| (`.+?) \|", text, re.M)
    quoted = [x for cell in first_cells for x in re.findall("`(.+?)`", cell)]
    assert len(quoted) > 10
    known = strings_of_the_package()
    assert [x for x in quoted if not any(x in text for text in known)] == []


def anchors(path):
    """Those of a page's headings, as GitHub and MkDocs make them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        for title in titles
    }


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        found = path.parent / file if file else path
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found), target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_that_are_shown_exist(path):
    text = path.read_text()
    for command in re.findall(r"python -m flax_resnetv2 ([\w-]+)", text):
        assert command in COMMANDS or command == "COMMAND", command
    for recipe in re.findall(r"train\.py ([a-z][\w-]+)", text):
        assert recipe in RECIPES, recipe


if __name__ == "__main__":
    for name, page in GENERATED.items():
        (DOCS / name).write_text(page())
    sys.exit()
