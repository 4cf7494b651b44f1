"""Run with the kits' Python:  names.py NAMES   (JSON: lmms_eval, vlmevalkit and videos, with their settings)

Writes, as JSON, which of lmms-eval's names are tasks and which class its model is, and which class VLMEvalKit
builds each of its names with; of videos also the settings that the class does not take.
"""

import inspect
import json
import sys
from pathlib import Path


def main(asked: dict) -> dict:
    from lmms_eval.models import get_model
    from lmms_eval.tasks import TaskManager
    from vlmeval import dataset

    tasks = set(TaskManager("ERROR").all_tasks)
    model = get_model("openai_compatible")
    built = {
        name: next(kind.__name__ for kind in dataset.DATASET_CLASSES if name in kind.supported_datasets())
        for name in asked["vlmevalkit"]
        if name in dataset.SUPPORTED_DATASETS
    }
    refused = {}
    for name, setting in asked["videos"].items():
        kind = getattr(dataset, setting["class"])
        own = inspect.signature(kind.__init__).parameters
        refused[name] = [key for key in setting if key != "class" and key not in own]
        assert setting["dataset"] in kind.supported_datasets(), name
    return {
        "unknown": sorted(set(asked["lmms_eval"]) - tasks),
        "model": f"{model.__module__}.{model.__name__}, simple: {model.is_simple}",
        "built": built,
        "refused": refused,
        "presets": sorted(dataset.supported_video_datasets),
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
