"""Writes the text of MODEL_ZOO.md from figures and records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from asag.checkpoint.layouts import LAYOUTS
from asag.model_zoo.entries import Entry, Release

HUB = "hf://"

HEAD = """\
# Model zoo

Written by `python tools/make_model_zoo.py`; do not edit. Names are those of `asag.model_zoo`:

```python
from asag import Detector, model_zoo

detector = Detector.from_pretrained()  # knows photographs of people and animals
detector = Detector.from_pretrained("sparse_rcnn_r50_300pro_3x_mmdet")  # 45.0 AP on COCO
model = model_zoo.get("conditional_detr_r50_50ep", pretrained=True)  # 41.0 AP on COCO
model = model_zoo.get("asag_a_r50_100_1x", pretrained="ASAG_A_r50_1x_100.pth")  # from a page
```

The second and the third download weights that others trained, once, and convert them while they
are loaded.

A plain name is a recipe, and with `pretrained=True` the weights of its authors. `_mmdet`,
`_detrex` and `_hf` behind a name are weights of the same model from MMDetection, detrex and the
Hugging Face hub.

"AP, published" is what the paper's table says; **nobody has trained the COCO and CrowdHuman
recipes to the end with this library**. Parameters, multiply-adds (GMACs) and floating point
operations (GFLOPs, two for each multiply-add) are counted by `tools/analyze.py` at the input given,
by the rules in `tools/analysis/flops.py`. Where auxiliary copies of the decoder only train, the
parameters without them stand behind the slash.
"""

BY_NAME = """\
## COCO detectors by one word

Weights of 80 COCO classes behind direct addresses: `Detector.from_pretrained(name)` and
`model_zoo.get(name, pretrained=True)` download them. The AP is that of COCO val2017, as stated by
whoever publishes the file; it was measured with their code, not with this library. What is proven
here is that names, shapes and arithmetic are theirs (see the end of this page). Downloads are
resumed, and checked against the SHA-256 where the file name or the hub tells it. Where a source
computes otherwise than the recipe, the configuration of the name says so (below the table).
"""

ADAPTIVE = """\
Where the number of queries follows the image, the least and the largest are given, and the
multiply-adds are those of a black image with random weights of seed 0.
"""

AGREEMENT = """\
## Numerical agreement

Reference tensors made with the authors' implementations, and with MMDetection's (`mmdet/`),
rebuilt with this library's modules (`python tools/verify.py DIR`): largest absolute error of the
values (features, boxes in pixels, logits, losses) and of the gradients, with the tensor that has it
and the tolerance there. Of Dynamic Sparse R-CNN no code was released; its suite holds transport
problems that were solved exactly, independently of any detector.
"""


def render(entries: Sequence[Entry], figures: Mapping[str, Any], sources: Mapping[str, Any]) -> str:
    """Returns the whole page.

    Args:
        entries: all names of the zoo.
        figures: content of figures.json.
        sources: facts of the paper by folder of configurations.
    """
    parts = [HEAD]
    own = [x for x in entries if x.weights]
    if own:
        parts += ["## Weights that come with the library\n", _own_table(own)]
    parts += [BY_NAME, _release_table(x for x in entries if x.release and x.release.address)]
    folders = sorted({x.config.parent.name for x in entries})
    for folder in folders:
        recipes = [x for x in entries if x.config.parent.name == folder and x.recipe]
        source = sources.get(folder, {})
        parts.append(f"## {source.get('title') or source.get('paper', 'Combinations')}\n")
        if repository := sources.get(folder, {}).get("repository"):
            parts.append(f"The authors' code: {repository}\n")
        parts.append(_recipe_table(recipes, figures["models"]))
        if any(isinstance(figures["models"][x.name]["queries"], list) for x in recipes):
            parts.append(ADAPTIVE)
    if figures["agreement"]:
        parts += [AGREEMENT, _agreement_table(figures["agreement"], sources)]
    return "\n".join(parts)


def _own_table(entries: Iterable[Entry]) -> str:
    rows = []
    for entry in entries:
        record = entry.training
        trained, reached = record["training"], record["evaluation"]
        options = " ".join(x or '""' for x in entry.options)
        rows.append(
            [
                f"`{entry.name}`",
                f"`{entry.config.parent.name}/{entry.config.stem}`"
                + (f" with `{options}`" if options else ""),
                f"{reached['AP']:.1f}",
                f"{reached['AP50']:.1f}",
                reached["dataset"],
                f"{trained['iterations']} iterations, seed {trained['seed']}, "
                f"{trained['hardware']}, {trained['date']}",
                f"{record['bytes'] / 1e6:.1f} MB",
            ]
        )
    header = ["name", "configuration", "AP", "AP50", "of", "training", "file"]
    notes = [f"`{x.name}`: {x.training['note']}\n" for x in entries if x.training.get("note")]
    tables = [_class_table(x) for x in entries if "classes" in x.training["evaluation"]]
    return "\n".join([_table(header, rows), *notes, *tables])


def _class_table(entry: Entry) -> str:
    """AP50 of every class that the evaluation's images have."""
    reached = entry.training["evaluation"]
    there = {k: x for k, x in reached["classes"].items() if x["objects"]}
    rows = [
        ["AP50", *(f"{x['AP50']:.1f}" for x in there.values())],
        ["objects", *(str(x["objects"]) for x in there.values())],
    ]
    head = f"`{entry.name}` by class, on the {reached['images']} images of {reached['dataset']}:\n"
    return f"{head}\n{_table(['', *there], rows)}"


