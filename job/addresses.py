"""Addresses with something secret in them: a password before the host, a signature behind the question mark.

What is recorded (recipe, claims, events, pages) and printed has them without; the whole address of the CORE bundle goes
to the processes that fetch it in a variable of the environment.
"""

from __future__ import annotations

import base64
import os
import re
import sys
from collections.abc import Mapping
from types import MappingProxyType
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import Request

WHOLE = "SPEEDRUN_CORE_ADDRESS"
"""the variable"""
URL = re.compile(r"\b([a-z][a-z0-9+.-]*://)(?:[^/?#\s'\"]*@)?([^?#\s'\"]*)(?:\?[^#\s'\"]*)?", re.IGNORECASE)

USER = re.compile(r"([a-z][a-z0-9+.-]*://)([^/?#]*)@", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """`text`, every address in it without user-info and query."""
    return URL.sub(r"\1\2", text)


def recorded_argv() -> list[str]:
    """The words of this command behind the program's name, as they are recorded."""
    return [without_secrets(word) for word in sys.argv[1:]]


def keep_whole(address: str) -> str:
    """What is recorded of `address`; the whole of it is kept for `whole_address` of this process and its children."""
    recorded = without_secrets(address)
    if recorded != address:
        os.environ[WHOLE] = address
    return recorded


def whole_address(recorded: str) -> str:
    """The address that `recorded` stands for, where this process was given it."""
    whole = os.environ.get(WHOLE, "")
    return whole if without_secrets(whole) == recorded else recorded


def user_apart(address: str) -> tuple[str, dict[str, str]]:
    """`address` without the user and password before its host, and the header that says them."""
    found = USER.match(address)
    if not found:
        return address, {}
    basic = base64.b64encode(unquote_to_bytes(found[2])).decode()
    return found[1] + address[found.end() :], {"authorization": f"Basic {basic}"}


def request(address: str, headers: Mapping[str, str] = MappingProxyType({})) -> Request:
    """What urllib, which takes user and password for a part of the host's name, asks for `address`; ValueError, which
    has no secret in it, where that is none. No header goes to where an answer redirects to."""
    if not re.fullmatch("[!-~]+", address):
        raise ValueError("it has characters that have to be percent-encoded")
    plain, basic = user_apart(address)
    if not re.fullmatch(r"([^:\[\]]+|\[[^]]+\])(:\d+)?", urlsplit(plain).netloc):
        raise ValueError("it has no host, or a port that is no number")
    asked = Request(plain)
    for name, value in {**headers, **basic}.items():
        asked.add_unredirected_header(name, value)
    return asked
