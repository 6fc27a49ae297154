"""The README's Python blocks run in order, and its commands exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    indented = re.findall(r"^    (\S.*)$", re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S), re.MULTILINE)
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()] + indented
    return [
        [words[0].removeprefix(".venv/bin/"), *words[1:]]
        for line in lines
        if (words := shlex.split(line, comments=True))
    ]


@pytest.mark.smoke
def test_python_blocks_run_in_order():
    namespace: dict[str, object] = {"__name__": "readme"}
    for number, block in enumerate(blocks("python")):
        exec(compile(block, f"README.md python block {number}", "exec"), namespace)


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
