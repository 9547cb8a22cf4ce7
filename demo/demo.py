#!/usr/bin/env python3
"""Detects objects in images, folders, videos or a camera stream; writes drawn images and JSON."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from output_files import CAMERA_FILE, is_video_name, plan_outputs
from PIL import Image

from asag import load_config, model_zoo
from asag.config.loading import find_config
from asag.data.image_io import read_image
from asag.inference.media import (
    MediaFile,
    VideoReader,
    VideoReadError,
    VideoWriter,
    find_media,
)
from asag.inference.predictor import Predictor
from asag.inference.record import DetectionRecord
from asag.visualization.detections import draw_detections

if TYPE_CHECKING:
    from detectron2.structures import Instances

T = TypeVar("T")
U = TypeVar("U")

DEFAULT_MODEL = model_zoo.PHOTOGRAPHS  # comes with the library

EXAMPLES = """\
examples:
  # people and animals in photographs, by the small model that comes with the library
  demo.py photos/

  # all images and videos below a folder, drawn into output/demo
  demo.py --config-file output/run/config.yaml --weights output/run/model_final.pth photos/

  # two images and a pattern, drawn and as JSON
  demo.py --config-file C --weights W a.jpg b.png 'scans/*.tif' --output out --json detections.json

  # a video, on the CPU, with detections of high scores only
  demo.py --config-file C --weights W street.mp4 --output marked.mp4 --device cpu --threshold 0.5

  # ten seconds of the first camera at about 30 frames a second
  demo.py --config-file C --weights W --webcam --max-frames 300 --output me.mp4

  # JSON only, with another input size
  demo.py --config-file C --weights W photos/ --json detections.json --opts INPUT.MIN_SIZE_TEST 640

The JSON file has three lists: "images" (id, file_name, width, height; frame and time in seconds
for videos), "categories" (id, name) and "detections" (image_id, file_name, category_id,
category_name, score, bbox as x, y, width, height in pixels of the upright image).
Category ids count from 0 in the order of the class names.

exit code: 0 if an input was read, 1 if none could be read, 2 for wrong arguments.
"""


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="demo.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="image, video, folder (searched recursively) or glob",
    )
    add("--webcam", nargs="?", type=int, const=0, metavar="N", help="read camera N (default 0)")
    add(
        "--config-file",
        metavar="FILE",
        help="yaml configuration of the model; default: config.yaml beside --weights, or without "
        f"these the model {DEFAULT_MODEL}, which comes with the library",
    )
    add("--weights", metavar="FILE", help="checkpoint; default: MODEL.WEIGHTS of the configuration")
    add(
        "--output",
        type=Path,
        metavar="PATH",
        help="folder for drawn images and videos, or the file for a single video; default "
        "output/demo, or nothing drawn when only --json is given",
    )
    add("--json", type=Path, metavar="FILE", help="write the detections into this file")
    add("--threshold", type=float, default=0.3, help="minimum score of a detection (default 0.3)")
    add("--batch-size", type=int, default=4, help="images of a forward pass (default 4)")
    add("--max-frames", type=int, metavar="N", help="stop videos and the camera after N frames")
    add("--device", help="cuda, cuda:1, cpu, ...; default: MODEL.DEVICE, cpu where there is no GPU")
    add(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="configuration overrides; everything after --opts is read as such",
    )
    return parser


class UsageError(Exception):
    """Invalid arguments; the message says what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    started = time.perf_counter()
    try:
        check_arguments(args)
        draw_to = args.output or (None if args.json else Path("output/demo"))
        files, issues = find_media(args.inputs, exclude=draw_to)
        targets = plan_outputs(files, draw_to, args.webcam is not None)
        run = Run(build_predictor(args), args.max_frames)
    except (UsageError, ValueError, KeyError, OSError) as error:
        return refuse(error)
    for issue in issues:
        run.skip(issue)
    try:
        with suppress(KeyboardInterrupt):  # keep the detections so far
            run.all(files, targets)
            if args.webcam is not None:
                run.detect_camera(args.webcam, draw_to)
        if args.json and run.record.images:
            run.record.write(args.json)
    except OSError as error:
        return refuse(error)
    print(run.summary(time.perf_counter() - started, draw_to, args.json))
    return 0 if run.record.images else 1


