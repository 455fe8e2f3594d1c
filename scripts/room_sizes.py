"""Print how much code each room of the package has, in tokens: names, numbers, operators, strings.

Docstrings, comments and layout are free.
"""

import ast
import tokenize
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "posthoc_cli"
LAYOUT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENDMARKER,
}  # fmt: skip


def main() -> None:
    """Print a line for each room, the largest first."""
    sizes = Counter[str]()
    for path in PACKAGE.rglob("*.py"):
        sizes[path.relative_to(PACKAGE).parts[0]] += count_tokens(path)
    for room, size in sizes.most_common():
        print(f"{room:20} {size:8,}")
    print(f"{'all':20} {sizes.total():8,}")


def count_tokens(path: Path) -> int:
    """Count the tokens of a module without its docstrings."""
    docstrings = set[int]()
    for node in ast.walk(ast.parse(path.read_text())):
        text = node.value if isinstance(node, ast.Expr) else None
        if isinstance(text, ast.Constant) and isinstance(text.value, str):
            docstrings.update(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    with path.open() as file:
        tokens = [*tokenize.generate_tokens(file.readline)]
    return sum(t.type not in LAYOUT and t.start[0] not in docstrings for t in tokens)


if __name__ == "__main__":
    main()
