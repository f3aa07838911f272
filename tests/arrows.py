"""Prints which folder of the package imports which, and its largest files and functions: python -m tests.arrows"""

from __future__ import annotations

import ast
from collections import Counter

from tests.test_package import FILES, IMPORTS, TREES


def main() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in FILES.items()}
    arrows = Counter(
        (name.split(".")[1], other.split(".")[1])
        for name, others in IMPORTS.items()
        for other in others
        if name.split(".")[1] != other.split(".")[1]
    )
    sizes = Counter[str]()
    for name, count in lines.items():
        sizes[name.split(".")[1]] += count
    for folder, size in sorted(sizes.items()):
        to = ", ".join(f"{other} {n}" for (own, other), n in sorted(arrows.items()) if own == folder)
        print(f"{folder} ({size} lines){' -> ' if to else ''}{to}")
    print(f"\n{sum(lines.values()):,} lines in {len(lines)} files")
    print("largest files:", ", ".join(f"{name} {n}" for name, n in Counter(lines).most_common(5)))
    functions = Counter(
        {
            f"{name}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
            for name, tree in TREES.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
        }
    )
    print("largest functions:", ", ".join(f"{name} {n}" for name, n in functions.most_common(5)))


if __name__ == "__main__":
    main()
