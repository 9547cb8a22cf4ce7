"""Edits of the compatibility wheel to the Python sources of Detectron2 v0.5, with reasons.

Every entry replaces an exact text and states how often it must occur; the builder
(`install_detectron2.py`) stops at the first mismatch, so that another source is never edited by
accident. The only file added is the stand-in for the compiled module `detectron2._C`.
"""

from __future__ import annotations

from typing import NamedTuple


class Edit(NamedTuple):
    """One exact substitution.

    Attributes:
        path: file below the package folder `detectron2/`.
        find: text to replace.
        replace: its replacement.
        count: number of occurrences of `find` the file must have.
        why: the failure without the edit.
    """

    path: str
    find: str
    replace: str
    count: int
    why: str


_NUMPY_ALIAS = "NumPy >= 1.24 has no such alias of the built-in type"
_NUMPY_BOOL = "NumPy 1.24-1.26 has no such alias of the built-in type"
_CPU_LAUNCH = "several CPU processes: no device, so gloo instead of NCCL (as later Detectron2 does)"
_NO_FAST_COCO = "COCO evaluation falls back to pycocotools because the compiled one is absent"

EDITS: tuple[Edit, ...] = (
    Edit(
        "data/transforms/transform.py",
        "Image.LINEAR",
        "Image.BILINEAR",
        1,
        "Pillow 10 dropped the old name of the constant",
    ),
    Edit(
        "model_zoo/model_zoo.py",
        "import pkg_resources\n",
        "",
        1,
        "setuptools >= 82 has no pkg_resources",
    ),
    Edit(
        "model_zoo/model_zoo.py",
        "pkg_resources.resource_filename(",
        "os.path.join(",
        1,
        "setuptools >= 82 has no pkg_resources",
    ),
    Edit(
        "model_zoo/model_zoo.py",
        '"detectron2.model_zoo", os.path.join(',
        "os.path.dirname(os.path.abspath(__file__)), os.path.join(",
        1,
        "the configs lie beside the module",
    ),
    Edit(
        "export/__init__.py",
        "from .api import *",
        "try:\n    from .api import *\n"
        "except ImportError:  # caffe2 is gone from PyTorch\n    pass",
        1,
        "PyTorch ships no caffe2; TracingAdapter and the FLOP counter must stay importable",
    ),
    Edit(
        "evaluation/coco_evaluation.py",
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt",
        "COCOeval_opt = None  # needs the compiled ops",
        1,
        _NO_FAST_COCO,
    ),
    Edit(
        "evaluation/coco_evaluation.py",
        "self._use_fast_impl = use_fast_impl",
        "self._use_fast_impl = use_fast_impl and COCOeval_opt is not None",
        1,
        _NO_FAST_COCO,
    ),
    Edit(
        "evaluation/coco_evaluation.py",
        "use_fast_impl=True, img_ids",
        "use_fast_impl=COCOeval_opt is not None, img_ids",
        1,
        _NO_FAST_COCO,
    ),
    Edit("evaluation/sem_seg_evaluation.py", "np.int)", "int)", 2, _NUMPY_ALIAS),
    Edit("evaluation/sem_seg_evaluation.py", "np.float)", "float)", 5, _NUMPY_ALIAS),
    Edit("data/datasets/pascal_voc.py", "np.str)", "str)", 1, _NUMPY_ALIAS),
    Edit("data/build.py", "dtype=np.int", "dtype=int", 2, _NUMPY_ALIAS),
    Edit("structures/masks.py", "np.bool)", "bool)", 2, _NUMPY_BOOL),
    Edit("utils/visualizer.py", "np.bool)", "bool)", 3, _NUMPY_BOOL),
    Edit("utils/video_visualizer.py", "np.bool)", "bool)", 1, _NUMPY_BOOL),
    Edit("evaluation/pascal_voc_evaluation.py", "np.bool)", "bool)", 2, _NUMPY_BOOL),
    Edit(
        "engine/launch.py",
        "assert torch.cuda.is_available(), "
        '"cuda is not available. Please check your installation."',
        "has_gpu = torch.cuda.is_available()",
        1,
        _CPU_LAUNCH,
    ),
    Edit("engine/launch.py", '"NCCL"', '"NCCL" if has_gpu else "GLOO"', 1, _CPU_LAUNCH),
    Edit(
        "engine/launch.py",
        "assert num_gpus_per_machine <=",
        "assert not has_gpu or num_gpus_per_machine <=",
        1,
        _CPU_LAUNCH,
    ),
    Edit(
        "engine/launch.py",
        "torch.cuda.set_device(local_rank)",
        "if has_gpu:\n        torch.cuda.set_device(local_rank)",
        1,
        _CPU_LAUNCH,
    ),
    Edit(
        "engine/defaults.py",
        'if "device_ids" not in kwargs:',
        'if "device_ids" not in kwargs and next(model.parameters()).is_cuda:',
        1,
        "several CPU processes: DistributedDataParallel refuses device ids for CPU parameters",
    ),
    Edit(
        "engine/hooks.py",
        "self._profiler.__exit__(None, None, None)\n",
        "self._profiler.__exit__(None, None, None)\n"
        '        if getattr(self._profiler, "on_trace_ready", None) is not None:\n'
        "            return  # the TensorBoard handler has saved this trace already\n",
        1,
        'PyTorch saves a trace once; the second attempt raises "Trace is already saved"',
    ),
    Edit(
        "engine/hooks.py",
        "profile(use_cuda=self._use_cuda)",
        'profile(use_device="cuda" if self._use_cuda else None)',
        1,
        "the autograd profiler renamed its argument",
    ),
    Edit(
        "layers/mask_ops.py",
        "np.array(mask, copy=False)",
        "np.asarray(mask)",
        1,
        "NumPy 2 raises where copy=False cannot be honored",
    ),
    Edit(
        "modeling/anchor_generator.py",
        "torch.meshgrid(shifts_y, shifts_x)",
        'torch.meshgrid(shifts_y, shifts_x, indexing="ij")',
        1,
        "PyTorch warns on every call without it",
    ),
)

