"""Addresses with a password or a signature: neither is recorded, and the whole address reaches whoever fetches it."""

from __future__ import annotations

import os

import pytest

from job.addresses import WHOLE, keep_whole, request, whole_address, without_secrets
from job.recipe.config import resolve

SECRET = "https://user:PASSWORD@host:8443/a/core.zip?X-Amz-Signature=SIGNATURE&x=1"
PUBLIC = "https://host:8443/a/core.zip"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (SECRET, PUBLIC),
        (f"-o eval.core_bundle={SECRET}", f"-o eval.core_bundle={PUBLIC}"),
        (f"('{SECRET}' failed)", f"('{PUBLIC}' failed)"),
        ("s3://bucket/prefix", "s3://bucket/prefix"),
        ("http://host?token=1", "http://host"),
        ("http://me@host", "http://host"),
        ("a folder/with?marks@home", "a folder/with?marks@home"),
        ("https://host/path@2/file", "https://host/path@2/file"),
        (PUBLIC, PUBLIC),
    ],
)
def test_what_is_secret_is_left_out(text: str, kept: str) -> None:
    assert without_secrets(text) == kept


def test_the_recipe_has_it_without_and_the_environment_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WHOLE, "")
    recipe = resolve("smoke", {"eval.core_bundle": ("--core-bundle", SECRET)})
    assert recipe.eval.core_bundle == PUBLIC and whole_address(PUBLIC) == SECRET == os.environ[WHOLE]
    assert whole_address("https://another.host/core.zip") == "https://another.host/core.zip"


def test_an_address_without_secrets_is_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WHOLE, raising=False)
    assert keep_whole(PUBLIC) == PUBLIC == whole_address(PUBLIC) and WHOLE not in os.environ


def test_no_header_goes_to_where_an_answer_redirects_to() -> None:
    asked = request(SECRET, {"X-Token": "SIGNATURE"})
    assert asked.full_url == SECRET.replace("user:PASSWORD@", "")
    assert asked.headers == {} and asked.unredirected_hdrs.keys() == {"Authorization", "X-token"}


@pytest.mark.parametrize(
    "address", ["http://", "http://host:port/x", "http://u:HIDDEN@/x", "http://host/?s=HID DEN", "caf\u00e9"]
)
def test_what_is_no_address_is_refused_without_saying_it(address: str) -> None:
    with pytest.raises(ValueError, match=r"^it has (no host, or a port|characters that have to be)") as refused:
        request(address)
    assert "HID" not in str(refused.value)
