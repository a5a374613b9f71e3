"""README.md, docs/ and CONTRIBUTING.md: what they quote, name and tell to type is there."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

from job.cli.commands import main

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")} | {
    f"docs/{path.name}": path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))
}


def test_the_commands_are_what_the_command_line_says_of_itself() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "commands.py"))["text"]()
    assert DOCUMENTS["docs/commands.md"] == made, "run `make docs`, and commit docs/commands.md"


def test_the_readme_is_read_in_ten_minutes() -> None:
    assert len(DOCUMENTS["README.md"].splitlines()) <= 150, "move what a first reader does not need to docs/"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_a_document_links_to_is_there(name: str) -> None:
    links = re.findall(r"\]\(([^)]+)\)", DOCUMENTS[name])
    files = [link.partition("#")[0] for link in links if "://" not in link]
    assert [file for file in files if file and not (ROOT / name).parent.joinpath(file).exists()] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_documents_command_lines_parse(name: str) -> None:
    for line in re.findall(r"^    (?:\.venv/bin/)?speedrun (.+)$", DOCUMENTS[name], re.MULTILINE):
        command, *words = shlex.split(line, comments=True)
        main.commands[command].make_context(command, words)
