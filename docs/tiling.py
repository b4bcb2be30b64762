"""Makes the picture and the figures of docs/tiling.md: `python docs/tiling.py [FOLDER]`, by default build/tiling.

Large frames are put together of real solar cells (ELPV): six cells in a rack, with a printed label that is different on
every frame. A model is trained on tiles of good frames, exported, calibrated, and shown frames with one defective cell.
Everything is made once in FOLDER, some ten minutes on one core; what is there is taken as it is.
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

from flowad_fast import load, load_checkpoint
from flowad_fast.config import Tiling
from flowad_fast.data.images import read_frame
from flowad_fast.data.layouts import read_dataset
from flowad_fast.data.samples import Sample
from flowad_fast.detector import Detection, Detector
from flowad_fast.evaluation.overlay import contours, heat_range, overlay
from flowad_fast.export.exporter import export_bundle
from flowad_fast.export.frames import good_parts, parity_frames
from flowad_fast.masks import draw_mask
from flowad_fast.stages.scorers import Mismatch
from flowad_fast.training.config import TrainConfig
from flowad_fast.training.loop import CHECKPOINT, train

ROOT = Path(__file__).resolve().parents[1]
CELL, ROWS, COLUMNS, EDGE = 300, 2, 3, 30
HEIGHT, WIDTH = ROWS * CELL + 2 * EDGE, COLUMNS * CELL + 2 * EDGE
ROI = (EDGE, EDGE, COLUMNS * CELL, ROWS * CELL)
LABEL = (EDGE + 20, EDGE + 12, 130, 36)
"""Left, top, width, height of the printed label."""
GOOD, CALIBRATION, TEST = 68, 40, 40
ALPHA = 0.05


def rack(cells: list[NDArray[np.uint8]], random: np.random.RandomState) -> NDArray[np.uint8]:
    """A frame (HEIGHT, WIDTH, 3) with six cells (300, 300, 3)."""
    frame = np.full((HEIGHT, WIDTH, 3), 70, np.uint8)
    for i, cell in enumerate(cells):
        top, left = EDGE + CELL * (i // COLUMNS), EDGE + CELL * (i % COLUMNS)
        frame[top : top + CELL, left : left + CELL] = cell
    left, top, width, height = LABEL
    bars = np.repeat(random.randint(0, 2, width // 3 + 1) * 200 + 30, 3)[:width]
    frame[top : top + height, left : left + width] = bars[None, :, None]
    return frame


def write_data(root: Path) -> None:
    """Good frames to train and calibrate on, and test frames; a defective one's name says which cell it is."""
    random = np.random.RandomState(0)
    samples = read_dataset("elpv", None).samples

    def drawn(split: str, label: int, count: int) -> list[Sample]:
        own = [one for one in samples if one.split == split and one.label == label]
        return [own[i] for i in random.choice(len(own), count, replace=False)]

    for folder, split, frames in (
        ("training/rack/train/good", "train", GOOD),
        ("calibration", "calibration", CALIBRATION),
        ("training/rack/test/good", "test", TEST // 2),
        ("defective", "test", TEST // 2),
    ):
        place = root / folder
        place.mkdir(parents=True)
        bad = drawn("test", 1, frames) if folder == "defective" else []
        for i in range(frames):
            cells = drawn(split, 0, ROWS * COLUMNS)
            name = f"{i:03d}"
            if bad:
                at = i % len(cells)
                cells[at], name = bad[i], f"{i:03d}-cell{at}"
            Image.fromarray(rack([read_frame(cell.path) for cell in cells], random)).save(place / f"{name}.png")
    mask = np.zeros((HEIGHT, WIDTH), bool)
    left, top, width, height = LABEL
    mask[top : top + height, left : left + width] = True
    Image.fromarray(mask).save(root / "mask.png")


def make(folder: Path) -> Path:
    """The data, the checkpoint and the bundle in `folder`, each unless it is there; returns the bundle."""
    data, run, bundle = folder / "data", folder / "run", folder / "bundle"
    if not (data / "mask.png").is_file():
        write_data(data)
    config = TrainConfig(
        layout="mvtec", root=data / "training", backbone="efficientnet-lite0", hidden_size=256, depth=4, num_heads=4,
        batch_size=8, steps=1600, warmup_steps=100, lr=4e-4, min_lr=4e-6, weight_decay=0.01, ema_decay=0.999,
        feature_cache=folder, tiles=0.25, roi=ROI, mask=data / "mask.png",
    )  # fmt: skip
    if not (run / CHECKPOINT).is_file():
        train(config, run)
    if not bundle.is_dir():
        result = export_bundle(
            load_checkpoint(run / CHECKPOINT), Mismatch(), bundle, formats=("onnx",), frame_size=(HEIGHT, WIDTH),
            frames=parity_frames(data / "calibration"), tiling=Tiling(overlap=0.25, roi=ROI),
            mask=draw_mask(data / "mask.png"), good=good_parts(data / "calibration"), alpha=ALPHA, device="cpu",
        )  # fmt: skip
        assert result.ok, result.status
    return bundle


def cell_of(detection: Detection) -> int | None:
    """The cell that the middle of the gravest region lies on."""
    if not detection.regions[0]:
        return None
    left, top, right, bottom = detection.regions[0][0].box
    return (top + bottom - 2 * EDGE) // (2 * CELL) * COLUMNS + (left + right - 2 * EDGE) // (2 * CELL)


def judge(detector: Detector, paths: list[Path]) -> list[Detection]:
    """What a detector says of each frame."""
    return [detector(read_frame(path)) for path in paths]


def draw(detector: Detector, frame: NDArray[np.uint8], detection: Detection, path: Path) -> None:
    """The frame with what is judged, its tiles, the blended map, and the region."""
    assert detector.tiler is not None and detector.calibration is not None
    grid, limits = detector.tiler.grid(HEIGHT, WIDTH), detector.calibration.classes[""]
    figure = Figure(figsize=(11, 7.8), layout="constrained")
    axes: list[Axes] = list(np.ravel(figure.subplots(2, 2)))
    for one, picture in zip(axes[:2], (frame, frame // 2 + 60), strict=True):
        one.imshow(picture)
    left, top, width, height = ROI
    axes[0].add_patch(Rectangle((left, top), width, height, fill=False, color="#2a9d8f", linewidth=2))
    left, top, width, height = LABEL
    axes[0].add_patch(Rectangle((left, top), width, height, color="#e76f51", alpha=0.6))
    axes[0].set_title(f"frame {WIDTH}x{HEIGHT}: region of interest and mask")
    colours = ("#e76f51", "#2a9d8f", "#f4d35e", "#5a7dd6")
    for i, (row, column) in enumerate(grid.chosen):
        left, top, right, bottom = grid.tile_box(i)
        colour, inset = colours[2 * (row % 2) + column % 2], 4 * (row % 2) + 2 * (column % 2)
        corner, size = (left + inset, top + inset), right - left - 2 * inset
        axes[1].add_patch(Rectangle(corner, size, size, fill=False, color=colour, linewidth=1.6))
    axes[1].set_title(f"{len(grid)} tiles of 256x256, a quarter in common")
    low, high = heat_range(detection.map[0][detection.judged], limits.threshold)
    axes[2].imshow(overlay(frame, detection.map[0], low, high))
    axes[2].set_title(f"blended map: score {detection.score[0]:.0f}, threshold {limits.threshold:.0f}")
    axes[3].imshow(contours(frame, detection.regions[0]))
    for region in detection.regions[0]:
        left, top, right, bottom = region.box
        axes[3].add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color="#f4d35e"))
    axes[3].set_title(f"verdict: {detection.verdict[0]}, regions: {len(detection.regions[0])}")
    for one in axes:
        one.set_axis_off()
    figure.savefig(path, dpi=80, pil_kwargs={"quality": 85})


def main(folder: Path, picture: Path) -> None:
    """Make everything, print the figures, draw the picture."""
    bundle = make(folder)
    detector, data = load(bundle, device="cpu"), folder / "data"
    good, bad = sorted((data / "training/rack/test/good").iterdir()), sorted((data / "defective").iterdir())
    of_good, of_bad = judge(detector, good), judge(detector, bad)
    found = [i for i, one in enumerate(of_bad) if one.verdict[0] == "anomalous"]
    right = [i for i in found if cell_of(of_bad[i]) == int(bad[i].stem[-1])]
    rejected = sum(one.verdict[0] == "anomalous" for one in of_good)
    scores = np.array([[one.score[0] for one in of_bad]]) - np.array([[one.score[0] for one in of_good]]).T
    print(f"good frames rejected: {rejected} of {len(good)}")
    print(
        f"frames with a defective cell found: {len(found)} of {len(bad)}, strongest region on that cell: {len(right)}"
    )
    print(f"AUROC of the frames' scores: {(scores > 0).mean():.3f}")
    middle = sorted(right, key=lambda i: of_bad[i].score[0])[len(right) // 2]
    draw(detector, read_frame(bad[middle]), of_bad[middle], picture)
    print(f"drawn: {picture}, of {bad[middle].name}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "build" / "tiling")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "tiling.jpg")
    given = parser.parse_args()
    main(given.folder, given.picture)
