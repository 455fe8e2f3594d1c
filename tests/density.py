"""How dense code is: tokens a line, and what makes a sentence hard to read."""

import ast
import io
import tokenize
from collections import Counter

LOOPS = (
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
    ast.Lambda,
)
BIG = 300
"""Most syntax nodes of a function that is not big."""


def density(folder):
    """Return the counts of a folder's modules.

    tokens  names, numbers, operators and texts, without comments and docstrings
    lines   lines with tokens
    packed  assignments of several values to several names in one statement
    times   a text or list that is multiplied by a condition
    inner   comprehensions and lambdas that contain others
    big     functions of more than `BIG` syntax nodes
    """
    counts = Counter()
    for path in folder.rglob("*.py"):
        counts.update(_density_of_module(path.read_text()))
    return counts


def _density_of_module(text):
    nodes = [*ast.walk(ast.parse(text))]
    documented = _docstring_lines(nodes)
    counts = Counter()
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        line = token.start[0]
        is_layout = token.type == tokenize.COMMENT or not token.string.strip()
        if not is_layout and line not in documented:
            counts["tokens"] += 1
            lines.add(line)
    counts["lines"] = len(lines)
    for node in nodes:
        counts["packed"] += _is_packed(node)
        counts["times"] += _is_multiplied_text(node)
        counts["inner"] += isinstance(node, LOOPS) and _size(node, LOOPS) > 1
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        counts["big"] += is_function and _size(node, ast.AST) > BIG
    return counts


def _docstring_lines(nodes):
    """Return the lines of texts that stand alone as statements."""
    lines = set()
    for node in nodes:
        if isinstance(node, ast.Expr) and _is_text(node.value):
            assert node.end_lineno
            lines.update(range(node.lineno, node.end_lineno + 1))
    return lines


def _is_text(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)


def _size(node, kinds):
    return sum(isinstance(each, kinds) for each in ast.walk(node))


def _is_packed(node):
    if not isinstance(node, ast.Assign):
        return False
    return isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple)


def _is_multiplied_text(node):
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)):
        return False
    sides = (node.left, node.right)
    has_text = any(
        _is_text(s) or isinstance(s, ast.JoinedStr | ast.List | ast.Tuple) for s in sides
    )
    return has_text and (any(map(_is_condition, sides)) or isinstance(node.right, ast.Attribute))


def _is_condition(node):
    if isinstance(node, ast.Call):
        return getattr(node.func, "id", "") in ("bool", "any", "all")
    is_not = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    return is_not or isinstance(node, ast.Compare | ast.BoolOp)
