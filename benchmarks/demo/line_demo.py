"""A whole line on this computer: cameras, broker, OPC UA server, `flowad-line`, and what it told each of them.

    make line-demo

The parts are electroluminescence pictures of solar cells (ELPV). One camera is a GigE Vision camera in software
(Aravis' fake camera with cells for its test pattern), the other one a folder of recorded cells. All processes end with
it.
"""

import json
import logging
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.table import Table

from flowad_fast.benchmarks.demo import judging
from flowad_fast.benchmarks.demo.cell_camera import READY
from flowad_fast.cli import common
from flowad_fast.errors import FlowADError, LineStoppedError, require
from flowad_fast.line.settings import LineSettings

if TYPE_CHECKING:
    from asyncua.sync import SyncNode

GIGE, RECORDED = "gige", "recorded"
PRODUCTS = {GIGE: "mono", RECORDED: "poly"}
"""The cameras, and the cells that each shows."""
CELLS_PER_CAMERA = 60
DEFECTIVE_EVERY = 5
RATE = 4.0
"""Parts a second of each camera."""
DEADLINE = 1.0
_NODES = ("part", "result", "reject", "alarm", "parts", "rejected")


@dataclass
class Seen:
    """What came out at each end: parts by camera and result, and how many each sink got."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    defective: Counter[str] = field(default_factory=Counter)
    """Recorded parts whose file is of a defective cell, by result."""
    alarms: list[str] = field(default_factory=list)
    sinks: dict[str, int] = field(default_factory=dict)


def line_demo(
    output: Annotated[Path, typer.Option(help="Folder for the bundle, the parts, and one folder per run.")] = Path(
        "line-demo-output"
    ),
    seconds: Annotated[float, typer.Option(min=1, help="How long the line runs.")] = 60.0,
    bundle: Annotated[
        Path | None, typer.Option(help="Another bundle of these cells; else the shipped checkpoint is exported, once.")
    ] = None,
) -> None:
    """Run a line of real pictures with a GigE Vision camera, a broker and an OPC UA server, all on this computer."""
    logging.getLogger("asyncua").setLevel(logging.ERROR)  # that loopback is not encrypted
    require("line", "sqlalchemy", "paho", "asyncua", by="the line demo")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    bundle = bundle or exported(output / "bundles" / "cells")
    folders = {camera: parts(output / "parts" / product, product) for camera, product in PRODUCTS.items()}
    run = output / datetime.now(UTC).strftime("run-%Y%m%dT%H%M%S%f")
    run.mkdir(parents=True)
    with ExitStack() as stack:
        sources = cameras(stack, folders, bundle, run)
        sinks: list[dict[str, Any]] = [
            {"kind": "jsonl", "path": str(run / "outcomes.jsonl")},
            {"kind": "database", "url": f"sqlite:///{run / 'outcomes.sqlite'}"},
        ]
        plant = stack.enter_context(opcua())
        sinks.append({"kind": "opcua", "url": plant.url, "nodes": {name: f"ns=2;s=Line.{name}" for name in _NODES}})
        received: Counter[str] | None = None
        if (port := broker(stack, run)) is not None:
            received = stack.enter_context(subscriber(port))
            sinks.append({"kind": "mqtt", "host": "127.0.0.1", "port": port})
        else:
            common.say("no MQTT: there is no mosquitto here; apt-get install mosquitto")
        settings: dict[str, Any] = {
            "bundle": str(bundle.resolve()),
            "sources": sources,
            "deadline": DEADLINE,
            "sinks": sinks,
            "journal": str(run / "journal"),
        }
        page = None
        if "web" in LineSettings.model_fields:
            port = free_port()
            settings["web"], page = {"port": port}, f"http://127.0.0.1:{port}"
        file = run / "line.yaml"
        file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        common.say(f"settings: {file}" + (f"; page, while it runs: {page}" if page else ""))
        problem = _run(file, run, seconds)
        seen = counted(run)
        seen.sinks["opcua"] = int(plant.nodes["parts"].read_value())
        if received is not None:
            seen.sinks["mqtt"] = received["outcome"]
    show(seen, run)
    if problem:
        raise LineStoppedError(f"{problem}; see {run / 'line.log'}")


def exported(bundle: Path) -> Path:
    """The shipped checkpoint with the demo's recipe, calibrated on good cells; made where it is missing."""
    if (bundle / "manifest.json").exists():
        common.say(f"bundle of an earlier run: {bundle}")
        return bundle
    with common.err.status("exporting the shipped checkpoint, once; some minutes"):
        return judging.export(judging.methods()[0], bundle)


