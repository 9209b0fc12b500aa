"""Who may import whom: ``ir <- passes <- pipelines <- tools <- qat2int8``, and what a pass file has to have."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import REPOSITORY

from qat2int8.passes.registry import all_passes

LAYERS = ("ir", "passes", "pipelines", "tools", "qat2int8")
RUNTIME_FREE = ("ir", "passes")


def sources(folder: str) -> list[Path]:
    """The Python files below ``folder``, not those behind the links in ``qat2int8``."""
    root = REPOSITORY / folder
    return sorted(path for path in root.rglob("*.py") if folder != "qat2int8" or path.parent == root)


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything a module of ``package`` imports, lazily or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                kept = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*kept, base] if base else kept)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
            "import_module",
            "__import__",
        ):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    yield node.lineno, str(argument.value)


def violations(source: str, layer: str, package: str) -> list[str]:
    """What the imports of a module do wrong, a line each. ``layer`` is none of LAYERS for tests and benchmarks."""
    found = []
    for line, name in imported(ast.parse(source), package):
        root, *rest = name.split(".")
        if root in LAYERS[:-1]:
            found.append(f"{line}: imports '{root}' by its folder; say 'qat2int8.{root}'")
        if root == "onnxruntime" and layer in RUNTIME_FREE:
            found.append(f"{line}: '{layer}' must not know onnxruntime")
        if root == "qat2int8" and layer in LAYERS:
            target = rest[0] if rest and rest[0] in LAYERS[:-1] else "qat2int8"
            if LAYERS.index(target) > LAYERS.index(layer):
                found.append(f"{line}: '{layer}' imports '{name}' from a layer above")
    return found


@pytest.mark.parametrize("folder", [*LAYERS, "tests", "benchmarks"])
def test_no_import_goes_up(folder: str) -> None:
    files = sources(folder)
    assert files
    wrong = []
    for path in files:
        inner = path.relative_to(REPOSITORY).parent.parts
        package = ".".join(inner if folder == "qat2int8" else ("qat2int8", *inner))
        name = path.relative_to(REPOSITORY).as_posix()
        wrong += [f"{name}:{problem}" for problem in violations(path.read_text(), folder, package)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("ir", "from qat2int8.passes import Pass"),
        ("ir", "from qat2int8 import passes"),
        ("ir", "from ..passes.base import Pass"),
        ("ir", "from .. import passes"),
        ("passes", "import qat2int8.pipelines.manager"),
        ("passes", "def f():\n    from qat2int8.tools import cli"),
        ("passes", "if TYPE_CHECKING:\n    from qat2int8.pipelines import spec"),
        ("passes", "import importlib\nimportlib.import_module('qat2int8.tools.cli')"),
        ("pipelines", "from qat2int8.tools.cli import main"),
        ("tools", "from qat2int8 import convert"),
        ("tools", "import qat2int8"),
        ("passes", "import onnxruntime as ort"),
        ("ir", "def f():\n    from onnxruntime.quantization import quantize"),
        ("tools", "import ir"),
        ("tests", "from passes.base import Pass"),
    ],
)
def test_a_planted_violation_is_found(layer: str, source: str) -> None:
    assert len(violations(source, layer, f"qat2int8.{layer}")) == 1


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("passes", "from qat2int8.ir import Model\nfrom . import base\nfrom .base import Pass"),
        ("passes", "import onnx_ir.passes.common as common\nfrom onnx_ir import passes"),
        ("pipelines", "import onnxruntime\nfrom qat2int8.passes import Pass"),
        ("tools", "from qat2int8 import ir, pipelines"),
        ("qat2int8", "from qat2int8.tools.cli import main\nimport qat2int8"),
        ("tests", "from qat2int8 import convert"),
    ],
)
def test_imports_that_go_down_are_fine(layer: str, source: str) -> None:
    assert violations(source, layer, f"qat2int8.{layer}") == []


@pytest.mark.parametrize("name", all_passes())
def test_a_pass_has_a_file_of_its_name_a_docstring_and_a_test(name: str) -> None:
    cls = all_passes()[name]
    if not cls.__module__.startswith("qat2int8."):
        pytest.skip("a plugin's")
    stem = name.replace("-", "_")
    assert cls.__module__ == f"qat2int8.passes.{stem}"
    # dataclasses write the signature into an absent docstring
    assert cls.__doc__
    assert not cls.__doc__.startswith(f"{cls.__name__}(")
    assert (REPOSITORY / "tests" / "passes" / f"test_{stem}.py").exists()


@pytest.mark.parametrize("folder", [*LAYERS, "tests", "benchmarks"])
def test_no_file_is_called_utils(folder: str) -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert [path.name for path in sources(folder) if path.stem in vague] == []
