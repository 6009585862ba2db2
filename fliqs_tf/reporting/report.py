"""Run directory -> pictures and one HTML page that holds everything.

    write_report("runs/digits")     # formats.png, probabilities.png, curves.png, report.html

What a run directory holds (`binaries/search.py` writes it; all of it is optional except that there must be a recipe
or metrics, so that a run that was stopped can be looked at too):

* `recipe.json`: {"formats": {decision: format}, "cost", "cost_unit", "target_cost", "accuracy", "reference": [{"name",
  "accuracy", "cost"}], "layers_table": [{"name", "macs", "weights", "weight_format", "activation_format", "cost",
  "decision"}], "seed", "versions", "flags"}; for text also "bits_per_character" beside "accuracy".
* `metrics.jsonl`: a JSON object per line with "step" and readings (see `curves.curves_figure`); some also have
  "probabilities": {decision: [p, ...]}.
* `budgets.json`: {"budgets": [{"cost", "loss", "deviation"}], "uniform": {format: the same}, "trained": the same or
  null}, what the critic expects of other budgets.
* `decisions.json`: [{"name": decision, "options": [format, ...]}].

The functions that draw are in `pictures`, `curves` and `budgets`; this module reads, saves and writes the page.
"""

from __future__ import annotations

import base64
import html
import json
import math
import os
import pathlib
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fliqs_tf.io.files import read_json, replacing, write_text
from fliqs_tf.reporting import budgets, curves, pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 144
_LARGEST = 10**30
_CSS_DPI = 96  # what browsers call an inch: pictures appear in their own size, sharp on dense screens
_RECIPE, _METRICS, _DECISIONS, _BUDGETS = "recipe.json", "metrics.jsonl", "decisions.json", "budgets.json"
_BUDGET = {"cost": "number", "loss": "number", "deviation": "number"}


def write_report(run_dir: str | os.PathLike) -> list[pathlib.Path]:
    """Writes the pictures of a run and `report.html`, with the pictures inside.

    What the run directory does not hold is left out. Called again it overwrites what it wrote.

    Args:
      run_dir: directory of a run.

    Returns:
      The files written, a list of `pathlib.Path`; `report.html` is the last.

    Raises:
      FileNotFoundError: the directory holds neither a recipe nor metrics.
      ValueError: recipe.json or decisions.json is not JSON, or not of the form above.
      ImportError: matplotlib is missing; says what to install.
    """
    run_dir = pathlib.Path(run_dir)
    if not (run_dir / _RECIPE).exists() and not (run_dir / _METRICS).exists():
        raise FileNotFoundError(
            f"{run_dir} holds neither {_RECIPE} nor {_METRICS}: give the directory of a run (--run_dir of search)."
        )
    recipe = _read(run_dir / _RECIPE, _check_recipe, {})
    rows, unreadable = read_metrics(run_dir / _METRICS)
    unit = recipe.get("cost_unit", "")
    drawn = []

    layers = recipe.get("layers_table", [])
    if layers:
        title = "Formats and share of the cost per layer"
        if "cost" in recipe:
            title += f": {_number(recipe['cost'])} {unit}"
        if "target_cost" in recipe:
            title += f" (target {_number(recipe['target_cost'])})"
        drawn.append(("formats.png", pictures.formats_figure(layers, title)))
    history = _probabilities(rows, _read(run_dir / _DECISIONS, _check_decisions, []))
    if history:
        drawn.append(("probabilities.png", pictures.probabilities_figure(*history)))
    if any(curves.has_curve(row) for row in rows):
        drawn.append(("curves.png", curves.curves_figure(rows, unit)))
    known = _read(run_dir / _BUDGETS, _check_budgets, {})
    if known.get("budgets"):
        figure = budgets.budgets_figure(known["budgets"], known.get("uniform", {}), known.get("trained"), unit)
        drawn.append(("budgets.png", figure))

    written = []
    for name, figure in drawn:
        _save(figure, run_dir / name)
        written.append(run_dir / name)
    page = _page(run_dir.resolve().name, recipe, layers, written, unreadable)
    write_text(run_dir / "report.html", page)
    return [*written, run_dir / "report.html"]


