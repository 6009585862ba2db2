"""Annotations: mypy, configured by pyproject.toml, finds nothing wrong with the package."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

from fliqs_tf._keras import IS_KERAS_3

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.skipif(not IS_KERAS_3, reason="mypy reads the same under either Keras: once is enough")
@pytest.mark.skipif(not importlib.util.find_spec("mypy"), reason="no mypy: pip install -e '.[dev]'")
def test_mypy_finds_nothing():
    found = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
