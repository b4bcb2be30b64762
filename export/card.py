"""The model card of a bundle: its manifest in Markdown, for people."""

from pathlib import Path

from flowad_fast.bundle import Artefact, Manifest
from flowad_fast.export.location import in_words
from flowad_fast.files import replacing
from flowad_fast.stages.aggregates import AGGREGATES
from flowad_fast.stages.tiling import in_words as tiles_in_words

CARD = "README.md"


def write_card(folder: Path, manifest: Manifest, heading: str = "") -> None:
    """Write or replace the card of the bundle in `folder`, with `heading` above it."""
    with replacing(folder / CARD) as file:
        file.write((heading + model_card(manifest)).encode())


def _certificate(artefact: Artefact) -> tuple[str, ...]:
    p = artefact.parity
    if p is None:
        return f"not measured: {artefact.unmeasured or 'no reason given'}".replace("|", "/"), "", "", "", ""
    return (
        f"{'passed' if p.passed else 'FAILED'} on {p.device}, {p.frames} frames ({p.source.replace('|', '/')})",
        f"{p.max_error:.1e} (tolerance {p.tolerance:.0e})",
        f"{p.rms_error:.1e} (tolerance {p.rms_tolerance:.0e})",
        "not measured" if p.spearman is None else f"{p.spearman:.4f}",
        "not measured" if p.auroc_difference is None else f"{p.auroc_difference:+.4f}",
    )


def model_card(manifest: Manifest) -> str:
    """Markdown that says what the bundle computes, what was checked, and how it is used."""
    v, image = manifest.model.velocity, manifest.model.image.size
    side = (v.height, v.width) if AGGREGATES[manifest.aggregate].of_cells else (image, image)
    names = ", ".join(manifest.model.class_names) if v.use_class_labels else "none (unconditional)"
    size = "any (resized as in training)" if manifest.frame_size is None else "x".join(map(str, manifest.frame_size))
    tiles = "none, whole frames" if manifest.tiling is None else tiles_in_words(manifest.tiling)
    if manifest.tiling is not None:
        score = f"{manifest.aggregate} of the map that is blended of all tiles"
        size = "any that is as large as a tile" if manifest.frame_size is None else size
    else:
        score = f"{manifest.aggregate} of the {side[0]}x{side[1]} map"
    lines = [
        "# Anomaly detector bundle",
        "",
        f"Written by flowad-fast {manifest.project_version} on {manifest.created}.",
        "",
        "| | |",
        "| --- | --- |",
        f"| scorer | `{manifest.scorer!r}` |",
        f"| image score | {score} |",
        f"| frames | uint8 RGB, height x width: {size} |",
        f"| tiles | {tiles}{', with a fixed mask' if manifest.mask else ''} |",
        f"| backbone | {manifest.model.backbone} |",
        f"| velocity field | DiT {v.hidden_size} wide, {v.depth} deep, {v.num_heads} heads, predicts {v.pred_type} |",
        f"| classes | {names} |",
        f"| source | {manifest.source.get('file', 'unnamed')}, SHA-256 {manifest.source.get('sha256', 'unknown')} |",
        "",
        "## Parity with the fp32 reference",
        "",
        "Errors are relative to the standard deviation of the reference map.",
        "",
        "| format | engine | precision | verdict | max error | RMS error | rank correlation | AUROC difference |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, a in manifest.artefacts.items():
        lines.append(f"| {name} | {a.engine} | {a.precision} | {' | '.join(_certificate(a))} |")
    notes = [f"- {name}: {a.details['note']}." for name, a in manifest.artefacts.items() if "note" in a.details]
    if notes:
        lines += ["", *notes]
    if manifest.location is not None:
        lines += ["", "## Location statistics", "", *(f"- {line.strip()}" for line in in_words(manifest.location))]
    if manifest.model.student is not None:
        lines += ["", "## Student", "", *(f"- {line}" for line in manifest.model.student.lines())]
    lines += ["", "## Calibration", ""]
    if manifest.calibration is None:
        lines.append("None: scores are available, verdicts are not. `flowad-export calibrate BUNDLE GOOD_FOLDER`.")
    else:
        lines += [
            f"Accepted false-reject rate: {manifest.calibration.alpha:g}.",
            "",
            "| class | threshold | good parts | pixel threshold of regions |",
        ]
        lines.append("| --- | --- | --- | --- |")
        for name, c in manifest.calibration.classes.items():
            pixels = "none" if c.pixels is None else f"{c.pixels.threshold:.6g}"
            lines.append(f"| {name or 'all'} | {c.threshold:.6g} | {c.parts} | {pixels} |")
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "import flowad_fast",
        'detector = flowad_fast.load("this-folder")',
        "detection = detector(frames)  # uint8 (B, H, W, 3)",
        "detection.score, detection.map, detection.verdict",
        "```",
        "",
    ]
    return "\n".join(lines)