def read_metrics(path: str | os.PathLike) -> tuple[list[dict[str, Any]], int]:
    """Reads metrics.jsonl as it is left by runs that were killed and resumed.

    A line that is no JSON object (the one being written when the run was killed) is passed over. Where the steps go
    back, the run was resumed from a checkpoint: the readings from that step on are those of the resumed run.

    Args:
      path: of the file; one that does not exist has no rows.

    Returns:
      (rows in the order of their steps, number of lines passed over).
    """
    path = pathlib.Path(path)
    if not path.exists():
        return [], 0
    rows: list[dict[str, Any]] = []
    unreadable = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_int=_whole)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not _is_number(row.get("step")):
            unreadable += 1
            continue
        while rows and rows[-1]["step"] > row["step"]:
            rows.pop()
        # Readings of the same step may come on several lines.
        if rows and rows[-1]["step"] == row["step"]:
            rows[-1] = {**rows[-1], **row}
        else:
            rows.append(row)
    return rows, unreadable


def comparison_base(rows: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The row that costs are given relative to: uniform INT8 if there is one, else the first that has a cost.

    Args:
      rows: dicts with "name" and perhaps "cost".

    Returns:
      One of the rows, or None.
    """
    priced = [row for row in rows if row.get("cost")]
    return next((row for row in priced if row["name"].startswith("uniform INT8")), priced[0] if priced else None)


def _read(path: pathlib.Path, check: Callable[[Any], None], default: dict | list) -> Any:
    if not path.exists():
        return default
    content = read_json(path, "file of a run", most_bytes=64 * 2**20)
    if not isinstance(content, type(default)):
        kind = "an object" if isinstance(default, dict) else "a list"
        raise ValueError(f"{path} must hold {kind}, it holds {type(content).__name__}.")
    try:
        check(content)
    except ValueError as error:
        raise ValueError(f"{path} is not of a run: {error} Delete it to have a report without it.") from None
    return content


_LAYER = {"name": "text", "macs": "number", "weights": "number", "cost": "number"}
_FORMATS = {"weight_format": "text or null", "activation_format": "text or null", "decision": "text or null"}
_SCORES = {"accuracy": "number or null", "cost": "number or null", "bits_per_character": "number or null"}


def _check_recipe(recipe: Mapping[str, Any]) -> None:
    _check(recipe, {}, {**_SCORES, "target_cost": "number or null", "cost_unit": "text"}, "it")
    for key, needed, known in (("layers_table", _LAYER, _FORMATS), ("reference", {"name": "text"}, _SCORES)):
        rows = recipe.get(key, [])
        if not isinstance(rows, list):
            raise ValueError(f"{key!r} must be a list, got {reprlib.repr(rows)}.")
        for i, row in enumerate(rows):
            _check(row, needed, known, f"{key}[{i}]")
            if key == "layers_table" and not {"weight_format", "activation_format"} <= row.keys():
                raise ValueError(f"{key}[{i}] has no 'weight_format' or no 'activation_format'.")


def _check_budgets(known: Mapping[str, Any]) -> None:
    _check(known, {}, {}, "it")
    rows, uniform = known.get("budgets", []), known.get("uniform", {})
    if not isinstance(rows, list) or not isinstance(uniform, dict):
        raise ValueError("'budgets' must be a list and 'uniform' an object.")
    named = {f"budgets[{i}]": row for i, row in enumerate(rows)}
    named |= {f"uniform[{name!r}]": row for name, row in uniform.items()}
    if known.get("trained") is not None:
        named["trained"] = known["trained"]
    for where, row in named.items():
        _check(row, _BUDGET, {}, where)


def _check_decisions(decisions: Sequence[Any]) -> None:
    for i, decision in enumerate(decisions):
        _check(decision, {"name": "text"}, {}, f"entry {i}")
        options = decision.get("options")
        if not isinstance(options, list) or not options or not all(isinstance(name, str) for name in options):
            raise ValueError(f"entry {i} must have 'options', a list of formats, got {reprlib.repr(options)}.")


def _check(entry: object, needed: Mapping[str, str], known: Mapping[str, str], where: str) -> None:
    """Raises unless an entry is an object with the needed keys, and those that are there are of their kinds."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be an object, got {reprlib.repr(entry)}.")
    for key, kind in {**needed, **known}.items():
        if key not in entry:
            if key in needed:
                raise ValueError(f"{where} has no {key!r}.")
            continue
        value, may_be_null = entry[key], kind.endswith("or null")
        fits = isinstance(value, str) if kind.startswith("text") else _is_number(value)
        if not fits and not (value is None and may_be_null):
            raise ValueError(f"{key!r} of {where} must be a {kind}, got {reprlib.repr(value)}.")


