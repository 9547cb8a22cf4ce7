"""Parameter names of residual networks: torchvision's and timm's, transformers', Detectron2's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from .mapping import NameTable

Rules = tuple[tuple[str, str], ...]

# Of every network, and of no detector.
_TORCHVISION_STEM, _TRANSFORMERS_STEM = "conv1.weight", "embedder.embedder.convolution.weight"
_OUR_STEM = "stem.conv1.weight"
# Image classifiers in front of a network's names and behind it.
_WRAPPER, _CLASSIFIERS = "resnet.", ("fc.", "classifier.")


def torchvision_rules(theirs: str, ours: str) -> Rules:
    """The names of torchvision, which timm shares, below the prefix `theirs` -> Detectron2's below
    `ours`."""
    # Norms first: on the way back, a convolution's rule would take its norm as well.
    block = (
        ("downsample.1.", "shortcut.norm."),
        ("downsample.0.", "shortcut."),
        *((f"bn{k}.", f"conv{k}.norm.") for k in (1, 2, 3)),
        *((f"conv{k}.", f"conv{k}.") for k in (1, 2, 3)),
    )
    return (
        (f"{theirs}bn1.", f"{ours}stem.conv1.norm."),
        (f"{theirs}conv1.", f"{ours}stem.conv1."),
        *(
            (f"{theirs}layer{n}.{{i}}.{a}", f"{ours}res{n + 1}.{{i}}.{b}")
            for n in (1, 2, 3, 4)
            for a, b in block
        ),
    )


def transformers_rules(theirs: str, ours: str) -> Rules:
    """The names of transformers' ResNet below the prefix `theirs` -> Detectron2's below `ours`."""
    parts = (("normalization.", "norm."), ("convolution.", ""))
    stem, blocks = "embedder.embedder.", "encoder.stages."
    return (
        *((f"{theirs}{stem}{a}", f"{ours}stem.conv1.{b}") for a, b in parts),
        *(
            (f"{theirs}{blocks}{n}.layers.{{i}}.{a}{kind}", f"{ours}res{n + 2}.{{i}}.{b}{name}")
            for n in (0, 1, 2, 3)
            for a, b in (
                ("shortcut.", "shortcut."),
                *((f"layer.{k}.", f"conv{k + 1}.") for k in (0, 1, 2)),
            )
            for kind, name in parts
        ),
    )


def is_image_classifier(state: Iterable[str]) -> bool:
    """Returns True if these are the names of a residual network by itself."""
    names = {name.removeprefix(_WRAPPER) for name in state}
    return _TORCHVISION_STEM in names or _TRANSFORMERS_STEM in names


def image_classifier_to_ours(
    state: Mapping[str, Tensor], model_names: Iterable[str]
) -> dict[str, Tensor]:
    """Renames the weights of an image classifier to those of a detector's backbone.

    Args:
        state: names of torchvision, timm or transformers -> tensors; the classifier is left out.
        model_names: of the detector that shall have them.

    Raises:
        ValueError: the detector has no residual network, or other parts are in the state than a
            residual network of this layout has; the message names them.
    """
    stems = [name for name in model_names if name.endswith(_OUR_STEM)]
    if len(stems) != 1:
        raise ValueError(
            "these are the weights of a residual network, but the model has "
            f"{len(stems) or 'none'}; choose MODEL.BACKBONE.NAME to fit the weights"
        )
    prefix = stems[0].removesuffix(_OUR_STEM)
    kept = {k.removeprefix(_WRAPPER): v for k, v in state.items()}
    kept = {k: v for k, v in kept.items() if not k.startswith(_CLASSIFIERS)}
    make_rules = torchvision_rules if _TORCHVISION_STEM in kept else transformers_rules
    table = NameTable(source="a ResNet's layout", rules=make_rules("", prefix))
    try:
        return table.to_ours(kept)
    except KeyError as error:
        raise ValueError(
            f"these look like the weights of a residual network, but Detectron2's has no place for "
            f"{error.args[0]}"
        ) from error
