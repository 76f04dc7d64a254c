"""The rules every notebook of the book keeps; `violations` lists what breaks them."""

import ast
import copy
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "lib" / "tools"))
from notebooks import FIGURE, FOLDS, fold, title  # noqa: E402

LIBRARY = ROOT / "lib" / "tuning"
# Modules whose `__all__` names the core algorithms, each of which some chapter must show.
METHOD_MODULES = (
    "prompts", "p_tuning", "nf4", "lora", "qlora", "memory", "lomo", "training", "chat", "evaluate", "adapter_files",
    "four_bit_files",
)  # fmt: skip
IGNORE_OUTPUT = "nbval-ignore-output"
RESULT = "result"  # the first result of a chapter
EARLIER = "earlier"  # a folded cell that recalls a function of an earlier chapter
TAGS = {IGNORE_OUTPUT, *FOLDS, RESULT, EARLIER, "readme-picture"}
MARKER = re.compile(r"# tuning/(\w+)\.py")
LIKE_A_MARKER = re.compile(r"#.*tuning\s*[/.\\]\s*\w+\s*\.?\s*py|#\s*nbval|#\s*pytest", re.IGNORECASE)
MACHINE_PATH = re.compile(
    r"(?<![\w.:/])(?:/(?:home|root|Users|tmp|work|opt|var|mnt|usr|content)/|[A-Z]:\\)[\w.-]"
    r"|(?:site|dist)-packages|\.pyenv|ipykernel_\d"
)
CARD = re.compile(r"^\*You need [^*]*?\bminutes of\s+reading\.\*$", re.MULTILINE)  # a paragraph near the top
OLD_CARD = ("**You will build**", "**You need**", "**Cost**", "**Download**")
LONGEST_CELL, OLD_LONGEST_CELL = 20, 50  # lines of a chapter's cell that is not folded; and of all other cells
LARGEST_FIGURE = 200  # KB
LONGEST_LINE = 80  # characters of code, and on a chapter's page of what is printed
# Chapters not yet remade in the form of the second edition, which keep older rules. The list only shrinks.
NOT_REMADE = {
    "4-p-tuning",
    "7-lora-in-practice", "8-instruction-tuning", "9-four-bits", "10-qlora", "12-lomo",
}  # fmt: skip
CHECKED = "✓ "  # how the title of a folded check begins
RECALLED = re.compile(r"From earlier: (\w+)\((.*)\)")  # the title of a cell with the tag EARLIER


def read_library(module):
    """The source of a module of the library, or None if there is no such module."""
    path = LIBRARY / f"{module}.py"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code" and cell.source.strip()]


def defined(book, name, namespace):
    """A class or function that a page writes itself, made from its source with the names of `namespace`."""
    for cell in code_cells(book):
        for node in parse(cell.source).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
                exec(compile(ast.Module([node], []), name, "exec"), namespace)
                return namespace[name]
    raise LookupError(f"no cell defines {name}")


def untitled(cell):
    """The source of a code cell, without the title of its fold."""
    return cell.source if title(cell) is None else cell.source.partition("\n")[2]


def parse(source):
    """The syntax tree of a cell; magics become statements that do nothing, so that blocks keep a body."""
    return ast.parse(re.sub(r"(?m)^(\s*)[%!].*", r"\1pass", source))


