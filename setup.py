"""What pyproject.toml cannot say about the wheel.

The catalogue lies outside the package in a checkout (models/) and inside it in the wheel
(app/store/models/). A wheel that carries compiled kernels is tagged with its platform; one without is
for any. The kernels are loaded by ctypes, so no wheel is tied to a Python release.
"""

import os
import shutil
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
MODELS = "models"
MODELS_IN_WHEEL = Path("app", "store", "models")
# A recipe reads and writes these; they are no part of a model.
IGNORED = shutil.ignore_patterns("__pycache__", "corpus", "data", "run")
# The oldest C library that the kernels are built against; empty: the name of the machine at hand.
PLATFORM_TAG = os.environ.get("HEADWATER_PLATFORM_TAG", "")


def has_kernels() -> bool:
    """Whether compiled kernels lie in the tree and so go into the wheel."""
    return any((ROOT / "app" / "runner" / "native").glob("**/*.so"))


class WheelDistribution(Distribution):
    """Pure Python unless the kernels are in it."""

    def has_ext_modules(self) -> bool:
        return has_kernels()


class BuildWithModels(build_py):
    """Copies models/ beside the code that reads it."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / MODELS_IN_WHEEL
        shutil.copytree(ROOT / MODELS, target, dirs_exist_ok=True, ignore=IGNORED)


class KernelWheel(bdist_wheel):
    """`py3-none-<platform>` where kernels are inside, else `py3-none-any`."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", PLATFORM_TAG if PLATFORM_TAG and platform != "any" else platform


setup(
    distclass=WheelDistribution,
    cmdclass={"build_py": BuildWithModels, "bdist_wheel": KernelWheel},
)
