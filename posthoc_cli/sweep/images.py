"""Images that trials leave in their folders, kept in the folder of the sweep."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from posthoc_cli import files
from posthoc_cli.resources import format_bytes
from posthoc_cli.snapshots.opened_file import read_small_file

log = logging.getLogger(__name__)

FOLDER = "images"  # in the folder of a sweep: a folder for each trial
MOST = 16  # images kept of a trial
MOST_BYTES = 2_000_000  # of one image: a page with 16 of a dozen lengths can still be opened
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif")
_BEGINNINGS = {
    b"\x89PNG": "png",
    b"\xff\xd8\xff": "jpeg",
    b"RIFF": "webp",
    b"GIF8": "gif",
}
"""The media type of an image by its first bytes."""


def image_type(content: bytes) -> str | None:
    """Find the media type of an image, or None for other content."""
    for beginning, name in _BEGINNINGS.items():
        if content.startswith(beginning):
            return f"image/{name}"
    return None


def keep_images(folder: Path, kept: Path) -> None:
    """Move the newest MOST images of a trial from its folder to `kept`, which is made anew, each
    under its path.

    Files that are not images, or are larger than MOST_BYTES, are left, with a warning.
    """
    remove(kept)
    paths = sorted(_images(folder), key=lambda path: path.stat().st_mtime_ns)
    for path in paths[-MOST:]:
        moved = kept / path.relative_to(folder)
        files.make_directory(moved.parent)
        path.rename(moved)


def list_images(kept: Path) -> list[Path]:
    """List the images of a trial, by name."""
    return sorted(path for path in kept.rglob("*") if path.is_file())


def _images(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if name.suffix.lower() not in ENDINGS or path.is_symlink() or not path.is_file():
            continue
        size = path.stat().st_size
        if size > MOST_BYTES:
            most = format_bytes(MOST_BYTES)
            log.warning("%s: %s, too large to be kept: at most %s", name, format_bytes(size), most)
        elif image_type(read_small_file(path, MOST_BYTES)) is None:
            log.warning("%s: not kept, since it is not a PNG, JPEG, WebP or GIF image", name)
        else:
            yield path


def remove(path: Path) -> None:
    """Remove a file, or a folder with its contents, if it exists; raise a WriteError if that
    fails."""
    with files.raise_write_errors(path, "removed"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            files.unlink_if_exists(path)
