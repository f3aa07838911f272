"""What one is told when the hub does not give a model or a data set, asked of a server that answers as the hub does."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Hub(BaseHTTPRequestHandler):
    """Gated, but for names with "absent" in them."""

    def answer(self) -> None:
        absent = "absent" in self.path
        self.send_response(404 if absent else 403)
        self.send_header("X-Error-Code", "RepoNotFound" if absent else "GatedRepo")
        self.send_header("X-Error-Message", "Not found" if absent else "Access to it is restricted.")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = answer

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def asked(endpoint: str, code: str, tmp_path) -> str:
    """The error of some code in a process that knows this hub only."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    code = f"import para_jax\ntry:\n    {code}\nexcept para_jax.ParaJaxError as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_gated_model(endpoint: str, tmp_path) -> None:
    said = asked(endpoint, "para_jax.BackboneConfig.from_pretrained('owner/closed')", tmp_path)
    assert said.startswith(
        f"owner/closed is gated: visit {endpoint}/owner/closed, accept its terms, and set the variable"
    )
    assert "HF_TOKEN" in said


@pytest.mark.slow
def test_a_model_that_is_not_there(endpoint: str, tmp_path) -> None:
    said = asked(endpoint, "para_jax.BackboneConfig.from_pretrained('owner/absent')", tmp_path)
    assert said.startswith("owner/absent is not a local folder") and "Check the spelling" in said


def test_a_gated_data_set(endpoint: str, tmp_path) -> None:
    said = asked(endpoint, "para_jax.read_rows('hf:owner/closed:train')", tmp_path)
    assert said.startswith(f"owner/closed is gated: visit {endpoint}/datasets/owner/closed"), said


@pytest.mark.slow
def test_a_data_set_that_is_not_there(endpoint: str, tmp_path) -> None:
    said = asked(endpoint, "para_jax.read_rows('hf:owner/absent/config')", tmp_path)
    assert said.startswith("owner/absent is not a local folder"), said
