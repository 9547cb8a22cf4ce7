"""Every configuration key that this library adds to Detectron2's, with meaning, unit and
default."""

from __future__ import annotations

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg


def add_asag_config(cfg: CN) -> None:
    """Adds the library's keys to a Detectron2 configuration, and sets Detectron2's own defaults
    where this family of detectors needs others."""
    _add_input(cfg)
    _add_model(cfg)
    _add_decoder(cfg)
    _add_transformer(cfg)
    _add_asag(cfg)
    _add_matching(cfg)
    _add_solver(cfg)
    _add_test(cfg)
    _add_logging(cfg)


def get_asag_cfg() -> CN:
    """Detectron2's defaults plus this library's keys."""
    cfg = get_cfg()
    add_asag_config(cfg)
    return cfg


def _add_input(cfg: CN) -> None:
    # Color order of the image tensors. All detectors here use torchvision's ImageNet weights: RGB.
    cfg.INPUT.FORMAT = "RGB"
    # With INPUT.CROP.ENABLED, half of the training images take the path of DETR's augmentation:
    # resize the short side to one of PRE_RESIZE (pixels), crop INPUT.CROP.SIZE, then resize as the
    # others.
    cfg.INPUT.CROP.TYPE = "absolute_range"
    cfg.INPUT.CROP.SIZE = [384, 600]
    cfg.INPUT.CROP.PRE_RESIZE = (400, 500, 600)
    # Probability of that path, 0 to 1.
    cfg.INPUT.CROP.PROB = 0.5
    # Images without objects are background worth learning from.
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False


def _add_model(cfg: CN) -> None:
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
    cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]
    # torchvision's ResNet: the stride sits in the 3x3 convolution.
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    # Memory format NHWC for the backbone: faster convolutions on GPUs with tensor cores.
    cfg.MODEL.CHANNELS_LAST = False
    # Precision of convolutions and matrix products outside of training: "float32", "bfloat16" or
    # "float16".
    cfg.MODEL.INFERENCE_DTYPE = "float32"
    # torch.compile for backbone, encoder layers, stages, and an anchor generator with fixed
    # capacities. Pays off after a minute of compilation, on fixed sizes.
    cfg.MODEL.COMPILE = False
    # Compute the stages of backbone and decoder and the layers of an encoder again in the backward
    # pass instead of keeping them: less memory, about a third more time, the same numbers.
    cfg.MODEL.ACTIVATION_CHECKPOINTING = False
    # IoU threshold of class-wise non-maximum suppression on the detections, 0 to 1; 0 is off.
    cfg.MODEL.NMS_THRESH_TEST = 0.0
    # Module between backbone and everything that reads features; "" is none (FPN is a backbone).
    cfg.MODEL.NECK = CN()
    cfg.MODEL.NECK.NAME = ""
    # Number of queries N. "DenseProposals" fills them with the best of MODEL.RPN's proposals.
    cfg.MODEL.PROPOSAL_GENERATOR.NUM_QUERIES = 100
    # Boxes that learning starts from: "image" (all equal to it), "grid", "random" or "center".
    cfg.MODEL.PROPOSAL_GENERATOR.BOX_INIT = "image"
    _add_dynamic_proposals(cfg)
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    # RoIAlign: side of the pooled grid and samples a bin and direction.
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO = 2
    # Small residual network for training on a CPU ("build_slim_resnet_fpn_backbone", or without
    # pyramid "build_slim_resnet"): basic blocks in each of the four stages (without pyramid: in the
    # first stages), channels of the first stage (doubled from stage to stage), and norm ("BN" or
    # "GN": it is trained from scratch, so its statistics cannot be frozen).
    cfg.MODEL.SLIM_RESNET = CN()
    cfg.MODEL.SLIM_RESNET.BLOCKS = (1, 1, 1, 1)
    cfg.MODEL.SLIM_RESNET.WIDTH = 16
    cfg.MODEL.SLIM_RESNET.NORM = "BN"
    # Swin Transformer ("build_swin_fpn_backbone"), by default Swin-T: channels of the first stage
    # (doubled from stage to stage), blocks and heads of the four stages, side of a window in
    # tokens, and the rate at which the last block's residual branches are dropped while training
    # (falling linearly to 0 at the first block), 0 to 1.
    cfg.MODEL.SWIN = CN()
    cfg.MODEL.SWIN.EMBED_DIM = 96
    cfg.MODEL.SWIN.DEPTHS = (2, 2, 6, 2)
    cfg.MODEL.SWIN.NUM_HEADS = (3, 6, 12, 24)
    cfg.MODEL.SWIN.WINDOW_SIZE = 7
    cfg.MODEL.SWIN.DROP_PATH_RATE = 0.2
    _add_timm(cfg)


