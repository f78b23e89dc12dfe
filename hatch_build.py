"""Compiles the kernels while a wheel, or an editable install, is made. Without a C compiler there are none, and NumPy works.

HATCH_BUILD_NO_HOOKS=true, hatchling's own switch, makes the wheel without kernels for any machine, `py3-none-any`.
"""

import importlib.util
import platform
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
        build_data["tag"] = f"py3-none-{tag_of(sysconfig.get_platform(), platform.machine())}"


def tag_of(target: str, machine: str) -> str:
    """The platform tag of a wheel; `target` is sysconfig's platform. A universal Python compiles for `machine` alone."""
    return target.replace("universal2", machine).replace("-", "_").replace(".", "_")
