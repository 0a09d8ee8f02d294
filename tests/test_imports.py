"""Who may import whom, what loads when, and what the package shows to the outside."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flax_resnetv2

PACKAGE = Path(flax_resnetv2.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")

OURS = {
    "errors": "",
    "fields": "errors",
    "semantics": "fields",
    "architecture": "semantics fields errors",
    "planning": "architecture semantics fields errors",
    "presets": "architecture semantics errors",
    "ops": "errors",
    "augment": "fields errors",
    "randaugment": "augment",
    "tensorboard": "",
    "report": "rundir tensorboard errors",
    "scores": "",
    "compare_runs": "assembly config rundir scores errors",
    "runpage": "assembly config counting data drawing inference reconstruction "
    "restored rundir scores streaming",
    "checkpoint": "errors",
    "model": "planning architecture presets ops fields errors",
    "embedded": "errors",
    "unpickling": "",
    "catalog": "embedded",
    "images": "errors",
    "archive": "catalog unpickling errors",
    "download": "errors",
    "idx": "archive catalog errors",
    "preparation": "archive catalog download embedded idx errors",
    "process": "errors",
    "records": "images errors",
    "decoded": "process records errors",
    "folder": "catalog decoded images process records errors",
    "data": "augment catalog decoded fields folder images preparation process records "
    "errors",
    "optimizers": "fields errors",
    "objective": "augment",
    "training": "augment objective optimizers randaugment",
    "mirror": "architecture counting fields planning errors",
    "autoencoder": "architecture augment mirror model objective planning",
    "config": "architecture augment data fields mirror optimizers errors",
    "recipes": "architecture augment config data optimizers presets",
    "assembly": "autoencoder config counting mirror model objective preflight training",
    "counting": "architecture planning",
    "preflight": "counting architecture errors",
    "rundir": "config data errors",
    "tracing": "errors",
    "streaming": "data folder images records",
    "parallel": "assembly augment config data optimizers records streaming training "
    "weights",
    "agreement": "assembly catalog config data preflight process rundir weights errors",
    "loop": "agreement assembly checkpoint config fields parallel preflight process "
    "report rundir tracing training errors",
    "find_rate": "agreement assembly config fields parallel preflight rundir training "
    "errors",
    "analysis": "model",
    "dialects": "model errors",
    "weights": "augment dialects fields model errors",
    "restored": "assembly autoencoder checkpoint config fields model rundir training "
    "errors",
    "reconstruction": "augment data fields restored rundir streaming errors",
    "modelfile": "assembly config data restored errors",
    "modelcard": "assembly restored scores",
    "inference": "augment images model modelfile restored training errors",
    "prediction": "fields folder inference restored rundir errors",
    "serve": "analysis augment embedded fields inference errors",
    "export": "inference modelcard modelfile restored rundir errors",
    "drawing": "architecture counting planning",
    "installed": "",
    "doctor": "agreement assembly catalog config data decoded folder installed "
    "preflight preparation process records rundir tracing training errors",
    "comparison": "",
    "sweep": "comparison config counting data fields planning process rundir errors",
    "cli": "config loop parallel prediction process recipes rundir runpage tracing "
    "errors",
    "tools": "cli compare_runs config counting doctor drawing export find_rate "
    "installed presets process reconstruction rundir runpage serve sweep errors",
    "__main__": "doctor installed tools",
}
"""What each module may import of ours, anywhere in it."""

THEIRS = {
    "ops": "jax",
    "augment": "jax",
    "randaugment": "jax",
    "report": "rich",
    "tensorboard": "tensorboardX",
    "scores": "numpy",
    "compare_runs": "matplotlib",
    "runpage": "numpy matplotlib PIL",
    "checkpoint": "jax numpy orbax",
    "model": "jax flax numpy",
    "embedded": "numpy",
    "unpickling": "numpy",
    "archive": "numpy",
    "idx": "numpy",
    "download": "rich",
    "preparation": "numpy tensorflow_datasets PIL",
    "process": "jax absl",
    "images": "numpy PIL",
    "records": "numpy tensorflow_datasets array_record PIL",
    "decoded": "numpy",
    "folder": "numpy",
    "streaming": "numpy grain absl",
    "data": "jax numpy",
    "optimizers": "jax optax",
    "objective": "jax optax",
    "training": "jax flax optax",
    "autoencoder": "jax flax",
    "preflight": "jax",
    "rundir": "jax",
    "tracing": "jax",
    "parallel": "jax numpy",
    "agreement": "jax",
    "loop": "jax",
    "find_rate": "jax matplotlib",
    "analysis": "jax flax",
    "dialects": "numpy",
    "weights": "jax flax numpy h5py safetensors",
    "restored": "jax",
    "modelfile": "jax flax numpy safetensors",
    "prediction": "numpy",
    "serve": "jax numpy PIL",
    "export": "jax jax2onnx",
    "reconstruction": "jax numpy matplotlib",
    "inference": "jax numpy",
    "doctor": "jax numpy",
    "comparison": "matplotlib",
    "cli": "tyro",
    "tools": "tyro",
    "__main__": "tyro",
}
"""The same for other people's packages; a module that is not here needs none."""

