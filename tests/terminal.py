"""A terminal for tests: a program behind a pseudo-terminal, and what it leaves on a screen of so many columns."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence
from pathlib import Path

CONTROL = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])")


class Screen:
    """Rows of text, never scrolled away: the control codes that a progress line needs, and AssertionError for others.

    `wrapped`: the rows that were too long for the width. `frames`: what stood in the cursor's row whenever it went back
    to the row's start.
    """

    def __init__(self, columns: int) -> None:
        self.columns, self.rows, self.wrapped, self.frames = columns, [""], list[str](), list[str]()
        self._row = self._column = 0

    def feed(self, text: str) -> None:
        at = 0
        while at < len(text):
            if control := CONTROL.match(text, at):
                self._control(control[1], control[2])
                at = control.end()
                continue
            self._character(text[at])
            at += 1

    def _character(self, character: str) -> None:
        assert character >= " " or character in "\r\n", (
            f"a control code that this terminal does not know: {character!r}"
        )
        if character == "\r":
            self.frames.append(self.rows[self._row].rstrip())
            self._column = 0
        elif character == "\n":
            self._row, self._column = self._row + 1, 0
            self.rows += [""] * (self._row + 1 - len(self.rows))
        else:
            if self._column == self.columns:
                self.wrapped.append(self.rows[self._row])
                self._character("\n")
            row = self.rows[self._row].ljust(self._column)
            self.rows[self._row] = row[: self._column] + character + row[self._column + 1 :]
            self._column += 1

    def _control(self, number: str, letter: str) -> None:
        if letter == "K":
            self.rows[self._row] = "" if number == "2" else self.rows[self._row][: self._column]
        elif letter == "A":
            self._row = max(0, self._row - int(number or 1))
        else:
            assert letter in "mhl", f"a control code that this terminal does not know: {number}{letter}"  # colours


def in_terminal(words: Sequence[str], columns: int, environment: Mapping[str, str], cwd: Path) -> tuple[int, Screen]:
    """The exit code of a program whose input and output are a terminal of `columns`, and its screen."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    given = {name: value for name, value in environment.items() if name != "COLUMNS"} | {"TERM": "xterm-256color"}
    process = subprocess.Popen(words, stdin=its, stdout=its, stderr=its, env=given, cwd=cwd)
    os.close(its)
    said = b""
    try:
        while data := os.read(ours, 65536):
            said += data
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    screen = Screen(columns)
    screen.feed(said.decode().replace("\r\n", "\n"))
    return process.wait(60), screen
