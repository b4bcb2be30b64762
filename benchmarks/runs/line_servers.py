"""What a line delivers to in the campaign: a broker that can be killed, an address that can be slow, a small disk."""

import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

from flowad_fast.benchmarks.runs.line_rig import free_port, listening, until
from flowad_fast.errors import EngineUnavailableError

if TYPE_CHECKING:
    from paho.mqtt.client import Client, MQTTMessage


class Broker:
    """Mosquitto in a folder of its own, and a listener whose session outlives it.

    Attributes:
        port: where it listens.
        parts: ids of the parts whose outcome came, in order, the same one twice only once.
    """

    def __init__(self, folder: Path) -> None:
        """Start it. EngineUnavailableError where mosquitto or its client is not installed."""
        found = shutil.which("mosquitto", path=os.environ.get("PATH", "") + os.pathsep + "/usr/sbin")
        if found is None:
            raise EngineUnavailableError("mosquitto is not installed: apt-get install mosquitto")
        try:
            from paho.mqtt.client import Client
            from paho.mqtt.enums import CallbackAPIVersion
        except ImportError:
            raise EngineUnavailableError('paho-mqtt is not installed: pip install "flowad-fast[line]"') from None
        self._folder, self._program, self.port = folder, found, free_port()
        folder.mkdir()
        lines = (
            f"listener {self.port} 127.0.0.1", "allow_anonymous true", "persistence true",
            f"persistence_location {folder}/", "queue_qos0_messages true", "max_queued_messages 0",
            "max_inflight_messages 0", f"user {'root' if os.geteuid() == 0 else 'mosquitto'}",
        )  # fmt: skip
        (folder / "conf").write_text("\n".join(lines) + "\n")
        self.parts: dict[str, None] = {}
        self.start()
        # Of quality 0: a listener that acknowledges to a dead broker would drop what it has not read yet.
        self._client = Client(CallbackAPIVersion.VERSION2, "campaign", clean_session=False)
        self._client.reconnect_delay_set(0.05, 0.1)  # type: ignore[arg-type]
        ready = threading.Event()
        self._client.on_connect = lambda client, *_: client.subscribe("flowad/+/outcome", qos=0)
        self._client.on_subscribe = lambda *_: ready.set()
        self._client.on_message = self._got
        self._client.connect("127.0.0.1", self.port)
        self._client.loop_start()
        if not ready.wait(10):
            raise EngineUnavailableError("mosquitto let nobody subscribe within 10 s")
        self._process.send_signal(signal.SIGUSR1)  # writes the subscription to disk, so that it outlives a kill
        if not until((folder / "mosquitto.db").exists, 10):
            raise EngineUnavailableError("mosquitto did not write its state within 10 s")

    def start(self) -> None:
        """Listen, also again after `kill`."""
        self._process = subprocess.Popen(
            [self._program, "-c", self._folder / "conf"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if not until(lambda: listening(self.port), 10):
            raise EngineUnavailableError(f"mosquitto did not listen on port {self.port} within 10 s")

    def kill(self) -> None:
        """As a power cut does."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End both."""
        self._client.disconnect()
        self._client.loop_stop()
        self.kill()

    def _got(self, client: "Client", data: object, message: "MQTTMessage") -> None:
        self.parts.setdefault(json.loads(message.payload)["part"])


class Hook:
    """An address that takes events, as slowly as it is told to.

    Attributes:
        delay: seconds until it answers.
        parts: ids of the parts whose outcome came.
        url: of it.
    """

    def __init__(self) -> None:
        self.delay, self.parts = 0.0, set[str]()
        pause = threading.Event()
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                pause.wait(hook.delay)
                hook.parts |= {one["part"] for one in json.loads(body)["events"] if one["event"] == "record"}
                with suppress(OSError):  # who asked has given up
                    self.send_response(204)
                    self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """No more answers."""
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def small_disk(folder: Path, size: str = "16m") -> Iterator[None]:
    """A file system of its own in memory, which can be filled; EngineUnavailableError where none may be mounted."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "flowad-campaign", str(folder)]
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = " ".join(str(getattr(error, "stderr", "") or error).split())
        raise EngineUnavailableError(f"no small file system may be mounted here ({reason})") from None
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(path: Path) -> None:
    """Write until the disk is full, to the last byte."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        size = 1 << 16
        while size:
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                pass
            size //= 2