def _release_table(entries: Iterable[Entry]) -> str:
    rows, options = [], {}
    for entry in entries:
        release = entry.release
        rows.append(
            [
                f"`{entry.name}`",
                "" if entry.recipe else f"`{entry.config.stem}`",
                f"{release.ap}",
                release.trained_by,
                f"[{_file_name(release.address)}]({_url(release.address)})",
            ]
        )
        if entry.options:
            options[LAYOUTS[release.layout].source] = " ".join(entry.options)
    notes = [f"{source} computes with `{words}`." for source, words in options.items()]
    table = _table(["name", "recipe", "AP", "whose training", "weights"], rows)
    return "\n".join([table, " ".join(notes), ""])


def _file_name(address: str) -> str:
    return address if address.startswith(HUB) else address.rpartition("/")[2]


def _url(address: str) -> str:
    return address.replace(HUB, "https://huggingface.co/", 1)


def _where(release: Release) -> str:
    """Source of the authors' weights, and how their AP was taken."""
    if release.address:
        return f"[download]({_url(release.address)})"
    notes = [f"`{release.file}`"] if release.file else []
    notes += [release.note] if release.note else []
    notes += [f"AP with `{' '.join(release.options)}`"] if release.options else []
    return ", ".join([f"[page]({release.page})", *notes])


def _recipe_table(entries: Iterable[Entry], models: Mapping[str, Any]) -> str:
    header = ["name", "AP, published", "epochs", "queries", "parameters", "input", "GMACs"]
    header += ["GFLOPs", "the authors' weights"]
    rows = []
    for entry in entries:
        x, claim = models[entry.name], entry.claim
        parameters = f"{x['parameters'] / 1e6:.2f} M"
        if x["deployed_parameters"] != x["parameters"]:
            parameters += f" / {x['deployed_parameters'] / 1e6:.2f} M"
        published = ""
        if claim:
            data = "" if claim.data == "COCO val2017" else f"{claim.data}; "
            published = f"{claim.ap} ({data}{claim.where})"
        many = x["queries"]
        rows.append(
            [
                f"`{entry.name}`",
                published,
                f"{x['epochs']:.3g}",
                f"{many[0]} to {many[1]}" if isinstance(many, list) else str(many),
                parameters,
                x["input"],
                f"{x['gmacs']:.2f}",
                f"{x['gflops']:.2f}",
                _where(entry.release) if entry.release else "",
            ]
        )
    return _table(header, rows)


def _agreement_table(agreement: Mapping[str, Any], sources: Mapping[str, Any]) -> str:
    header = ["suite", "cases", "comparisons", "failed", "largest error, values"]
    header += ["largest error, gradients"]
    rows = []
    for prefix in sorted({p for x in sources.values() for p in x["verified_by"]}):
        cases = [x for name, x in agreement.items() if name.startswith(prefix)]
        if not cases:
            continue
        rows.append(
            [
                f"`{prefix}*`",
                str(len(cases)),
                str(sum(x["comparisons"] for x in cases)),
                str(sum(x["failed"] for x in cases)),
                _largest(x["values"] for x in cases),
                _largest(x["gradients"] for x in cases),
            ]
        )
    return _table(header, rows)


def _largest(errors: Iterable[Mapping[str, Any] | None]) -> str:
    known = [x for x in errors if x]
    if not known:
        return ""
    worst = max(known, key=lambda x: x["max_abs_error"])
    tolerance = f"{worst['atol']:.0e}"
    if worst["rtol"]:
        tolerance += f" + {worst['rtol']:.0e} relative"
    return f"{worst['max_abs_error']:.1e} (`{worst['tensor']}`, {tolerance})"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