def _add_timm(cfg: CN) -> None:
    """Networks of timm: "build_timm_fpn_backbone", or without pyramid "build_timm_backbone"."""
    # MODEL.PIXEL_MEAN and MODEL.PIXEL_STD must be the network's own, and MODEL.BACKBONE.FREEZE_AT
    # n keeps everything up to "resn" as it is (1: the stem, 0: nothing).
    cfg.MODEL.TIMM = CN()
    t = cfg.MODEL.TIMM
    # Name of a timm model, perhaps with a tag for its weights ("resnet50.a1_in1k").
    t.NAME = "tf_efficientnet_lite0"
    # Start from timm's weights, which timm downloads; or from a file or any address of weights,
    # with timm's names or EfficientNet-PyTorch's. Neither is used where MODEL.WEIGHTS is set.
    t.PRETRAINED = False
    t.WEIGHTS = ""
    # Strides of the feature maps: 4 is "res2", 8 "res3", 16 "res4", 32 "res5".
    t.OUT_STRIDES = (4, 8, 16, 32)
    # Batch norms: "BN" (trained, statistics of each batch), "SyncBN" (statistics of all processes),
    # "FrozenStatistics" (scale and shift are trained) or "FrozenBN" (nothing is). Other norms are
    # trained, except in frozen stages.
    t.NORM = "BN"
    # Rate at which the last block's residual branch is dropped while training (falling linearly
    # to 0 at the first block), 0 to 1.
    t.DROP_PATH_RATE = 0.0


def _add_dynamic_proposals(cfg: CN) -> None:
    cfg.MODEL.PROPOSAL_GENERATOR.DPG = CN()
    g = cfg.MODEL.PROPOSAL_GENERATOR.DPG
    # Experts N_e, each a full set of NUM_QUERIES proposals.
    g.NUM_EXPERTS = 4
    # Side of the square, in cells, that the image is described on.
    g.SIZE = 30
    # Width between the two linear layers that weigh the experts.
    g.FC_DIM = 1500
    # Lead fine levels down to the coarsest by depth-wise convolutions; False resizes each alone.
    g.STAIRCASE = True
    # Softmax temperature at the start and at the end, and the share of the training (0 to 1, of
    # SOLVER.MAX_ITER) in which it falls linearly from one to the other.
    g.TAU_INIT = 30.0
    g.TAU_FINAL = 1.0
    g.TAU_SHARE = 10 / 36


