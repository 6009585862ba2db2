"""BUILD files from imports: a target for every module, its deps what the module imports of ours.

python binaries/tools/build_files.py        # writes the BUILD file of every folder
"""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]
TREES = ("fliqs_tf", "models", "binaries")
# What a module reads beside its imports.
DATA = {"fliqs_tf/__init__.py": '["py.typed"]', "fliqs_tf/costs/profile.py": 'glob(["profiles/*.json"])'}
HEADER = """load("@rules_python//python:defs.bzl", {rules})

package(default_visibility = ["//visibility:public"])
"""


def folders() -> list[pathlib.Path]:
    """The folders with modules, from the root."""
    return sorted({path.parent.relative_to(ROOT) for tree in TREES for path in (ROOT / tree).rglob("*.py")})


def build_file(folder: pathlib.Path) -> str:
    """What the BUILD file of a folder holds."""
    modules = sorted((ROOT / folder).glob("*.py"), key=lambda path: (path.stem != "__init__", path.stem))
    targets = [_target(path) for path in modules]
    rules = sorted({f'"{target.partition("(")[0]}"' for target in targets})
    return "\n".join([HEADER.format(rules=", ".join(rules)), *targets])


def _target(path: pathlib.Path) -> str:
    source, folder = path.read_text(), path.parent.relative_to(ROOT)
    if path.stem.endswith("_test"):
        rule = "py_test"
    else:
        rule = "py_binary" if re.search(r'^if __name__ == "__main__":', source, re.M) else "py_library"
    own = _label(path)
    labels = sorted({_short(label, folder) for label in _imported(source) if label != own})
    lines = [f'    name = "{_name(path)}",', f'    srcs = ["{path.name}"],']
    if data := DATA.get(str(path.relative_to(ROOT))):
        lines.append(f"    data = {data},")
    if labels:
        lines += ["    deps = [", *(f'        "{label}",' for label in labels), "    ],"]
    return "\n".join([f"{rule}(", *lines, ")", ""])


def _imported(source: str) -> set[str]:
    """Labels of the modules that a source imports, those of libraries aside."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    found = (_module(name) for name in names if name.split(".")[0] in TREES)
    return {_label(path) for path in found if path is not None}


def _module(name: str) -> pathlib.Path | None:
    """The file of a module, or of the module that a name is in."""
    parts = name.split(".")
    while parts:
        path = ROOT.joinpath(*parts)
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.exists():
                return file
        parts.pop()
    return None


def _name(path: pathlib.Path) -> str:
    return path.parent.name if path.stem == "__init__" else path.stem


def _label(path: pathlib.Path) -> str:
    return f"//{path.parent.relative_to(ROOT)}:{_name(path)}"


def _short(label: str, folder: pathlib.Path) -> str:
    package, name = label.removeprefix("//").split(":")
    if package == str(folder):
        return f":{name}"
    return f"//{package}" if package.rpartition("/")[2] == name else label


if __name__ == "__main__":
    for folder in folders():
        (ROOT / folder / "BUILD").write_text(build_file(folder))
