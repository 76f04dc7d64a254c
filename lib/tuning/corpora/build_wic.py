"""Build wic/*.jsonl (word in context) from the usage examples of WordNet 3.0.

    apt-get install wordnet-base
    python lib/tuning/corpora/build_wic.py /usr/share/wordnet

The construction is that of WiC (Pilehvar and Camacho-Collados, NAACL 2019): a pair of examples of one word, true if
both illustrate one sense. For false pairs, senses that are close are left out: one lexicographer file, parent and
child, or sisters. At most three pairs a word, no word and no sentence in two splits, classes balanced. Field names are
SuperGLUE's.
"""

import json
import random
import re
import sys
from collections import defaultdict
from itertools import combinations
from pathlib import Path

SIZES = {"test": 800, "dev": 400, "train": None}  # for training: all that is left
PAIRS_PER_WORD = 3
FILES = {"n": ("data.noun", "noun.exc"), "v": ("data.verb", "verb.exc")}


def read_synsets(folder, part):
    """Yield (id, lexicographer file, parents, lemmas, examples) for each synset of a part of speech."""
    for line in (folder / FILES[part][0]).read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            continue  # the licence at the top
        data, _, gloss = line.partition("|")
        fields = data.split()
        count = int(fields[3], 16)
        lemmas = [fields[4 + 2 * i].lower() for i in range(count)]
        pointers = fields[4 + 2 * count + 1 :]
        parents = {pointers[i + 1] for i, field in enumerate(pointers) if field in ("@", "@i")}
        yield fields[0], fields[1], parents, lemmas, re.findall(r'"([^"]+)"', gloss)


def inflections(lemma, part, irregular):
    """A pattern for the forms of `lemma`: regular endings and WordNet's list of exceptions."""
    stems = {lemma} | irregular[lemma]
    if part == "n":
        stems |= {lemma + "s", lemma + "es"} | ({lemma[:-1] + "ies"} if lemma.endswith("y") else set())
    else:
        stems |= {lemma + ending for ending in ("s", "es", "ed", "d", "ing", lemma[-1] + "ed", lemma[-1] + "ing")}
        if lemma.endswith("e"):
            stems |= {lemma[:-1] + "ing"}
        if lemma.endswith("y"):
            stems |= {lemma[:-1] + "ies", lemma[:-1] + "ied"}
    return re.compile(r"\b(?:" + "|".join(sorted(map(re.escape, stems), key=len, reverse=True)) + r")\b", re.IGNORECASE)


def usages(folder):
    """word and part of speech -> list of (sense, its lexicographer file, its parents, sentence, start, end)."""
    found = defaultdict(list)
    for part, (_, exceptions) in FILES.items():
        irregular = defaultdict(set)
        for line in (folder / exceptions).read_text(encoding="utf-8").splitlines():
            form, *lemmas = line.split()
            for lemma in lemmas:
                irregular[lemma].add(form)
        for sense, file, parents, lemmas, examples in read_synsets(folder, part):
            for lemma in lemmas:
                if not lemma.isalpha() or len(lemma) < 3:
                    continue
                pattern = inflections(lemma, part, irregular)
                for sentence in examples:
                    matches = list(pattern.finditer(sentence))
                    if len(matches) == 1 and len(sentence.split()) >= 2:
                        found[lemma, part].append((sense, file, parents, sentence, *matches[0].span()))
    return found


def pairs_of(found):
    """label -> list of rows; a row is a pair of usages of one word."""
    rows = {True: [], False: []}
    for (word, _), uses in sorted(found.items()):
        for a, b in combinations(uses, 2):
            if a[3] == b[3]:
                continue
            same = a[0] == b[0]
            close = a[1] == b[1] or a[2] & b[2] or a[0] in b[2] or b[0] in a[2]
            if same or not close:
                row = {"word": word, "sentence1": a[3], "sentence2": b[3]}
                row |= {"start1": a[4], "end1": a[5], "start2": b[4], "end2": b[5], "label": same}
                rows[same].append(row)
    return rows


def main(folder):
    rng = random.Random(0)
    rows = pairs_of(usages(Path(folder)))
    for label in rows:
        rng.shuffle(rows[label])
    out = Path(__file__).parent / "wic"
    out.mkdir(exist_ok=True)
    split_of_word, split_of_sentence = {}, {}
    for split, size in SIZES.items():
        chosen, taken = [], defaultdict(int)
        for label in (True, False):  # pairs of one sense are the rarer kind, so they come first
            wanted = len(chosen) if label is False else (size // 2 if size else len(rows[True]))
            for row in rows[label]:
                places = [split_of_word.get(row["word"], split)]
                places += [split_of_sentence.get(row[key], split) for key in ("sentence1", "sentence2")]
                if wanted and taken[row["word"]] < PAIRS_PER_WORD and set(places) == {split}:
                    chosen.append(row)
                    taken[row["word"]] += 1
                    split_of_word[row["word"]] = split
                    split_of_sentence[row["sentence1"]] = split_of_sentence[row["sentence2"]] = split
                    wanted -= 1
            rows[label] = [row for row in rows[label] if split_of_word.get(row["word"]) != split]
        rng.shuffle(chosen)
        lines = [json.dumps({"idx": index, **row}, ensure_ascii=False) for index, row in enumerate(chosen)]
        (out / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(split, len(chosen), sum(row["label"] for row in chosen), len({row["word"] for row in chosen}))


if __name__ == "__main__":
    main(sys.argv[1])
