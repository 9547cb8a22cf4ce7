"""Configuration keys that this library adds to Detectron2's, with meaning, unit and default.

The keys of the model are declared in `model_defaults`.
"""

from __future__ import annotations

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg

from .model_defaults import add_model_config


def add_asag_config(cfg: CN) -> None:
    """Adds the library's keys to a Detectron2 configuration, and changes those of Detectron2's
    defaults that do not suit this family of detectors."""
    _add_input(cfg)
    add_model_config(cfg)
    _add_solver(cfg)
    _add_test(cfg)
    _add_logging(cfg)


def get_asag_cfg() -> CN:
    """Returns Detectron2's defaults with this library's keys."""
    cfg = get_cfg()
    add_asag_config(cfg)
    return cfg


def _add_input(cfg: CN) -> None:
    # Color order of the image tensors. All detectors here use torchvision's ImageNet weights: RGB.
    cfg.INPUT.FORMAT = "RGB"
    # Images of more pixels are refused, before training where the data is checked: memory for
    # decoding. The default, 2^29 / 3, is half a GiB as RGB.
    cfg.INPUT.MAX_PIXELS = 178_956_970
    # Stop if the boxes of a whole data set look like fractions, corners or of another image size,
    # or lie in one corner of all images. False takes them as they are.
    cfg.DATASETS.CHECK_BOXES = True
    # With INPUT.CROP.ENABLED, a share of the training images is augmented as in DETR: resize the
    # short side to one of PRE_RESIZE (pixels), crop INPUT.CROP.SIZE, then resize like the other
    # images.
    cfg.INPUT.CROP.TYPE = "absolute_range"
    cfg.INPUT.CROP.SIZE = [384, 600]
    cfg.INPUT.CROP.PRE_RESIZE = (400, 500, 600)
    # Probability of that augmentation, 0 to 1.
    cfg.INPUT.CROP.PROB = 0.5
    # Images without objects stay in the training set, as examples of background.
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False


def _add_solver(cfg: CN) -> None:
    s = cfg.SOLVER
    # "ADAMW" or "SGD".
    s.OPTIMIZER = "ADAMW"
    s.BASE_LR = 2.5e-5
    s.WEIGHT_DECAY = 1e-4
    # Learning rate of the backbone (without its feature pyramid) as a multiple of BASE_LR.
    s.BACKBONE_MULTIPLIER = 1.0
    # One norm over all gradients, as in the authors' code of all these detectors. False clips each
    # parameter by itself, which is all that Detectron2's own `build_optimizer` supports.
    s.CLIP_GRADIENTS.FULL_MODEL = True
    s.CLIP_GRADIENTS.ENABLED = True
    s.CLIP_GRADIENTS.CLIP_TYPE = "norm"
    s.CLIP_GRADIENTS.CLIP_VALUE = 1.0
    s.CLIP_GRADIENTS.NORM_TYPE = 2.0
    # Number format of mixed precision (SOLVER.AMP.ENABLED): "float16" or "bfloat16".
    s.AMP.DTYPE = "float16"
    # Epochs after which training ends, and after which the learning rate drops. If EPOCHS is
    # positive, MAX_ITER and STEPS are computed from it, the batch size and the size of the data
    # set; 0 uses MAX_ITER and STEPS as they are.
    s.EPOCHS = 0.0
    s.EPOCH_STEPS = ()
    # Length of training by the size of the data, where EPOCHS is 0 and BY_DATA.EPOCHS is positive:
    # that many passes over the training set, but at least MIN_ITERS and at most MAX_ITERS
    # iterations (0 is no limit). Small data sets get more passes, large ones fewer.
    s.BY_DATA = CN()
    s.BY_DATA.EPOCHS = 0.0
    s.BY_DATA.MIN_ITERS = 0
    s.BY_DATA.MAX_ITERS = 0
    # Batch size for which BASE_LR was chosen, and scaling of BASE_LR for other batch sizes: "none",
    # "linear" or "sqrt".
    s.REFERENCE_BATCH = 16
    s.SCALE_LR = "none"
    # Forward and backward passes an optimizer step; IMS_PER_BATCH counts the images of all of them.
    s.ACCUMULATE_STEPS = 1
    # Exponential moving average of the weights, used by the evaluations and in `model_best`: decay
    # a step, 0 to 1, and its warm-up. At step t = 0, 1, ... the decay is at most
    # (1 + t) / (WARMUP + t); 1 is no warm-up.
    s.EMA = CN()
    s.EMA.ENABLED = False
    s.EMA.DECAY = 0.9998
    s.EMA.WARMUP = 10.0
    # Consecutive evaluations (every TEST.EVAL_PERIOD iterations) without a better box AP after
    # which training ends; 0 is off.
    s.EARLY_STOP_PATIENCE = 0
    # Forward and backward pass of the largest possible batch before training, without side effects,
    # to detect a lack of memory early: "auto" (on CUDA only), "always" or "never".
    s.MEMORY_CHECK = "auto"


def _add_test(cfg: CN) -> None:
    # Number of evaluations during training, evenly spread, the last one at its end, where
    # EVAL_PERIOD (in iterations) is 0; 0 and 0 is a single one at the end.
    cfg.TEST.NUM_EVALUATIONS = 0
    # Validation images drawn with their predictions after each evaluation.
    cfg.TEST.NUM_PICTURES = 8
    # Write report.html at the end of training: results, curves, best and worst images, data.
    cfg.TEST.REPORT = True
    # Compute the losses on the first data set of DATASETS.TEST at each evaluation, as val_loss/*.
    cfg.TEST.LOSS = False
    # Evaluate and predict with the averaged weights of a checkpoint that has them (SOLVER.EMA).
    cfg.TEST.EMA_WEIGHTS = True
    # Test-time augmentation, beside Detectron2's TEST.AUG.ENABLED, MIN_SIZES, MAX_SIZE and FLIP.
    aug = cfg.TEST.AUG
    # Augmented copies of an image in one batch.
    aug.BATCH_SIZE = 2
    # For each of MIN_SIZES, the smallest and the largest square root of the area of boxes that are
    # kept, in pixels of the resized image; () keeps all boxes.
    aug.SIZE_RANGES = ()
    # Merging of the detections of all copies: "nms" keeps the best box of each cluster, "vote"
    # averages the boxes of a cluster weighted by score.
    aug.MERGE = "nms"
    # IoU from which boxes of one class form a cluster, 0 to 1.
    aug.MERGE_IOU = 0.65
    # "vote" also returns the members of a cluster, with scores lowered by their overlap; those with
    # a lower score than this are dropped, 0 to 1.
    aug.MIN_SCORE = 0.05


def _add_logging(cfg: CN) -> None:
    cfg.LOGGING = CN()
    # Weights & Biases project that receives the metrics, beside metrics.json and TensorBoard; ""
    # is off. The environment variables of wandb apply, such as WANDB_MODE=offline.
    cfg.LOGGING.WANDB = ""
