"""Which files of a folder are photos: one walk for everything that reads folders.

Linked folders are entered, each real folder once, so that a loop of links ends. What other programs leave beside photos
(hidden files, companions of macOS, thumbnails of network disks, Jupyter's copies) is no data. Whatever else is no
photo is counted, and what cannot be looked at is named: nothing is passed over without a word.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from flowad_fast.errors import FrameError

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".pgm", ".ppm", ".pnm",
    ".pbm", ".gif", ".jp2", ".j2k", ".pcx", ".sgi", ".avif",
)  # fmt: skip
"""Names of photos, in any letter case; `images.read_frame` reads or refuses each by its contents."""
UNREADABLE = (".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw", ".exr", ".hdr")
"""Names of photos in formats that are not read: they get their error, too, instead of being passed over."""
NO_DATA = frozenset(
    name.casefold() for name in (
        "@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found", "Thumbs.db",
        "desktop.ini", "Icon\r",
    )
)  # fmt: skip
"""What operating systems and network disks leave in folders; names that begin with a dot belong to it as well."""


@dataclass(frozen=True)
class Photos:
    """What a walk found.

    Attributes:
        paths: photos, sorted by path; also those that cannot be read, such as links that lead nowhere.
        problems: folders that could not be looked into, and why.
        others: files that are no photos, counted by suffix ("" for names without one).
    """

    paths: tuple[Path, ...]
    problems: tuple[tuple[Path, str], ...] = ()
    others: Counter[str] = field(default_factory=Counter)

    def left_out(self) -> str:
        """One line about the files that are no photos, "" where there are none."""
        return left_out(self.others)


def left_out(others: Counter[str]) -> str:
    """One line about files that were left out, counted by suffix; "" where there are none."""
    count = others.total()
    if not count:
        return ""
    shown = ", ".join(suffix or "no suffix" for suffix, _ in others.most_common(5))
    more = ", ..." if len(others) > 5 else ""
    return f"{count} {'file' if count == 1 else 'files'} with other suffixes left out ({shown}{more})"


def is_data(name: str) -> bool:
    """Whether a file or folder of this name may belong to a data set."""
    return not name.startswith(".") and name.casefold() not in NO_DATA


def is_photo(path: Path) -> bool:
    """Whether a file of this name is a photo, readable or not."""
    return path.suffix.lower() in SUFFIXES or path.suffix.lower() in UNREADABLE


def find_photos(folder: Path, deep: bool = True) -> Photos:
    """The photos under `folder`, at any depth, or of the folder alone.

    Raises:
        FrameError: `folder` is no folder, or cannot be looked into.
    """
    if not _is_folder(folder):
        raise FrameError(f"{folder}: no such folder; give a folder with image files")
    found: list[Path] = []
    problems: list[tuple[Path, str]] = []
    others: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()

    root, waiting = folder.resolve(), [folder]
    while waiting:
        place = waiting.pop()
        try:
            status = place.stat()
            entries = list(place.iterdir())
        except OSError as error:
            if place == folder:
                raise FrameError(f"{folder}: cannot be looked into ({error.strerror}); check its permissions") from None
            problems.append((place, f"the folder cannot be looked into ({error.strerror}); check its permissions"))
            continue
        if status.st_ino and (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            if not is_data(entry.name):
                continue
            if _is_folder(entry):
                loop = entry.is_symlink() and root.is_relative_to(entry.resolve())  # a way back up is no content
                waiting += [entry] if deep and not loop else []
            elif is_photo(entry):
                found.append(entry)
            else:
                others[entry.suffix.lower()] += 1
    return Photos(tuple(sorted(found)), tuple(sorted(problems)), others)


def folders(place: Path) -> Iterator[Path]:
    """The folders in `place` that may belong to a data set, by name."""
    return (entry for entry in sorted(place.iterdir()) if is_data(entry.name) and _is_folder(entry))


def _is_folder(path: Path) -> bool:
    try:
        return os.path.isdir(path)
    except (OSError, ValueError):
        return False