def _add_decoder(cfg: CN) -> None:
    cfg.MODEL.DECODER = CN()
    d = cfg.MODEL.DECODER
    # Refinement stages T.
    d.NUM_STAGES = 6
    # Channels of a query; equal to the channels of the features.
    d.HIDDEN_DIM = 256
    # Attention heads, a divisor of HIDDEN_DIM.
    d.NUM_HEADS = 8
    # Inner width of the feed-forward blocks.
    d.FFN_DIM = 2048
    # Dropout rate in attention, residual branches and feed-forward blocks, 0 to 1.
    d.DROPOUT = 0.0
    # Activation of feed-forward blocks and towers: "relu" or "gelu".
    d.ACTIVATION = "relu"
    # Layers of the towers before the class and the box predictor.
    d.NUM_CLS_LAYERS = 1
    d.NUM_REG_LAYERS = 3
    # Inner width of the dynamic convolution.
    d.DYNAMIC_DIM = 64
    # Self-attention among the queries: "msa" (multi-head self-attention), "iou_esa" (the same,
    # weighted by the IoU of the queries' boxes), "iou" (the IoU matrix alone) or "none".
    d.SELF_ATTENTION = "msa"
    # SELF_ATTENTION "iou": divide each row of the IoU matrix by its sum.
    d.IOU_ROW_NORMALizE = True
    # Dynamic channel weighting: each query masks the channels of its box features anew for
    # classification and for regression, each with its own path to the predictors.
    d.DCW = False
    # Disentangled dynamic convolution, an ablation without masks: "none", "half" (each task keeps
    # half of HIDDEN_DIM up to its predictor) or "full" (projected back to HIDDEN_DIM before its
    # tower).
    d.DISENTANGLE = "none"
    # Probability that sigmoid classifiers start with, 0 to 1.
    d.PRIOR_PROB = 0.01


def _add_transformer(cfg: CN) -> None:
    """DETR and its relatives. Encoder and decoder share width, heads and rates of MODEL.DECODER."""
    # Keep padding at zero throughout a ResNet, so that images get the same features in a batch as
    # by themselves; otherwise it bleeds in at the borders, as in the authors' code.
    cfg.MODEL.EXACT_PADDING = False
    cfg.MODEL.ENCODER = CN()
    # The backbone's feature map that the encoder reads, and the number of its layers.
    cfg.MODEL.ENCODER.IN_FEATURE = "res5"
    cfg.MODEL.ENCODER.NUM_LAYERS = 6
    # Reference point of each object query, from which box centers are offsets: "predicted" from the
    # query, "learned" as a parameter, "origin" (the middle of the image) or "none" (no offsets).
    cfg.MODEL.PROPOSAL_GENERATOR.REFERENCE_POINTS = "none"
    d = cfg.MODEL.DECODER
    # Norms in front of the sublayers of encoder and decoder instead of behind.
    d.PRE_NORM = False
    # Spatial query p_q of conditional cross-attention: "csq" = T(f) p_s, and the paper's ablations
    # "csq_c" = f, "csq_t" = T(f), "csq_p" = p_s, "csq_i" = T(c_q) p_s.
    d.SPATIAL_QUERY = "csq"
    # Form of the transformation T: "diagonal", "single", "block", "full" or "identity".
    d.SPATIAL_PROJECTION = "diagonal"


