"""`flowad-line`: a production line from one settings file."""

import json
import logging
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from flowad_fast.cli import common
from flowad_fast.data.images import read_frame
from flowad_fast.errors import ConfigError, FlowADError, FrameError, require
from flowad_fast.line.activation import Progress, active
from flowad_fast.line.canary import CanaryCheck
from flowad_fast.line.event import Alarm, Record
from flowad_fast.line.health import Health
from flowad_fast.line.heap import steady_heap
from flowad_fast.line.journal import Journal
from flowad_fast.line.scoring import InProcess, Start
from flowad_fast.line.settings import LineSettings, WebSettings, read_settings, sink_names
from flowad_fast.line.sinks.rows import from_row, to_row
from flowad_fast.line.station import Station
from flowad_fast.line.web.client import Client
from flowad_fast.stages.decision import Verdict

TEMPLATE = """\
# A line, for flowad-line. Check it: flowad-line check line.yaml. Run it: flowad-line run line.yaml.
# Paths are relative to the folder in which the command runs. Seconds everywhere.

bundle: BUNDLE
# engine: auto            # one of the bundle's engines
# device: auto            # auto, cpu, cuda or cuda:N
# threads: 2              # CPU threads of the detector; default: the cores of the container

# From a part's trigger until its outcome must be there; later is no result.
deadline: 0.5
# What becomes of a part without a verdict: reject, pass or stop. Anomalous and invalid parts are always rejected.
on_no_result: reject
# capacity: 64            # parts that may wait
# largest_batch: 4        # parts in one call of the detector, as far as deadlines allow

# Cameras by name.
sources:
  camera1:
    kind: folder          # each new image file is a part, taken once, when it is complete
    folder: incoming
    # class_name: bottle  # for bundles with several products
  # camera2: {kind: recorded, folder: parts, rate: 10, rounds: null}
  # camera3: {kind: video, url: "rtsp://camera.local/stream", every: 5}
  # camera4: {kind: gige, camera: 192.168.0.20, pixel_format: Mono8, trigger: hardware, line: Line0}

# Where outcomes and alarms go. Those that promise delivery are given what they missed, in order, also after a restart.
sinks:
  - kind: jsonl
    path: outcomes.jsonl
  # - {kind: modbus, host: 192.168.0.10, coil: 0, pulse: 0.2}
  # - {kind: database, url: "sqlite:///outcomes.db"}
  # - {kind: pictures, folder: pictures}

# Of this line alone: parts in flight, what sinks have missed, the canary's score.
journal: line-journal
# spool: 268435456        # bytes on disk for each sink that promises delivery

# limits:
#   call: 2.0             # one call of the detector; beyond it the engine is started again
#   start: 120.0          # starting the engine
#   restarts: 3           # failures of the engine within `window` that are survived
#   window: 600.0
#   drain: 10.0           # from SIGTERM until the end

# monitor:                # says when the line drifts, or parts got worse
#   false_alarms: 0.01    # share of unchanged lines that may have any such alarm within `horizon` parts
#   horizon: 100000
#   reference: 500        # parts after a bundle's first start that say what is usual
#   rejects: null         # share that is rejected as a rule; null: alpha of the calibration

# web:                    # page, probes and metrics: http://127.0.0.1:8600
#   port: 8600
#   token: {file: line-token}    # who has it may activate bundles; without one the page only shows
#   host: 127.0.0.1       # others than this computer need a token

# canary:                 # a frame whose score is remembered: an engine that gives another one is not ready
#   image: null           # null: a generated pattern
#   tolerance: 0.001
"""

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown", no_args_is_help=True
)
File = Annotated[Path, typer.Argument(help="Settings file (YAML).")]
Json = Annotated[bool, typer.Option("--json", help="Result as JSON on standard output.")]


