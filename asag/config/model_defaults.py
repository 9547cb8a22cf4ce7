"""Configuration keys of the model, with meaning, unit and default."""

from __future__ import annotations

from detectron2.config import CfgNode as CN


def add_model_config(cfg: CN) -> None:
    """Adds the keys below MODEL."""
    _add_model(cfg)
    _add_backbones(cfg)
    _add_proposal_generator(cfg)
    _add_decoder(cfg)
    _add_transformer(cfg)
    _add_asag(cfg)
    _add_matcher(cfg)
    _add_criterion(cfg)


def _add_model(cfg: CN) -> None:
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
    cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]
    # NHWC memory format for the backbone: faster convolutions on GPUs with tensor cores.
    cfg.MODEL.CHANNELS_LAST = False
    # Precision of convolutions and matrix products outside of training: "float32", "bfloat16" or
    # "float16".
    cfg.MODEL.INFERENCE_DTYPE = "float32"
    # torch.compile for backbone, encoder layers, decoder stages, and an anchor generator with fixed
    # capacities. Compilation takes about a minute; it pays off for fixed image sizes.
    cfg.MODEL.COMPILE = False
    # Activation checkpointing of backbone stages, encoder layers and decoder stages: less memory,
    # about a third more time, the same results.
    cfg.MODEL.ACTIVATION_CHECKPOINTING = False
    # IoU threshold of class-wise non-maximum suppression on the detections, 0 to 1; 0 is off.
    cfg.MODEL.NMS_THRESH_TEST = 0.0
    # Clip detections to the image and drop those of which nothing is left; False gives the boxes as
    # predicted.
    cfg.MODEL.CLIP_BOXES = True
    # Neck behind the backbone; "" is none (FPN is part of the backbone).
    cfg.MODEL.NECK = CN()
    cfg.MODEL.NECK.NAME = ""
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    # RoIAlign: side of the pooled grid, and samples a bin and direction.
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO = 2


def _add_backbones(cfg: CN) -> None:
    # torchvision's ResNet has the stride in the 3x3 convolution.
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    # Small residual network for training on a CPU ("build_slim_resnet_fpn_backbone", or without
    # pyramid "build_slim_resnet"): basic blocks of each of the four stages (without pyramid: of the
    # first stages), channels of the first stage (doubled in each following stage), and norm: "BN",
    # "GN" or "SyncBN". The network is trained from scratch, so its norms cannot be frozen.
    cfg.MODEL.SLIM_RESNET = CN()
    cfg.MODEL.SLIM_RESNET.BLOCKS = (1, 1, 1, 1)
    cfg.MODEL.SLIM_RESNET.WIDTH = 16
    cfg.MODEL.SLIM_RESNET.NORM = "BN"
    # Swin Transformer ("build_swin_fpn_backbone"), by default Swin-T: channels of the first stage
    # (doubled in each following stage), blocks and heads of the four stages, side of a window in
    # tokens, and stochastic depth rate of the last block (falling linearly to 0 at the first), 0 to
    # 1.
    cfg.MODEL.SWIN = CN()
    cfg.MODEL.SWIN.EMBED_DIM = 96
    cfg.MODEL.SWIN.DEPTHS = (2, 2, 6, 2)
    cfg.MODEL.SWIN.NUM_HEADS = (3, 6, 12, 24)
    cfg.MODEL.SWIN.WINDOW_SIZE = 7
    cfg.MODEL.SWIN.DROP_PATH_RATE = 0.2
    _add_timm(cfg)


def _add_timm(cfg: CN) -> None:
    """Networks of timm: "build_timm_fpn_backbone", or without pyramid "build_timm_backbone"."""
    # MODEL.PIXEL_MEAN and MODEL.PIXEL_STD must be those of the network. MODEL.BACKBONE.FREEZE_AT n
    # freezes all stages up to "resn" (1: the stem, 0: nothing).
    cfg.MODEL.TIMM = CN()
    t = cfg.MODEL.TIMM
    # Name of a timm model, optionally with a tag for its weights ("resnet50.a1_in1k").
    t.NAME = "tf_efficientnet_lite0"
    # Start from timm's weights, which timm downloads, or from a file or address of weights with
    # timm's names or EfficientNet-PyTorch's. Both are ignored if MODEL.WEIGHTS is set.
    t.PRETRAINED = False
    t.WEIGHTS = ""
    # Strides of the feature maps: 4 is "res2", 8 "res3", 16 "res4", 32 "res5".
    t.OUT_STRIDES = (4, 8, 16, 32)
    # Batch norms: "BN" (trained, statistics of each batch), "SyncBN" (statistics of all processes),
    # "FrozenStatistics" (scale and shift are trained) or "FrozenBN" (nothing is trained). Other
    # norms are trained, except in frozen stages.
    t.NORM = "BN"
    # Stochastic depth rate of the last block (falling linearly to 0 at the first), 0 to 1.
    t.DROP_PATH_RATE = 0.0


