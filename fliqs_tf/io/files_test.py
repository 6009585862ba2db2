"""Reading what is damaged or hostile, and writing whole files only."""

import json
import os
import stat
import threading

import hypothesis
import hypothesis.strategies as st
import pytest

from fliqs_tf.io import files
from fliqs_tf.io.files import parse_json, read_json, replacing, write_json, write_text

HOSTILE = {
    "empty": (b"", "Expecting value"),
    "two documents": (b"{} {}", "Extra data"),
    "a comma too many": (b"[1,]", "Expecting value"),
    "NaN": (b"[NaN]", "NaN is not a number of JSON"),
    "Infinity": (b"[-Infinity]", "-Infinity is not a number of JSON"),
    "a float beyond float64": (b"[1e999]", "'1e999' is too large"),
    "an exponent of many digits": (b"1e" + b"9" * 99_999, "too large"),
    "an integer of many digits": (b"-" + b"1" * 100_000, "A number has 100001 digits; the limit is 40"),
    "a key twice": (b'{"a": {"b": 1, "c": 2, "b": 3}}', "'b' is there twice"),
    "half of a surrogate pair": (b'["\\ud800"]', "half of a surrogate pair"),
    "the same in a key": (b'{"\\udfff": 1}', "half of a surrogate pair"),
    "not UTF-8": (b'["\xff"]', r"not UTF-8 text \(byte 2\)"),
    "UTF-16": ('["a"]'.encode("utf-16"), r"not UTF-8 text \(byte 0\)"),
    "UTF-16 without a mark": ('["a"]'.encode("utf-16-le"), "Expecting value"),
    "a surrogate in UTF-8": (b'["\xed\xa0\x80"]', "not UTF-8"),
    "control characters": (b'["\n"]', "Invalid control character"),
    "brackets": (b"[" * 100_000, "nested too deeply: more than 64"),
    "objects": (b'{"a":' * 100_000, "nested too deeply: more than 64"),
    "brackets after a closed string": (rb'["\"", ' + b"[" * 65, "nested too deeply"),
    "a quote that never closes": (b'"' + b"a" * 1_000_000, "Unterminated string"),
    "escapes that never close": (b'"' + b"\\\\" * 1_000_000, "Unterminated string"),
}


@pytest.mark.parametrize("content, cause", HOSTILE.values(), ids=HOSTILE)
def test_hostile_content_is_refused_by_name(tmp_path, content, cause):
    path = tmp_path / "thing.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=cause) as error:
        read_json(path, "thing")
    assert str(error.value).startswith(f"{path} is not a thing: ")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "content, value",
    [
        (b"\xef\xbb\xbf[1]", [1]),  # the mark that some editors put at the start
        (b'["\\ud83d\\ude00"]', ["\U0001f600"]),
        (b'["\\\\ud800"]', ["\\ud800"]),  # a backslash and five letters
        (b'["[[[[", {"}": "{"}]', ["[[[[", {"}": "{"}]),
        (b"[" * 64 + b"]" * 64, None),
        (b"[1.5, -2, 1e-999, 1e308]", [1.5, -2, 0.0, 1e308]),
        (b"1234567890123456789012345678901234567890", 1234567890123456789012345678901234567890),
    ],
)
def test_what_is_sound_is_read(content, value):
    assert value is None or parse_json(content) == value


def test_strings_do_not_count_as_brackets():
    assert parse_json(json.dumps(["[" * 1000, '"' + "{" * 1000]).encode())[0] == "[" * 1000


@hypothesis.given(st.binary(max_size=60) | st.text(alphabet='[]{}",:\\u\n d8019eE.-+ntf', max_size=40).map(str.encode))
@hypothesis.settings(max_examples=400, deadline=None)
def test_any_bytes_give_a_value_or_a_value_error(content):
    try:
        value = parse_json(content)
    except ValueError:
        return
    assert parse_json(json.dumps(value).encode()) == value  # so it can be written and read again


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@hypothesis.given(JSON)
@hypothesis.settings(max_examples=40, deadline=None)
def test_agrees_with_the_standard_parser_on_sound_json(value):
    assert parse_json(json.dumps(value).encode()) == json.loads(json.dumps(value))


# ---- what is not a file


def test_a_large_file_is_not_read(tmp_path):
    path = tmp_path / "large.json"
    with open(path, "wb") as file:
        file.truncate(1025)
    with pytest.raises(ValueError, match="large.json has 1025 bytes; a thing has at most 1024"):
        read_json(path, "thing", most_bytes=1024)


@pytest.mark.parametrize("name, error", [("nowhere", FileNotFoundError), (".", IsADirectoryError)])
def test_what_is_not_there(tmp_path, name, error):
    with pytest.raises(error, match=str(tmp_path)):
        read_json(tmp_path / name, "thing")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    answers = []

    def read():
        with pytest.raises(ValueError, match="pipe is not a thing: it is a device or a pipe") as error:
            read_json(tmp_path / "pipe", "thing")
        answers.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(5)
    assert answers


def test_an_endless_device_is_not_read():
    with pytest.raises(ValueError, match="/dev/zero is not a thing: it is a device"):
        read_json("/dev/zero", "thing")


# ---- writing


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": [2, "Größe"]})
    assert read_json(path, "thing") == {"a": [2, "Größe"]}
    assert os.listdir(tmp_path) == ["a.json"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_what_json_does_not_have_becomes_null(tmp_path):
    write_json(tmp_path / "a.json", {"loss": float("nan"), "list": [float("inf"), (1.5,)]})
    assert read_json(tmp_path / "a.json", "thing") == {"loss": None, "list": [None, [1.5]]}


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "a.json"
    write_text(path, "old")

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, step, no_space)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_writer_that_fails_half_way_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "a.txt", "old")

    def write():
        with replacing(tmp_path / "a.txt") as temporary:
            assert temporary.suffix == ".txt" and temporary.parent == tmp_path
            temporary.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_data_that_is_not_json_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "a.json", "[]")
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"formats": object()})
    assert (tmp_path / "a.json").read_text() == "[]"


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_json(tmp_path / "nowhere" / "a.json", [])
