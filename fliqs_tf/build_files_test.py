"""BUILD files name one target per module, with the edges that the imports have."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("fliqs_tf", "models", "binaries")


def imported(path: pathlib.Path, package: str) -> set[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    labels = set()
    for name in names:
        top, *rest = name.split(".")
        if top in PACKAGES:
            is_module = bool(rest) and (ROOT / top / f"{rest[0]}.py").exists()
            labels.add(f"//{top}:{rest[0] if is_module else top}")
    own = package if path.stem == "__init__" else path.stem
    return labels - {f"//{package}:{own}"}


def targets(package: str) -> dict[str, set[str]]:
    found = {}
    for block in re.findall(r"^py_\w+\((.*?)^\)", (ROOT / package / "BUILD").read_text(), re.S | re.M):
        source = re.search(r'srcs = \["(.+?)"\]', block)[1]
        deps = re.search(r"deps = \[(.*?)\]", block, re.S)
        labels = re.findall(r'"(.+?)"', deps[1]) if deps else []
        found[source] = {
            f"//{package}{label}" if label.startswith(":") else label if ":" in label else f"{label}:{label[2:]}"
            for label in labels
        }
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_is_a_target_with_its_imports_as_deps(package):
    expected = {path.name: imported(path, package) for path in (ROOT / package).glob("*.py")}
    assert targets(package) == expected
