"""`hf://org/name` against a server on this machine that speaks the hub's protocol: cache, revision, refusals."""

import hashlib
import http.server
import json
import threading

import pytest
import reference
import transformers

pytestmark = pytest.mark.plain
LOAD = """
import sys, keras_llama
for name in sys.argv[1:]:
    try:
        lm = keras_llama.LlamaCausalLM.from_preset(name)
        print("parameters", lm.count_params())
    except ValueError as error:
        print("refused", error)
"""
REFUSALS = {
    "hf://org/gated": ["gated", "https://huggingface.co/org/gated", "HF_TOKEN", "status=403"],
    "hf://org/secret": ["does not exist, or is private", "HF_TOKEN", "status=401"],
    "hf://org/tiny@v9": ["no such revision", "revision='v9'"],
    "hf://not a name": ["hf://org/name"],
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one model, `org/tiny`, one gated, `org/gated`, and no other; counts the files it hands out."""
    directory = tmp_path / "served"
    model = reference.randomize(transformers.LlamaForCausalLM(reference.hf_config()))
    model.save_pretrained(directory, max_shard_size="20KB")
    (directory / "pytorch_model.bin").write_bytes(b"never to be fetched")
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    fetched = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = self.path.split("?")[0]
            if "org/gated" in path:
                return self.answer(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="ask first")
            if "org/tiny" not in path:
                return self.answer(401, b"{}", X_Error_Code="RepoNotFound")
            if path.startswith("/api/"):
                if "tiny/revision" in path and path.rsplit("/", 1)[-1] not in ("main", "v1", COMMIT):
                    return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
                entries = [{"rfilename": name, "path": name, "type": "file", "size": len(files[name]), "oid": "0" * 40}
                           for name in files]  # fmt: skip
                body = entries if "/tree/" in path else {"id": "org/tiny", "sha": COMMIT, "siblings": entries}
                return self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
            name = path.rsplit("/", 1)[-1]
            if name not in files:
                return self.answer(404, b"", X_Error_Code="EntryNotFound")
            if self.command == "GET":
                fetched.append(name)
            etag = hashlib.sha1(files[name]).hexdigest()
            return self.answer(200, files[name], ETag=f'"{etag}"', X_Repo_Commit=COMMIT)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    yield fetched
    server.shutdown()
    server.server_close()


def test_a_model_is_fetched_once_and_then_found_offline(hub, run_python, monkeypatch):
    first, again = run_python(LOAD, "hf://org/tiny", "hf://org/tiny@main").splitlines()
    assert first == again
    assert first.startswith("parameters")
    assert "config.json" in hub
    assert "pytorch_model.bin" not in hub
    assert len(hub) == len(set(hub))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    offline, missing = run_python(LOAD, "hf://org/tiny", "hf://org/other").splitlines()
    assert offline == first
    assert "not in the local cache" in missing


def test_refusals_say_what_to_do(hub, run_python):
    told = run_python(LOAD, *REFUSALS).splitlines()
    for line, expected in zip(told, REFUSALS.values(), strict=True):
        assert line.startswith("refused")
        assert all(part in line for part in expected), line
