"""What `flowad-export` says of a bundle: a table of its formats, its calibration, or the same as JSON."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich.table import Table
from rich.text import Text

from flowad_fast.bundle import Manifest
from flowad_fast.cli import common
from flowad_fast.export.exporter import ExportResult
from flowad_fast.export.location import in_words
from flowad_fast.export.tiling import in_words as tiles_in_words
from flowad_fast.export.verify import Outcome
from flowad_fast.masks import read_mask

HASHES_OK = "hashes ok"


def report(result: ExportResult, json: bool, left_out: Sequence[str]) -> None:
    """Print what an export did; exit code 1 unless every format is ok."""
    if json:
        common.print_json(
            {
                "ok": result.ok,
                "published": str(result.path) if result.published else None,
                "rejected": None if result.rejected is None else str(result.rejected),
                "left_out": list(left_out),
                **_facts(result.manifest, result.outcomes),
            }
        )
    else:
        common.out.print(_table(result.manifest, result.outcomes))
        _print_reasons(result.outcomes)
        if result.published:
            common.say(f"bundle: {result.path}")
            print_calibration(result.manifest)
    failed = [name for name, outcome in result.outcomes.items() if not outcome.ok]
    if failed:
        kept = f"; kept as {result.rejected}" if result.rejected else ""
        done = "the others are published" if result.published else "nothing is published"
        common.err.print("[bold red]error:[/] ", end="")
        common.note(f"not ok: {', '.join(failed)}{kept}; {done}")
        raise typer.Exit(common.EXIT_ERROR)


def hashed(folder: Path, manifest: Manifest) -> dict[str, Outcome]:
    """The outcomes of a bundle whose hashes were checked, and no more."""
    return {
        name: Outcome(HASHES_OK, "", artefact, sum((folder / file).stat().st_size for file in artefact.files))
        for name, artefact in manifest.artefacts.items()
    }


def print_bundle(folder: Path, manifest: Manifest, outcomes: dict[str, Outcome], doubt: str, json: bool) -> None:
    """Print what a bundle holds and what became of its formats; `doubt` is what was not checked."""
    if json:
        ok = all(outcome.ok or outcome.status == HASHES_OK for outcome in outcomes.values())
        common.print_json({"ok": ok, "bundle": str(folder), "doubt": doubt, **_facts(manifest, outcomes)})
        return
    common.out.print(_table(manifest, outcomes))
    _print_reasons(outcomes)
    common.say(f"written by flowad-fast {manifest.project_version} on {manifest.created}")
    for line in () if manifest.model.student is None else manifest.model.student.lines():
        common.say(line)
    for line in tiles_in_words(manifest, read_mask(folder, manifest)):
        common.say(line)
    if doubt:
        common.say(doubt)
    print_calibration(manifest)


def _facts(manifest: Manifest, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    formats = {
        name: {
            "status": outcome.status,
            "reason": outcome.reason,
            "bytes": outcome.bytes,
            "artefact": None if outcome.artefact is None else outcome.artefact.model_dump(mode="json"),
        }
        for name, outcome in outcomes.items()
    }
    return {"formats": formats, "manifest": manifest.model_dump(mode="json")}


def _table(manifest: Manifest, outcomes: dict[str, Outcome]) -> Table:
    table = Table(title=common.plain(f"{manifest.scorer!r}, score: {manifest.aggregate}"), title_justify="left")
    for column in ("format", "status", "file", "MB", "build s", "map error", "RMS", "rank corr."):
        table.add_column(column, overflow="fold")
    for name, outcome in outcomes.items():
        style = "green" if outcome.ok or outcome.status == HASHES_OK else "bold red"
        status = Text(common.visible(outcome.status), style)
        artefact = outcome.artefact
        if artefact is None:
            table.add_row(common.plain(name), status)
            continue
        parity = artefact.parity
        table.add_row(
            common.plain(name),
            status,
            common.plain(next(iter(artefact.files))),
            f"{outcome.bytes / 1e6:.1f}",
            "" if artefact.build_seconds is None else f"{artefact.build_seconds:.1f}",
            f"{parity.max_error:.1e}" if parity else "not measured",
            f"{parity.rms_error:.1e}" if parity else "",
            f"{parity.spearman:.4f}" if parity and parity.spearman is not None else "",
        )
    return table


def _print_reasons(outcomes: dict[str, Outcome]) -> None:
    for name, outcome in outcomes.items():
        if outcome.artefact is not None and "note" in outcome.artefact.details:
            common.say(f"{name}: {outcome.artefact.details['note']}")
    for name, outcome in outcomes.items():
        if outcome.reason:
            common.say(f"{name}: {outcome}")


def print_calibration(manifest: Manifest) -> None:
    """Print location statistics, thresholds, and what counts as a region."""
    for line in in_words(manifest.location) if manifest.location else ():
        common.say(line)
    if manifest.calibration is None:
        common.out.print("calibration: none, so no verdicts; flowad-export calibrate BUNDLE GOOD_FOLDER")
        return
    for name, one in manifest.calibration.classes.items():
        common.say(
            f"calibration: {name or 'all'}: threshold {one.threshold:.6g} from {one.parts} good parts, "
            f"false-reject rate at most {manifest.calibration.alpha:g}"
        )
        if one.pixels is None:
            common.say(f"regions: {name or 'all'}: none, no pixel threshold; calibrate again to have them")
        else:
            common.say(
                f"regions: {name or 'all'}: map above {one.pixels.threshold:.6g}, in at most "
                f"{manifest.calibration.alpha:g} of good parts"
            )
    settings = manifest.calibration.regions
    if settings.min_area:
        common.say(f"regions: of at least {settings.min_area:g} pixels")
    for severity in settings.severities:
        limits = [f"{key} {v:g}" for key, v in (("area", severity.area), ("peak", severity.peak)) if v is not None]
        common.say(f"severity: {severity.name}: {' or '.join(limits) or 'all others'}")
