"""A page on this machine to watch a model continue a text: each token's probability, what else it might have been.

The server answers on the loopback interface, to whoever has the token of the link, and only to its own page: a request
for another host or from another origin is refused, so that no page in the same browser reaches it. The page is one file
without anything from elsewhere. A client has PATIENCE seconds to send or take what is due, and holds up nobody: the
model is taken for a token at a time.
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
import secrets
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from job.errors import UsageError
from job.inference.sample import TextModel
from model.generate import ENDED, Decoder, Sampling, draw

PATIENCE = 30.0
MOST_BYTES = 1 << 20
"""of a request"""
NONSENSE = (UsageError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
"""what a request that makes no sense is refused with"""
OTHERS = 8
"""alternatives that are shown of each token"""
HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?")
"""this machine, by any port: a browser may come through a tunnel, and leaves out port 80"""


class Player(ThreadingHTTPServer):
    """The server of one model; `link` is where to go."""

    daemon_threads = True

    def __init__(self, model: TextModel, host: str = "127.0.0.1", port: int = 0) -> None:
        self.model, self.token, self.lock = model, secrets.token_urlsafe(16), threading.Lock()
        self.page = Path(__file__).with_name("play.html").read_bytes()
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            raise UsageError(f"port {port} cannot be used ({error.strerror}): choose another --port") from None

    @property
    def link(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/?token={self.token}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a client that went away ends its own thread."""

    def tokens(self, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What follows `prompt` and the tokens `ids` that came after it, one by one. NONSENSE for a
        request that makes none."""
        gpt, tokenizer = self.model.gpt, self.model.tokenizer
        sampling = Sampling(asked["temperature"], seed=asked["seed"])
        kept = [int(token) for token in asked["ids"]]
        if kept and not 0 <= min(kept) <= max(kept) < tokenizer.vocab_size:
            raise UsageError("there are no such tokens")
        ids = [*self.model.ids(asked["prompt"]), *kept]
        room = min(int(asked["tokens"]), gpt.config.seq_len - len(ids))
        generator = sampling.generator(0)
        characters = codecs.getincrementaldecoder("utf-8")("replace")
        characters.decode(tokenizer.bytes_of(kept))
        decoder, token = None, ENDED
        for _ in range(room):
            with self.lock:
                if decoder is None:
                    decoder = Decoder(gpt, [ids], len(ids) + room)
                else:
                    decoder.append([token])
            p = decoder.logits[0].double().cpu().softmax(dim=-1)
            token = draw(sampling.probabilities(decoder.logits)[0], generator)
            likeliest = p.topk(min(OTHERS, len(p)))
            others = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
            yield {
                "id": token,
                "text": "" if token == tokenizer.bos_id else characters.decode(tokenizer.bytes_of([token])),
                "p": p[token].item(),
                "others": [{"id": other, "text": tokenizer.decode([other]), "p": share} for other, share in others],
            }
            if token == tokenizer.bos_id:
                return


class Handler(BaseHTTPRequestHandler):
    server: Player
    timeout = PATIENCE

    def log_message(self, *_: object) -> None:
        """Nothing: the terminal has the link and nothing else."""

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        if address.path != "/":
            self._answer(404, b"there is nothing here", "text/plain")
        elif self._is_welcome(parse_qs(address.query).get("token", [""])[0]):
            self._answer(200, self.server.page, "text/html; charset=utf-8")

    def do_POST(self) -> None:
        if not self._is_welcome(self.headers.get("X-Token", "")):
            return
        size = self.headers.get("Content-Length", "")
        if not size.isdigit() or int(size) > MOST_BYTES:
            if size.isdigit():  # a client that is still sending would see no answer
                self.rfile.read(min(int(size), 2 * MOST_BYTES))
            self._answer(413, b"a request has at most a megabyte", "text/plain")
            return
        try:
            tokens = self.server.tokens(json.loads(self.rfile.read(int(size))))
            first = list(itertools.islice(tokens, 1))
        except NONSENSE as error:
            self._answer(400, f"{error}".encode(errors="replace"), "text/plain; charset=utf-8")
            return
        self._head(200, "application/x-ndjson")
        for token in itertools.chain(first, tokens):
            self.wfile.write(json.dumps(token).encode() + b"\n")

    def _is_welcome(self, token: str) -> bool:
        """Whether the request comes from our own page; answers it where not."""
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin")
        if not HOST.fullmatch(host) or origin not in (None, f"http://{host}"):
            self._answer(403, b"this is for its own page on this machine", "text/plain")
        elif not secrets.compare_digest(token.encode(), self.server.token.encode()):
            self._answer(403, b"the token is missing or wrong: open the link that was printed", "text/plain")
        else:
            return True
        return False

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self._head(status, kind, len(body))
        self.wfile.write(body)

    def _head(self, status: int, kind: str, size: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if size is not None:
            self.send_header("Content-Length", str(size))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()


HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline';"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
