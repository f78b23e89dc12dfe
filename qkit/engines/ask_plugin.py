"""A script, never imported: imports one plugin, prints its backends and recipes as JSON. `discovery.py` runs it.

A process of its own, since an import may exit, crash or hang. The plugin's own output goes nowhere.
"""

import json
import os
import sys
from importlib.metadata import EntryPoint
from importlib.util import find_spec


def answer(name: str, value: str) -> str:
    """The plugin's description as JSON, or `{"broken": why}`."""
    try:
        plugin = EntryPoint(name, value, "qkit").load()
        from qkit.engines.discovery import (  # after the plugin: one that fails at once costs no import of qkit
            ask,
            to_json,
        )

        brought = ask(plugin)
        for spec in brought.backends:
            module = spec.target.partition(":")[0]
            if find_spec(spec.framework) and not find_spec(module):
                raise ModuleNotFoundError(f"backend {spec.name!r} is in {module}, which is not there")
        return to_json(brought)
    except BaseException as error:  # SystemExit and KeyboardInterrupt included: whatever it is, it is the plugin's
        from qkit.engines.discovery import explain

        return json.dumps({"broken": explain(error)})


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    sys.path[:] = request["path"]
    sys.argv[:] = ["qkit"]
    real = os.dup(1)
    os.dup2(2, 1)  # both are the null device
    found = answer(request["name"], request["value"])
    with os.fdopen(real, "w", encoding="utf-8") as output:
        output.write(found)
    os._exit(0)  # no thread and no exit handler of the plugin keeps the process alive