@app.command()
@common.interruptible
def init(
    settings: File = Path("line.yaml"),
    bundle: Annotated[str, typer.Option(help="Bundle folder to write into it.")] = "bundles/part",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a settings file with comments, to be changed by hand."""
    common.write_settings(settings, TEMPLATE.replace("BUNDLE", json.dumps(bundle)), "flowad-line", force)


@app.command()
@common.interruptible
def check(settings: File = Path("line.yaml"), json: Json = False) -> None:
    """Connect to everything that a line needs, and say what would fail. Nothing moves a gate or looks like an outcome.

    Exit codes: 0 all is well, 1 something failed.
    """
    found = [*_checks(read_settings(settings))]
    if json:
        common.print_json([{"what": what, "ok": ok, "text": text} for what, ok, text in found])
    else:
        for what, ok, text in found:
            common.say(f"{'ok    ' if ok else 'FAILED'}  {what}: {text}")
    if not all(ok for _, ok, _ in found):
        raise typer.Exit(common.EXIT_ERROR)


@app.command()
@common.interruptible
def run(
    settings: File = Path("line.yaml"),
    every: Annotated[float, typer.Option(min=0, help="Seconds between lines of state; 0: none.")] = 10.0,
    json: Json = False,
) -> None:
    """Run a line until its sources end, or SIGTERM or Ctrl-C, when it drains within its limit.

    Exit codes: 0 it ended or was asked to, 1 it could not start or go on; every part has its outcome either way.
    """
    steady_heap()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    station = Station(read_settings(settings))
    line = station.line

    def stop(number: int, frame: FrameType | None) -> None:
        line.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    station.start()
    common.note(f"running: {line.health().engine}, bundle {line.health().bundle}")
    if station.note:
        common.note(station.note)
    if station.settings.web is not None:
        common.note(f"page: {station.settings.web.address}")
    try:
        while not line.wait(every or None):
            common.note(_state(line.health()))
    finally:
        station.close()
    health = line.health()
    common.print_json(_summary(health)) if json else common.say(_state(health))
    line.raise_if_stopped()


@app.command()
@common.interruptible
def activate(
    settings: File,
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, beside the one that runs or in web.bundles.")],
    shadow: Annotated[int, typer.Option(min=0, help="Parts that both bundles judge before the change.")] = 0,
    allowed: Annotated[
        float, typer.Option(min=0, max=1, help="Share of those that the new bundle may judge otherwise.")
    ] = 0.02,
) -> None:
    """Have a running line judge with another bundle, after checks; the old one judges until then.

    It must be whole, of the same products and sizes, calibrated, and give the canary frame its score. In shadow the
    verdicts stay the old one's, and every difference is an event. Ctrl-C ends it without a change. The line
    goes on with the new bundle after a restart; `flowad-line check` says so. Exit codes: 0 it judges, 1 it was refused.
    """
    client = Client(read_settings(settings))
    client.activate(str(bundle.resolve()), shadow, allowed)
    _follow(client)


@app.command()
@common.interruptible
def rollback(settings: File = Path("line.yaml")) -> None:
    """Go back to the bundle that a running line judged with before the last activation."""
    client = Client(read_settings(settings))
    client.rollback()
    _follow(client)


@app.command()
@common.interruptible
def replay(
    records: Annotated[Path, typer.Argument(help="Records of a run: the file of a jsonl sink.")],
    frames: Annotated[Path, typer.Argument(help="Folder with the parts' pictures, named as in the records.")],
    settings: Annotated[Path, typer.Option(help="Settings file (YAML).")] = Path("line.yaml"),
    tolerance: Annotated[float, typer.Option(min=0, help="Difference of scores, as a share of the threshold.")] = 1e-3,
    json: Json = False,
) -> None:
    """Judge recorded parts again with the bundle of SETTINGS and compare with what was recorded.

    Parts that had no result, or were invalid for what went before them, are not compared. Exit codes: 0 all that were
    compared agree, 1 some do not, or none could be compared.
    """
    chosen = read_settings(settings)
    scoring = _scoring(chosen)
    counts = {"compared": 0, "same": 0, "no_verdict": 0, "no_picture": 0}
    changes: list[dict[str, Any]] = []
    try:
        with common.status("starting the engine"):
            scoring.start(chosen.limits.start)
        for record in _records(records):
            if record.score is None or record.result not in (Verdict.GOOD, Verdict.ANOMALOUS):
                counts["no_verdict"] += 1
                continue
            path = frames / record.part.split("/", 2)[-1].partition("#")[0]
            source = chosen.sources.get(record.camera)
            try:
                frame = read_frame(path)
                names = [source.class_name] if source is not None and source.class_name is not None else None
                found = scoring(frame[None], names, chosen.limits.start)
            except FrameError as error:
                counts["no_picture"] += 1
                common.note(f"{record.part}: {error}")
                continue
            verdict, score = found.verdict[0], float(found.score[0])
            near = abs(score - record.score) <= tolerance * max(1e-12, abs(record.threshold or 1.0))
            counts["compared"] += 1
            counts["same"] += (same := near and verdict is record.result)
            if not same:
                was = {"result": str(record.result), "score": record.score, "bundle": record.bundle}
                now = {"result": str(verdict), "score": score, "bundle": scoring.bundle}
                changes.append({"part": record.part, "was": was, "now": now})
    finally:
        scoring.close()
    if json:
        common.print_json({**counts, "changes": changes})
    else:
        for one in changes:
            was, now = one["was"], one["now"]
            common.say(f"{one['part']}: {was['result']} {was['score']:.6g} -> {now['result']} {now['score']:.6g}")
        common.say(", ".join(f"{value} {key.replace('_', ' ')}" for key, value in counts.items()))
    if changes or not counts["compared"]:
        raise typer.Exit(common.EXIT_ERROR)


def _follow(client: Client) -> None:
    def tell(now: Progress) -> None:
        done = f", {now.judged} of {now.parts} parts, {now.disagreements} judged otherwise" if now.judged else ""
        common.note(f"{now.bundle}: {now.text}{done}")

    try:
        common.say(f"active: {client.follow(tell).text}")
    except KeyboardInterrupt:
        client.cancel()
        raise


def _checks(settings: LineSettings) -> Iterator[tuple[str, bool, str]]:
    yield _tried("bundle", lambda: _engine(settings))
    for camera, source in settings.sources.items():
        yield _tried(f"source {camera}", source.check)
    for name, sink in zip(sink_names(settings.sinks), settings.sinks, strict=True):
        yield _tried(f"sink {name}", sink.check)
    yield _tried("journal", lambda: _journal(settings.journal))
    if (web := settings.web) is not None:
        yield _tried("web", lambda: _page(web))


def _tried(what: str, call: Callable[[], str]) -> tuple[str, bool, str]:
    try:
        return what, True, call()
    except (FlowADError, OSError, ValueError) as error:
        return what, False, str(error)


def _page(web: WebSettings) -> str:
    require("line", "fastapi", "uvicorn", "prometheus_client", by="the page")
    from flowad_fast.line.web.server import bind, read_token

    token = read_token(web)
    bind(web).close()
    clear = token is not None and not web.local and web.certificate is None
    reach = "this computer" if web.local else "anyone on the network"
    return (
        f"{web.address} is free, {reach} may look, "
        + ("who has the token may activate bundles" if token else "nobody may change anything, for there is no token")
        + ("; the token travels unencrypted, see certificate and key" if clear else "")
    )


def _engine(settings: LineSettings) -> str:
    activated = active(settings)
    scoring = _scoring(settings if activated is None else settings.model_copy(update={"bundle": activated.bundle}))
    for camera, source in settings.sources.items():
        try:
            scoring.classes.indices([source.class_name] if source.class_name is not None else None, 1)
        except FlowADError as error:
            raise ConfigError(f"source {camera}: {error}") from None
    canary = CanaryCheck(settings.canary, settings.journal / "canary.json" if settings.journal.is_dir() else None)
    try:
        scoring.start(settings.limits.start)
        text = f"{scoring.bundle} runs on {scoring.engine}; canary: {canary(scoring, settings.limits.start)}"
        return text if activated is None else f"{text}; {activated.text(settings.bundle)}"
    finally:
        scoring.close()


def _scoring(settings: LineSettings) -> InProcess:
    return InProcess(Start(settings.bundle, settings.engine, settings.device, settings.threads))


def _journal(folder: Path) -> str:
    with Journal(folder) as journal:
        lost = len(journal.lost)
    return f"{folder} can be written" + (f"; {lost} parts of a killed run will be named" if lost else "")


def _records(path: Path) -> Iterator[Record]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    event = from_row(json.loads(line))
                except (ValueError, KeyError, TypeError):
                    raise ConfigError(f"{path}, line {number}: no record; expected the file of a jsonl sink") from None
                if isinstance(event, Record):
                    yield event
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def _state(health: Health) -> str:
    results = ", ".join(f"{count} {name}" for name, count in sorted(health.results.items())) or "none yet"
    text = f"{health.arrived} parts: {results}"
    if health.latency:
        text += f"; p50 {1e3 * health.latency['p50']:.1f} ms, p99 {1e3 * health.latency['p99']:.1f} ms"
    troubles = [f"camera {name}: {trouble}" for name, trouble in health.sources.items() if trouble]
    troubles += [f"sink {name}: {one.trouble or f'{one.missed} events missed'}" for name, one in health.sinks.items()
                 if one.trouble or one.missed]  # fmt: skip
    return "; ".join([text, *troubles])


def _summary(health: Health) -> dict[str, Any]:
    """`health` without its last events' pictures."""
    plain = {key: value for key, value in vars(health).items() if key not in ("last", "alarms", "sinks")}
    events: dict[str, tuple[Record | Alarm, ...]] = {"last": health.last, "alarms": health.alarms}
    return {
        **plain,
        "sinks": {name: asdict(one) for name, one in health.sinks.items()},
        **{key: [to_row(event) for event in value] for key, value in events.items()},
    }


def main() -> None:
    """The console script."""
    common.run(app)


if __name__ == "__main__":
    main()