def _add_asag(cfg: CN) -> None:
    """Adaptive sparse anchors, and what the decoders of ASAG add to MODEL.DECODER."""
    d = cfg.MODEL.DECODER
    # "ParallelHeads": kind of the stages, "dynamic_conv" (ASAG-S), "adamixer" (A) or "deformable"
    # (D); auxiliary copies of the first stage, which only train; and the copy that detects, -1 is
    # the last (most numbers of the authors' weights were taken with 2, the last but one).
    d.STAGE = "dynamic_conv"
    d.NUM_AUXILIARY = 0
    d.MAIN_COPY = -1
    # AdaMixer stage: groups of channels, points sampled in each, points after mixing.
    d.MIXER_GROUPS = 4
    d.MIXER_IN_POINTS = 32
    d.MIXER_OUT_POINTS = 128
    # Deformable attention, in encoder and decoder: points of a head and level.
    d.DEFORMABLE_POINTS = 4
    cfg.MODEL.DEFORMABLE_ENCODER = CN()
    # Maps of the backbone, finest first, to which a coarser one is added, and encoder layers.
    cfg.MODEL.DEFORMABLE_ENCODER.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.DEFORMABLE_ENCODER.NUM_LAYERS = 6

    cfg.MODEL.ASAG = CN()
    a = cfg.MODEL.ASAG
    # Maps of strides 8, 16 and 32 that anchors are predicted from.
    a.IN_FEATURES = ["p3", "p4", "p5"]
    # Channels of the compressed maps, and cells of a patch's side.
    a.COMPRESSED_DIM = 8
    a.PATCH_SIZE = 15
    # Where the anchors of a patch start: "random" or, for training from scratch on little data,
    # "grid".
    a.ANCHOR_INIT = "random"
    # Anchors of each of the five patches of P5 and P6 (n1), and of each probed patch (n2).
    a.FIXED_ANCHORS = 50
    a.PATCH_ANCHORS = 20
    # Anchors with a location score above ETA_F are kept; a negative value keeps all, so that
    # MAX_ANCHORS alone decides (fixed top-k). Those between ETA_L and ETA_H are probed. Patches
    # that overlap by an IoU above ETA_IOU are thinned out.
    a.ETA_F = 0.1
    a.ETA_L = 0.1
    a.ETA_H = 0.7
    a.ETA_IOU = 0.25
    # Fewest and most anchors of an image.
    a.MIN_ANCHORS = 5
    a.MAX_ANCHORS = 200
    # Anchors with a smaller side score 0, in pixels of the network input.
    a.MIN_SIDE = 3.0
    # Most patches of an image and level; 0 is no limit.
    a.MAX_PATCHES = 0
    # Probed anchors are replaced by what their patches predict.
    a.REPLACE = True
    # Finest level that inference probes: 3, 4, or 5 for none.
    a.FINEST_LEVEL_TEST = 3
    # Fast inference: images with fewer than 3 selected anchors are not probed further, others by at
    # most 15 patches a level.
    a.FAST_TEST = False
    # Slots of patches (an image and level) and of anchors (an image), so that every shape is fixed
    # and the host never waits; 0 and 0 take what the fullest image of the batch needs. What exceeds
    # the slots is lost, the worst first.
    a.PATCH_CAPACITY = 0
    a.ANCHOR_CAPACITY = 0
    # Patches that training has at least in each image on P4 and on P3 (N_TP).
    a.MIN_TRAIN_PATCHES = 4
    # Training passes at the start that probe nothing and learn from ground-truth patches: about one
    # epoch (7330 iterations of 16 images on COCO).
    a.GT_WARMUP_ITERS = 7330
    # Supervise flipped P6 patches with wrong boxes, as the published training did.
    a.RELEASED_FLIP = False
    # Coefficients of the anchors' losses.
    a.CLASS_WEIGHT = 8.0
    a.L1_WEIGHT = 4.0
    a.GIOU_WEIGHT = 2.0
    # Inner width of the proposal block's feed-forward network, and depth of its towers (also of
    # "DenseProposals").
    a.FFN_DIM = 2048
    a.NUM_CLS_LAYERS = 1
    a.NUM_REG_LAYERS = 3
    # Noised copies of ground truths that train beside the anchors, 0 is off (the paper: 200); the
    # noise of their boxes in shares of the sides, and its decrease a training pass.
    a.NUM_DENOISING = 0
    a.DENOISING_NOISE = 0.4
    a.DENOISING_NOISE_DECAY = 0.0


