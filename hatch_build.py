"""Compiles the kernels while a wheel, or an editable install, is made. Without a C compiler there are none, and NumPy works."""

import importlib.util
import sysconfig
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUILD = "qkit/native/build.py"


class Kernels(BuildHookInterface[Any]):
    """Adds `kernels.compiled` to the wheel, which is then one for this platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it collects files."""
        spec = importlib.util.spec_from_file_location("build", f"{self.root}/{BUILD}")
        assert spec is not None
        assert spec.loader is not None
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        if missing := build.build():
            self.app.display_warning(f"qkit's CPU kernels are left out, and NumPy will do their work: {missing}")
            return
        build_data["artifacts"].append("qkit/native/kernels.compiled")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
