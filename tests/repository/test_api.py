"""The public names: what they take is written down, and a change of it is meant."""

import ast
import dataclasses
import inspect
import json
import re
import sys
import typing
from pathlib import Path

import flax_resnetv2

SNAPSHOT = Path(__file__).parents[1] / "golden" / "api.json"
TYPED_USE = Path(__file__).parent / "typed_use.py"
ROOT = Path(__file__).parents[2]


def described(name):
    """What a caller relies on: arguments, fields, defaults, methods, first line."""
    value = getattr(flax_resnetv2, name)
    if not inspect.isroutine(value) and not inspect.isclass(value):
        return {"value": type(value).__name__}
    about = {"about": inspect.getdoc(value).splitlines()[0]}
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(value)
        about["fields"] = {
            f.name: _text(hints[f.name]) + _default(f.default)
            for f in dataclasses.fields(value)
            if f.init and f.name not in ("parent", "name")
        }
    elif inspect.isclass(value) and issubclass(value, tuple):
        about["fields"] = list(value._fields)
    elif not (inspect.isclass(value) and issubclass(value, Exception)):
        about["arguments"] = _arguments(value)
    if inspect.isclass(value):
        methods = {
            name: _arguments(member)
            for name, member in vars(value).items()
            if not name.startswith("_")
            and inspect.isroutine(_plain(member))
            # Not what flax adds to its dataclasses, version by version.
            and _plain(member).__module__.startswith("flax_resnetv2")
        }
        about |= {"methods": methods} if methods else {}
    return about


def _plain(member):
    return getattr(member, "__func__", member)


def _arguments(function):
    parameters = inspect.signature(_plain(function)).parameters.values()
    return [
        ("*" if p.kind is p.KEYWORD_ONLY else "") + p.name + _default(p.default)
        for p in parameters
        if p.name not in ("self", "cls")
    ]


def _default(value):
    return "" if value in (dataclasses.MISSING, inspect.Parameter.empty) else (
        f" = {_text(value)}"
    )  # fmt: skip


def _text(value):
    """Without what differs between versions of Python and JAX."""
    text = re.sub(r"typing\.|<class '([\w.]+)'>", r"\1", repr(value))
    return re.sub(r"[\w.]+\.Array\b", "jax.Array", text)


def snapshot():
    return {name: described(name) for name in flax_resnetv2.__all__}


def write():
    text = json.dumps(snapshot(), indent=1, sort_keys=True)
    SNAPSHOT.write_text(text + "\n")


def test_the_public_names_are_what_they_were():
    assert json.loads(SNAPSHOT.read_text()) == json.loads(json.dumps(snapshot())), (
        "the public names changed; if that is meant, say it in CHANGELOG.md and run "
        "python -m tests.repository.test_api"
    )


def test_a_typed_program_uses_every_public_name():
    tree = ast.parse(TYPED_USE.read_text())
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "flax_resnetv2"
        for alias in node.names
    }
    assert imported == set(flax_resnetv2.__all__)


def test_the_changes_and_the_citation_have_the_version():
    text = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.+)"', text, re.M)[1]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert f'version: "{version}"' in (ROOT / "CITATION.cff").read_text()


if __name__ == "__main__":
    sys.exit(write())
