"""Split one COCO-format file into a training and an evaluation file, image by image.

Run as `python -m asag.data.coco_split annotations/train.json --val-fraction 0.2`. The two new files
go to `train.json` and `val.json` in a new folder beside the source, so the source stays as it is.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from asag.data.coco_json import load_json, read_coco_table
from asag.data.errors import DataIssue, DatasetError


def split_coco_json(
    source: Path, train_json: Path, val_json: Path, *, val_fraction: float = 0.2, seed: int = 0
) -> tuple[int, int]:
    """Write two files that share out the images of one; every other entry of the source is kept.

    Args:
        source: COCO-format file.
        train_json: written; must not exist.
        val_json: written; must not exist.
        val_fraction: share of images for evaluation, in (0, 1).
        seed: of the random choice; the same seed gives the same split.

    Returns:
        Number of training and of evaluation images.

    Raises:
        ValueError: the fraction is out of range, or one side would be empty.
        FileExistsError: a target exists.
        DatasetError: the source is not a valid COCO file.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must lie between 0 and 1, not {val_fraction}")
    for target in (train_json, val_json):
        if target.exists():
            raise FileExistsError(f"{target} exists: remove it or choose another folder")
    read_coco_table(source, (source.parent,))  # reports a broken source
    data = load_json(source)
    images = data["images"]
    num_val = round(len(images) * val_fraction)
    if num_val in (0, len(images)):
        problem = f"{len(images)} image(s) cannot be split with val_fraction = {val_fraction}"
        raise DatasetError([DataIssue(str(source), problem, "add images or change the fraction")])

    is_val = np.zeros(len(images), dtype=bool)
    is_val[np.random.default_rng(seed).permutation(len(images))[:num_val]] = True
    val_ids = {image["id"] for image, chosen in zip(images, is_val, strict=True) if chosen}
    for target, side in ((train_json, False), (val_json, True)):
        part = {
            "images": [image for image in images if (image["id"] in val_ids) == side],
            "annotations": [a for a in data["annotations"] if (a["image_id"] in val_ids) == side],
        }
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(data | part))
    return len(images) - num_val, num_val


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="COCO-format annotation file")
    parser.add_argument("--val-fraction", type=float, default=0.2, help="share of images, (0, 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for train.json and val.json")
    args = parser.parse_args()
    out = args.out or args.source.with_name(f"{args.source.stem}_split")
    train_json, val_json = out / "train.json", out / "val.json"
    try:
        counts = split_coco_json(
            args.source, train_json, val_json, val_fraction=args.val_fraction, seed=args.seed
        )
    except (ValueError, FileExistsError) as error:
        parser.exit(1, f"{error}\n")
    print(f"{train_json}: {counts[0]} images\n{val_json}: {counts[1]} images")
    images = _image_folder(args.source)
    print(
        f"next: python train_net.py --train-json {train_json} --val-json {val_json} "
        f"--train-images {images} --val-images {images}"
    )


def _image_folder(source: Path) -> Path | str:
    """Where the first picture of a file lies in the usual layouts; a placeholder elsewhere."""
    first = load_json(source)["images"][0]["file_name"]
    parents = (source.parent, source.parent.parent)
    folders = [folder for parent in parents for folder in (parent, parent / "images")]
    return next((folder for folder in folders if (folder / first).is_file()), "FOLDER_OF_IMAGES")


if __name__ == "__main__":
    main()
