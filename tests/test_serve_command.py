"""`flowad-serve`: what it is told, what it asks of a running server, and what that answers to operators."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from line_servers import free_port
from typer.testing import CliRunner

from flowad_fast.cli.serve import TEMPLATE, app
from flowad_fast.errors import ConfigError, EngineUnavailableError
from flowad_fast.line.activation import Progress, RefusedError
from flowad_fast.serve.client import Client
from flowad_fast.serve.orders import LARGEST, STATUS, UPDATE, Orders
from flowad_fast.serve.pool import UnknownModelError
from flowad_fast.serve.pool_ray import RayPool
from flowad_fast.serve.settings import read_settings
from tests.models import exported

TOKEN = "a-token-of-the-test"
ROW = {"model": "part", "version": "0" * 12, "engine": "fake", "replicas": 1, "wanted": 2, "trouble": "one is gone",
       "going": 3, "outcomes": {"answered": 7, "late": 1}, "retries": 2, "bundle": "bundles/part"}  # fmt: skip


class Pool(RayPool):
    """Says what a test wants."""

    def __init__(self) -> None:
        self.progress, self.asked = Progress(), list[tuple[str, str]]()

    async def status(self) -> list[dict[str, Any]]:
        return [ROW]

    def update(self, model: str, bundle: Path) -> None:
        self.asked.append((model, str(bundle)))
        if model != "part":
            raise UnknownModelError(f"no model {model!r}")
        if self.progress.busy:
            raise RefusedError("one is being loaded")
        self.progress = Progress("loading", str(bundle), "is verified")
        end = "refused" if bundle.name == "broken" else "active"
        asyncio.get_running_loop().call_later(0.3, self._end, Progress(end, str(bundle), f"it is {end}"))  # type: ignore[arg-type]

    def _end(self, progress: Progress) -> None:
        self.progress = progress


async def rest(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"the protocol"})


@contextmanager
def serving(pool: Any, token: str | None) -> Iterator[str]:
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(Orders(rest, pool, token), port=port, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        threading.Event().wait(0.02)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


def ask(address: str, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    import httpx

    found = httpx.request(method, address + path, content=body, headers=headers)
    return found.status_code, found.content


def test_orders_need_the_token_and_everything_else_is_the_protocols() -> None:
    pool, bearer = Pool(), {"authorization": f"Bearer {TOKEN}"}
    order = json.dumps({"model": "part", "bundle": "new"}).encode()
    with serving(pool, TOKEN) as address:
        assert ask(address, "GET", "/v2")[1] == b"the protocol"
        assert ask(address, "GET", STATUS)[0] == ask(address, "POST", UPDATE, order)[0] == 401
        assert ask(address, "GET", STATUS, authorization="Bearer wrong")[0] == 401
        assert ask(address, "POST", STATUS, b"{}", **bearer)[0] == ask(address, "GET", UPDATE, **bearer)[0] == 405
        for body in (b"", b"[]", b"{", b'{"model": "part"}', b'{"model": "part", "bundle": "x", "y": 1}', b"[" * 9999):
            assert ask(address, "POST", UPDATE, body, **bearer)[0] == 400, body
        assert ask(address, "POST", UPDATE, b" " * (LARGEST + 1), **bearer)[0] == 413
        assert pool.asked == []
        assert ask(address, "POST", UPDATE, order, **bearer)[0] == 202
        assert ask(address, "POST", UPDATE, order, **bearer)[0] == 409, "one at a time"


def test_without_a_token_anyone_may_look_and_nobody_may_change() -> None:
    pool = Pool()
    with serving(pool, None) as address:
        assert Client(address).status()["models"] == [ROW]
        with pytest.raises(ConfigError, match="started without a token"):
            Client(address).update("part", "new", print)
    assert pool.asked == []


def test_an_update_is_waited_for() -> None:
    told: list[str] = []
    with serving(Pool(), TOKEN) as address:
        client = Client(address, TOKEN)
        assert client.update("part", "new", told.append, pause=0.05) == "it is active"
        assert told == ["is verified", "it is active"]
        with pytest.raises(RefusedError, match="it is refused"):
            client.update("part", "broken", told.append, pause=0.05)
        with pytest.raises(ConfigError, match="404, no model 'other'"):
            client.update("other", "new", told.append)
    with pytest.raises(EngineUnavailableError, match="no server answers"):
        client.status()
    with pytest.raises(ConfigError, match="expected an address"):
        Client("ftp://x")


def test_a_pool_without_ray_changes_no_bundle() -> None:
    async def models() -> list[Any]:
        return [SimpleNamespace(name="part", version="1", engine="e")]

    async def ready(name: str) -> str:
        return "no canary yet"

    with serving(SimpleNamespace(models=models, ready=ready), TOKEN) as address:
        client = Client(address, TOKEN)
        assert client.status()["models"] == [
            {"model": "part", "version": "1", "engine": "e", "trouble": "no canary yet"}
        ]
        with pytest.raises(ConfigError, match="without Ray"):
            client.update("part", "new", print)


def test_status_and_update_as_commands(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    with serving(Pool(), TOKEN) as address:
        options = ["--server", address, "--token", str(tmp_path / "token")]
        shown = CliRunner().invoke(app, ["status", *options])
        assert "part: 000000000000 on fake; 1 of 2 replicas; 7 answered, 1 late, 3 on their way" in shown.output
        assert json.loads(CliRunner().invoke(app, ["status", *options, "--json"]).stdout)["models"] == [ROW]
        assert "it is active" in CliRunner().invoke(app, ["update", "part", "new", *options]).output
        refused = CliRunner().invoke(app, ["update", "part", "broken", *options])
        assert refused.exit_code == 1 and isinstance(refused.exception, RefusedError)


def test_the_template_is_a_settings_file_with_its_comments_as_defaults(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    assert CliRunner().invoke(app, ["init", str(path), "--bundle", "bundles/x"]).exit_code == 0
    plain = read_settings(path)
    assert plain.models["part"].bundle == Path("bundles/x")
    assert isinstance(CliRunner().invoke(app, ["init", str(path)]).exception, ConfigError)
    lines = TEMPLATE.replace("BUNDLE", "bundles/x").splitlines()
    values = [line.replace("# ", "", 1) for line in lines if ":" in line and not line.startswith(("# A", "# P", "# M"))]
    path.write_text("\n".join(line for line in values if "token:" not in line))
    assert read_settings(path) == plain


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("models: {}", "models"),
        ("models: {'a b': {bundle: x}}", "model name"),
        ("models: {a: {bundle: x, replica: 2}}", "unknown key 'models.a.replica'"),
        ("models: {a: {bundle: x, replicas: 0}}", "replicas"),
        ("models: {a: {bundle: x}}\nray: {name: 'A.b'}", "ray.name"),
        ("- a", "expected fields"),
        ("a: [", "no valid YAML"),
    ],
)
def test_settings_that_are_wrong_are_named(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        read_settings(path)


def test_check_tries_every_model(tmp_path: Path) -> None:
    bundle = exported("onnx")[1].path
    path = tmp_path / "serve.yaml"
    path.write_text(json.dumps({"models": {"a": {"bundle": str(bundle), "device": "cpu"}, "b": {"bundle": "none"}}}))
    done = CliRunner().invoke(app, ["check", str(path), "--json"])
    rows = {one["what"]: one for one in json.loads(done.stdout)}
    assert done.exit_code == 1 and rows["model a"]["ok"] and not rows["model b"]["ok"] and rows["front"]["ok"]
    assert "not calibrated" in rows["model a"]["text"] and "no bundle" in rows["model b"]["text"]


@pytest.mark.long
def test_one_process_serves_until_it_is_told_to_end(tmp_path: Path) -> None:
    port = free_port()
    settings = {"models": {"part": {"bundle": str(exported("onnx")[1].path), "device": "cpu", "threads": 1}}}
    settings["front"] = {"http_port": port, "grpc_port": None}  # type: ignore[dict-item]
    (tmp_path / "serve.yaml").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "flowad_fast.cli.serve", "--local", str(tmp_path / "serve.yaml")]
    server = subprocess.Popen(command, cwd=Path(__file__).parents[1], stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        said = [server.stderr.readline(), server.stderr.readline()]
        assert said == ["starting part\n", f"HTTP at http://127.0.0.1:{port}\n"]
        (row,) = Client(f"http://127.0.0.1:{port}").status()["models"]
        assert row["model"] == "part" and row["trouble"] == "" and "onnxruntime" in row["engine"]
        server.terminate()
        assert server.wait(30) == 0
    finally:
        server.kill()