STAND_IN_PATH = "_C.py"
STAND_IN = '''\
"""Stand-in for Detectron2's compiled operators, which this installation does not have.

Importing it is harmless. Calling an operator raises; NMS, RoIAlign and deformable convolution v1
on CPU come from torchvision and need nothing from here.
"""

_MISSING = (
    "box_iou_rotated",
    "nms_rotated",
    "deform_conv_forward",
    "deform_conv_backward_input",
    "deform_conv_backward_filter",
    "modulated_deform_conv_forward",
    "modulated_deform_conv_backward",
    "roi_align_rotated_forward",
    "roi_align_rotated_backward",
    "InstanceAnnotation",
    "COCOevalEvaluateImages",
    "COCOevalAccumulate",
)


def _missing(name):
    def operator(*args, **kwargs):
        raise NotImplementedError(
            f"detectron2._C.{name} is a compiled operator and this is the pure-Python "
            "compatibility wheel. For it, uninstall this wheel and build the official Detectron2."
        )

    operator.__name__ = name
    return operator


globals().update({name: _missing(name) for name in _MISSING})


def get_compiler_version():
    return "none (pure-Python installation)"


def get_cuda_version():
    return "none (pure-Python installation)"


def has_cuda():
    return False
'''


def describe_edits() -> str:
    """Formats the table as text, one block for each entry."""
    blocks = [
        f"detectron2/{e.path}  ({e.count} x)\n  why:  {e.why}\n"
        f"  from: {e.find.strip()!r}\n  to:   {e.replace.strip()!r}"
        for e in EDITS
    ]
    blocks.append(
        f"detectron2/{STAND_IN_PATH}  (new)\n"
        "  why:  the package imports its compiled module; the stand-in raises when one is called"
    )
    return "\n".join(blocks) + "\n"
