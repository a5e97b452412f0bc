"""Model cards: what stored networks are and where they come from, as Markdown."""

from __future__ import annotations

import json

from fmd.config import RunConfig, is_teacher
from fmd.records import Record

# Stated in the card's first table, or places on the machine that trained the network.
STATED = {
    *("experiment", "variant", "seed", "model", "data", "half_weights"),
    *("teacher", "teacher_weights", "init"),
}


def model_card(record: Record, load: str, files: str, *, half: bool = False) -> str:
    """The card of a run's network after the last epoch.

    Args:
        record: of the run.
        load: Python code that reads the network.
        files: what is said of its files.
        half: whether the weights were rounded to float16 after the run.
    """
    config = record.config
    role = "teacher" if is_teacher(config.variant) else "student"
    teacher = "none"
    if record.teacher is not None:
        teacher = f"`{record.teacher.run}`, weights {record.teacher.fingerprint}"
    shown = config.model_dump(mode="json", exclude_defaults=True, exclude=STATED)
    facts = {
        "Network": f"`{config.model}` with {record.parameters:,} parameters",
        "Experiment": f"`{config.experiment}`, variant `{config.variant}`, seed {config.seed}",
        "Code": f"commit {record.commit}" + (", with uncommitted changes" if record.dirty else ""),
        "Data": f"`{config.data}`, fingerprint {record.data['fingerprint']}",
        "Teacher": teacher,
        "Weights": f"after the last epoch, fingerprint {record.fingerprint}"
        + (", rounded to float16" if half or config.half_weights else ""),
        "Trained on": f"{record.device}, {record.precision}, {record.world_size} process(es)",
        "Versions": ", ".join(f"{k} {v}" for k, v in record.versions.items()),
        "Test top-1": f"{record.test.last.top1:.2f} %, top-5 {record.test.last.top5:.2f} %",
        "Finished": record.timing.finished,
    }
    rows = "\n".join(f"| {name} | {text} |" for name, text in facts.items())
    settings = "\n".join(f"| `{name}` | `{json.dumps(value)}` |" for name, value in shown.items())
    return f"""---
library_name: timm
pipeline_tag: image-classification
tags: [image-classification, timm, knowledge-distillation]
---
# {config.model}, {config.experiment}/{config.variant}

A {role} in experiments on *Fine-Grained Manifold Distillation* (arXiv 2107.01378).

```python
{load}
```

| | |
|---|---|
{rows}

## Schedule

Settings that are not at their defaults:

| setting | value |
|---|---|
{settings}

## Files

{files}

## Licence

The code is under Apache-2.0. {_data_terms(config)}
A pretrained teacher's weights have terms of their own.
"""


def _data_terms(config: RunConfig) -> str:
    if config.data == "digits":
        return "The training images are the digits bundled with scikit-learn."
    if config.data == "tiny-imagenet":
        return "Tiny-ImageNet-200 is for non-commercial research and education."
    return (
        f"The weights were learnt from the photographs in `{config.data}`. Where these are "
        "ImageNet's, its terms of access allow non-commercial research and education; whether they "
        "bind weights is for whoever uses these to judge."
    )