def definitions(source):
    """name -> syntax tree (as text, without docstrings) of the functions and classes at the top of `source`."""
    tree = parse(source)
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            for inner in ast.walk(node):
                if isinstance(inner, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(inner) is not None:
                    inner.body = inner.body[1:] or [ast.Pass()]
            found[node.name] = ast.dump(node)
    return found


def marked(book):
    """(cell, module, definitions) of the cells that show the library's code."""
    for cell in code_cells(book):
        match = MARKER.fullmatch(untitled(cell).partition("\n")[0])
        if match:
            yield cell, match[1], definitions(cell.source)


def exported(source):
    """The names in a module's `__all__`."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", None) == "__all__" for target in node.targets):
            return ast.literal_eval(node.value)
    return []


def asserts(cell):
    return any(re.match(r"\s*assert\b", line) for line in cell.source.splitlines()) or "assert_close(" in cell.source


def violations(book, setup, library=read_library, chapter=True, remade=True):
    """What in a notebook breaks the rules, as a list of sentences; empty if nothing does.

    Args:
        book: the notebook, as `nbformat` reads it.
        setup: the text its setup cell must have.
        library: a function from a module's name to its source, or None.
        chapter: whether it is a chapter, which has a card and one cell tagged as its first result.
        remade: whether a chapter has the form of the second edition; else its cells and printed lines may be longer,
            and its card has other words.
    """
    found = []
    cells = code_cells(book)
    counts = [cell.execution_count for cell in cells]
    if counts != list(range(1, len(cells) + 1)):
        found.append(f"not executed from top to bottom: execution counts {counts}")
    if not any(cell.outputs for cell in cells):
        found.append("no cell has an output: the notebook was stripped")
    if not cells or cells[0].source != setup:
        found.append("the first code cell is not the setup cell")
    if chapter:
        text = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
        if remade and not CARD.search(text):
            found.append("no card: a paragraph '*You need … minutes of reading.*' near the top")
        if not remade:
            found += [f"the card lacks {entry}" for entry in OLD_CARD if entry not in text]
        results = sum(RESULT in cell.metadata.get("tags", []) for cell in cells)
        if results != 1:
            found.append(f"{results} cells with the tag {RESULT!r}; one, the chapter's first result, has it")
    for cell in book.cells:
        if cell.cell_type == "markdown" and re.search(
            r"^(```|:::)\s*\{|\{(cite|ref|doc|term)", cell.source, re.MULTILINE
        ):
            found.append(f"a directive that Colab shows raw: {cell.source[:50]!r}")
        if MACHINE_PATH.search(cell.source):
            found.append(f"a path of a machine in {MACHINE_PATH.search(cell.source)[0]!r}")
    for number, cell in enumerate(cells, start=1):
        longest = LONGEST_CELL if chapter and remade else OLD_LONGEST_CELL
        found += [f"cell {number}: {fault}" for fault in (*cell_faults(cell, longest), *fold_faults(cell))]
        found += [f"cell {number}: {fault}" for fault in earlier_faults(cell, library)]
        if chapter and remade:
            found += [f"cell {number}: {fault}" for fault in wide_outputs(cell)]
        ignored = IGNORE_OUTPUT in cell.metadata.get("tags", [])
        if ignored and not any(asserts(near) for near in cells[number - 1 : number + 2]):
            found.append(f"cell {number}: its output is ignored, and neither it nor the next two assert anything")
    return found + list(marker_faults(book, library))


def cell_faults(cell, longest):
    """What is wrong with one code cell and its outputs; unfolded it may have so many lines."""
    tags = cell.metadata.get("tags", [])
    for tag in tags:
        if tag not in TAGS:
            yield f"unknown tag {tag!r}; known: {', '.join(sorted(TAGS))}"
    if cell.source.count("\n") >= longest and title(cell) is None:
        yield f"{cell.source.count(chr(10)) + 1} lines; at most {longest}"
    for line in cell.source.splitlines():
        if len(line) > LONGEST_LINE:
            yield f"a line of {len(line)} characters; at most {LONGEST_LINE}: {line.strip()[:40]!r}…"
        if LIKE_A_MARKER.search(line) and not MARKER.fullmatch(line):
            yield f"a marker with a typo, or a marker that must be a tag: {line!r}"
    yield from private_imports(cell.source)
    for output in cell.outputs:
        data = output.get("data", {})
        if output.output_type == "error":
            yield f"an error output: {output.ename}"
        if output.get("name") == "stderr":
            yield "stderr in its output: warnings or a progress bar; `make run` leaves them out"
        if MACHINE_PATH.search(
            str(output.get("text", "")) + str(data.get("text/plain", "")) + str(data.get("text/html"))
        ):
            yield "a path of a machine in its output"
        if "image/png" in data:
            yield "a PNG figure; figures are SVG, as tuning.plots and tuning.drawings make them"
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        if len(data.get(FIGURE, "")) > 1000 * LARGEST_FIGURE:
            size = len(data[FIGURE]) // 1000
            yield f"a figure of {size} KB; at most {LARGEST_FIGURE}: draw its many points with rasterized=True"
        if FIGURE in data and len(alt) < 20:
            yield "a figure without alternative text in metadata.mystnb.image.alt"


def fold_faults(cell):
    """Where a fold differs between the page, JupyterLab and Colab, or its title does not say what is in it."""
    before = copy.deepcopy(cell.metadata)
    folded = copy.deepcopy(cell)
    try:
        fold(folded)
    except ValueError as error:
        yield str(error)
        return
    if folded.metadata != before:
        yield "its fold is not the same for the page, JupyterLab and Colab: write it with `make run`"
    tags, heading = cell.metadata.get("tags", []), title(cell) or ""
    if "hide-cell" in tags and EARLIER not in tags and asserts(cell) and not heading.startswith(CHECKED):
        yield f"a check is folded and its title does not begin with ✓: {heading!r}"
    if heading.startswith("✓") and not (asserts(cell) and heading.startswith(CHECKED)):
        yield f"the title says ✓ and the cell asserts nothing: {heading!r}"


def earlier_faults(cell, library):
    """Where a cell that recalls a function of an earlier chapter does not name it as the library has it."""
    tags, heading = cell.metadata.get("tags", []), title(cell) or ""
    match = RECALLED.fullmatch(heading)
    if EARLIER not in tags:
        if match:
            yield f"its title recalls a function: give it the tag {EARLIER!r} too"
        return
    if "hide-cell" not in tags:
        yield f"a cell with the tag {EARLIER!r} is folded whole: give it the tag 'hide-cell' too"
    if not cell.outputs:
        yield "it recalls a function and shows no example: print one small result below the import"
    if match is None:
        yield f"its title must read like 'From earlier: merge(model)', with a name and parameters, not {heading!r}"
        return
    name, named = match[1], [parameter for parameter in match[2].split(", ") if parameter]
    modules = [
        node.module.removeprefix("tuning.")
        for node in parse(cell.source).body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tuning.")
        if any(alias.name == name and alias.asname is None for alias in node.names)
    ]
    if not modules:
        yield f"it recalls {name} and does not import it: add `from tuning.… import {name}`"
        return
    own = parameters(library(modules[0]) or "", name)
    if own is None:
        yield f"tuning/{modules[0]}.py defines no {name} with parameters: import it from where it is written"
        return
    left = iter(own)
    if not all(parameter in left for parameter in named):
        yield f"its title names {name}({', '.join(named)}); the library has, in this order, {name}({', '.join(own)})"


def parameters(source, name):
    """The names of the parameters that a function or class at the top of `source` takes; None if there is none."""
    top = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    node = top.get(name)
    while isinstance(node, ast.ClassDef):
        inner = {part.name: part for part in node.body if isinstance(part, ast.FunctionDef)}
        bases = [top[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in top]
        node = inner.get("__init__") or next(iter(bases), None)
    if node is None:
        return None
    return [child.arg for child in ast.iter_child_nodes(node.args) if getattr(child, "arg", "self") != "self"]


def printed(output):
    """The lines of an output that the page shows as text."""
    data = output.get("data", {})
    if set(data) - {"text/plain"}:
        return []
    return str(output.get("text", data.get("text/plain", ""))).splitlines()


def wide_outputs(cell):
    for output in cell.outputs:
        longest = max(map(len, printed(output)), default=0)
        if longest > LONGEST_LINE and "hide-cell" not in cell.metadata.get("tags", []):
            yield f"a printed line of {longest} characters; at most {LONGEST_LINE}"


def private_imports(source):
    """Imports that a page must not need: the library's private names, and experiments (but for reading results)."""
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tuning":
            if node.module.startswith("tuning.experiments") and node.module != "tuning.experiments.record":
                yield f"an import from {node.module}; pages read its results by tuning.experiments.record"
            yield from (
                f"a private name of {node.module}: {alias.name}" for alias in node.names if alias.name.startswith("_")
            )


def marker_faults(book, library):
    """Where a cell that claims to show the library's code does not, or is not followed by the library's own."""
    cells = code_cells(book)
    for cell, module, shown in marked(book):
        source = library(module)
        if source is None:
            yield f"marker '# tuning/{module}.py': the library has no such module"
            continue
        if not shown:
            yield f"marker '# tuning/{module}.py' on a cell without a definition"
        real = definitions(source)
        for name, tree in shown.items():
            if name not in real:
                yield f"{name}: not in tuning/{module}.py"
            elif tree != real[name]:
                yield f"{name}: the shown code is not that of tuning/{module}.py"
        later = [untitled(one) for one in cells[cells.index(cell) + 1 :]]
        later = [source for source in later if not MARKER.match(source)]
        following = parse(later[0] if later else "")
        names = {name for node in following.body for name in imported_from(node, f"tuning.{module}")}
        for name in shown.keys() - names:
            if any(name in names_of(source) for source in later):
                yield f"{name}: the cell after the marked one does not import the library's"


def names_of(source):
    """The names that a cell's code reads or writes."""
    return {node.id for node in ast.walk(parse(source)) if isinstance(node, ast.Name)}


def imported_from(node, module):
    """The names that a statement imports from a module, under these names."""
    if isinstance(node, ast.ImportFrom) and node.module == module:
        yield from (alias.name for alias in node.names if alias.asname is None)


def unshown(books, library=read_library):
    """Core algorithms of the method modules that no notebook shows in a marked cell."""
    shown = {(module, name) for book in books for _, module, names in marked(book) for name in names}
    sources = {module: library(module) for module in METHOD_MODULES}
    return [
        f"tuning/{module}.py: no chapter shows {name}"
        for module, source in sources.items()
        if source is not None
        for name in exported(source)
        if (module, name) not in shown
    ]


def read(path):
    return nbformat.read(path, as_version=4)