def parts(folder: Path, product: str) -> Path:
    """Test cells of a product under names that say what they are, every fifth one defective."""
    from flowad_fast.data.layouts import read_dataset
    from flowad_fast.shipped import PHOTOS

    if folder.is_dir():
        return folder
    dataset = read_dataset(PHOTOS[judging.CELLS], None)
    good, defective = (iter(dataset.select("test", product, label)) for label in (0, 1))  # type: ignore[arg-type]
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for number in range(CELLS_PER_CAMERA):
        bad = number % DEFECTIVE_EVERY == DEFECTIVE_EVERY - 1
        path = next(defective if bad else good).path
        shutil.copy(path, fresh / f"{number:03d}-{'defective' if bad else 'good'}{path.suffix}")
    return fresh.rename(folder)


def cameras(stack: ExitStack, folders: Mapping[str, Path], bundle: Path, run: Path) -> dict[str, dict[str, Any]]:
    """Settings of both cameras; the first is a folder too where there is no Aravis, which is said."""
    from flowad_fast.bundle import read
    from flowad_fast.data.images import find_images, read_frame

    conditional = read(bundle)[1].model.classes.conditional
    sources: dict[str, dict[str, Any]] = {
        camera: {"kind": "recorded", "folder": str(folder), "rate": RATE, "rounds": None}
        for camera, folder in folders.items()
    }
    height, width = read_frame(find_images(folders[GIGE])[0]).shape[:2]
    if reason := _camera(stack, folders[GIGE], run):
        common.say(f"no GigE Vision camera: {reason}. Its cells come from a folder instead: {folders[GIGE]}")
    else:
        common.say(f"camera {GIGE}: GigE Vision on loopback, Aravis' fake camera with the cells of {folders[GIGE]}")
        sources[GIGE] = {
            "kind": "gige",
            "camera": "127.0.0.1",
            "pixel_format": "Mono8",
            "region": [0, 0, width, height],
            "frame_rate": RATE,
        }
    common.say(f"camera {RECORDED}: the files of {folders[RECORDED]}")
    for camera, source in sources.items():
        if conditional:
            source["class_name"] = PRODUCTS[camera]
    return sources


def _camera(stack: ExitStack, folder: Path, run: Path) -> str:
    """Start the camera; why that is not possible, or ""."""
    from flowad_fast.line.sources.aravis import library

    try:
        library()
    except FlowADError as error:
        return str(error)
    command = [sys.executable, "-m", "flowad_fast.benchmarks.demo.cell_camera", str(folder)]
    log = stack.enter_context((run / "camera.log").open("w"))
    camera = stack.enter_context(process(command, stdout=subprocess.PIPE, stderr=log))
    assert camera.stdout is not None
    if camera.stdout.readline().strip() == READY:
        return ""
    camera.wait(10)
    return " ".join((run / "camera.log").read_text().split()) or "it did not start"


def broker(stack: ExitStack, run: Path) -> int | None:
    """Start mosquitto for this computer alone; its port, None where it is missing."""
    program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        return None
    port = free_port()
    file = run / "mosquitto.conf"
    file.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\n")
    log = stack.enter_context((run / "mosquitto.log").open("w"))
    stack.enter_context(process([program, "-c", str(file)], stdout=log, stderr=log))
    end = time.monotonic() + 10
    while time.monotonic() < end:
        with socket.socket() as one:
            if not one.connect_ex(("127.0.0.1", port)):
                return port
        time.sleep(0.05)
    raise LineStoppedError(f"mosquitto did not start within 10 s; see {run / 'mosquitto.log'}")


@contextmanager
def subscriber(port: int) -> Iterator[Counter[str]]:
    """What a client of the broker gets, counted by the last level of the topic."""
    from paho.mqtt.client import Client, MQTTMessage
    from paho.mqtt.enums import CallbackAPIVersion

    got: Counter[str] = Counter()

    def count(client: Client, data: object, message: MQTTMessage) -> None:
        got[message.topic.rpartition("/")[2]] += 1

    client = Client(CallbackAPIVersion.VERSION2)
    client.on_message = count
    client.connect("127.0.0.1", port)
    client.subscribe("flowad/#", qos=1)
    client.loop_start()
    try:
        yield got
    finally:
        client.disconnect()
        client.loop_stop()


@dataclass(frozen=True)
class Plant:
    """An OPC UA server with a node for each of `_NODES`."""

    url: str
    nodes: "Mapping[str, SyncNode]"