def _add_matching(cfg: CN) -> None:
    cfg.MODEL.MATCHER = CN()
    m = cfg.MODEL.MATCHER
    # "HungarianMatcher": one query an object. "OptimalTransportMatcher": as many as its predictions
    # deserve, see OT below.
    m.NAME = "HungarianMatcher"
    # Weights of the matching cost: class, L1 of normalized boxes, negative GIoU.
    m.CLASS_COST = 2.0
    m.L1_COST = 5.0
    m.GIOU_COST = 2.0
    _add_optimal_transport(m)

    cfg.MODEL.CRITERION = CN()
    c = cfg.MODEL.CRITERION
    # "SetCriterion", or "QueryWeightingCriterion": matched queries count by how good they are.
    c.NAME = "SetCriterion"
    # "focal" (sigmoid) or "softmax" (cross entropy with a background column); also the kind of
    # cost.
    c.CLASS_LOSS = "focal"
    # Coefficients of the three terms.
    c.CLASS_WEIGHT = 2.0
    c.L1_WEIGHT = 5.0
    c.GIOU_WEIGHT = 2.0
    # Box format of the L1 term and cost: "xyxy" or "cxcywh", in shares of the image size.
    c.L1_FORMAT = "xyxy"
    # Focal loss: weight of positives, 0 to 1, and exponent.
    c.FOCAL_ALPHA = 0.25
    c.FOCAL_GAMMA = 2.0
    # Weight of background in the cross entropy.
    c.NO_OBJECT_WEIGHT = 0.1
    # Factor of the matching cost, and in the "QueryWeightingCriterion" of the loss, of an object
    # that covers nothing of the image, falling with the root of its share to 1; 1 is off.
    c.AREA_WEIGHT = 1.0
    # "QueryWeightingCriterion": exponents of score and IoU in the weights of matched queries
    # (gamma1 and gamma2 of ASAG).
    c.SCORE_EXPONENT = 0.4
    c.IOU_EXPONENT = 0.6
    # Sums are divided by the number of "objects", or of "positives" of each stage.
    c.NORMALizER = "objects"
    # A loss for every stage, or for the last one only.
    c.DEEP_SUPERVISION = True


def _add_optimal_transport(matcher: CN) -> None:
    matcher.OT = CN()
    ot = matcher.OT
    # Dynamic k: an object gets as many units as its best Q predictions' IoUs sum up to.
    ot.Q = 8
    # The same number of units for every object instead; 0 is dynamic k.
    ot.FIXED_K = 0
    # Units grow from stage to stage: k* = k - UNIT_STEP * (T - t) (Eq. 2), and how that becomes a
    # whole number: "floor", "round", or "none" to take the equation to the letter.
    ot.UNIT_INCREASE = True
    ot.UNIT_STEP = 0.5
    ot.UNIT_ROUNDING = "floor"
    # Largest share of the predictions that may be positive, above 0 and at most 1.
    ot.CAP = 0.8
    # Weight alpha of the regression cost, and the terms it is made of: "l1", "giou".
    ot.ALPHA = 1.0
    ot.REG_COST = ("l1", "giou")
    # "exact" (assignment with repeated rows), "sinkhorn" (never waits for the device), or "auto":
    # exact on a CPU, sinkhorn on a GPU.
    ot.SOLVER = "auto"
    # Sinkhorn: entropy weight of the first and the last iteration (in units of cost), bound on the
    # iterations, and over-relaxation, 1 to 1.7. OTA's plain form is 0.1, 0.1, 50, 1.
    ot.EPS_START = 1.0
    ot.EPS = 0.001
    ot.ITERS = 60
    ot.RELAXATION = 1.5
    # Divide each row of the plan by its maximum before a prediction takes its best row, like OTA.
    ot.ROW_RESCALE = False
    # Bound on the rounds that repair what the iterations left inexact; 0 takes the plan as it is.
    ot.REPAIR_ROUNDS = 8


