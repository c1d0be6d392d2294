"""Puts what lies at the root of a checkout, programs and configurations, inside the package that is installed.

setup.cfg has all else. A mapping of packages to these folders would install modules for programs, and give a checkout
that is installed with `pip install -e` an import hook for each.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("*.py", "data_scripts/*.py", "configs/**/*.*")
LEFT_OUT = {"setup.py", "demo.py"}  # the demo writes into its checkout


class BuildShipped(build_py):
    """w2v2 as it is, and `w2v2/shipped` with the files of `SHIPPED`, where `w2v2.ROOT` then points."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the checkout is at hand
            return
        for path in (path for pattern in SHIPPED for path in Path().glob(pattern)):
            if str(path) not in LEFT_OUT:
                target = Path(self.build_lib, "w2v2/shipped", path)
                self.mkpath(str(target.parent))
                self.copy_file(str(path), str(target))


setup(cmdclass={"build_py": BuildShipped})
