"""Which folder may import what, what loads when, and what the package shows outside."""

import ast
import inspect
import subprocess
import sys

import pytest

import flax_resnetv2
from tests.repository.structure import (
    FILES,
    FOLDERS,
    PACKAGE,
    folder_of,
    imports,
    is_type_checking,
    tree_of,
)

APART = {("model", "data"), ("data", "model")}
"""Neighbors that do not know each other."""

LAZY = {
    *("orbax", "tensorflow_datasets", "matplotlib", "tyro", "PIL", "array_record"),
    *("h5py", "safetensors", "grain", "jax2onnx", "tensorboardX"),
}
"""Never at the top of a module."""


def top_level(tree):
    """The same tree without the bodies of functions."""
    return ast.Module(
        [n for n in tree.body if not isinstance(n, ast.FunctionDef | ast.ClassDef)], []
    )


def packages(names):
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_only_what_its_row_allows(folder):
    folders = list(FOLDERS)
    allowed = set(folders[: folders.index(folder) + 1])
    allowed -= {other for one, other in APART if one == folder}
    names = {
        path: list(imports(tree_of(path)))
        for path in FILES
        if folder_of(path) == folder
    }
    assert names, f"nothing is there: {folder}"
    for path, found in names.items():
        ours = {n.split(".")[1] for n in found if n.startswith("flax_resnetv2.")}
        assert ours <= allowed, path
        theirs = packages(found) - {"flax_resnetv2"}
        assert theirs <= set(FOLDERS[folder].split()), path


def test_every_file_is_in_a_folder_of_the_list():
    folders = {folder_of(path) for path in FILES} - {"__init__", "__main__"}
    assert folders == set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_heavy_packages_are_imported_where_they_are_used(folder):
    # No command works without tyro, and the types of the flags are made with it.
    lazy = LAZY - {"tyro"} if folder == "cli" else LAZY
    for path in FILES:
        if folder_of(path) == folder:
            found = packages(imports(top_level(tree_of(path))))
            assert not found & lazy, path


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES} - {PACKAGE}))
def test_a_folder_itself_imports_nothing(folder):
    """So ``import flax_resnetv2.model.semantics`` loads no more than it says."""
    assert len(tree_of(folder / "__init__.py").body) == 1  # the docstring


def test_training_knows_of_the_net_only_how_to_initialize_it():
    """Otherwise a net is a type, so that whatever has its methods can be trained."""
    found = {
        name
        for path in (PACKAGE / "training").glob("*.py")
        for name in imports(tree_of(path))
        if name.startswith("flax_resnetv2.model")
    }
    assert found == {"flax_resnetv2.model.initial"}


def test_pmap_stands_in_one_module():
    users = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        for node in ast.walk(tree_of(path))
        if getattr(node, "attr", getattr(node, "id", None)) == "pmap"
    }
    assert users == {"run/placement.py"}


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()


def test_importing_the_package_is_light():
    code = """
import sys
import flax_resnetv2
print(*sys.modules)
"""
    heavy = {"jax", "flax", "optax", "numpy", "tensorflow"} | LAZY
    assert not heavy & set(run_python(code))


def test_the_model_starts_no_backend_and_loads_no_tensorflow():
    code = """
import sys
from flax_resnetv2 import Architecture, ResNetV2, create_model, make_train_step, fit
create_model(Architecture())
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
print(*(name for name in sys.modules if "." not in name))
"""
    heavy = {"tensorflow", "orbax", "tensorflow_datasets", "matplotlib", "tyro", "PIL"}
    loaded = set(run_python(code))
    assert "jax" in loaded
    assert not heavy & loaded


def test_type_checkers_see_the_names_that_the_package_has():
    tree = tree_of(PACKAGE / "__init__.py")
    block = next(n for n in ast.walk(tree) if is_type_checking(n))
    seen = {
        alias.name: node.module.removeprefix("flax_resnetv2.")
        for node in block.body
        for alias in node.names
    }
    assert seen == flax_resnetv2._MODULE_OF
    assert flax_resnetv2.__all__ == sorted(seen)


@pytest.mark.parametrize("name", flax_resnetv2.__all__)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(flax_resnetv2, name)
    assert name in dir(flax_resnetv2)
    if callable(value):
        assert len(inspect.getdoc(value)) > 20
        # A dataclass without a docstring is given its signature as one.
        assert not value.__doc__.startswith(f"{name}(")
    else:
        module = flax_resnetv2._MODULE_OF[name].replace(".", "/")
        home = tree_of(PACKAGE / f"{module}.py").body
        at = next(k for k, node in enumerate(home) if assigned(node) == name)
        assert isinstance(home[at + 1].value, ast.Constant), "no docstring below it"


def assigned(node):
    target = getattr(node, "targets", [getattr(node, "target", None)])[0]
    return getattr(target, "id", None)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_module_says_what_it_is_for(path):
    assert len(ast.get_docstring(tree_of(path))) > 40


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="has no attribute 'Resnet'"):
        _ = flax_resnetv2.Resnet
