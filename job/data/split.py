"""GPT-4's split pattern (numbers in groups of at most two digits) as operations on whole arrays of bytes.

A regular expression engine walks through text byte by byte; here a few megabytes are cut at once, by comparisons of arrays of bytes with
themselves moved by one, which run at the speed of memory. What the pattern's alternatives, tried in their order, come to (L letter,
N number, W white space, O anything else, "run" a longest sequence of one class):

    an L run       is a piece, with the one character before it when that is W other than a newline, or an O that is a run of one character
                   and has no space (U+0020) before it
    an N run       is cut into pieces of two characters
    an O run       is a piece, with the space (U+0020) before it and all newlines behind it; a last or only character that an L run takes is
                   not part of it
    '              as an O run of one character without a space before it, before s d m t ll ve re: a piece with those letters alone
    a W run        without the newlines that an O run took, ends a piece after its last newline; of the rest its last character is a piece
                   (or begins the next one) unless the text ends there

Documents are joined by the byte 0xFF, which UTF-8 does not have. White space of several bytes, and numbers, are looked at one by one; they are rare.
That the result is the pattern's own, on any text, is a property test against tiktoken (tests/job/data/test_split.py).
"""

from __future__ import annotations

import functools
import unicodedata

import numpy as np

END = 0xFF
"""the byte before each document and after the last"""
L, N, O, QUOTE, E, HARD = range(6)  # noqa: E741
SPACE, NEWLINE, BLANK = 8, 9, 10
WHITE = 8
"""codes from here on are white space"""
TABLED = 0x20000
"""code points from here on are not in the table"""
BLANKS = (0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)
"""white space beyond ASCII (Unicode's White_Space, of which Python's own notion differs)"""


def _code(point: int) -> int:
    if point in BLANKS or point in (9, 11, 12):
        return BLANK
    match chr(point):
        case " ":
            return SPACE
        case "\n" | "\r":
            return NEWLINE
        case "'":
            return QUOTE
    category = unicodedata.category(chr(point))
    # what Python's Unicode does not know yet, a newer one may know to be a letter
    return HARD if category == "Cn" else {"L": L, "N": N}.get(category[0], O)


ASCII = bytes(_code(point) if point < 128 else E if point == END else O for point in range(256))


@functools.cache
def _beyond_ascii() -> np.ndarray:
    return np.array([_code(point) for point in range(TABLED)], dtype=np.uint8)


def piece_starts(text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Where pieces begin in END document END document ... END, in order (int64; each END is a piece of its own), and the offsets of
    characters about which this Python's Unicode does not say whether they are letters: their documents have to be cut by other means."""
    data = np.frombuffer(text, np.uint8)
    code = np.frombuffer(bytearray(text.translate(ASCII)), np.uint8)
    hard = _classify_beyond_ascii(data, code) if not text.replace(b"\xff", b"").isascii() else np.empty(0, np.int64)
    white = code >= WHITE
    kind = np.where(white, np.uint8(WHITE), code)
    kind[kind == QUOTE] = O
    first = np.empty(len(code), bool)
    first[0] = True
    np.not_equal(kind[1:], kind[:-1], out=first[1:])
    before, here = code[:-1], kind[1:]
    other_before = (before == O) | (before == QUOTE)
    _join_other_and_letters(data, code, kind, first, np.flatnonzero(first[1:] & (here == L) & other_before) + 1)
    first[1:] &= ~((before == SPACE) & (here == O))
    first[1:] &= ~(((before == SPACE) | (before == BLANK)) & (here == L))
    first[1:] &= ~((code[1:] == NEWLINE) & other_before)
    _cut_numbers(data, kind, first)
    _cut_white_runs(data, code, white, first)
    first |= code == E
    return np.flatnonzero(first), hard


def _classify_beyond_ascii(data: np.ndarray, code: np.ndarray) -> np.ndarray:
    """Give every byte of a character beyond ASCII the character's code; the offsets of those that are not in the table."""
    at = np.flatnonzero((data >= 0xC2) & (data != END))
    lead = data[at]
    length = 2 + (lead >= 0xE0).astype(np.int64) + (lead >= 0xF0)
    point = (lead & (0x7F >> length).astype(np.uint8)).astype(np.int64)
    for step in (1, 2, 3):
        more = length > step
        point[more] = point[more] << 6 | (data[at[more] + step] & 0x3F)
    found = _beyond_ascii()[np.minimum(point, TABLED - 1)]
    is_hard = (found == HARD) | (point >= TABLED)
    found[is_hard] = O
    for step in (0, 1, 2, 3):
        more = length > step
        code[at[more] + step] = found[more]
    return at[is_hard]


def _character_start(data: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The offset of the first byte of the character that each byte of `at` belongs to."""
    at = at.copy()
    for _ in range(3):
        at -= data[at] & 0xC0 == 0x80
    return at


def _join_other_and_letters(data: np.ndarray, code: np.ndarray, kind: np.ndarray, first: np.ndarray, at: np.ndarray) -> None:
    """L runs that begin `at` behind an O run: one piece, two, or a contraction."""
    start = _character_start(data, at - 1)
    joined = (kind[start - 1] != O) & (code[start - 1] != SPACE)
    at, start = at[joined], start[joined]
    first[at] = False
    at = at[data[start] == ord("'")]
    one, two = (data[np.minimum(at + step, len(data) - 1)] | 0x20 for step in (0, 1))
    longs = (data[at] == 0xC5) & (data[at + 1] == 0xBF)  # ſ, which is an s of another form
    single = np.isin(one, np.frombuffer(b"sdmt", np.uint8))
    double = ((one == ord("l")) & (two == ord("l"))) | (((one == ord("v")) | (one == ord("r"))) & (two == ord("e")))
    first[at[single] + 1] = True
    first[at[longs | (double & ~single)] + 2] = True


def _cut_numbers(data: np.ndarray, kind: np.ndarray, first: np.ndarray) -> None:
    at = np.flatnonzero(kind == N)
    at = at[data[at] & 0xC0 != 0x80]
    if len(at):
        index = np.arange(len(at))
        run_start = np.maximum.accumulate(np.where(first[at], index, 0))
        first[at[(index - run_start) % 2 == 0]] = True


def _cut_white_runs(data: np.ndarray, code: np.ndarray, white: np.ndarray, first: np.ndarray) -> None:
    """W runs of two bytes and more, seen as one array of their bytes alone."""
    member = white.copy()
    member[1:-1] &= white[:-2] | white[2:]
    at = np.flatnonzero(member)
    if not len(at):
        return
    begins = ~white[at - 1]
    run, starts = np.cumsum(begins) - 1, np.flatnonzero(begins)
    ends = np.append(starts[1:], len(at)) - 1
    newline = code[at] == NEWLINE
    before = code[at[starts] - 1]
    seen = np.cumsum(~newline)
    taken = ((before == O) | (before == QUOTE))[run] & (seen == (seen - ~newline)[starts][run])  # by the O run before
    first[at] = False
    index = np.arange(len(at))
    begin = np.minimum.reduceat(np.where(taken, len(at), index), starts)
    first[at[begin[begin <= ends]]] = True
    last_newline = np.maximum.reduceat(np.where(newline & ~taken, index, -1), starts)
    cut = (last_newline >= 0) & (last_newline < ends)
    first[at[last_newline[cut] + 1]] = True
    rest = (last_newline < ends) & (begin <= ends) & (code[at[ends] + 1] != E)
    first[_character_start(data, at[ends[rest]])] = True
