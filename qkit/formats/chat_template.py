"""Chat templates: the features of Jinja that llama.cpp's own engine lacks. Read off llama.cpp 0.5 (`common/jinja`)."""

import re
from collections.abc import Iterable, Iterator
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
#: Its `format`, `slice` are methods of Python's texts and lists, and its `join` is none.
FILTERS: Final = METHODS - {"format", "slice"} | {"count", "d", "trim"}
#: Filters that take the name of a test or filter: how many positional arguments llama.cpp takes for another meaning.
NAMING: Final = {"select": 1, "reject": 1, "selectattr": 2, "rejectattr": 2, "map": 1}
_TESTS: Final = (
    "boolean callable defined divisibleby eq equalto even false float ge greaterthan gt in integer iterable "
    "lessthan lower lt mapping ne none number odd sameas sequence string test true undefined upper"
)
TESTS: Final = frozenset(_TESTS.split())
PYTHON: Final = frozenset(name for kind in (str, list, dict) for name in dir(kind) if not name.startswith("_"))
GENERATION: Final = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  #: transformers' own tag, which llama.cpp skips
FUNCTIONS: Final = frozenset(("lipsum", "cycler", "joiner"))  #: of Jinja
LOOP: Final = frozenset(("cycle", "changed", "depth", "depth0"))  #: of Jinja's `loop`
REST: Final = ("varargs", "kwargs")  #: the further arguments of a macro
OPERATORS: Final = {"FloorDiv": "//", "Pow": "**"}
UNTRUE: Final = ("ensure_ascii", "sort_keys")  #: options of tojson that have to be false
ESCAPE: Final = re.compile(r"\\(?:[^ntrbfv\\'\"]|$)")  #: of a string, which llama.cpp's lexer does not know
NUMBER: Final = re.compile(r"\d+(\.\d+)?")


def unsupported(template: str) -> list[str]:
    """The parts of `template` that llama.cpp lacks: statements, filters, tests, methods, functions; or where it is no Jinja."""
    from jinja2 import Environment, TemplateSyntaxError, nodes

    environment = Environment(extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"])
    plain = GENERATION.sub("", template)
    try:
        tree, tokens = environment.parse(plain), list(environment.lex(plain))
    except TemplateSyntaxError as error:
        return [f"line {error.lineno}: {error.message}"]
    found = dict.fromkeys(_unread(tokens))
    for node in tree.find_all(nodes.Node):
        found.update(dict.fromkeys(_lacking(node, nodes)))
    return list(found)


def _unread(tokens: Iterable[tuple[int, str, str]]) -> Iterator[str]:
    """The tokens that llama.cpp's lexer does not read."""
    for _, kind, text in tokens:
        if kind == "raw_begin":
            yield "statement 'raw'"
        if kind.endswith("_begin") and text.rstrip().endswith("+"):
            yield f"mark {text.strip()!r}"
        if kind == "string" and (escape := ESCAPE.search(text[1:-1])):
            yield f"escape {escape[0]!r}"
        if kind in ("integer", "float") and not NUMBER.fullmatch(text):
            yield f"number {text}"


def _lacking(node: Any, nodes: Any) -> Iterator[str]:
    kind = type(node).__name__
    if kind in STATEMENTS:
        yield f"statement {STATEMENTS[kind]!r}"
    if kind in OPERATORS:
        yield f"operator {OPERATORS[kind]!r}"
    if isinstance(node, nodes.Mod) and isinstance(node.left, nodes.Const) and isinstance(node.left.value, str):
        yield "operator '%' of a text"
    if isinstance(node, nodes.Compare) and len(node.ops) > 1:
        yield "comparisons in a chain"
    if isinstance(node, nodes.For) and node.recursive:
        yield "a recursive loop"
    if isinstance(node, nodes.For) and any(isinstance(one, nodes.Tuple) for one in getattr(node.target, "items", ())):
        yield "a loop that unpacks in depth"
    if isinstance(node, nodes.AssignBlock) and node.filter:
        yield "a filter of 'set'"
    if isinstance(node, nodes.CallBlock) and not isinstance(node.call.node, nodes.Name):
        yield "a 'call' of an attribute"
    if isinstance(node, nodes.Filter) and node.name not in FILTERS:
        yield f"filter {node.name!r}"
    if isinstance(node, nodes.Filter) and NAMING.get(node.name) == len(node.args):
        yield f"filter {node.name!r} by the name of another one"
    if isinstance(node, nodes.Filter) and node.name == "replace" and len(node.args) + len(node.kwargs) > 2:
        yield "'replace' with a count"
    if isinstance(node, nodes.Call) and (node.dyn_args or node.dyn_kwargs):
        yield "a call with * or **"
    if isinstance(node, nodes.Name) and node.name in REST:
        yield f"{node.name!r} of a macro"
    if isinstance(node, nodes.Filter) and node.name == "tojson":
        yield from (
            f"'tojson' with {one.key}" for one in node.kwargs if one.key in UNTRUE and _may_hold(one.value, nodes)
        )
    if isinstance(node, nodes.Test) and node.name not in TESTS:
        yield f"test {node.name!r}"
    if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name) and node.node.name == "loop":
        yield from [f"'loop.{node.attr}'"] if node.attr in LOOP else []
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name) and node.node.name in FUNCTIONS:
        yield f"function {node.node.name!r}"
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
        name = node.node.attr
        yield from [f"method {name!r}"] if name in PYTHON - (METHODS - {"join"}) else []
        if name in ("startswith", "endswith") and any(isinstance(one, nodes.Tuple) for one in node.args):
            yield f"method {name!r} of several texts"


def _may_hold(value: Any, nodes: Any) -> bool:
    """Whether an expression may be true: any but a constant that is not."""
    return not isinstance(value, nodes.Const) or bool(value.value)