def _add_proposal_generator(cfg: CN) -> None:
    # Number of queries N. "DenseProposals" fills them with the best proposals of MODEL.RPN.
    cfg.MODEL.PROPOSAL_GENERATOR.NUM_QUERIES = 100
    # Initial boxes of learned proposals: "image" (the whole image), "grid", "random" or "center".
    cfg.MODEL.PROPOSAL_GENERATOR.BOX_INIT = "image"
    # Reference point of each object query, from which box centers are offsets: "predicted" from the
    # query, "learned" as a parameter, "origin" (the center of the image) or "none" (no offsets).
    cfg.MODEL.PROPOSAL_GENERATOR.REFERENCE_POINTS = "none"
    # Dynamic proposal generation of Dynamic Sparse R-CNN.
    cfg.MODEL.PROPOSAL_GENERATOR.DPG = CN()
    g = cfg.MODEL.PROPOSAL_GENERATOR.DPG
    # Experts N_e, each a full set of NUM_QUERIES proposals.
    g.NUM_EXPERTS = 4
    # Side of the square map that describes the image, in cells.
    g.SIZE = 30
    # Width between the two linear layers that predict the weights of the experts.
    g.FC_DIM = 1500
    # Merge fine levels into the coarsest one by depth-wise convolutions; False resizes each level
    # by itself.
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
    # Layers of the towers in front of the class and the box predictor.
    d.NUM_CLS_LAYERS = 1
    d.NUM_REG_LAYERS = 3
    # Inner width of the dynamic convolution.
    d.DYNAMIC_DIM = 64
    # Self-attention among the queries: "msa" (multi-head self-attention), "iou_esa" (the same,
    # weighted by the IoU of the queries' boxes), "iou" (the IoU matrix alone) or "none".
    d.SELF_ATTENTION = "msa"
    # SELF_ATTENTION "iou": divide each row of the IoU matrix by its sum.
    d.IOU_ROW_NORMALIZE = True
    # Dynamic channel weighting: each query masks the channels of its box features separately for
    # classification and regression, which have branches of their own.
    d.DCW = False
    # Disentangled dynamic convolution, an ablation without masks: "none", "half" (each task keeps
    # half of HIDDEN_DIM up to its predictor) or "full" (projected back to HIDDEN_DIM before its
    # tower).
    d.DISENTANGLE = "none"
    # Initial probability of sigmoid classifiers, 0 to 1.
    d.PRIOR_PROB = 0.01
    # Smallest and largest factor by which a stage with dynamic convolution changes a side of a box;
    # 0 leaves shrinking free. MMDetection's models: 0.016 and 62.5.
    d.MIN_BOX_SCALE = 0.0
    d.MAX_BOX_SCALE = 6250.0


def _add_transformer(cfg: CN) -> None:
    """DETR and Conditional DETR. Encoder and decoder share width, heads and rates of
    MODEL.DECODER."""
    # Keep padding at zero throughout a ResNet, so that an image gets the same features in any
    # batch. Without it, features near the padding depend on the batch, as in the authors' code.
    cfg.MODEL.EXACT_PADDING = False
    cfg.MODEL.ENCODER = CN()
    # Feature map of the backbone that the encoder reads, and number of encoder layers.
    cfg.MODEL.ENCODER.IN_FEATURE = "res5"
    cfg.MODEL.ENCODER.NUM_LAYERS = 6
    d = cfg.MODEL.DECODER
    # Pre-norm: norms in front of the sublayers of encoder and decoder instead of behind.
    d.PRE_NORM = False
    # Spatial query p_q of conditional cross-attention: "csq" = T(f) p_s, and the paper's ablations
    # "csq_c" = f, "csq_t" = T(f), "csq_p" = p_s, "csq_i" = T(c_q) p_s.
    d.SPATIAL_QUERY = "csq"
    # Where boxes are offsets to reference points: how far these are kept from the borders of the
    # image, in shares of its size. detrex's models: 0.001.
    d.REFERENCE_EPS = 1e-5
    # Form of the transformation T: "diagonal", "single", "block", "full" or "identity".
    d.SPATIAL_PROJECTION = "diagonal"


