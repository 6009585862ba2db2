"""Packaging: fliqs_tf is what is installed; models and binaries run from a checkout."""

import pathlib
import re

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "fliqs_tf/__init__.py").read_text())[1]

PLOTS = ["matplotlib>=3.8"]
BINARIES = [
    "absl-py>=1.2",
    "rich>=13.0",
    "tensorboard>=2.18",
    "scikit-learn>=1.4",
    "tensorflow-datasets>=4.9.9",
    "importlib_resources>=6.0",  # tensorflow-datasets needs it and does not ask for it
    *PLOTS,
]
EXPORT = ["ai-edge-litert>=2.1", "flatbuffers>=24.3"]
HUB = ["keras-hub>=0.32"]  # for the model "bert"
LEGACY = ["tf-keras>=2.21", "tensorflow-model-optimization>=0.8"]
SAFETENSORS = ["safetensors>=0.4.3"]
ONNX = ["onnx>=1.23", "onnxruntime>=1.31"]  # 1.22 gives other values for INT4 networks
MILP = ["scipy>=1.9"]  # the first with scipy.optimize.milp
TESTS = [
    "pytest>=8.0",
    "pytest-xdist>=3.5",
    "hypothesis>=6.100",
    "ml-dtypes>=0.5",
    "gfloat>=0.5",
    "ai-edge-quantizer>=0.10",
    *SAFETENSORS,
    *ONNX,
    *MILP,
    *HUB,
]
CHECKS = ["ruff>=0.14", "mypy>=1.11", "import-linter>=2.5", "pre-commit>=4.0"]


class WithoutTests(build_py):
    """Tests stand beside the code; what is installed has none."""

    def find_package_modules(self, package, package_dir):
        return [m for m in super().find_package_modules(package, package_dir) if not m[1].endswith("_test")]


setup(
    name="fliqs-tf",
    version=VERSION,
    description="One-shot mixed-precision floating-point and integer quantization search for Keras",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["fliqs_tf", "fliqs_tf.*"]),
    package_data={"fliqs_tf": ["py.typed"], "fliqs_tf.costs": ["profiles/*.json"]},
    cmdclass={"build_py": WithoutTests},
    install_requires=["tensorflow>=2.21", "keras>=3.15", "numpy>=2.0"],
    extras_require={
        "plots": PLOTS,
        "binaries": BINARIES,
        "hub": HUB,
        "legacy": LEGACY,
        "export": EXPORT,
        "safetensors": SAFETENSORS,
        "onnx": ONNX,
        "milp": MILP,
        "tests": [*BINARIES, *LEGACY, *EXPORT, *TESTS],
        "dev": [*BINARIES, *LEGACY, *EXPORT, *TESTS, *CHECKS],
    },
)
