"""Bundles behind a network: start a server, look at it, give it another bundle."""

import json
import logging
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from flowad_fast.cli import common
from flowad_fast.config import parse
from flowad_fast.errors import ConfigError, FlowADError, require
from flowad_fast.serve.client import Client
from flowad_fast.serve.settings import ServeSettings, from_bundles, is_settings, read_settings

TEMPLATE = """\
# A server, for flowad-serve. Check it: flowad-serve check serve.yaml. Run it: flowad-serve serve.yaml.
# Paths are relative to the folder in which the command runs, and the same on every machine. Seconds everywhere.

# Models by the name that requests call them.
models:
  part:
    bundle: BUNDLE
    # replicas: 1           # or {min: 1, max: 4}: as many as the requests in flight need
    # cpus: 1               # share of a machine's cores for each replica
    # gpus: 0               # GPUs for each; 0.5: two share one
    # engine: auto          # one of the bundle's engines
    # device: auto          # auto, cpu, cuda
    # largest_batch: 4      # frames in one call of the detector, and in one request
    # wait: 0.002           # how long a replica with nothing to do waits for more frames
    # queue: 64             # requests that may wait for a replica; one more is refused

# front:                    # where clients ask; see docs/serving-protocol.md
#   host: 127.0.0.1         # others than this computer need a token
#   token: {file: serve-token}

# ray:
#   address: null           # of a running cluster, such as 10.0.0.5:6379; null: one on this computer
#   name: flowad            # of this server on the cluster

# limits:
#   call: 10                # one call of a detector; beyond it the replica is replaced
#   start: 120              # starting a model's replicas
#   canary: 10              # between two judgements of the canary frame
#   drain: 8                # from the wish to stop until what is being judged is given up
"""
ADDRESS = "http://127.0.0.1:8000"


class _Group(TyperGroup):
    """`flowad-serve BUNDLE…` is `flowad-serve run BUNDLE…`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click."""
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Group, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown", no_args_is_help=True
)
Json = Annotated[bool, typer.Option("--json", help="Result as JSON on standard output.")]
Server = Annotated[str, typer.Option(help="Address of the running server.")]
Token = Annotated[Path | None, typer.Option(help="File with the server's token.")]
What = Annotated[list[Path], typer.Argument(help="Bundle folders, or one settings file (YAML).")]


@app.command()
@common.interruptible
def run(
    what: What,
    local: Annotated[bool, typer.Option("--local", help="One process on this computer, without Ray.")] = False,
    address: Annotated[
        str | None, typer.Option(help="Of a running Ray cluster. [default: one for this server, on this computer]")
    ] = None,
) -> None:
    """Serve bundles until SIGTERM or Ctrl-C, when what is being judged is finished within a limit.

    Clients speak the Open Inference Protocol over HTTP and gRPC. Every request has one outcome: an answer in time, or a
    named reason why there is none. Exit codes: 0 it was asked to end, 1 it could not start or go on.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    settings = _settings(what, address)
    if local and address is not None:
        raise ConfigError("got --local and --address, expected one of them")
    require("serve", "starlette", "uvicorn", "grpc", "tritonclient", by="flowad-serve")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the front takes it over
    if local:
        from flowad_fast.serve.running import run_local

        run_local(settings, common.note)
        return
    require("ray", "ray", by="flowad-serve without --local")
    from flowad_fast.serve.running import run_ray

    run_ray(settings, common.note)


@app.command()
@common.interruptible
def init(
    settings: Annotated[Path, typer.Argument(help="Settings file (YAML).")] = Path("serve.yaml"),
    bundle: Annotated[str, typer.Option(help="Bundle folder to write into it.")] = "bundles/part",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a settings file with comments, to be changed by hand."""
    common.write_settings(settings, TEMPLATE.replace("BUNDLE", json.dumps(bundle)), "flowad-serve", force)


@app.command()
@common.interruptible
def check(what: What, as_json: Json = False) -> None:
    """Verify the bundles and start their engines here, with the canary frame, one after the other; no port is taken.

    Exit codes: 0 all is well, 1 something failed.
    """
    found = [*_checks(_settings(what, None))]
    if as_json:
        common.print_json([{"what": name, "ok": ok, "text": text} for name, ok, text in found])
    else:
        for name, ok, text in found:
            common.say(f"{'ok    ' if ok else 'FAILED'}  {name}: {text}")
    if not all(ok for _, ok, _ in found):
        raise typer.Exit(common.EXIT_ERROR)


@app.command()
@common.interruptible
def status(server: Server = ADDRESS, token: Token = None, as_json: Json = False) -> None:
    """What a running server serves, with how many replicas, and what became of its requests."""
    found = _client(server, token).status()
    if as_json:
        common.print_json(found)
        return
    for one in found["models"]:
        common.say(_told(one))
    if (update := found["update"])["state"] != "idle":
        common.say(f"update: {update['state']}, {update['bundle']}: {update['text']}")


@app.command()
@common.interruptible
def update(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, on the server beside the one that runs.")],
    server: Server = ADDRESS,
    token: Token = None,
) -> None:
    """Have a running server judge with another bundle, without a lost request.

    Its replicas start beside the old ones and must pass the canary; then every new request is theirs, and the old ones
    end when they have answered what they have. Ctrl-C here ends the waiting, not the update. Exit codes: 0 it judges,
    1 it was refused and nothing changed.
    """
    client = _client(server, token)
    common.say(client.update(model, str(bundle), lambda text: common.note(f"{model}: {text}")))


def _settings(what: list[Path], address: str | None) -> ServeSettings:
    if any(is_settings(path) for path in what):
        if len(what) > 1:
            raise ConfigError("got a settings file beside others, expected bundles or one settings file")
        settings = read_settings(what[0])
    else:
        settings = parse(ServeSettings, {"models": from_bundles(what)}, "the bundles")
    if address is None:
        return settings
    return settings.model_copy(update={"ray": settings.ray.model_copy(update={"address": address})})


def _client(server: str, token: Path | None) -> Client:
    from flowad_fast.line.sinks.base import Secret

    return Client(server, None if token is None else Secret(file=token).read())


def _checks(settings: ServeSettings) -> Iterator[tuple[str, bool, str]]:
    from flowad_fast.serve.running import front_text, tried

    for name, model in settings.models.items():
        yield _tried(f"model {name}", partial(tried, name, model, settings.limits))
    yield _tried("front", partial(front_text, settings.front))


def _tried(what: str, call: Callable[[], str]) -> tuple[str, bool, str]:
    try:
        return what, True, call()
    except (FlowADError, OSError, ValueError) as error:
        return what, False, str(error)


def _told(one: dict[str, Any]) -> str:
    text = f"{one['model']}: {one['version']} on {one['engine']}"
    if "replicas" in one:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(one["outcomes"].items())) or "none yet"
        text += f"; {one['replicas']} of {one['wanted']} replicas; {counts}, {one['going']} on their way"
        text += f", {one['retries']} given to another replica" if one["retries"] else ""
    return text + (f"; {one['trouble']}" if one["trouble"] else "")


def main() -> None:
    """The console script."""
    common.run(app)


if __name__ == "__main__":
    main()
