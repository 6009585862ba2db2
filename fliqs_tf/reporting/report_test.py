"""Reports of run directories: whole, killed, resumed, hostile."""

import base64
import html.parser
import json
import sys

import pytest

from fliqs_tf.reporting import report

LAYERS = [
    {"name": "conv1", "macs": 1000, "weights": 432, "weight_format": "INT8", "activation_format": "INT8"}
    | {"cost": 0.064, "decision": "conv1"},
    {"name": "conv2", "macs": 3000, "weights": 2304, "weight_format": "INT4", "activation_format": "INT4"}
    | {"cost": 0.048, "decision": "conv2"},
    {"name": "dense", "macs": 640, "weights": 640, "weight_format": None, "activation_format": None}
    | {"cost": 0.0, "decision": None},
]
RECIPE = {
    "fliqs_tf": "0.1.0",
    "formats": {"conv1": "INT8", "conv2": "INT4"},
    "tensors": "together",
    "cost": 0.112,
    "cost_unit": "GBOPs",
    "target_cost": 0.11,
    "accuracy": 0.9123,
    "reference": [
        {"name": "float", "accuracy": 0.95, "cost": None},
        {"name": "uniform INT4", "accuracy": 0.88, "cost": 0.064},
        {"name": "uniform INT8", "accuracy": 0.94, "cost": 0.256},
    ],
    "layers_table": LAYERS,
    "seed": 7,
    "versions": {"keras": "3.15.1"},
    "flags": {"epochs": 30},
}
DECISIONS = [{"name": "conv1", "options": ["INT4", "INT8"]}, {"name": "conv2", "options": ["INT4", "INT8", "BF16"]}]
PICTURES = ["formats.png", "probabilities.png", "curves.png"]


def metrics(first=0, last=20):
    return [
        {"step": step, "reward": 0.5, "loss": 2.0 - step / 20, "entropy": 0.4}
        | ({"probabilities": {"conv1": [0.4, 0.6], "conv2": [0.7, 0.2, 0.1]}} if step % 2 == 0 else {})
        for step in range(first, last)
    ]


def write_run(directory, recipe=RECIPE, rows=None, decisions=DECISIONS):
    directory.mkdir(exist_ok=True)
    if recipe is not None:
        (directory / "recipe.json").write_text(json.dumps(recipe))
    if decisions is not None:
        (directory / "decisions.json").write_text(json.dumps(decisions))
    lines = [json.dumps(row) for row in (metrics() if rows is None else rows)]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return directory


