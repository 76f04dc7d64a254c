"""Build reviews/*.jsonl from the rated movie-review sentences in vaderSentiment 0.5's source archive (MIT).

    pip download --no-deps --no-binary :all: vaderSentiment==0.5
    python lib/tuning/corpora/build_reviews.py vaderSentiment-0.5.zip

The sentences are those of Pang and Lee (2005); about 20 people rated each from -4 to 4 (Hutto and Gilbert, 2014). Kept
are those whose mean rating is at least 1 away from 0; the label is its sign. Classes are balanced by dropping from the
larger one; a sentence that occurs twice is kept once.
"""

import html
import io
import json
import random
import sys
import tarfile
import zipfile
from pathlib import Path

ARCHIVE = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
SIZES = {"dev": 1000, "test": 1000}  # the rest is for training


def read(zip_path):
    """The lines of the ratings file, as (rating, sentence)."""
    with zipfile.ZipFile(zip_path) as outer, tarfile.open(fileobj=io.BytesIO(outer.read(ARCHIVE))) as inner:
        text = inner.extractfile(MEMBER).read().decode("utf-8")
    for line in text.splitlines():
        _, rating, sentence = line.split("\t")
        yield float(rating), " ".join(html.unescape(sentence).replace("''", '"').split())


def main(zip_path):
    rated = {sentence.lower(): (rating, sentence) for rating, sentence in read(zip_path) if abs(rating) >= 1}
    rated = sorted(rated.values())
    random.Random(0).shuffle(rated)
    sides = [[row for row in rated if (row[0] > 0) == positive] for positive in (False, True)]
    each = min(map(len, sides))
    rows = [row for pair in zip(*(side[:each] for side in sides), strict=True) for row in pair]
    splits, start = {}, 0
    for split, size in SIZES.items():
        splits[split], start = rows[start : start + size], start + size
    splits["train"] = rows[start:]
    folder = Path(__file__).parent / "reviews"
    folder.mkdir(exist_ok=True)
    for split, chosen in splits.items():
        lines = [
            json.dumps(
                {"idx": index, "sentence": sentence, "label": int(rating > 0), "rating": round(rating, 2)},
                ensure_ascii=False,
            )
            for index, (rating, sentence) in enumerate(chosen)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(split, len(chosen), sum(rating > 0 for rating, _ in chosen))


if __name__ == "__main__":
    main(sys.argv[1])
