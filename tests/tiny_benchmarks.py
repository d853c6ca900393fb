"""Benchmark files small enough to count by hand, in the formats of their authors; and where the real ones may lie."""

import json
from pathlib import Path

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"
"""Folder with `amber/`, `pope/` and `fixtures/`, for tests against the official evaluators' numbers."""

ASSOCIATIONS = {
    "grass": ["ground"],
    "road": ["ground", "street"],
    "dog": [],
    "cat": ["tiger"],
    "tree": ["bush"],
    "sign": [],
    "car": [],
    "can": [],
    "orange": [],
}
ANNOTATIONS = [
    {"id": 1, "type": "generative", "truth": ["grass", "road", "dog"], "hallu": ["cat", "tree"]},
    {"id": 2, "type": "generative", "truth": ["car", "sign"], "hallu": ["dog", "cat"]},
    {"id": 3, "type": "discriminative-hallucination", "truth": "no"},
    {"id": 4, "type": "discriminative-attribute-state", "truth": "yes"},
    {"id": 5, "type": "discriminative-attribute-state", "truth": "no"},
    {"id": 6, "type": "discriminative-attribute-number", "truth": "yes"},
    {"id": 7, "type": "discriminative-attribute-action", "truth": "no"},
    {"id": 8, "type": "discriminative-relation", "truth": "yes"},
    {"id": 9, "type": "relation", "truth": "no"},
]
GENERATIVE_IDS, QUESTION_IDS = ("1", "2"), tuple(str(id) for id in range(3, 10))


def write_amber(folder):
    """AMBER's data folder with two images and seven questions."""
    (folder / "query").mkdir(parents=True)
    (folder / "annotations.json").write_text(json.dumps(ANNOTATIONS))
    (folder / "relation.json").write_text(json.dumps(ASSOCIATIONS))
    (folder / "safe_words.txt").write_text("orange\nsign")
    queries = [
        {
            "id": row["id"],
            "image": f"AMBER_{1 + row['id'] % 2}.jpg",
            "query": "Describe this image." if row["type"] == "generative" else f"Is it so ({row['id']})?",
        }
        for row in ANNOTATIONS
    ]
    (folder / "query" / "query_all.json").write_text(json.dumps(queries))
    return folder


def write_lines(path, rows):
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pope_rows(n=8):
    """Questions with the labels yes and no in turn."""
    return [
        {
            "question_id": place + 1,
            "image": f"picture_{place // 4}.png",
            "text": f"Is there a thing number {place} in the image?",
            "label": ("yes", "no")[place % 2],
        }
        for place in range(n)
    ]
