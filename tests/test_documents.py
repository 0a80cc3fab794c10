"""The documents say what is there: files, methods, commands, recipes, targets, pins."""

import argparse
import re
import tomllib
from pathlib import Path

import pytest

from flows.cli import parser
from flows.config import recipes
from pipeline.selectors import SELECTORS

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "stores", "flows")
TREE = "<!-- tree -->"
DATA = (".py", ".toml", ".jsonl", ".j2", ".css", ".yaml")
TEXTS = sorted(
    path
    for place in (*PACKAGES, ".ci")
    for path in (ROOT / place).rglob("*")
    if path.suffix in (*DATA, ".md", "") and path.is_file()
) + [
    ROOT / n
    for n in (
        "README.md",
        "METHODS.md",
        "STORES.md",
        "SCALE.md",
        "CHANGELOG.md",
        "Makefile",
        "pyproject.toml",
        "constraints.txt",
    )
]


@pytest.fixture
def readme() -> str:
    """The README, once it has its tree."""
    text = (ROOT / "README.md").read_text()
    if TREE not in text:
        pytest.skip(f"README.md has no {TREE} yet")
    return text


def commands() -> dict[str, str]:
    """Return the help text of each command."""
    (actions,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    helps = {choice.dest: choice.help or "" for choice in actions._choices_actions}
    return {name: helps.get(name, "") for name in actions.choices}


def test_the_readme_lists_every_file(readme: str):
    """The README's tree has a line, path and purpose, for each file of the packages, and for nothing else."""
    block = readme.split(TREE, 1)[1].split("```")[1]
    lines = [line.split(maxsplit=1) for line in block.splitlines()[1:] if line.strip()]
    assert all(len(line) == 2 for line in lines), "every path has its purpose"
    listed = [path for path, _ in lines]
    there = {str(p.relative_to(ROOT)) for name in PACKAGES for p in (ROOT / name).rglob("*") if p.suffix in DATA}
    there = {path for path in there if (ROOT / path).stat().st_size}  # an empty __init__.py marks a package, no more
    assert len(listed) == len(set(listed))
    assert set(listed) == there


def test_methods_has_every_selector():
    """METHODS.md has a row for each selector, by its name in the table of selectors."""
    rows = [line for line in (ROOT / "METHODS.md").read_text().splitlines() if line.startswith("|")]
    named = [match[1] for row in rows if (match := re.match(r"\| `([a-z_]+)` \|", row))]
    assert set(SELECTORS) <= set(named)
    assert len(named) == len(set(named))


def test_methods_names_files_that_are_there():
    """Every file that METHODS.md names is in the house."""
    named = re.findall(r"`((?:pipeline|stores|flows)/[\w/.]+)`", (ROOT / "METHODS.md").read_text())
    assert named and all((ROOT / path).is_file() for path in named)


def test_methods_names_settings_that_exist():
    """Every ``section.key`` that METHODS.md sets is a key of the configuration."""
    from flows.config import Config

    named = re.findall(r"`([a-z]+)\.([a-z_]+) = ", (ROOT / "METHODS.md").read_text())
    assert named
    for section, key in named:
        assert key in Config.model_fields[section].annotation.model_fields, f"{section}.{key}"


def test_every_promise_has_its_tests():
    """STORES.md has fourteen promises, and each names tests that exist."""
    rows = re.findall(r"^\| P(\d+) \| .* \| (.*) \|$", (ROOT / "STORES.md").read_text(), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 15))
    for _, tests in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
        assert named and all(f"def {test}(" in (ROOT / file).read_text() for file, test in named), tests


def test_every_command_has_help():
    """Each command of the command line says in a line what it does."""
    assert all(10 < len(text) < 100 for text in commands().values())


def test_the_readme_names_every_command(readme: str):
    """The README names each command."""
    assert [name for name in commands() if not re.search(rf"`(influent )?{name}\b", readme)] == []


def test_the_readme_names_every_recipe(readme: str):
    """The README names each recipe."""
    assert [name for name in recipes() if not re.search(rf"\b{name}\b", readme)] == []


def test_every_target_has_help():
    """Each target of the Makefile that a person calls has a line of help, and none is phony without being there."""
    text = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z0-9-]+):(.*)$", text, re.MULTILINE)
    assert targets and all("  ## " in rest for _, rest in targets)
    assert {name for name, _ in targets} == set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split())


def test_every_dependency_is_pinned():
    """constraints.txt pins each dependency of the package, of its tests and of its recipes, within its bounds."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [Requirement(text) for text in [*project["dependencies"], *extras["dev"], *extras["smollm2"]]]
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines if line)}
    for requirement in wanted:
        assert canonicalize_name(requirement.name) in pins, requirement.name
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)], prereleases=True), requirement


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_texts_stand_on_their_own(path: Path):
    """No text points at a tracker, at the occasion it was written on, or at a folder of one machine."""
    try:
        text = path.read_text()
    except UnicodeDecodeError:
        pytest.skip("not a text")
    found = re.findall(r"(?:\b(?:issue|ticket|session)s?\b|/work/|/root/|/home/\w+).*", text, re.IGNORECASE)
    assert found == []


def test_the_peers_of_the_benchmarks_are_pinned_once():
    """What the Makefile installs to compare with is the extra ``bench``."""
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["bench"]
    assert re.search(r"^PEERS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split() == extra
