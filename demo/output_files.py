"""Names of the files that the demo writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from asag.inference.media import VIDEO_SUFFIXES, MediaFile

CAMERA_FILE = "webcam.mp4"


def plan_outputs(
    files: Sequence[MediaFile], draw_to: Path | None, camera: bool
) -> list[Path | None]:
    """Chooses the output of each input, without overwriting an input or another output.

    Args:
        files: the inputs.
        draw_to: a folder, or a video file; None: nothing is drawn.
        camera: True if a camera is recorded as well.

    Returns:
        A path for each input; None: it is not drawn.

    Raises:
        ValueError: the inputs do not fit into one video, or an input would be overwritten.
    """
    if draw_to is None:
        return [None] * len(files)
    if is_video_name(draw_to):
        if len(files) + camera > 1 or any(not file.is_video for file in files):
            raise ValueError(
                f"--output {draw_to} is a video file, which takes exactly one video or camera as "
                "input; give a folder instead"
            )
        targets = [draw_to] * len(files)
    else:
        taken = {draw_to / CAMERA_FILE} if camera else set()
        targets = [free_name(draw_to, file, taken) for file in files]
    sources = {file.path.resolve() for file in files}
    for target in targets:
        if target.resolve() in sources:
            raise ValueError(f"--output would overwrite the input {target}; choose another folder")
    return targets


def free_name(folder: Path, file: MediaFile, taken: set[Path]) -> Path:
    """Returns a name that is not taken yet, in a format that needs no further library."""
    suffix = file.path.suffix.lower()
    if file.is_video:
        suffix = ".avi" if suffix == ".avi" else ".mp4"
    else:
        suffix = ".jpg" if suffix in (".jpg", ".jpeg") else ".png"
    target, number = folder / file.relative.with_suffix(suffix), 2
    while target in taken:
        target = folder / file.relative.with_name(f"{file.relative.stem}_{number}{suffix}")
        number += 1
    taken.add(target)
    return target


def is_video_name(path: Path) -> bool:
    """Returns True if the path names a video file and not a folder."""
    return path.suffix.lower() in VIDEO_SUFFIXES and not path.is_dir()
