"""Loading weights that others published, under their own names."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from .class_heads import adopt_classes, class_heads, coco_row_names
from .detr import CLASSIFIER, PUBLISHED_COLUMNS, UNUSED_CATEGORIES, keep_used_classes
from .download import local_file
from .layouts import LAYOUTS, OURS, ConversionError, closest_layout, recognize
from .reading import UnreadableError, read_checkpoint
from .report import BATCH_COUNTER, LoadedFile
from .resnet import image_classifier_to_ours, is_image_classifier
from .settings import apply_settings, describe, known_settings
from .swin import swin_to_ours
from .timm import EFFICIENTNET_MARK, holds_timm_network, timm_to_ours

# Parameters that only a Swin Transformer by itself has: the authors' name, torchvision's name.
_SWIN_MARKS = ("patch_embed.norm.weight", "features.1.0.attn.relative_position_bias_table")


class PartialWeightsError(ValueError):
    """A file leaves a part of the model at its random start; the message names both."""


def to_library_names(
    state: Mapping[str, Tensor], model_names: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Renames a published state dict if its layout is known; otherwise returns it as it is.

    A detector's layout counts as known when it has a place for most of the names. The others, such
    as buffers of a loss, keep their names, and loading reports them as left out.

    Args:
        state: parameter name -> tensor of a whole detector, or of a Swin Transformer, residual
            network or network of timm trained on image classification.
        model_names: of the model that shall have them; weights of an image classifier need them.

    Raises:
        ValueError: weights of an image classifier for a model without such a network, or a part of
            a matrix is missing.
    """
    model_names = list(model_names)
    if EFFICIENTNET_MARK in state or holds_timm_network(state, model_names):
        return timm_to_ours(state, model_names)
    if any(mark in state for mark in _SWIN_MARKS):
        return swin_to_ours(state)
    if is_image_classifier(state):
        return image_classifier_to_ours(state, model_names)
    layout, strangers = detector_layout(state)
    if layout is None:
        return dict(state)
    kept = {name: state[name] for name in strangers}
    known = {name: value for name, value in state.items() if name not in kept}
    try:
        return kept | LAYOUTS[layout].to_ours(known)
    except KeyError as error:
        raise ValueError(f"incomplete: {error.args[0]}") from error


def detector_layout(names: Iterable[str]) -> tuple[str | None, list[str]]:
    """The layout that has a place for most of these names, None if there is none; and the names
    that it has no place for."""
    names = list(names)
    if layout := recognize(names):
        return layout, []
    try:
        layout, strangers = closest_layout(names)
    except ConversionError:
        return None, names
    return (layout, strangers) if 2 * len(strangers) < len(names) else (None, names)


def source_of(names: Iterable[str]) -> str:
    """Whose parameter names these are, for messages."""
    names = set(names)
    if EFFICIENTNET_MARK in names:
        return "an image classifier, an EfficientNet"
    if not names.isdisjoint(_SWIN_MARKS):
        return "an image classifier, a Swin Transformer"
    if is_image_classifier(names):
        return "an image classifier, a residual network"
    layout, _ = detector_layout(names)
    return LAYOUTS[layout].source if layout else "of no known layout"


class PublishedCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, for addresses of all kinds (`download.local_file`) and all
    published layouts; it runs no code of a file, fits classifiers to the classes of the data, sets
    the model to compute as the source of the weights does, and logs where every tensor came from.

    Attributes:
        class_names: of the data to train on; classifiers of other classes are fitted to them.
            None takes classifiers as they are.
        use_average: where a checkpoint holds averaged weights beside the latest ones ("ema" beside
            "model"), load the averaged ones.
        whole: refuse files that leave a part of the model at its random start.
        settings: configuration key -> value that the weights loaded last need, because their layout
            or the file says so; empty where the configuration decides. Files that descend from such
            weights keep them in the entry "settings".
    """

    use_average = True
    whole = False

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        class_names: Sequence[str] | None = None,
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ) -> None:
        """
        Args:
            model: the detector.
            save_dir: folder of checkpoints.
            class_names: see the attribute.
            save_to_disk: whether to write; default: on the main process.
            checkpointables: further objects with a state.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.class_names = class_names
        self.settings: dict[str, Any] = {}
        self._file = LoadedFile()

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Detectron2's, for any address.

        Raises:
            FileNotFoundError: no such file.
            DownloadError: it cannot be downloaded.
            PartialWeightsError: see `whole`.
            ValueError: the file is no weights file, holds code, or nothing of this model.
        """
        self._file = LoadedFile(address=str(path))
        return super().load(local_file(str(path)) if path else path, *args, **kwargs)

    def _load_file(self, filename: str) -> dict[str, Any]:
        loaded = read_checkpoint(filename)
        if self.use_average and _holds_average(loaded):
            self.logger.info("loading the averaged weights (SOLVER.EMA) of the checkpoint")
            loaded["model"] = loaded.pop("ema")
        self._file.names = frozenset(loaded["model"])
        # Files with matching heuristics are Detectron2's own business.
        if loaded.get("matching_heuristics", False):
            self._file.layout = f"by {loaded.get('__author__')}, matched by Detectron2"
            return loaded
        wanted = self.model.state_dict().keys()
        try:
            ours = to_library_names(loaded["model"], wanted)
        except ValueError as error:
            raise ValueError(f"weights {self._file.address}: {error}") from error
        if ours.keys() != self._file.names:
            layout, _ = detector_layout(self._file.names)
            self._file.published = layout not in (None, OURS)
            self._file.layout = source_of(self._file.names)
            if self._file.published:
                loaded["settings"] = dict(LAYOUTS[layout].settings)
        else:
            self._file.layout = "the model's own names"
        # Frozen batch norms do not count.
        loaded["model"] = {
            k: v for k, v in ours.items() if k in wanted or not k.endswith(BATCH_COUNTER)
        }
        return loaded

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        if not checkpoint.get("matching_heuristics", False):
            self._fit_classes(checkpoint)
        incompatible = super()._load_model(checkpoint)
        if self.whole:
            _check_whole(self.model, incompatible, self._file.address)
        report = self._file.report(self.model, incompatible)
        if not report.loaded:
            raise ValueError(
                f"nothing in {self._file.address} belongs to this model: names in the file are "
                f"like {min(self._file.names)}, in the model like "
                f"{min(report.fresh, default='none')}. Take the configuration that the weights "
                "were trained with"
            )
        expected = report.complete or report.backbone_only
        self.logger.log(logging.INFO if expected else logging.WARNING, str(report))
        # A backbone, or one with its pyramid, computes the same everywhere.
        whole = any(name.startswith("roi_heads.") for name in report.loaded)
        self._apply_settings(checkpoint.get("settings") if whole else {})
        return incompatible

    def _apply_settings(self, wanted: Any) -> None:
        """Makes the model compute as its weights need it."""
        self.settings = known_settings(self.model, wanted)
        if changes := apply_settings(self.model, self.settings):
            self.logger.warning(
                f"weights {self._file.address} ({self._file.layout}) need other values than the "
                f"configuration has; the model now computes with {describe(changes)}"
            )

    def _fit_classes(self, checkpoint: dict[str, Any]) -> None:
        """Gives the classifiers in a checkpoint the rows that the model has, by class name."""
        fresh, names = self.model.state_dict(), checkpoint.get("class_names")
        classifier = f"{CLASSIFIER}.bias"
        if classifier in fresh:
            before = checkpoint["model"]
            checkpoint["model"] = keep_used_classes(before, len(fresh[classifier]))
            fewer = checkpoint["model"].get(classifier) is not before.get(classifier)
            if fewer and names and len(names) == PUBLISHED_COLUMNS:
                names = [x for i, x in enumerate(names) if i not in UNUSED_CATEGORIES]
                checkpoint["class_names"] = names
        if self.class_names is None:
            return
        heads = class_heads(checkpoint["model"])
        if not names and heads and self._file.published:
            names = coco_row_names(len(checkpoint["model"][heads[0]]))
            if names:
                self.logger.info(
                    f"weights {self._file.address}: taken for trained on COCO's classes"
                )
        checkpoint["model"], transfer = adopt_classes(
            checkpoint["model"], fresh, self.class_names, names
        )
        if transfer is not None:
            self._file.fresh_classes = transfer.rows.count(None) * bool(transfer.file_names)
            level = logging.WARNING if None in transfer.rows else logging.INFO
            self.logger.log(level, f"weights {self._file.address}: {transfer.describe()}")

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        """Silent: the report has said it."""


def _check_whole(model: nn.Module, incompatible: Any, address: str) -> None:
    """Raises PartialWeightsError unless every parameter of the model came from the file."""
    wrong = list(incompatible.incorrect_shapes)
    if wrong:
        name, given, expected = wrong[0]
        raise PartialWeightsError(
            f"weights {address} do not fit the configuration: {len(wrong)} tensors have other "
            f"shapes than in the model; {name} is {tuple(given)} in the file, {tuple(expected)} in "
            "the model. Take the configuration the weights were trained with (config.yaml in their "
            "folder), or set MODEL.ROI_HEADS.NUM_CLASSES to their number of classes"
        )
    missing = set(incompatible.missing_keys) & {name for name, _ in model.named_parameters()}
    if missing:
        raise PartialWeightsError(
            f"weights {address} do not fit the configuration: {len(missing)} of the model's "
            f"parameters are not in the file, such as {min(missing)}. Weights of a backbone alone, "
            "or of another architecture, detect nothing"
        )


def _holds_average(loaded: Mapping[str, Any]) -> bool:
    """Returns True if "ema" is what this library writes: all of the model, under the same names."""
    average = loaded.get("ema")
    return isinstance(average, Mapping) and average.keys() == loaded["model"].keys()


def load_weights(model: nn.Module, path: str, *, use_average: bool = True) -> dict[str, Any]:
    """Loads a checkpoint whole.

    Args:
        model: the detector.
        path: file, or any address of `download`.
        use_average: take averaged weights (SOLVER.EMA) where the file holds them.

    Returns:
        What the checkpoint holds besides the model, such as `class_names`, and `settings` where its
        source computes in its own way; the model has taken them over.

    Raises:
        FileNotFoundError: no such file.
        DownloadError: it cannot be downloaded.
        ValueError: unreadable, or not of this model; the message names file, tensor and way out.
    """
    checkpointer = PublishedCheckpointer(model, save_to_disk=False)
    checkpointer.use_average, checkpointer.whole = use_average, True
    try:
        return checkpointer.load(path)
    except (UnreadableError, PartialWeightsError):
        raise
    except (KeyError, ValueError) as error:
        raise ValueError(f"weights {path} do not fit the configuration: {error}") from error