def refuse(error: Exception) -> int:
    """Prints an error that the user can fix; returns the exit code."""
    message = error.args[0] if type(error) is KeyError else error  # KeyError's str adds quotes
    print(f"demo.py: {message}", file=sys.stderr)
    return 2


def check_arguments(args: argparse.Namespace) -> None:
    """Checks arguments beyond the rules of argparse.

    Raises:
        UsageError: there is no input, or an argument is out of range.
    """
    if not args.inputs and args.webcam is None:
        raise UsageError("there is no input; name images, videos or folders, or give --webcam")
    if args.max_frames is not None and args.max_frames < 1:
        raise UsageError(f"--max-frames is {args.max_frames}; it must be at least 1")


def build_predictor(args: argparse.Namespace) -> Predictor:
    """Builds the model with its weights on its device.

    Raises:
        UsageError: there are no weights, or no such device.
    """
    if args.config_file:
        cfg = load_config(str(find_config(args.config_file)), args.opts)
    else:
        cfg = model_zoo.locate(args.weights or DEFAULT_MODEL, options=args.opts)
    if args.weights:
        cfg.MODEL.WEIGHTS = args.weights
    if not cfg.MODEL.WEIGHTS:
        raise UsageError(f"{args.config_file} names no MODEL.WEIGHTS; give --weights FILE")
    cfg.MODEL.DEVICE = choose_device(cfg.MODEL.DEVICE, args.device)
    return Predictor.from_config(cfg, batch_size=args.batch_size, score_threshold=args.threshold)


def choose_device(configured: str, requested: str | None) -> str:
    """Returns the requested device, else that of the configuration with the CPU as fallback.

    Raises:
        UsageError: the device does not exist.
    """
    device = requested or configured
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UsageError(f"device {device}: {str(error).splitlines()[0]}") from error
    if kind != "cuda" or torch.cuda.is_available():
        return device
    if requested:
        raise UsageError(f"--device {requested}: PyTorch finds no CUDA device; try --device cpu")
    print("no CUDA device: running on the CPU")
    return "cpu"


@dataclass
class Loaded:
    """An image that was read and resized, or the error that prevented it."""

    file: MediaFile
    target: Path | None
    image_rgb: np.ndarray | None = None
    model_input: dict[str, Any] | None = None
    error: Exception | None = None


