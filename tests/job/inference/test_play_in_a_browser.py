"""The page in headless Chromium, driven through its debugging pipe."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import wait_for
from job.inference.play import Player
from job.inference.sample import TextModel
from job.inference.sources import Source

NAMES = ("chromium-headless-shell", "chromium", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason=f"there is none of {', '.join(NAMES)}")]


class Browser:
    """One page of a browser without a window; messages are JSON between zero bytes, on descriptors 3 and 4."""

    def __init__(self, profile: Path) -> None:
        assert BROWSER
        inward, self._write = os.pipe()
        self._read, outward = os.pipe()
        script = f'exec "$0" "$@" 3<&{inward} 4>&{outward}'
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        command = ["bash", "-c", script, BROWSER, *flags]
        self.process = subprocess.Popen(command, pass_fds=(inward, outward), stderr=subprocess.DEVNULL)
        os.close(inward)
        os.close(outward)
        self._held, self._count, self._session = b"", 0, ""
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def do(self, method: str, **asked: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": asked}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._held:
                self._held += os.read(self._read, 1 << 16)
            line, _, self._held = self._held.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def evaluate(self, script: str) -> Any:
        answer = self.do("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.end()


def test_type_watch_hover_and_go_on(make_source: Callable[[str], Source], browser: Browser) -> None:
    source = make_source("head")
    player = Player(TextModel(source.model(), source.tokenizer))
    threading.Thread(target=player.serve_forever, daemon=True).start()
    browser.do("Page.navigate", url=player.link)
    wait_for(lambda: browser.evaluate("document.getElementById('go') !== null"), 30)

    def spans() -> list[str]:
        return browser.evaluate("[...document.querySelectorAll('#text span')].map(span => span.textContent)")

    def idle() -> bool:
        return browser.evaluate("running === null && kept.length > 0")

    browser.evaluate("at('prompt').value = '<img src=x onerror=alert(1)>'; at('tokens').value = 8; at('go').click()")
    wait_for(idle, 30)
    before = spans()
    assert len(before) == 8 and browser.evaluate("document.querySelectorAll('img').length") == 0
    assert browser.evaluate("document.querySelector('#text b').textContent") == "<img src=x onerror=alert(1)>"
    browser.evaluate("document.querySelectorAll('#text span')[3].onmouseenter()")
    rows = browser.evaluate("[...document.querySelectorAll('#tip button')].map(button => button.textContent)")
    assert len(rows) >= 9 and "%" in rows[0] and rows[-1] == "again from here"
    other = browser.evaluate("kept[3].others.findIndex(other => other.id !== kept[3].id)")
    wanted = browser.evaluate(f"kept[3].others[{other}].id")
    browser.evaluate(f"document.querySelectorAll('#tip button')[{other}].click()")
    wait_for(lambda: idle() and browser.evaluate("kept.length") == 12, 30)
    assert spans()[:3] == before[:3] and browser.evaluate("kept[3].id") == wanted
    browser.evaluate("at('prompt').value = 'x '.repeat(200); at('go').click()")
    wait_for(lambda: "shorten the prompt" in browser.evaluate("at('said').textContent"), 30)
    player.shutdown()
    player.server_close()
