"""Finding pictures and videos, and reading and writing video frame by frame.

H, W frame size. Frames are (H, W, 3) uint8 RGB; the color order of OpenCV stays in this file.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np

# fmt: off
IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jp2", ".png", ".bmp", ".dib", ".gif", ".tif",
     ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm", ".tga")
)
# fmt: on
VIDEO_SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ts")
)
DEFAULT_FPS = 25.0
MAX_PLAUSIBLE_FPS = 1000.0


@dataclass(frozen=True)
class MediaFile:
    """A picture or a video.

    Attributes:
        path: where it lies.
        relative: its place below the folder it was found in; the mere name of single files.
    """

    path: Path
    relative: Path

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES


def find_media(
    inputs: Sequence[str], exclude: Path | None = None
) -> tuple[list[MediaFile], list[str]]:
    """Pictures and videos of files, folders and patterns.

    Folders are searched with all their subfolders for known suffixes. A file named directly is
    taken whatever its suffix. `*`, `?`, `[...]` and `**` form patterns where no file has that name.

    Args:
        inputs: paths and patterns.
        exclude: a folder of earlier results, passed over where it lies below a searched one.

    Returns:
        The files, each once, in the order of the inputs, folders sorted with 2 before 10; and a
        sentence for every input that leads to nothing.
    """
    found: dict[Path, MediaFile] = {}
    issues: list[str] = []
    excluded = exclude.resolve() if exclude else None
    for text in inputs:
        path = Path(text).expanduser()
        if path.is_dir():
            files = _search(path, excluded)
            problem = "no pictures or videos in it"
        elif path.exists():
            files, problem = [MediaFile(path, Path(path.name))], ""
        elif glob.has_magic(text):
            files = _expand(str(path))
            problem = "no file fits the pattern"
        else:
            files, problem = [], "no such file or folder"
        if not files:
            issues.append(f"{text}: {problem}")
        for file in files:
            found.setdefault(file.path.resolve(), file)
    return list(found.values()), issues


def _search(folder: Path, excluded: Path | None) -> list[MediaFile]:
    known = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    if excluded is not None and folder.resolve() not in excluded.parents:
        excluded = None
    files = [
        MediaFile(path, path.relative_to(folder))
        for path in folder.rglob("*")
        if path.suffix.lower() in known
        and path.is_file()
        and excluded not in path.resolve().parents
    ]
    return sorted(files, key=lambda file: _natural(str(file.relative)))


def _expand(pattern: str) -> list[MediaFile]:
    paths = map(Path, sorted(glob.glob(pattern, recursive=True), key=_natural))
    return [MediaFile(path, Path(path.name)) for path in paths if path.is_file()]


def _natural(text: str) -> list[tuple[int, int | str]]:
    """Sort key under which frame2 comes before frame10."""
    return [(0, int(x)) if x.isdigit() else (1, x) for x in re.split(r"([0-9]+)", text.lower())]


class VideoReadError(OSError):
    """A video or camera that cannot be opened."""


class VideoWriteError(OSError):
    """A video file that cannot be written."""


class VideoReader:
    """Frames of a video file or a camera, to be used in a `with` block.

    Attributes:
        fps: frames a second; 25 where the source does not say.
        num_frames: as the file states it; 0 where unknown.
    """

    def __init__(self, source: Path | int) -> None:
        """
        Args:
            source: a file, or the number of a camera.

        Raises:
            VideoReadError: it cannot be opened.
        """
        self.source = source
        self._capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
        if not self._capture.isOpened():
            self._capture.release()
            kind = f"camera {source}" if isinstance(source, int) else f"video {source}"
            raise VideoReadError(f"cannot open {kind}: absent, in use, or in an unknown format")
        fps = float(self._capture.get(cv2.CAP_PROP_FPS))
        self.fps = fps if 0 < fps <= MAX_PLAUSIBLE_FPS else DEFAULT_FPS
        self.num_frames = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def __iter__(self) -> Iterator[np.ndarray]:
        """Frames until the source ends or stops to be readable."""
        while True:
            readable, frame_bgr = self._capture.read()
            if not readable:
                return
            yield cv2.cvtColor(frame_bgr, cv2.COLOR_BGR2RGB)

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._capture.release()


class VideoWriter:
    """Writes frames of one size into a video file, to be used in a `with` block.

    The suffix chooses the format: Motion JPEG for .avi, MPEG-4 otherwise; both come with OpenCV.
    The first frame sets the size, an odd last row or column is cut off as the formats demand.
    """

    def __init__(self, path: Path, fps: float) -> None:
        """
        Args:
            path: file to write; missing parent folders are made with the first frame.
            fps: frames a second.
        """
        self.path = path
        self.fps = fps
        self._writer: cv2.VideoWriter | None = None
        self._size_wh = (0, 0)

    def write(self, frame_rgb: np.ndarray) -> None:
        """Appends a frame.

        Raises:
            VideoWriteError: the file cannot be written, or the frame's size is not the first's.
        """
        height, width = (side // 2 * 2 for side in frame_rgb.shape[:2])
        if self._writer is None:
            self._writer, self._size_wh = self._open((width, height)), (width, height)
        if self._size_wh != (width, height):  # OpenCV would drop it without a word
            raise VideoWriteError(
                f"cannot write video {self.path}: frames change from {self._size_wh} to "
                f"{(width, height)} pixels"
            )
        self._writer.write(cv2.cvtColor(frame_rgb[:height, :width], cv2.COLOR_RGB2BGR))

    def _open(self, size_wh: tuple[int, int]) -> cv2.VideoWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        codec = "MJPG" if self.path.suffix.lower() == ".avi" else "mp4v"
        writer = cv2.VideoWriter(str(self.path), cv2.VideoWriter_fourcc(*codec), self.fps, size_wh)
        if not writer.isOpened():
            raise VideoWriteError(
                f"cannot write video {self.path}: take a name that ends in .mp4 or .avi"
            )
        return writer

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.release()