def _is_number(value: object) -> bool:
    """A finite number of a size that arithmetic can stand."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= _LARGEST if isinstance(value, int) else math.isfinite(value)


def _whole(text: str) -> int:
    """An integer of JSON, unless it has more digits than any count."""
    if len(text) > len(str(_LARGEST)):
        raise ValueError(f"A number has {len(text)} digits.")
    return int(text)


def _probabilities(
    rows: Sequence[Mapping[str, Any]], decisions: Sequence[Mapping[str, Any]]
) -> tuple[list[float], list[list[list[float]]], list[str], list[list[str]]] | None:
    """(steps, probabilities, names, options) for `probabilities_figure`, or None where there is nothing to draw.

    Rows whose probabilities do not fit the decisions are left out.
    """
    options = {decision["name"]: decision["options"] for decision in decisions}

    def fits(row: Mapping[str, Any]) -> bool:
        found = row.get("probabilities")
        return isinstance(found, Mapping) and all(
            isinstance(found.get(name), list)
            and len(found[name]) == len(options[name])
            and all(map(_is_number, found[name]))
            for name in options
        )

    rows = [row for row in rows if fits(row)] if options else []
    if not rows:
        return None
    series = [[row["probabilities"][name] for row in rows] for name in options]
    return [row["step"] for row in rows], series, list(options), list(options.values())


def _save(figure: Figure, path: str | os.PathLike) -> None:
    with replacing(path) as temporary:
        figure.savefig(os.fspath(temporary), dpi=_DPI)


_STYLE = """
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #222; margin: 2rem auto;
  max-width: 72rem; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 1rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.numbers { display: flex; flex-wrap: wrap; gap: 2.5rem; margin: 0 0 1.5rem; }
.numbers div { color: #666; font-size: .85rem; } .numbers b { display: block; color: #222; font-size: 1.5rem;
  font-weight: 600; line-height: 1.2; }
