"""A Ray of the server's own: who can reach it, and that nothing of it is left."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from line_servers import free_port

from tests.serve_replicas import needs_ray, works

ROOT = Path(__file__).parents[1]


class Touch:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> object:
        return os.system, (f"touch {self._path}",)


@pytest.mark.slow
def test_a_ray_of_its_own_answers_nobody_else_and_ends_with_the_server(tmp_path: Path) -> None:
    needs_ray()
    import grpc
    from ray.serve.generated import serve_pb2, serve_pb2_grpc

    work, _, _ = works(tmp_path)
    port, log = free_port(), tmp_path / "log"
    settings = tmp_path / "serve.yaml"
    settings.write_text(
        f"models: {{part: {{bundle: {work.bundle}, cpus: 0.4, device: cpu}}}}\n"
        f"front: {{http_port: {port}, grpc_port: null}}\nray: {{memory: 104857600}}\n"
    )
    command = [sys.executable, "-m", "flowad_fast.cli.serve", str(settings)]
    home = tmp_path / "home"
    home.mkdir()
    with log.open("wb") as file:
        environment = os.environ | {"HOME": str(home), "PYTHONPATH": str(ROOT)}
        server = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True, env=environment)
    try:
        end = time.monotonic() + 90
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/v2/health/ready").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert server.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        open_ports = [
            (one.laddr.port, process.cmdline()[0])
            for process in family
            for one in process.net_connections("tcp")
            if one.status == psutil.CONN_LISTEN and one.laddr.ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
        ]
        assert all(name.startswith("ray::ServeReplica:") for _, name in open_ports), open_ports
        for number, _ in open_ports:
            with grpc.insecure_channel(f"127.0.0.1:{number}") as channel:
                stub = serve_pb2_grpc.ASGIServiceStub(channel)
                order = serve_pb2.ASGIRequest(pickled_request_metadata=pickle.dumps(Touch(tmp_path / "owned")))
                with pytest.raises(grpc.RpcError) as error:
                    stub.HandleRequest(order, timeout=10)
                assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert not (tmp_path / "owned").exists()
        senders = [one for one in family if "dashboard" in " ".join(one.cmdline()) or "gcs_server" in one.cmdline()[0]]
        assert len(senders) > 1 and all(one.environ().get("RAY_USAGE_STATS_ENABLED") == "0" for one in senders)
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0, log.read_text()
        gone, alive = psutil.wait_procs(family, timeout=15)
        assert not alive
        assert [*home.rglob("*")] == [], "nothing is left in the home"
    finally:
        server.kill()