@contextmanager
def opcua() -> Iterator[Plant]:
    """A server for this computer alone, in threads of this process."""
    from asyncua import ua
    from asyncua.sync import Server, ThreadLoop

    kinds = {"reject": ua.VariantType.Boolean, "parts": ua.VariantType.UInt32, "rejected": ua.VariantType.UInt32}
    first: dict[ua.VariantType, object] = {ua.VariantType.Boolean: False, ua.VariantType.UInt32: 0}
    with ThreadLoop(30) as loop:
        server = Server(tloop=loop)
        url = f"opc.tcp://127.0.0.1:{free_port()}/line"
        server.set_endpoint(url)
        space = ua.Int16(2)
        line = server.nodes.objects.add_object(ua.NodeId(ua.String("Line"), space), "Line")
        nodes = {}
        for name in _NODES:
            kind = kinds.get(name, ua.VariantType.String)
            nodes[name] = line.add_variable(
                ua.NodeId(ua.String(f"Line.{name}"), space), ua.QualifiedName(name, 2), first.get(kind, ""), kind
            )
            nodes[name].set_writable()
        server.start()
        try:
            yield Plant(url, nodes)
        finally:
            server.stop()


def _run(settings: Path, run: Path, seconds: float) -> str:
    """Run the line for so long, then SIGTERM; what went wrong, or ""."""
    log = run / "line.log"
    command = [sys.executable, "-m", "flowad_fast.cli.line", "run", str(settings), "--every", "2", "--json"]
    with log.open("w") as err, (run / "summary.json").open("w") as out:
        with process(command, stdout=out, stderr=err, patience=20) as line:
            try:
                with common.err.status("starting the engine") as status:
                    running = False
                    end = time.monotonic() + 120
                    while time.monotonic() < end and line.poll() is None:
                        last = (log.read_text(encoding="utf-8").strip().splitlines() or [""])[-1]
                        if not running and last:
                            running, end = True, time.monotonic() + seconds
                        status.update(last[:150] or "starting the engine")
                        time.sleep(0.1)
            except KeyboardInterrupt:
                common.say("stopping")
            if line.poll() is None:
                line.send_signal(signal.SIGTERM)
                line.wait(30)
    return "" if line.returncode == 0 else f"flowad-line ended with exit code {line.returncode}"


def counted(run: Path) -> Seen:
    """What the file and the database have."""
    seen = Seen()
    for path in sorted(run.glob("outcomes*.jsonl")):
        for text in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(text)
            if row["event"] == "alarm":
                seen.alarms.append(f"{row['kind']}: {row['text']}")
                continue
            seen.outcomes[row["camera"], row["result"]] += 1
            if "-defective" in row["part"]:
                seen.defective[row["result"]] += 1
    seen.sinks["jsonl"] = sum(seen.outcomes.values())
    if (run / "outcomes.sqlite").exists():
        database = sqlite3.connect(run / "outcomes.sqlite")
        seen.sinks["database"] = database.execute("select count(*) from flowad_outcomes").fetchone()[0]
        database.close()
    return seen


def show(seen: Seen, run: Path) -> None:
    """Print what came of it, and where to look."""
    results = sorted({result for _, result in seen.outcomes})
    table = Table("camera", *results, "parts")
    for camera in sorted({camera for camera, _ in seen.outcomes}):
        counts = [seen.outcomes[camera, result] for result in results]
        table.add_row(camera, *map(str, counts), str(sum(counts)))
    common.out.print(table)
    if total := sum(seen.defective.values()):
        common.say(f"defective cells from folders: {seen.defective['anomalous']} of {total} anomalous")
    common.say("outcomes delivered: " + ", ".join(f"{name} {count}" for name, count in seen.sinks.items()))
    for alarm in seen.alarms or ["none"]:
        common.say(f"alarm: {alarm}")
    common.say(f"records: {run / 'outcomes.jsonl'}, {run / 'outcomes.sqlite'}; the line's words: {run / 'line.log'}")


@contextmanager
def process(
    command: list[str],
    stdout: int | IO[str],
    stderr: IO[str],
    patience: float = 5.0,
) -> Iterator["subprocess.Popen[str]"]:
    """A process that ends with the block: SIGTERM, and SIGKILL after `patience` seconds. Ctrl-C does not reach it."""
    one = subprocess.Popen(command, stdout=stdout, stderr=stderr, text=True, start_new_session=True)
    try:
        yield one
    finally:
        if one.poll() is None:
            one.terminate()
        try:
            one.wait(patience)
        except subprocess.TimeoutExpired:
            one.kill()
            one.wait()
        if one.stdout is not None:
            one.stdout.close()


def free_port() -> int:
    """A port of the loopback interface that nothing listened on a moment ago."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """`python -m flowad_fast.benchmarks.demo.line_demo`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(common.interruptible(line_demo))
    common.run(app)


if __name__ == "__main__":
    main()
