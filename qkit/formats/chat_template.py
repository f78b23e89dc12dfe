"""Chat templates: the features of Jinja that llama.cpp's own engine lacks. Read off llama.cpp 0.5 (`common/jinja`)."""

import re
from typing import Any, Final

STATEMENTS: Final = {
    "With": "with",
    "ExprStmt": "do",
    "Include": "include",
    "Import": "import",
    "FromImport": "from",
    "Extends": "extends",
    "Block": "block",
    "ScopedEvalContextModifier": "autoescape",
}
_METHODS: Final = (
    "abs append capitalize default dictsort endswith first float format get indent int items join keys last "
    "length list lower lstrip map max min pop reject rejectattr replace reverse rsplit rstrip safe select "
    "selectattr slice sort split startswith string strip title tojson upper values"
)
METHODS: Final = frozenset(_METHODS.split())
FILTERS: Final = METHODS | {"count", "d", "trim"}
_TESTS: Final = (
    "boolean callable defined divisibleby eq equalto even false float ge greaterthan gt in integer iterable "
    "lessthan lower lt mapping ne none number odd sameas sequence string test true undefined upper"
)
TESTS: Final = frozenset(_TESTS.split())
PYTHON: Final = frozenset(name for kind in (str, list, dict) for name in dir(kind) if not name.startswith("_"))
GENERATION: Final = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  #: transformers' own tag, which llama.cpp skips


def unsupported(template: str) -> list[str]:
    """The statements, filters, tests and methods of `template` that llama.cpp lacks, or the place where it is no Jinja."""
    from jinja2 import Environment, TemplateSyntaxError, nodes

    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"]).parse(GENERATION.sub("", template))
    except TemplateSyntaxError as error:
        return [f"line {error.lineno}: {error.message}"]
    found: dict[str, None] = {}
    for node in tree.find_all(nodes.Node):
        found.update(dict.fromkeys(_lacking(node, nodes)))
    return list(found)


def _lacking(node: Any, nodes: Any) -> list[str]:
    kind = type(node).__name__
    if kind in STATEMENTS:
        return [f"statement {STATEMENTS[kind]!r}"]
    if isinstance(node, nodes.Filter) and node.name not in FILTERS:
        return [f"filter {node.name!r}"]
    if isinstance(node, nodes.Test) and node.name not in TESTS:
        return [f"test {node.name!r}"]
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
        name = node.node.attr
        return [f"method {name!r}"] if name in PYTHON - METHODS else []
    return []
