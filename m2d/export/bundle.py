"""One source file of M2D's own definitions, word for word: what an exported pipeline runs where M2D is not installed.

diffusers loads custom code from single files. A second copy by hand would drift from the first.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_HEADER = '''"""{name} of M2D {version}, and what it needs of M2D's sources, word for word.

Made by `m2d export`. MIT licence.
"""

{imports}
'''
_FOR_TOOLS = re.compile(r"  # (?:type: ignore|noqa).*$", re.MULTILINE)


def one_file(module: str, name: str, version: str) -> str:
    """Source of a definition at the top of a module of m2d and of all that it uses; other packages are imported.

    Raises ValueError where two definitions that it needs have one name.
    """
    wanted: dict[tuple[str, str], None] = {}  # in the order of need, the needed first
    imports: dict[str, set[str]] = {}

    def need(module: str, name: str) -> None:
        source = _read(module)
        if name in source.imported:
            origin, original = source.imported[name]
            if origin.split(".")[0] == "m2d":
                need(origin, original)
            else:
                imports.setdefault(origin, set()).add(original if original == name else f"{original} as {name}")
        elif name in source.defined and (module, name) not in open_now:
            open_now.add((module, name))
            for used in source.names_in(name):
                need(module, used)
            wanted[(module, name)] = None

    open_now: set[tuple[str, str]] = set()
    need(module, name)
    names = [name for _, name in wanted]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{module}: {doubled[0]} is defined in two of the modules that {name} needs")
    text = _HEADER.format(name=name, version=version, imports="\n".join(_import_lines(imports)))
    parts, above = [text], ""
    for where, one in wanted:
        heading = f"# --- {where.replace('.', '/')}.py ---\n" if where != above else ""
        parts.append(f"{heading}{_read(where).text_of(one)}\n")
        above = where
    return _FOR_TOOLS.sub("", "\n\n".join(parts))


class _Source:
    """A module's text: what it imports, and what it defines at its top."""

    def __init__(self, module: str) -> None:
        spec = find_spec(module)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(module)
        text = Path(spec.origin).read_text(encoding="utf-8")
        self._lines = text.splitlines()
        self.imported: dict[str, tuple[str, str]] = {}  # name here -> module, its name there; "" for a whole module
        self.defined: dict[str, list[ast.stmt]] = {}
        last = ""
        for node in ast.parse(text).body:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self.imported[alias.asname or alias.name] = ("", alias.name)
            elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
                for alias in node.names:
                    self.imported[alias.asname or alias.name] = (str(node.module), alias.name)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                last = node.name
                self.defined[last] = [node]
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                last = target.id if isinstance(target, ast.Name) else ""
                self.defined[last] = [node]
            elif isinstance(node, ast.Expr) and last:  # the docstring of an assignment
                self.defined[last].append(node)

    def names_in(self, name: str) -> Iterator[str]:
        """Names that a definition uses."""
        for node in self.defined[name]:
            for inner in ast.walk(node):
                if isinstance(inner, ast.Name):
                    yield inner.id
                elif isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name):  # os.path, as imported
                    yield f"{inner.value.id}.{inner.attr}"

    def text_of(self, name: str) -> str:
        """Its lines, with decorators, the comment above it and the docstring below."""
        first, last = self.defined[name][0], self.defined[name][-1]
        start = min([first.lineno, *(one.lineno for one in getattr(first, "decorator_list", []))]) - 1
        while start and self._lines[start - 1].startswith("#"):
            start -= 1
        return "\n".join(self._lines[start : last.end_lineno])


@cache
def _read(module: str) -> _Source:
    return _Source(module)


def _import_lines(imports: dict[str, set[str]]) -> list[str]:
    """`import x` first, then `from x import a, b`."""
    whole = [f"import {name}" for name in sorted(imports.get("", ()))]
    return whole + [
        f"from {module} import {', '.join(sorted(imports[module]))}" for module in sorted(imports) if module
    ]
