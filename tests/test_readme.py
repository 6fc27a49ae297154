"""The Python blocks of README and docs run in order, their commands and links exist, and the ladder is as measured."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import results

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
LINKING = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    indented = [line for page in PAGES for line in re.findall(r"^    (\S.*)$", without_blocks(page), re.MULTILINE)]
    fenced = [
        line for page in PAGES for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()
    ]
    return [
        [words[0].removeprefix(".venv/bin/"), *words[1:]]
        for line in fenced + indented
        if (words := shlex.split(line, comments=True))
    ]


def anchors(page: Path) -> set[str]:
    """Returns the names that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.smoke
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_python_blocks_run_in_order(page):
    namespace: dict[str, object] = {"__name__": page.stem}
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{name(page)} python block {number}", "exec"), namespace)


@pytest.mark.parametrize("page", LINKING, ids=name)
def test_relative_links_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_readme_links_to_every_page():
    assert all(f"]({name(page)}" in README.read_text() for page in PAGES[1:])


def test_ladder_is_as_measured():
    """Every row of the README's ladder is a recorded one, bytes, speed and costs; ``*`` marks compiled bytes."""
    suites = {path.stem: json.loads(path.read_text()) for path in results.PLOTTED.glob("*.json")}
    recorded = {}
    for row in suites["ladder"]["rows"] + suites["scaling"]["rows"]:
        gib = f"{row['compiled_gib']:.2f} *" if results._peak(row).startswith("<=") else results._peak(row)
        recorded[gib, f"{row['tokens_per_s']:,.0f}"] = results.costs(row.get("settings", {}), suites)
    rows = re.findall(r"^\| .+ \| ([\d.]+(?: \*)?) \| ([\d,]+) \| (.+) \|$", README.read_text(), re.MULTILINE)
    assert len(rows) == 22
    assert {(gib, speed): recorded.get((gib, speed)) for gib, speed, _ in rows} == {row[:2]: row[2] for row in rows}


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {words[1] for words in commands() if words[0] == "make"}
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize("subcommand", sorted({words[1] for words in commands() if words[0] == "memjax"}))
def test_memjax_commands_take_the_flags_shown(subcommand):
    command = [sys.executable, "-c", "from memjax.recipes.cli import main; main()", subcommand, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    uses = [words for words in commands() if words[:2] == ["memjax", subcommand]]
    flags = {word for words in uses for word in words if word.startswith("--")}
    assert not {flag for flag in flags if not re.search(rf"{flag}\b", done.stdout)}


def test_every_command_is_one_that_we_can_check():
    assert {words[0] for words in commands()} <= {"make", "memjax", "git", "cd", "pip", "python"}
