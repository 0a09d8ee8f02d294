"""The pages: generated ones are current, quoted messages exist, links resolve.

``python -m tests.repository.test_docs`` writes the generated files, ``GENERATED``.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flax_resnetv2
from benchmarks import studies
from flax_resnetv2 import RECIPES
from flax_resnetv2.cli.tools import COMMANDS
from tests.repository import structure

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def recipes():
    """Return the page on recipes."""
    lines = [
        "# Recipes",
        "",
        "The recipes of `python train.py RECIPE`. Every field of a recipe is a flag;",
        "`python train.py RECIPE --help` lists them. Test accuracies are those of the",
        "final epoch: mean ± standard deviation over n seeds, or for a single run its",
        "accuracy with the 95 % interval that the number of test images leaves.",
        "`results/README.md` has seconds, versions and commits. *Not run* means not",
        "run to its end.",
        "(`python -m tests.repository.test_docs` writes this page.)",
        "",
        "| recipe | description | data | epochs | batch | optimizer, rate, schedule "
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
    """Return the page on the public names, module by module."""
    lines = [
        "# Reference",
        "",
        "All public names of `flax_resnetv2`, by the module that defines them. Import",
        "them from the package: `from flax_resnetv2 import Architecture`.",
        "(`python -m tests.repository.test_docs` writes this page.)",
    ]
    for module, names in flax_resnetv2._HOME.items():
        lines += ["", f"## {module}", "", f"::: flax_resnetv2.{module}", "    options:"]
        lines += ["      show_root_heading: false", "      show_root_toc_entry: false"]
        lines += ["      members:"]
        lines += [f"        - {name}" for name in names.split()]
    return "\n".join(lines) + "\n"


GENERATED = {
    "recipes.md": recipes,
    "api.md": reference,
    "structure.svg": structure.draw,
}


@pytest.mark.parametrize("name", GENERATED)
def test_a_generated_file_is_current(name):
    assert (DOCS / name).read_text() == GENERATED[name](), (
        "run python -m tests.repository.test_docs"
    )


def test_the_page_on_architecture_names_every_file_of_the_package():
    text = (DOCS / "architecture.md").read_text()
    table = text.split("## Folders")[1].split("\n## ")[0]
    names = {path.stem for path in structure.FILES} - {"__init__", "__main__"}
    assert {name for name in names if f"`{name}`" not in table} == set()


def python_blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.S)


def test_the_python_code_of_the_readme_runs(tmp_path):
    from PIL import Image

    Image.new("RGB", (40, 30), "gray").save(tmp_path / "image.png")
    code = "\n".join(python_blocks(ROOT / "README.md"))
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_every_page_has_its_place_in_the_order():
    named = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(named) == sorted(path.name for path in DOCS.glob("*.md"))


def strings_of_the_package():
    found = []
    for path in structure.FILES:
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
    """Return the anchors of a page's headings, as GitHub and MkDocs make them."""
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
