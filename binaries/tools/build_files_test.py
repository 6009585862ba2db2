"""BUILD files are as `binaries/tools/build_files.py` writes them."""

import pytest

from binaries.tools import build_files


@pytest.mark.parametrize("folder", build_files.folders(), ids=str)
def test_build_files_follow_the_imports(folder):
    written = (build_files.ROOT / folder / "BUILD").read_text()
    assert written == build_files.build_file(folder), "run: python binaries/tools/build_files.py"