class Run:
    """Reads, detects and draws, and counts inputs and detections.

    The next batch is read and resized in threads while the model processes the current one.
    """

    def __init__(self, predictor: Predictor, max_frames: int | None = None) -> None:
        self.predictor = predictor
        self.max_frames = max_frames
        self.record = DetectionRecord(predictor.class_names)
        self.images = self.videos = self.skipped = 0

    def skip(self, message: str) -> None:
        """Reports an input that cannot be read."""
        self.skipped += 1
        print(f"skipped: {message}", file=sys.stderr)

    def all(self, files: Sequence[MediaFile], targets: Sequence[Path | None]) -> None:
        """Processes the images first, in batches across files, then the videos."""
        planned = list(zip(files, targets, strict=True))
        with ThreadPoolExecutor() as pool:
            self.detect_images([x for x in planned if not x[0].is_video], pool)
            for file, target in planned:
                if file.is_video:
                    self.detect_video(file.path, target, pool)

    def detect_camera(self, number: int, draw_to: Path | None) -> None:
        """Records a camera into the video `draw_to`, or into a video in that folder."""
        if draw_to is not None and not is_video_name(draw_to):
            draw_to = draw_to / CAMERA_FILE
        with ThreadPoolExecutor() as pool:
            self.detect_video(number, draw_to, pool)

    def detect_images(
        self, planned: Sequence[tuple[MediaFile, Path | None]], pool: ThreadPoolExecutor
    ) -> None:
        """Detects in images and draws each into its target."""

        def load(file_and_target: tuple[MediaFile, Path | None]) -> Loaded:
            file, target = file_and_target
            try:
                image_rgb = read_image(str(file.path), "RGB")
                return Loaded(file, target, image_rgb, self.predictor.prepare(image_rgb))
            except (OSError, ValueError) as error:
                return Loaded(file, target, error=error)

        for batch in ahead(load, chunks(planned, self.predictor.batch_size), pool):
            for bad in (x for x in batch if x.error):
                self.skip(f"{bad.file.path}: {bad.error}")
            good = [x for x in batch if not x.error]
            detections = self.predictor.detect([x.model_input for x in good])
            list(pool.map(self.draw, good, detections))  # raises the errors of the threads
            for x, found in zip(good, detections, strict=True):
                self.images += 1
                self.record.add(str(x.file.path), x.image_rgb.shape[:2], found)
                print(f"{x.file.path}: {self.describe(found)}{arrow(x.target)}")

    def draw(self, loaded: Loaded, found: Instances) -> None:
        if loaded.target is None:
            return
        drawn = draw_detections(loaded.image_rgb, found, self.predictor.class_names, 0.0)
        loaded.target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn).save(loaded.target, quality=92)

    def detect_video(
        self, source: Path | int, target: Path | None, pool: ThreadPoolExecutor
    ) -> None:
        """Detects in every frame of a video or a camera and writes the drawn frames into a video.

        Ctrl-C ends the recording of a camera.
        """
        is_camera = isinstance(source, int)
        name = f"camera {source}" if is_camera else str(source)
        frames, objects = 0, 0

        def load(frame_rgb: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
            return frame_rgb, self.predictor.prepare(frame_rgb)

        def draw(frame_rgb: np.ndarray, found: Instances) -> np.ndarray:
            return draw_detections(frame_rgb, found, self.predictor.class_names, 0.0)

        try:
            with ExitStack() as stack:
                video = stack.enter_context(VideoReader(source))
                writer = stack.enter_context(VideoWriter(target, video.fps)) if target else None
                stack.enter_context(suppress(KeyboardInterrupt) if is_camera else nullcontext())
                batches = chunks(islice(video, self.max_frames), self.predictor.batch_size)
                for batch in ahead(load, batches, pool):
                    images = [image for image, _ in batch]
                    detections = self.predictor.detect([x for _, x in batch])
                    for drawn in pool.map(draw, images, detections) if writer else ():
                        writer.write(drawn)
                    for image_rgb, found in zip(images, detections, strict=True):
                        moment = {"frame": frames, "time": frames / video.fps}
                        self.record.add(name, image_rgb.shape[:2], found, **moment)
                        frames, objects = frames + 1, objects + len(found)
        except VideoReadError as error:
            self.skip(str(error))
            return
        if frames == 0:
            self.skip(f"{name}: no frame can be read")
            return
        self.videos += 1
        expected = min(video.num_frames, self.max_frames or video.num_frames)
        cut = f" (of {expected}: the rest cannot be read)" if frames < expected else ""
        print(f"{name}: {count(frames, 'frame')}{cut}, {count(objects, 'object')}{arrow(target)}")

    def describe(self, found: Instances) -> str:
        """Counts the objects of each class, the most frequent first."""
        names = Counter(map(self.record.name, found.pred_classes.tolist()))
        listed = ", ".join(f"{name} {n}" for name, n in names.most_common())
        return count(len(found), "object") + (f" ({listed})" if listed else "")

    def summary(self, seconds: float, draw_to: Path | None, json_file: Path | None) -> str:
        """Returns the last line of the output."""
        frames = len(self.record.images) - self.images
        read = [count(self.images, "image")] if self.images or not self.videos else []
        if self.videos:
            read.append(f"{count(self.videos, 'video')} ({count(frames, 'frame')})")
        parts = [f"{' and '.join(read)} in {seconds:.1f} s"]
        parts.append(count(len(self.record.detections), "object"))
        if self.skipped:
            parts.append(f"{count(self.skipped, 'input')} skipped")
        if self.record.images:
            parts += [f"drawn into {draw_to}"] if draw_to else []
            parts += [f"listed in {json_file}"] if json_file else []
        return "; ".join(parts)


def ahead(
    work: Callable[[T], U], batches: Iterable[Sequence[T]], pool: ThreadPoolExecutor
) -> Iterator[list[U]]:
    """Yields the results of `work` by batch while the next batch is being processed."""
    waiting: list[Future[U]] = []
    for batch in batches:
        started = [pool.submit(work, item) for item in batch]
        if waiting:
            yield [job.result() for job in waiting]
        waiting = started
    if waiting:
        yield [job.result() for job in waiting]


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yields consecutive lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def arrow(target: Path | None) -> str:
    return f" -> {target}" if target else ""


if __name__ == "__main__":
    sys.exit(main())
