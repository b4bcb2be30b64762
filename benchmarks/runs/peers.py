"""Other methods that people choose between, on the same photos and clock as ours: accuracy and time per frame.

    python -m venv peers
    peers/bin/pip install anomalib -c constraints.txt && peers/bin/pip install -e ".[demo]" -c constraints.txt
    peers/bin/python -m flowad_fast.benchmarks.runs.peers --cache CACHE --output benchmarks/results/peers-cpu.json

An environment of its own, since anomalib brings many packages. Every peer is trained on the good parts of a product
(the demo's solar cells, ELPV) within a stated budget of one thread, and ranks the same test cells; then every method is
timed in turns with one of ours. What was trained and judged is kept in the cache: a run that was ended goes on there.
"""

import logging
import os
import signal
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from flowad_fast.benchmarks.demo import judging
from flowad_fast.benchmarks.measure.worker import WorkerError
from flowad_fast.benchmarks.options import words
from flowad_fast.benchmarks.record import peers as found_as
from flowad_fast.benchmarks.record import record as records
from flowad_fast.benchmarks.record.peers import PeersRecord
from flowad_fast.benchmarks.runs import peers_judging, peers_models
from flowad_fast.benchmarks.runs.peers_judging import Run, Tell
from flowad_fast.benchmarks.runs.peers_models import PEERS, Peer
from flowad_fast.benchmarks.runs.peers_speed import Job, Timed, timed
from flowad_fast.cli import common
from flowad_fast.data.images import read_frame
from flowad_fast.data.layouts import read_dataset
from flowad_fast.data.samples import Dataset
from flowad_fast.engines.device import torch_device
from flowad_fast.errors import ConfigError, EngineUnavailableError
from flowad_fast.files import make_folder
from flowad_fast.shipped import PHOTOS

PARTS = ("accuracy", "speed")


def time_all(run: Run, methods: Sequence[judging.Method], peers: Sequence[Peer], seconds: float, keep: Tell) -> None:
    """Time every method in turns with the first of ours; rows that were not judged before are made here."""
    jobs = []
    for method in methods:
        run.rows.setdefault(method.name, peers_judging.our_row(run, method))
        jobs.append(Job(method.name, bundle=peers_judging.our_bundle(method, run.cache, run.tell)))
    for peer in peers:
        row = run.rows.setdefault(peer.name, peers_judging.peer_row(run, peer))
        weights = None
        if peer.weights != "random":
            if row.accuracy_reason and not row.accuracy:
                continue  # it could not be trained, and says why
            weights = peers_judging.trained(run, peer, run.products[0])[0]
        jobs.append(Job(peer.name, trained=weights, download=run.download))
    samples = run.shown()
    frames = np.stack([read_frame(sample.path) for sample in samples])

    def kept(name: str, found: Timed) -> None:
        row = run.rows[name]
        run.rows[name] = row.but(
            status=found.status, reason=found.reason, measured=found.measured, anchor=found.anchor
        )  # fmt: skip
        keep(name)

    labels = [sample.category for sample in samples]
    timed(jobs[1:], jobs[0], frames, labels, run.threads, run.device, seconds, run.tell, kept)


def peers(
    cache: Annotated[Path, typer.Option(help="Keeps what was trained and judged; a run goes on there.")],
    output: Annotated[Path | None, typer.Option(help="Write the record (JSON) here.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Write the figure (PNG) into this folder.")] = None,
    methods: Annotated[str, typer.Option(help="Peers, comma-separated; empty for none.")] = ",".join(PEERS),
    products: Annotated[str, typer.Option(help="Comma-separated: mono, poly.")] = "mono,poly",
    part: Annotated[str, typer.Option(help="What to do, comma-separated: accuracy, speed.")] = ",".join(PARTS),
    budget: Annotated[float, typer.Option(min=1, help="Seconds of training per peer and product.")] = 300.0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads, of training and of every method.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time per row of speeds, in seconds.")] = 15.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "cpu",
    download: Annotated[bool, typer.Option("--download", help="Fetch weights of peers' own backbones.")] = False,
    json: Annotated[bool, typer.Option("--json", help="The record as JSON on standard output.")] = False,
) -> None:
    """Accuracy and time per frame of anomalib's models beside ours, on the demo's solar cells."""
    peers_judging.anomalib()
    wanted = words(part)
    if unknown := [one for one in wanted if one not in PARTS]:
        raise ConfigError(f"--part {', '.join(unknown)}: expected some of {', '.join(PARTS)}")
    chosen = peers_models.chosen(words(methods), download)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that are started
    torch.set_num_threads(threads)
    _quiet()
    make_folder(cache)
    dataset = read_dataset(PHOTOS[judging.CELLS], None)
    ours = peers_judging.our_methods()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: finished rows are kept
    with common.status("peers") as tell:
        where = str(torch_device(device))
        run = Run(dataset, _products(dataset, words(products)), budget, threads, where, download, cache, tell)
        run.anchor = ours[0].name

        def keep(name: str) -> None:
            if output is not None:
                records.write(run.record(), output)

        try:
            if "accuracy" in wanted:
                for peer in chosen:
                    run.rows[peer.name] = peers_judging.judge_peer(run, peer)
                    keep(peer.name)
                for method in ours:
                    run.rows[method.name] = peers_judging.judge_ours(run, method)
                    keep(method.name)
            if "speed" in wanted:
                time_all(run, ours, chosen, seconds, keep)
        except WorkerError as error:
            raise EngineUnavailableError(f"{run.anchor}, which all take turns with: {error.reason}") from None
    _show(run.record(), output, figure, json)


def _products(dataset: Dataset, names: Sequence[str]) -> tuple[str, ...]:
    unknown = [name for name in names if name not in dataset.categories]
    if unknown or not names:
        raise ConfigError(f"--products {', '.join(unknown) or 'is empty'}: expected {', '.join(dataset.categories)}")
    return tuple(names)


def _quiet() -> None:
    """Lightning and anomalib say much that is not asked for."""
    for name in ("lightning", "lightning.pytorch", "anomalib"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.|anomalib\.")


def _show(record: PeersRecord, output: Path | None, figure: Path | None, json: bool) -> None:
    if output is not None:
        records.write(record, output)
    if figure is not None:
        from flowad_fast.benchmarks.record import pareto

        pareto.draw(record, figure)
    if json:
        common.print_json(records.finite(record.dump()))
        return
    common.out.print(found_as.table(record))
    for line in found_as.remarks(record):
        common.say(line)


main = common.command(peers)

if __name__ == "__main__":
    main()