def _add_solver(cfg: CN) -> None:
    s = cfg.SOLVER
    # "ADAMW" or "SGD".
    s.OPTIMIZER = "ADAMW"
    s.BASE_LR = 2.5e-5
    s.WEIGHT_DECAY = 1e-4
    # Learning rate of the backbone (without its feature pyramid) as a multiple of BASE_LR.
    s.BACKBONE_MULTIPLIER = 1.0
    # One norm over all gradients, as all authors of this family clip; False clips each parameter by
    # itself, which is all that Detectron2's own `build_optimizer` can do.
    s.CLIP_GRADIENTS.FULL_MODEL = True
    s.CLIP_GRADIENTS.ENABLED = True
    s.CLIP_GRADIENTS.CLIP_TYPE = "norm"
    s.CLIP_GRADIENTS.CLIP_VALUE = 1.0
    s.CLIP_GRADIENTS.NORM_TYPE = 2.0
    # Number format of mixed precision (SOLVER.AMP.ENABLED): "float16" or "bfloat16".
    s.AMP.DTYPE = "float16"
    # Passes over the training set at which training ends and at which the learning rate drops. When
    # EPOCHS is positive, MAX_ITER and STEPS follow from it, the batch and the size of the data set;
    # 0 takes MAX_ITER and STEPS as they stand.
    s.EPOCHS = 0.0
    s.EPOCH_STEPS = ()
    # Images a step for which BASE_LR was chosen, and what to do when the batch differs: "none",
    # "linear" or "sqrt" scaling of BASE_LR.
    s.REFERENCE_BATCH = 16
    s.SCALE_LR = "none"
    # Forward and backward passes that share one optimizer step; IMS_PER_BATCH counts their sum.
    s.ACCUMULATE_STEPS = 1
    # Exponential moving average of the weights, with which the evaluations and `model_best` then
    # work: decay a step, 0 to 1, and its warm-up. At step t = 0, 1, ... the decay is at most
    # (1 + t) / (WARMUP + t); 1 is no warm-up.
    s.EMA = CN()
    s.EMA.ENABLED = False
    s.EMA.DECAY = 0.9998
    s.EMA.WARMUP = 10.0
    # Evaluations (every TEST.EVAL_PERIOD iterations) in a row without a better box AP after which
    # training ends; 0 trains to the end.
    s.EARLY_STOP_PATIENCE = 0
    # Forward and backward pass of the largest possible batch before the training, without a trace
    # in it, to see whether the memory is enough: "auto" (on CUDA only), "always" or "never".
    s.MEMORY_CHECK = "auto"


def _add_test(cfg: CN) -> None:
    # Validation images drawn with their predictions after each evaluation.
    cfg.TEST.NUM_PICTURES = 8
    # Write report.html at the end of training: results, curves, best and worst images, data.
    cfg.TEST.REPORT = True
    # Losses on the first data set of DATASETS.TEST at each evaluation, as val_loss/*.
    cfg.TEST.LOSS = False
    # Evaluate and predict with the averaged weights of a checkpoint that holds them (SOLVER.EMA).
    cfg.TEST.EMA_WEIGHTS = True
    # Test-time augmentation, beside Detectron2's TEST.AUG.ENABLED, MIN_SIZES, MAX_SIZE and FLIP.
    aug = cfg.TEST.AUG
    # Augmented copies of an image that go through the network together.
    aug.BATCH_SIZE = 2
    # For each of MIN_SIZES the smallest and the largest square root of a box area, in pixels of the
    # resized image, that is believed at this size; () believes all boxes.
    aug.SIZE_RANGES = ()
    # How the detections of all copies become one set: "nms" keeps the best box of each cluster,
    # "vote" averages the cluster weighted by score.
    aug.MERGE = "nms"
    # IoU from which boxes of one class form a cluster, 0 to 1.
    aug.MERGE_IOU = 0.65
    # "vote" gives cluster members again with a score lowered by their overlap; below this score
    # they are dropped, 0 to 1.
    aug.MIN_SCORE = 0.05


def _add_logging(cfg: CN) -> None:
    cfg.LOGGING = CN()
    # Project on Weights & Biases that a training sends its numbers to, beside metrics.json and
    # TensorBoard; "" sends nothing. The package's own variables hold, such as WANDB_MODE=offline.
    cfg.LOGGING.WANDB = ""