class _Page(html.parser.HTMLParser):
    """Tags in order, cells of table rows, images, text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.images, self.rows, self.text = [], [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attributes))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.text += data
        if self.tags and self.tags[-1] in ("td", "th"):
            self.rows[-1][-1] += data.strip("\n")


def read_page(directory):
    return _Page((directory / "report.html").read_text(encoding="utf-8"))


def test_writes_pictures_and_a_page_that_holds_them(tmp_path):
    written = report.write_report(write_run(tmp_path))
    assert [path.name for path in written] == [*PICTURES, "report.html"]
    page = read_page(tmp_path)
    assert len(page.images) == 3
    for name, image in zip(PICTURES, page.images, strict=True):
        head, data = image["src"].split(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data) == (tmp_path / name).read_bytes()
    # 7.5 inches of 144 dots are shown as 7.5 inches of 96.
    assert page.images[0]["style"] == "width: 720px"
    # Self-contained: nothing is loaded from anywhere.
    assert "http" not in (tmp_path / "report.html").read_text().replace(page.images[0]["src"], "").split("<body>")[0]
    assert not {"script", "link", "iframe"} & set(page.tags)


def test_page_has_the_headline_numbers_and_results(tmp_path):
    report.write_report(write_run(tmp_path))
    page = read_page(tmp_path)
    for number in ("91.23 %", "0.112 GBOPs", "0.11 GBOPs"):
        assert number in page.text
    results = {row[0]: row[1:] for row in page.rows}
    assert results["float"] == ["95.00 %", "–", "–"]
    assert results["uniform INT4"] == ["88.00 %", "0.064", "0.250"]
    assert results["uniform INT8"] == ["94.00 %", "0.256", "1.000"]
    assert results["found by the search"] == ["91.23 %", "0.112", "0.438"]
    assert ["", "accuracy", "cost (GBOPs)", "cost / uniform INT8"] in page.rows


def test_page_of_text_has_bits_per_character(tmp_path):
    recipe = {**RECIPE, "bits_per_character": 2.34567}
    recipe["reference"] = [RECIPE["reference"][0], {**RECIPE["reference"][1], "bits_per_character": 2.5}]
    report.write_report(write_run(tmp_path, recipe))
    results = {row[0]: row[1:] for row in read_page(tmp_path).rows}
    assert results[""][:2] == ["accuracy", "bits per character"]
    assert results["float"] == ["95.00 %", "–", "–", "–"]
    assert results["uniform INT4"] == ["88.00 %", "2.5", "0.064", "1.000"]
    assert results["found by the search"][:3] == ["91.23 %", "2.346", "0.112"]


def test_page_has_the_table_of_layers(tmp_path):
    report.write_report(write_run(tmp_path))
    rows = {row[0]: row[1:] for row in read_page(tmp_path).rows}
    assert rows["conv1"] == ["INT8", "INT8", "conv1", "1,000", "432", "0.064", "57.14 %"]
    assert rows["conv2"] == ["INT4", "INT4", "conv2", "3,000", "2,304", "0.048", "42.86 %"]
    assert rows["dense"] == ["float", "float", "–", "640", "640", "0", "0.00 %"]
    assert rows["epochs"] == ["30"]
    assert rows["keras"] == ["3.15.1"]


def test_costs_are_relative_to_uniform_int8_or_the_first_that_has_one():
    rows = [{"name": "float", "cost": None}, {"name": "a", "cost": 3.0}, {"name": "uniform INT8, shared", "cost": 2.0}]
    assert report.comparison_base(rows)["name"] == "uniform INT8, shared"
    assert report.comparison_base(rows[:2])["name"] == "a"
    assert report.comparison_base(rows[:1]) is None


def test_text_is_escaped(tmp_path):
    evil = '<script>alert("x")</script>&'
    recipe = json.loads(json.dumps(RECIPE))
    recipe["layers_table"][0] |= {"name": evil, "decision": evil}
    recipe["reference"][0]["name"] = evil
    recipe |= {"flags": {evil: evil}, "versions": {evil: evil}, "seed": evil, "cost_unit": evil}
    directory = tmp_path / "<i>run"
    report.write_report(write_run(directory, recipe))
    source = (directory / "report.html").read_text(encoding="utf-8")
    assert "<script" not in source and "<i>" not in source and '"x"' not in source
    page = read_page(directory)
    # Nothing is lost: the unit stands in 2 headline numbers and 2 headers, the other 8 once each.
    assert page.text.count(evil) == 4 + 8
    assert "<i>run" in page.text


def test_truncated_last_line_is_passed_over_and_said(tmp_path):
    write_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "rew')
    rows, unreadable = report.read_metrics(tmp_path / "metrics.jsonl")
    assert (len(rows), unreadable) == (20, 1)
    report.write_report(tmp_path)
    assert "1 unreadable line(s) of metrics.jsonl" in read_page(tmp_path).text


def test_truncated_in_the_middle_of_a_character(tmp_path):
    write_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 20, "name": "é'.encode()[:-1])
    rows, unreadable = report.read_metrics(tmp_path / "metrics.jsonl")
    assert (len(rows), unreadable) == (20, 1)


def test_lines_that_are_no_rows_are_passed_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('[1]\n{"loss": 3}\nnull\n\n{"step": 1, "loss": 2}\n{"step": "2"}\n')
    assert report.read_metrics(tmp_path / "metrics.jsonl") == ([{"step": 1, "loss": 2}], 4)


def test_resumed_run_replaces_the_readings_after_its_checkpoint(tmp_path):
    rows = [{"step": step, "loss": 1.0} for step in range(10)]
    rows += [{"step": step, "loss": 2.0} for step in range(6, 12)]
    write_run(tmp_path, rows=rows)
    found, _ = report.read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in found] == list(range(12))
    assert [row["loss"] for row in found] == [1.0] * 6 + [2.0] * 6


def test_readings_of_one_step_on_several_lines_are_joined(tmp_path):
    write_run(tmp_path, rows=[{"step": 1, "loss": 1.0}, {"step": 1, "accuracy": 0.5}])
    assert report.read_metrics(tmp_path / "metrics.jsonl")[0] == [{"step": 1, "loss": 1.0, "accuracy": 0.5}]


def test_stopped_run_without_recipe(tmp_path):
    written = report.write_report(write_run(tmp_path, recipe=None))
    assert [path.name for path in written] == ["probabilities.png", "curves.png", "report.html"]
    assert "not finished" in read_page(tmp_path).text


def test_recipe_alone(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({"formats": {"conv1": "INT4"}}))
    assert [path.name for path in report.write_report(tmp_path)] == ["report.html"]


def test_probabilities_that_fit_no_decision_are_left_out(tmp_path):
    rows = [{"step": 0, "probabilities": {"conv1": [0.5, 0.5]}}, *metrics(1, 9)]
    write_run(tmp_path, rows=rows)
    steps, series, names, options = report._probabilities(report.read_metrics(tmp_path / "metrics.jsonl")[0], DECISIONS)
    assert steps == [2, 4, 6, 8]
    assert series == [[[0.4, 0.6]] * 4, [[0.7, 0.2, 0.1]] * 4]
    assert (names, options) == (["conv1", "conv2"], [["INT4", "INT8"], ["INT4", "INT8", "BF16"]])
    assert report._probabilities(rows, []) is None


def test_directory_that_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds neither recipe.json nor metrics.jsonl"):
        report.write_report(tmp_path)


def test_damaged_json_names_the_file(tmp_path):
    write_run(tmp_path)
    (tmp_path / "decisions.json").write_text('[{"name"')
    with pytest.raises(ValueError, match=r"decisions\.json is not a file of a run: "):
        report.write_report(tmp_path)
    (tmp_path / "decisions.json").write_text("{}")
    with pytest.raises(ValueError, match=r"decisions\.json must hold a list, it holds dict"):
        report.write_report(tmp_path)


def without(entry, key):
    return {k: v for k, v in entry.items() if k != key}


WRONG = {
    "a layer without MACs": ({"layers_table": [without(LAYERS[0], "macs")]}, r"layers_table\[0\] has no 'macs'"),
    "a layer without a format": ({"layers_table": [without(LAYERS[0], "weight_format")]}, "has no 'weight_format'"),
    "a layer that is a text": ({"layers_table": ["conv1"]}, r"layers_table\[0\] must be an object, got 'conv1'"),
    "layers that are an object": ({"layers_table": {}}, "'layers_table' must be a list"),
    "a cost that is a text": ({"cost": "much"}, "'cost' of it must be a number or null, got 'much'"),
    "a cost that is true": ({"cost": True}, "'cost' of it must be a number or null, got True"),
    "a cost of many digits": ({"cost": 10**31}, "'cost' of it must be a number or null"),
    "a unit that is a number": ({"cost_unit": 1}, "'cost_unit' of it must be a text, got 1"),
    "a reference without a name": ({"reference": [{"cost": 1.0}]}, r"reference\[0\] has no 'name'"),
}


@pytest.mark.parametrize("change, why", WRONG.values(), ids=WRONG)
def test_a_recipe_of_another_form_names_the_entry(tmp_path, change, why):
    write_run(tmp_path, recipe={**RECIPE, **change})
    with pytest.raises(ValueError, match=rf"recipe\.json is not of a run: .*{why}.*Delete it"):
        report.write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("decisions", [[3], [{"name": "conv1"}], [{"name": "conv1", "options": [4, 8]}]])
def test_decisions_of_another_form_name_the_entry(tmp_path, decisions):
    write_run(tmp_path, decisions=decisions)
    with pytest.raises(ValueError, match=r"decisions\.json is not of a run: entry 0 must"):
        report.write_report(tmp_path)


def test_lines_of_metrics_that_are_anything(tmp_path):
    lines = [
        '{"step": 1, "loss": 2.0}',
        "[" * 100_000,
        '{"step": NaN}',
        '{"step": %s}' % ("9" * 5000),
        '{"step": true}',
    ]
    lines += ['{"step": 2, "loss": NaN, "probabilities": {"conv1": 3, "conv2": ["x", 0, 1]}}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    rows, unreadable = report.read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and unreadable == 4
    assert report._probabilities(rows, DECISIONS) is None


def test_again_it_overwrites(tmp_path):
    report.write_report(write_run(tmp_path))
    before = (tmp_path / "formats.png").read_bytes()
    changed = json.loads(json.dumps(RECIPE))
    changed["layers_table"][0]["weight_format"] = "BF16"
    report.write_report(write_run(tmp_path, changed))
    assert (tmp_path / "formats.png").read_bytes() != before


def test_missing_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    write_run(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install fliqs-tf\[plots\]"):
        report.write_report(tmp_path)


BUDGETS = {
    "budgets": [
        {"cost": 1.0, "loss": 0.5, "deviation": 0.1},
        {"cost": 2.0, "loss": 0.2, "deviation": 0.05},
        {"cost": 4.0, "loss": 0.0, "deviation": 0.0},
    ],
    "uniform": {
        "INT4": {"cost": 1.0, "loss": 0.5, "deviation": 0.1},
        "INT8": {"cost": 4.0, "loss": 0.0, "deviation": 0.0},
    },
    "trained": {"cost": 2.0, "loss": 0.2, "deviation": 0.05},
}


def test_budgets_have_a_picture_of_their_own(tmp_path):
    from fliqs_tf.reporting.budgets import budgets_figure

    axes = budgets_figure(BUDGETS["budgets"], BUDGETS["uniform"], BUDGETS["trained"], "GBOPs").axes[0]
    line = axes.get_lines()[0]
    assert line.get_xdata().tolist() == [1, 2, 4] and line.get_ydata().tolist() == [0.5, 0.2, 0]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert {"INT4", "INT8", "what the weights are for"} <= set(legend)
    assert axes.get_xlabel() == "cost (GBOPs)" and axes.get_xscale() == "log"
    directory = write_run(tmp_path)
    (directory / "budgets.json").write_text(json.dumps(BUDGETS))
    assert "budgets.png" in [path.name for path in report.write_report(directory)]
    (directory / "budgets.json").write_text(json.dumps({**BUDGETS, "trained": {"cost": 1}}))
    with pytest.raises(ValueError, match="trained has no 'loss'"):
        report.write_report(directory)
    with pytest.raises(ValueError, match="There are no budgets to draw"):
        budgets_figure([], {})
