"""A detector and a data set small enough to train in a second, for the tests of the engine."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import torch
from detectron2.config import CfgNode

from asag import load_config
from asag.data import ShapesSpec, register_shapes
from asag.data.shapes import make_shapes

CONFIG = Path(__file__).resolve().parents[2] / "configs/SparseRCNN/sparse_rcnn_tiny.yaml"
SPEC = ShapesSpec(
    name="engine_shapes",
    class_names=("circle", "square"),
    height=64,
    width=80,
    objects=(1, 3),
    sizes=(0.3, 0.7),
    images=(("train", 12), ("val", 6)),
)

# Everything as small as the blocks allow; group norm, so that a batch can be cut up.
OPTIONS: dict[str, object] = {
    "MODEL.DEVICE": "cpu",
    "MODEL.SLIM_RESNET.WIDTH": 32,
    "MODEL.SLIM_RESNET.NORM": "GN",
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.FPN.NORM": "",
    "MODEL.PROPOSAL_GENERATOR.NUM_QUERIES": 6,
    "MODEL.PROPOSAL_GENERATOR.BOX_INIT": "image",
    "MODEL.ROI_HEADS.NUM_CLASSES": 2,
    "MODEL.DECODER.NUM_STAGES": 2,
    "MODEL.DECODER.HIDDEN_DIM": 16,
    "MODEL.DECODER.NUM_HEADS": 2,
    "MODEL.DECODER.FFN_DIM": 16,
    "MODEL.DECODER.DYNAMIC_DIM": 4,
    "MODEL.DECODER.NUM_REG_LAYERS": 1,
    "DATASETS.TRAIN": "('engine_shapes_train',)",
    "DATASETS.TEST": "()",
    "DATALOADER.NUM_WORKERS": 0,
    "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "INPUT.MAX_SIZE_TRAIN": 80,
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 80,
    "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.REFERENCE_BATCH": 8,
    "SOLVER.BASE_LR": 0.0005,
    "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR",
    "SOLVER.EPOCHS": 0,
    "SOLVER.EPOCH_STEPS": "()",
    "SOLVER.MAX_ITER": 4,
    "SOLVER.STEPS": "()",
    "TEST.NUM_PICTURES": 0,
    "TEST.REPORT": False,
    "SEED": 7,
}


def register_tiny_shapes(root: str | Path | None = None) -> Path:
    """Registers engine_shapes_train and engine_shapes_val below `root` (default: a folder of this
    process that vanishes with it), and returns it."""
    root = Path(root) if root is not None else _scratch()
    register_shapes(SPEC, root)
    return root


@functools.cache
def _scratch() -> Path:
    folder = tempfile.mkdtemp(prefix="engine_shapes_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def write_coco_folder(folder: Path) -> Path:
    """The tiny shapes as a folder that a user might bring, in Roboflow's layout."""
    root = register_tiny_shapes()
    for split in ("train", "val"):
        shutil.copytree(make_shapes(SPEC, split, root), folder / split)
    return folder


def tiny_options(output_dir: str | Path, **changes: object) -> list[str]:
    """KEY VALUE words of the tiny configuration; `changes` has __ for the dots of a key."""
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    options = OPTIONS | {"OUTPUT_DIR": output_dir} | changed
    return [str(word) for pair in options.items() for word in pair]


def tiny_cfg(output_dir: str | Path, **changes: object) -> CfgNode:
    """The tiny configuration."""
    return load_config(str(CONFIG), tiny_options(output_dir, **changes))


def losses(trainer) -> list[float]:
    """Total loss of every iteration of the trainer's last run."""
    return [value for value, _ in trainer.storage.history("total_loss").values()]


def weights(model: torch.nn.Module) -> torch.Tensor:
    """All trainable parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
