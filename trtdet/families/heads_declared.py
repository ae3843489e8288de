# SPDX-License-Identifier: Apache-2.0
"""What was declared on the command line, held against a file: names that it does not have, and
options that say nothing about outputs such as its.
"""

from trtdet.errors import GraphError
from trtdet.families.base import Declaration, Hints
from trtdet.families.heads_plan import Plan
from trtdet.sources.onnx_file import OnnxSource

#: Field of a `Declaration` -> its option.
NAMES = {
    "boxes": "--boxes_output",
    "scores": "--scores_output",
    "labels": "--labels_output",
    "rows": "--rows_output",
}


def check_names(source: OnnxSource, declared: Declaration | None) -> None:
    """Refuse a declared tensor that the file does not have; one inside the graph is none of its
    outputs, but may be declared.

    Raises:
        GraphError: names the option, and the outputs that there are.
    """
    if declared is None:
        return
    made = {name for node in source.model.graph.node for name in node.output}
    outputs = [info.name for info in source.model.graph.output]
    for field, option in NAMES.items():
        name = getattr(declared, field)
        if name and name not in made:
            raise GraphError(
                f"{source.path}: {option} {name}: nothing in the file has that name; its outputs are {', '.join(outputs)}"
            )


def refuse_unused(plan: Plan, hints: Hints, path: str) -> None:
    """Options that say nothing about such outputs are errors, so that nobody believes they did
    something.

    Raises:
        GraphError: names the option, and why.
    """
    d = hints.declared or Declaration()
    has_labels = plan.labels != "" or plan.label_column is not None
    one_score = plan.num_scores == 1
    count = plan.num_scores - (plan.background != "none")
    unused = {
        f"--background {d.background}": d.background in ("first", "last")
        and one_score
        and "there is one score a box, and none is for no object",
        f"--scores_layout {d.scores_layout}": d.scores_layout is not None
        and (plan.rows != "" or has_labels or one_score)
        and "there is one score a box, or boxes and scores share an output",
        f"--label_base {d.label_base}": d.label_base is not None
        and not has_labels
        and "a box has one score for each class, whose position is the class",
        f"--num_classes {hints.num_classes}": hints.num_classes is not None
        and not has_labels
        and hints.num_classes != count
        and f"there are {count}, one for each score of a box",
        "--clip_boxes": hints.clipped is not None
        and plan.selected
        and "the model selects its detections itself, so no NMS follows",
    }
    for option, why in unused.items():
        if why:
            raise GraphError(f"{path}: {option}: {why}; leave it out")
