"""A small study as a file, and an API whose judge is a function."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

STUDY = """
prompts: [Once upon a time, Tom had a red ball.]
reward: cheerfulness
held_out: {sentiment: vader}
guides: {cheerful: cheerful}
dtype: float32
sampling: {temperature: 0.7, max_tokens: 12, n: 2, seed: 3}
baseline: plain
methods:
  - {name: plain, rule: none}
  - {name: VAS, rule: vas, guide: cheerful, beta: [0, 4.0], k: 8}
  - {name: BoN, rule: none, best_of: [1, 3], sampling: {n: 4}}
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    file = tmp_path / "study.yaml"
    file.write_text(STUDY)
    return file


@pytest.fixture
def server() -> Iterator[Any]:
    """An API in OpenAI's format: ``answer`` makes a text, or a code and a body, of a question."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            httpd.asked.append((self.path, self.headers.get("Authorization"), body))
            found = httpd.answer(body["messages"][-1]["content"])
            if isinstance(found, str):
                found = 200, json.dumps({"choices": [{"message": {"content": found}}]})
            code, text = found
            self.send_response(code)
            # A body that is cut off says that it were longer.
            length = len(text.encode()) + 9 * text.endswith("[cut off]")
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(text.encode())
            self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    httpd: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.asked, httpd.answer = [], lambda text: ""
    httpd.url = f"http://127.0.0.1:{httpd.server_port}/v1"
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield httpd
    httpd.shutdown()
    thread.join()
    httpd.server_close()