def _add_asag(cfg: CN) -> None:
    """Adaptive sparse anchors, and the keys of MODEL.DECODER for the decoders of ASAG."""
    d = cfg.MODEL.DECODER
    # "ParallelHeads": kind of the stages, "dynamic_conv" (ASAG-S), "adamixer" (A) or "deformable"
    # (D); number of auxiliary copies of the first stage, which run in training only; and index of
    # the copy that detects, -1 is the last (most figures of the authors' weights were measured with
    # 2, the last but one).
    d.STAGE = "dynamic_conv"
    d.NUM_AUXILIARY = 0
    d.MAIN_COPY = -1
    # AdaMixer stage: groups of channels, points sampled in each group, points after mixing.
    d.MIXER_GROUPS = 4
    d.MIXER_IN_POINTS = 32
    d.MIXER_OUT_POINTS = 128
    # Deformable attention, in encoder and decoder: points of a head and level.
    d.DEFORMABLE_POINTS = 4
    cfg.MODEL.DEFORMABLE_ENCODER = CN()
    # Feature maps of the backbone, finest first, to which a coarser one is added; encoder layers.
    cfg.MODEL.DEFORMABLE_ENCODER.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.DEFORMABLE_ENCODER.NUM_LAYERS = 6

    cfg.MODEL.ASAG = CN()
    a = cfg.MODEL.ASAG
    # Feature maps of strides 8, 16 and 32 from which anchors are predicted.
    a.IN_FEATURES = ["p3", "p4", "p5"]
    # Channels of the compressed maps, and side of a patch in cells.
    a.COMPRESSED_DIM = 8
    a.PATCH_SIZE = 15
    # Initial anchors of a patch: "random", or "grid" for training from scratch on little data.
    a.ANCHOR_INIT = "random"
    # Anchors of each of the five patches of P5 and P6 (n1), and of each probed patch (n2).
    a.FIXED_ANCHORS = 50
    a.PATCH_ANCHORS = 20
    # Anchors with a location score above ETA_F are kept; a negative value keeps all, so that only
    # MAX_ANCHORS limits their number (fixed top-k). Anchors with scores between ETA_L and ETA_H are
    # probed. ETA_IOU is the IoU threshold of the NMS on patches.
    a.ETA_F = 0.1
    a.ETA_L = 0.1
    a.ETA_H = 0.7
    a.ETA_IOU = 0.25
    # Smallest and largest number of anchors of an image.
    a.MIN_ANCHORS = 5
    a.MAX_ANCHORS = 200
    # Anchors with a smaller side get score 0, in pixels of the network input.
    a.MIN_SIDE = 3.0
    # Largest number of patches of an image and level; 0 is no limit.
    a.MAX_PATCHES = 0
    # Replace probed anchors by the predictions of their patches.
    a.REPLACE = True
    # Finest level that inference probes: 3, 4, or 5 for none.
    a.FINEST_LEVEL_TEST = 3
    # Fast inference: images with fewer than 3 selected anchors are not probed further, other images
    # by at most 15 patches a level.
    a.FAST_TEST = False
    # Slots of patches (an image and level) and of anchors (an image). With both positive all shapes
    # are fixed and inference needs no host synchronization; patches and anchors beyond the slots
    # are dropped, the lowest scores first. 0 and 0 size the slots by the fullest image of a batch.
    a.PATCH_CAPACITY = 0
    a.ANCHOR_CAPACITY = 0
    # Smallest number of patches of each training image on P4 and on P3 (N_TP).
    a.MIN_TRAIN_PATCHES = 4
    # Forward passes at the start of training without probing, on ground-truth patches: about one
    # epoch (7330 passes of 16 images on COCO).
    a.GT_WARMUP_ITERS = 7330
    # Use the wrong targets of flipped P6 patches that the authors' code used in training.
    a.RELEASED_FLIP = False
    # Weights of the anchor losses.
    a.CLASS_WEIGHT = 8.0
    a.L1_WEIGHT = 4.0
    a.GIOU_WEIGHT = 2.0
    # Inner width of the proposal block's feed-forward network, and depth of its towers (also for
    # "DenseProposals").
    a.FFN_DIM = 2048
    a.NUM_CLS_LAYERS = 1
    a.NUM_REG_LAYERS = 3
    # Denoising queries, noised copies of the ground truth beside the anchors in training; 0 is off
    # (the paper: 200). Noise of their boxes in shares of the sides, and its decrease a pass.
    a.NUM_DENOISING = 0
    a.DENOISING_NOISE = 0.4
    a.DENOISING_NOISE_DECAY = 0.0


