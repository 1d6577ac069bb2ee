"""The documents name what exists: modules, functions, files, links. docs/architecture.md names every module."""

import ast
import pkgutil
import re
from pathlib import Path

import pytest
from test_package import MODULES, PACKAGE, ROOMS, ROOT

ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()
README = (ROOT / "README.md").read_text()
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
# not imported by the package, nor checked by mypy; some import within strings
SCRIPTS = sorted(
    [
        ROOT / "hubconf.py",
        *(path for name in ("benchmarks", "examples", "tests/stress") for path in (ROOT / name).glob("*.py")),
    ]
)
WRITERS_OWN = {  # named, not ours
    *("my_net.py", "cifar10_speedrun.py", "airbench94_muon.py", "airbench95.py", "airbench96_faster.py"),
}


def road(document: str) -> list[tuple[str, str]]:
    """(file, function) of each stage on the road of one batch that a document shows."""
    stages = re.findall(r"^    (\w+/\w+\.py)\s+(\S+)", document, re.MULTILINE)
    assert stages, "no road"
    return stages


def module_docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def test_architecture_names_every_module_in_its_tables_and_no_other() -> None:
    named = re.findall(r"^\| `([\w/]+\.py)` \|", ARCHITECTURE.split("## Where a change goes")[0], re.MULTILINE)
    assert len(named) == len(set(named))
    assert set(named) == {str(path.relative_to(PACKAGE)) for path in MODULES if path.name != "__init__.py"}


def test_architecture_tells_the_import_rule_that_is_tested() -> None:
    (rule,) = re.findall(r"^    (errors .* \| .*)$", ARCHITECTURE, re.MULTILINE)
    assert [set(room.split()) for room in rule.split(" | ")] == ROOMS


@pytest.mark.parametrize(("file", "function"), road(ARCHITECTURE))
def test_the_functions_on_the_road_exist(file: str, function: str) -> None:
    source = (PACKAGE / file).read_text()
    if "(" in function:  # a call
        assert function in source
        return
    name, method = function.split(".")
    (found,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name)
    assert method in {node.name for node in found.body if isinstance(node, ast.FunctionDef)}


def test_readme_shows_the_same_road() -> None:
    assert road(README) == road(ARCHITECTURE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_files_and_folders_that_a_document_names_exist(document: Path) -> None:
    words = re.findall(r"[\w./*-]+", re.sub(r"\]\(.*?\)|https?://\S+", "", document.read_text()))
    for word in (word.rstrip(".") for word in words):
        if word in WRITERS_OWN or "<" in word:
            continue
        if re.fullmatch(r"(lit_cifar|tests|examples|configs|benchmarks|docs)/[\w./-]*|[\w/]+\.py", word):
            places = (ROOT / word, PACKAGE / word, ROOT / "configs" / word, document.parent / word)
            assert any(place.exists() for place in places), f"{document.name} names {word}"


@pytest.mark.parametrize("path", [*DOCUMENTS, *SCRIPTS], ids=lambda path: path.name)
def test_names_in_the_package_that_documents_and_scripts_use_exist(path: Path) -> None:
    text = path.read_text()
    for name in re.findall(r"(?<![\w/.-])lit_cifar(?:\.[A-Za-z_]\w*)+", text):
        if name.endswith((".json", ".git")):
            continue
        assert pkgutil.resolve_name(name)
    for module, names in re.findall(r"from (lit_cifar[\w.]*) import (\w+(?:, \w+)*)", text):
        for name in names.split(", "):
            assert pkgutil.resolve_name(f"{module}.{name}")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_links_within_the_repository_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), f"{document.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{document.name} links to {target}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_neighbours_that_a_module_names_exist(path: Path) -> None:
    for name in re.findall(r"[\w/]+\.py\b", module_docstring(path)):
        assert (path.parent / name).is_file() or (PACKAGE / name).is_file(), f"{path} names {name}"


def test_readme_asks_for_the_versions_that_pyproject_asks_for() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for pattern, needed in ((r'requires-python = ">=(.+)"', "Python {} to"), (r'"torch>=(.+)"', "torch {} or later")):
        (version,) = re.findall(pattern, project)
        assert needed.format(version) in README


def test_make_help_lists_every_target_that_documents_name() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        named = set(re.findall(r"(?:`|^    )make ([a-z-]+)", document.read_text(), re.MULTILINE))
        assert named <= targets, (document.name, named - targets)


def test_hooks_before_a_commit_are_what_make_check_runs() -> None:
    hooks = re.findall(r"entry: \.venv/bin/(\w+(?: check| format)?)", (ROOT / ".pre-commit-config.yaml").read_text())
    check = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert check
    assert hooks == re.findall(r"\$\(BIN\)/(\w+(?: check| format)?)", check[1])
