"""Networks of timm (PyTorch Image Models) as backbones, with or without a feature pyramid.

B images, H x W input, C channels of a feature map.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor, nn

from ...checkpoint.download import local_file
from ...checkpoint.reading import read_checkpoint
from ...checkpoint.report import BATCH_COUNTER
from ...checkpoint.timm import to_body_names
from .timm_extractor import (
    create_extractor,
    drop_behind,
    map_positions,
    module_name,
    modules_up_to,
)

# Largest difference of MODEL.PIXEL_MEAN and MODEL.PIXEL_STD from the network's own, in gray levels:
# 127 is accepted for 127.5.
PIXEL_TOLERANCE = 1.0

logger = logging.getLogger(__name__)


class TimmBackbone(Backbone):
    """Feature extractor of timm with outputs such as "res2" (stride 4) to "res5" (stride 32).

    Attributes:
        name: of the network.
        body: timm's module; parameter names below it are timm's.
        pixel_mean, pixel_std: normalization of the pretrained weights, RGB, 0 to 255.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        out_strides: Sequence[int] = (4, 8, 16, 32),
        norm: str = "BN",
        drop_path_rate: float = 0.0,
        freeze_at: int = 0,
        **options: Any,
    ) -> None:
        """
        Args:
            name: of a timm model, optionally with a tag for its weights ("resnet50.a1_in1k").
            pretrained: let timm download its weights.
            out_strides: strides of the feature maps, each a power of two. If a network has several
                maps of a stride, the last is used.
            norm: batch norms: "BN" uses the statistics of each batch, "SyncBN" those of all
                processes, "FrozenStatistics" fixes the statistics and trains scale and shift,
                "FrozenBN" fixes all. Other norms are trained.
            drop_path_rate: stochastic depth rate of the last block, 0 to 1.
            freeze_at: n freezes all stages up to "resn", including batch norms; 1 the stem, 0
                nothing.
            options: further arguments of the timm model.

        Raises:
            ImportError: timm is not installed.
            ValueError: a value is not possible for this network. The message names its key.
        """
        super().__init__()
        self.name = name
        self.body = create_extractor(name, pretrained, drop_path_rate, options)
        info = self.body.feature_info
        self._positions = map_positions(name, info.reduction(), out_strides)
        self._shapes = {
            f"res{stride.bit_length() - 1}": ShapeSpec(channels=info.channels()[i], stride=stride)
            for stride, i in self._positions.items()
        }
        self._channels_last = str(getattr(self.body, "output_fmt", "")).endswith("NHWC")
        preprocessing = self.body.pretrained_cfg
        self.pixel_mean = tuple(255 * x for x in preprocessing["mean"])
        self.pixel_std = tuple(255 * x for x in preprocessing["std"])
        self._set_norms(norm)
        self._freeze(freeze_at)
        drop_behind(self.body, info.module_name()[max(self._positions.values())])

    def _set_norms(self, norm: str) -> None:
        """Replaces the batch norms according to `norm`."""
        from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d

        self._fixed_statistics = norm == "FrozenStatistics"
        if norm != "BN" and not any(isinstance(x, nn.BatchNorm2d) for x in self.body.modules()):
            raise ValueError(
                f"MODEL.TIMM.NORM is {norm!r}, but {self.name} has no batch norms; set it to 'BN'"
            )
        if norm == "SyncBN":
            self.body = convert_sync_batchnorm(self.body)
        elif norm == "FrozenBN":
            self.body = freeze_batch_norm_2d(self.body)

    def _freeze(self, freeze_at: int) -> None:
        from timm.layers import freeze_batch_norm_2d

        for name, module in modules_up_to(self.body, freeze_at):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
            if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
                parent, _, child = name.rpartition(".")
                setattr(self.body.get_submodule(parent), child, freeze_batch_norm_2d(module))

    def train(self, mode: bool = True) -> TimmBackbone:
        """Sets the mode; norms with fixed statistics stay in evaluation mode."""
        super().train(mode)
        if self._fixed_statistics:
            for module in self.body.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    @property
    def stages(self) -> list[nn.Module]:
        """Stages of the network in order, or blocks of a transformer; empty if it has neither."""
        modules = dict(self.body.named_modules())
        for name in ("blocks", "model.blocks"):
            if isinstance(blocks := modules.get(name), nn.Sequential | nn.ModuleList):
                return list(blocks)
        ends = [module_name(self.body, x) for x in self.body.feature_info.module_name()]
        return [modules[x] for x in ends if x and len(list(modules[x].modules())) > 1]

    @property
    def size_divisibility(self) -> int:
        """Largest stride: networks differ in their handling of incomplete cells at the border."""
        return max(self._positions)

    def output_shape(self) -> dict[str, ShapeSpec]:
        return dict(self._shapes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Computes the feature maps.

        Args:
            images: (B, 3, H, W), H and W multiples of `size_divisibility`.

        Returns:
            name -> (B, C, H / stride, W / stride).

        Raises:
            ValueError: the maps have other sizes, because of convolutions without padding.
        """
        every = self.body(images)
        maps = [every[i] for i in self._positions.values()]
        if self._channels_last:
            maps = [x.permute(0, 3, 1, 2).contiguous() for x in maps]
        outputs = dict(zip(self._shapes, maps, strict=True))
        for name, x in outputs.items():
            expected = tuple(-(-side // self._shapes[name].stride) for side in images.shape[-2:])
            if x.shape[-2:] != expected:
                raise ValueError(
                    f"MODEL.TIMM.NAME {self.name}: its map {name} has {tuple(x.shape[-2:])} cells, "
                    f"not {expected}: boxes would be in the wrong place. Choose another network"
                )
        return outputs

    def load_weights(self, address: str) -> None:
        """Loads the weights of a whole network, for example from image classification.

        Args:
            address: of a file, see `asag.checkpoint.download`, with timm's names or
                EfficientNet-PyTorch's.

        Raises:
            OSError: the file cannot be read or downloaded.
            ValueError: it is damaged, or of another network.
        """
        given = to_body_names(read_checkpoint(local_file(address))["model"], self.body.state_dict())
        own = _without_counters(self.body.state_dict())
        _check_whole(address, _without_counters(given), own)
        self.body.load_state_dict(given, strict=False)
        logger.info(f"weights {address}: all {len(own)} tensors of {self.name} loaded")


def _without_counters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a state dict without the counters of batch norms, which frozen ones lack."""
    return {name: value for name, value in state.items() if not name.endswith(BATCH_COUNTER)}


def _check_whole(address: str, given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raises ValueError if names or shapes of the weights differ from the network's."""
    missing = [x for x in own if x not in given]
    wrong = [x for x in given if x not in own or given[x].shape != own[x].shape]
    for names, fault in ((missing, "lacks"), (wrong, "has another form of")):
        if names:
            raise ValueError(
                f"MODEL.TIMM.WEIGHTS {address} are not of MODEL.TIMM.NAME: of the network's "
                f"{len(own)} tensors the file {fault} {len(names)}, such as {names[0]}"
            )


def check_pixels(cfg: CfgNode, name: str, mean: Sequence[float], std: Sequence[float]) -> None:
    """Compares the normalization of the input with that of the network.

    Args:
        cfg: the configuration.
        name: of the network.
        mean, std: normalization of the network, RGB, 0 to 255.

    Raises:
        ValueError: they differ. The message gives the values to set.
    """
    wrong = []
    for key, own in (("PIXEL_MEAN", mean), ("PIXEL_STD", std)):
        own = own if cfg.INPUT.FORMAT == "RGB" else own[::-1]
        if max(abs(a - b) for a, b in zip(cfg.MODEL[key], own, strict=True)) > PIXEL_TOLERANCE:
            wrong.append((f"MODEL.{key}", cfg.MODEL[key], [round(x, 3) for x in own]))
    if wrong:
        said = ", ".join(f"{key} is {list(value)}" for key, value, _ in wrong)
        options = " ".join(f'{key} "{own}"' for key, _, own in wrong)
        raise ValueError(
            f"{said}, but {name} was trained with other values (INPUT.FORMAT {cfg.INPUT.FORMAT}); "
            f"set {options}"
        )


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """Builds the network of `MODEL.TIMM`, outputs "res2" to "res5" or those of `OUT_STRIDES`.

    `PRETRAINED` and `WEIGHTS` are initial weights for training. They are ignored if MODEL.WEIGHTS
    is set, so that a trained detector needs neither internet nor that file.

    Raises:
        ValueError: a value is not possible. The message names its key.
        OSError: the file of `WEIGHTS` cannot be read or downloaded.
    """
    return _build(cfg, input_shape, cfg.MODEL.TIMM.OUT_STRIDES)


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Builds `build_timm_backbone` with Detectron2's feature pyramid.

    The outputs are "p2" to "p6" for MODEL.FPN.IN_FEATURES "res2" to "res5"; in general, one for
    each of them and one more behind the last. Stages behind the last one are not built.
    """
    names = list(cfg.MODEL.FPN.IN_FEATURES)
    strides = [2 ** int(x[3:]) for x in names if re.fullmatch(r"res\d", x)]
    contiguous = strides == [strides[0] << i for i in range(len(names))] if strides else False
    if not contiguous or not set(strides) <= set(cfg.MODEL.TIMM.OUT_STRIDES):
        available = ", ".join(f"res{x.bit_length() - 1}" for x in cfg.MODEL.TIMM.OUT_STRIDES)
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES is {names}; it must be neighbors, finest first, among the maps "
            f"of MODEL.TIMM.OUT_STRIDES: {available}"
        )
    top_block = LastLevelMaxPool()  # reads p5 by default
    top_block.in_feature = names[-1].replace("res", "p")
    return FPN(
        bottom_up=_build(cfg, input_shape, strides),
        in_features=names,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _build(cfg: CfgNode, input_shape: ShapeSpec, strides: Sequence[int]) -> TimmBackbone:
    """See `build_timm_backbone`."""
    timm, start = cfg.MODEL.TIMM, not cfg.MODEL.WEIGHTS
    if timm.PRETRAINED and timm.WEIGHTS:
        raise ValueError(
            f"MODEL.TIMM.PRETRAINED is True and MODEL.TIMM.WEIGHTS is {timm.WEIGHTS!r}; choose one"
        )
    pretrained = bool(timm.PRETRAINED or timm.WEIGHTS)
    if pretrained and not start:
        logger.info("MODEL.WEIGHTS is set: MODEL.TIMM.PRETRAINED and MODEL.TIMM.WEIGHTS not used")
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    if freeze_at > 0 and start and not pretrained:
        logger.warning(
            f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}, but no key names weights: "
            "training from here leaves these stages at their random start. Set it to 0, or set "
            "MODEL.TIMM.PRETRAINED, MODEL.TIMM.WEIGHTS or MODEL.WEIGHTS"
        )
    backbone = TimmBackbone(
        timm.NAME,
        pretrained=timm.PRETRAINED and start,
        out_strides=strides,
        norm=timm.NORM,
        drop_path_rate=timm.DROP_PATH_RATE,
        freeze_at=freeze_at,
        in_chans=input_shape.channels,
    )
    map_positions(timm.NAME, backbone.body.feature_info.reduction(), timm.OUT_STRIDES)  # all exist
    check_pixels(cfg, timm.NAME, backbone.pixel_mean, backbone.pixel_std)
    if timm.WEIGHTS and start:
        backbone.load_weights(timm.WEIGHTS)
    return backbone