def _add_matcher(cfg: CN) -> None:
    cfg.MODEL.MATCHER = CN()
    m = cfg.MODEL.MATCHER
    # "HungarianMatcher": one query an object. "OptimalTransportMatcher": several queries an object,
    # depending on its predictions (see OT below).
    m.NAME = "HungarianMatcher"
    # Weights of the matching cost: class, L1 of normalized boxes, negative GIoU.
    m.CLASS_COST = 2.0
    m.L1_COST = 5.0
    m.GIOU_COST = 2.0

    m.OT = CN()
    ot = m.OT
    # Dynamic k: the units of an object are the sum of the IoUs of its best Q predictions.
    ot.Q = 8
    # Fixed number of units of every object instead; 0 is dynamic k.
    ot.FIXED_K = 0
    # Increase of units by stage, k* = k - UNIT_STEP * (T - t) (Eq. 2), and rounding of the result:
    # "floor", "round", or "none" (fractional units).
    ot.UNIT_INCREASE = True
    ot.UNIT_STEP = 0.5
    ot.UNIT_ROUNDING = "floor"
    # Largest share of positive predictions, above 0 and at most 1.
    ot.CAP = 0.8
    # Weight alpha of the regression cost, and its terms: "l1", "giou".
    ot.ALPHA = 1.0
    ot.REG_COST = ("l1", "giou")
    # "exact" (linear assignment with repeated rows), "sinkhorn" (no host synchronization), or
    # "auto": exact on a CPU, sinkhorn on a GPU.
    ot.SOLVER = "auto"
    # Sinkhorn: entropy weight of the first and the last iteration (in units of cost), largest
    # number of iterations, and over-relaxation, 1 to 1.7. OTA's plain form is 0.1, 0.1, 50, 1.
    ot.EPS_START = 1.0
    ot.EPS = 0.001
    ot.ITERS = 60
    ot.RELAXATION = 1.5
    # Divide each row of the plan by its maximum before reading the assignment, as OTA does.
    ot.ROW_RESCALE = False
    # Largest number of rounds that repair row counts after the iterations; 0 is off.
    ot.REPAIR_ROUNDS = 8


def _add_criterion(cfg: CN) -> None:
    cfg.MODEL.CRITERION = CN()
    c = cfg.MODEL.CRITERION
    # "SetCriterion", or "QueryWeightingCriterion": matched queries are weighted by their quality.
    c.NAME = "SetCriterion"
    # "focal" (sigmoid) or "softmax" (cross entropy with a background column); also selects the
    # class cost of the matcher.
    c.CLASS_LOSS = "focal"
    # Weights of the three losses.
    c.CLASS_WEIGHT = 2.0
    c.L1_WEIGHT = 5.0
    c.GIOU_WEIGHT = 2.0
    # Box format of L1 loss and cost: "xyxy" or "cxcywh", in shares of the image size.
    c.L1_FORMAT = "xyxy"
    # Focal loss: weight of positives, 0 to 1, and exponent.
    c.FOCAL_ALPHA = 0.25
    c.FOCAL_GAMMA = 2.0
    # Weight of background in the cross entropy.
    c.NO_OBJECT_WEIGHT = 0.1
    # Weight of very small objects in the matching cost, and in the loss of the
    # "QueryWeightingCriterion". It falls to 1 with the square root of the share of the image that
    # an object covers; 1 is off.
    c.AREA_WEIGHT = 1.0
    # "QueryWeightingCriterion": exponents of score and IoU in the weights of matched queries
    # (gamma1 and gamma2 of ASAG).
    c.SCORE_EXPONENT = 0.4
    c.IOU_EXPONENT = 0.6
    # Divisor of the sums: number of "objects", or of "positives" of each stage.
    c.NORMALIZER = "objects"
    # Losses of every stage; False keeps those of the last stage only.
    c.DEEP_SUPERVISION = True