.wide { overflow-x: auto; } img { display: block; max-width: none; }
table { border-collapse: collapse; font-size: .88rem; } th, td { padding: .22rem .8rem; text-align: right;
  border-bottom: 1px solid #e4e4e4; white-space: nowrap; font-variant-numeric: tabular-nums; }
th { color: #666; font-weight: 600; } th.text, td.text { text-align: left; } tr.found td { font-weight: 600; }
details { margin: 1rem 0; } summary { cursor: pointer; color: #444; } .note { color: #8a4b00; }
"""


def _page(
    name: str,
    recipe: Mapping[str, Any],
    layers: Sequence[Mapping[str, Any]],
    images: Sequence[pathlib.Path],
    unreadable: int,
) -> str:
    parts = [f"<h1>FLIQS run {_text(name)}</h1>", _headline(recipe, layers)]
    if not recipe:
        parts.append('<p class="note">This run has no recipe.json: it was not finished.</p>')
    if unreadable:
        parts.append(f'<p class="note">{unreadable} unreadable line(s) of {_METRICS} passed over.</p>')
    if recipe:
        parts += ["<h2>Results</h2>", _results(recipe)]
    captions = {"formats.png": "Formats", "probabilities.png": "Probabilities", "curves.png": "Curves"}
    captions["budgets.png"] = "Other budgets"
    for path in images:
        parts += [f"<h2>{captions[path.name]}</h2>", _image(path, captions[path.name])]
    if layers:
        parts += ["<h2>Layers</h2>", _layers(layers, recipe.get("cost_unit", ""))]
    for key in ("flags", "versions"):
        if isinstance(recipe.get(key), Mapping):
            pairs = sorted(recipe[key].items())
            parts.append(f"<details><summary>{key.capitalize()}</summary>{_table(['', ''], pairs, 2)}</details>")
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>FLIQS run {_text(name)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _headline(recipe: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> str:
    unit = recipe.get("cost_unit", "")
    numbers: list[tuple[object, str]] = []
    if "accuracy" in recipe:
        numbers.append((_percent(recipe["accuracy"]), "accuracy of the found recipe"))
    if "cost" in recipe:
        numbers.append((f"{_number(recipe['cost'])} {unit}", "its cost"))
    if "target_cost" in recipe:
        numbers.append((f"{_number(recipe['target_cost'])} {unit}", "target"))
    if layers:
        numbers.append((len(layers), "layers"))
    if "seed" in recipe:
        numbers.append((recipe["seed"], "seed"))
    cells = "".join(f"<div><b>{_text(value)}</b>{_text(label)}</div>" for value, label in numbers)
    return f'<div class="numbers">{cells}</div>'


def _results(recipe: Mapping[str, Any]) -> str:
    """The recipe found, and what it is compared with."""
    rows = [*recipe.get("reference", []), {**recipe, "name": "found by the search"}]
    has_bits = any(row.get("bits_per_character") is not None for row in rows)
    base = comparison_base(rows)
    cells = [
        [
            row["name"],
            _percent(row.get("accuracy")),
            *([_number(row.get("bits_per_character"))] if has_bits else []),
            _number(row.get("cost")),
            f"{row['cost'] / base['cost']:.3f}" if base and row.get("cost") is not None else "–",
        ]
        for row in rows
    ]
    unit = recipe.get("cost_unit", "")
    header = ["", "accuracy", *(["bits per character"] if has_bits else []), f"cost ({unit})" if unit else "cost"]
    header.append(f"cost / {base['name'].partition(',')[0]}" if base else "")
    return _table(header, cells, 1, strong=len(cells) - 1)


def _layers(layers: Sequence[Mapping[str, Any]], unit: str) -> str:
    total = sum(layer["cost"] for layer in layers) or 1
    header = ["layer", "weight format", "activation format", "decision", "MACs", "weights"]
    header += [f"cost ({unit})" if unit else "cost", "share"]
    rows = [
        [
            layer["name"],
            layer["weight_format"] or "float",
            layer["activation_format"] or "float",
            layer.get("decision") or "–",
            f"{layer['macs']:,}",
            f"{layer['weights']:,}",
            _number(layer["cost"]),
            _percent(layer["cost"] / total),
        ]
        for layer in layers
    ]
    return _table(header, rows, 4)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]], text_columns: int, strong: int | None = None) -> str:
    """HTML of a table whose first `text_columns` columns are text, the others numbers."""

    def line(tag: str, cells: Sequence[Any], row_class: str = "") -> str:
        kinds = [' class="text"' if i < text_columns else "" for i in range(len(cells))]
        return f"<tr{row_class}>" + "".join(
            f"<{tag}{kind}>{_text(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)
        )

    lines = [line("th", header)] if any(header) else []
    lines += [line("td", row, ' class="found"' if i == strong else "") for i, row in enumerate(rows)]
    return '<div class="wide"><table>' + "\n".join(lines) + "</table></div>"


def _image(path: pathlib.Path, caption: str) -> str:
    content = path.read_bytes()
    width = int.from_bytes(content[16:20], "big")  # from the head of every PNG file
    data = base64.b64encode(content).decode("ascii")
    return (
        f'<div class="wide"><img style="width: {width * _CSS_DPI // _DPI}px" alt="{_text(caption)}" '
        f'src="data:image/png;base64,{data}"></div>'
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"