LAZY = {
    *("orbax", "tensorflow_datasets", "matplotlib", "tyro", "PIL", "array_record"),
    *("h5py", "safetensors", "grain", "jax2onnx", "tensorboardX"),
}
"""Never at the top of a module."""


def tree_of(module):
    return ast.parse((PACKAGE / f"{module}.py").read_text())


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(node):
    """Yield the dotted name of everything imported below ``node`` at run time."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative import"
            if child.module == "flax_resnetv2":
                yield from (f"flax_resnetv2.{alias.name}" for alias in child.names)
            else:
                yield child.module
        yield from imports(child)


def top_level(tree):
    """The same tree without the bodies of functions."""
    return ast.Module(
        [n for n in tree.body if not isinstance(n, ast.FunctionDef | ast.ClassDef)], []
    )


def packages(names):
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)


def test_every_module_has_a_row_in_the_table():
    assert set(MODULES) == set(OURS)


def test_the_page_on_the_architecture_has_the_same_table():
    page = (PACKAGE.parent / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|[^|]*\|$", page, re.M)
    written = {module: set(re.findall(r"\w+", ours)) for module, ours in rows}
    expected = {
        module: set(OURS[module].split()) - {"errors"}
        for module in MODULES
        if module not in ("__init__", "__main__")
    }
    # "inside" says of what stands before it that it is imported inside functions.
    assert {m: ours - {"inside"} for m, ours in written.items()} == expected


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_row_allows(module):
    names = list(imports(tree_of(module)))
    ours = {n.split(".")[1] for n in names if n.startswith("flax_resnetv2.")}
    assert ours <= set(OURS.get(module, "").split())
    theirs = packages(names) - {"flax_resnetv2"}
    assert theirs <= set(THEIRS.get(module, "").split())


@pytest.mark.parametrize("module", MODULES)
def test_heavy_packages_are_imported_where_they_are_used(module):
    assert not packages(imports(top_level(tree_of(module)))) & LAZY


def test_the_net_is_known_to_training_as_a_type_only():
    blocks = [n for n in ast.walk(tree_of("training")) if is_type_checking(n)]
    assert len(blocks) == 1
    known = ["flax_resnetv2.autoencoder", "flax_resnetv2.model"]
    assert list(imports(blocks[0])) == known


def test_pmap_stands_in_one_module():
    users = {
        module
        for module in MODULES
        for node in ast.walk(tree_of(module))
        if getattr(node, "attr", getattr(node, "id", None)) == "pmap"
    }
    assert users == {"parallel"}


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
    block = next(n for n in ast.walk(tree_of("__init__")) if is_type_checking(n))
    seen = {
        node.module.removeprefix("flax_resnetv2."): tuple(a.name for a in node.names)
        for node in block.body
    }
    assert seen == flax_resnetv2._HOME
    assert flax_resnetv2.__all__ == sorted(flax_resnetv2._MODULE_OF)


@pytest.mark.parametrize("name", flax_resnetv2.__all__)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(flax_resnetv2, name)
    assert name in dir(flax_resnetv2)
    if callable(value):
        assert len(inspect.getdoc(value)) > 20
        # A dataclass without a docstring is given its signature as one.
        assert not value.__doc__.startswith(f"{name}(")
    else:
        home = tree_of(flax_resnetv2._MODULE_OF[name]).body
        at = next(k for k, node in enumerate(home) if assigned(node) == name)
        assert isinstance(home[at + 1].value, ast.Constant), "no docstring below it"


def assigned(node):
    target = getattr(node, "targets", [getattr(node, "target", None)])[0]
    return getattr(target, "id", None)


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_every_module_says_what_it_is_for(module):
    assert len(ast.get_docstring(tree_of(module))) > 40


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="has no attribute 'Resnet'"):
        _ = flax_resnetv2.Resnet
