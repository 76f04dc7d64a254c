"""The data sets of the book, and their real counterparts: LAMA, SuperGLUE and GLUE files of your own or from a hub.

Everything comes as Hugging Face `datasets`. How the shipped files were built, from what and under which licence stands
in `corpora/README.md` beside them.
"""

import itertools
import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset

__all__ = [
    "RELATIONS",
    "TEMPLATES",
    "load_facts",
    "load_lama",
    "load_mine",
    "load_reviews",
    "load_superglue",
    "load_wic",
]

CORPORA = Path(__file__).parent / "corpora"
FOLDS = 3  # the facts' `part` runs from 0 to 5: a fold tests on two parts, chooses on one and trains on three


@dataclass(frozen=True)
class Relation:
    """A relation of LAMA (Petroni et al., 2019): Wikidata's property, what it says, and LAMA's own template."""

    id: str
    meaning: str
    template: str


RELATIONS = {
    relation.id: relation
    for relation in (
        Relation("P17", "country of a city", "[X] is located in [Y]."),
        Relation("P1376", "country of a capital", "[X] is the capital of [Y]."),
        Relation("P37", "official language of a country", "The official language of [X] is [Y]."),
        Relation("P30", "continent of a country", "[X] is located in [Y]."),
        Relation("P36", "capital of a country", "The capital of [X] is [Y]."),
    )
}

# Handcrafted templates, LAMA's own first. The four of P17 on "which country" are the P-tuning paper's case study.
TEMPLATES = {
    "P17": [
        "[X] is located in [Y].",
        "[X] is located in which country or state? [Y].",
        "[X] is located in which country? [Y].",
        "[X] is located in which country? In [Y].",
        "[X] is a city in [Y].",
        "[X] is located in the country of [Y].",
        "The city of [X] is located in [Y].",
        "The city of [X] is in the country of [Y].",
        "[X] lies within the borders of [Y].",
        "If you travel to [X], you are in [Y].",
    ],
    "P1376": [
        "[X] is the capital of [Y].",
        "[X] is the capital city of [Y].",
        "[X], the capital of [Y].",
        "The city of [X] is the capital of [Y].",
        "[X] is the capital of which country? [Y].",
        "[X] is the capital of which country? It is the capital of [Y].",
        "The country whose capital is [X] is [Y].",
        "[X] is the capital of the country of [Y].",
        "[X] is the seat of the government of [Y].",
    ],
    "P37": [
        "The official language of [X] is [Y].",
        "In [X], the official language is [Y].",
        "[X]'s official language is [Y].",
        "The language spoken in [X] is [Y].",
        "The people of [X] speak [Y].",
        "In [X], people speak [Y].",
        "What is the official language of [X]? [Y].",
        "What is the official language of [X]? It is [Y].",
        "A person born in [X] grows up speaking [Y].",
    ],
    "P30": [
        "[X] is located in [Y].",
        "[X] is a country in [Y].",
        "[X] is located in the continent of [Y].",
        "[X] is on the continent of [Y].",
        "The continent of [X] is [Y].",
        "The country of [X] is on the continent of [Y].",
        "Which continent is [X] in? [Y].",
        "Which continent is [X] in? It is in [Y].",
        "[X] is one of the countries of [Y].",
    ],
    "P36": ["The capital of [X] is [Y].", "[X] has its capital in [Y].", "The capital city of [X] is the city of [Y]."],
}


def load_facts(relation, fold=0):
    """The shipped facts of a relation, as splits `train`, `dev` and `test` with columns `sub_label` and `obj_label`.

    Args:
        relation: a key of `RELATIONS`.
        fold: 0, 1 or 2. Each fold tests on another third, and the three tests together hold every subject once: small
            relations are to be reported over all folds. No subject is in two splits of a fold.

    Raises:
        ValueError: an unknown relation or fold; the message lists the known ones.
    """
    if relation not in RELATIONS:
        raise ValueError(f"unknown relation {relation!r}; known: {', '.join(RELATIONS)}")
    if fold not in range(FOLDS):
        raise ValueError(f"unknown fold {fold!r}; known: {', '.join(map(str, range(FOLDS)))}")
    split_of = {(2 * fold + part) % 6: split for part, split in enumerate(["test"] * 2 + ["dev"] + ["train"] * 3)}
    splits = {"train": [], "dev": [], "test": []}
    for row in read_jsonl(CORPORA / "facts" / f"{relation}.jsonl", ("sub_label", "obj_label", "part")):
        splits[split_of[row.pop("part")]].append(row)
    return DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})


def load_lama(path):
    """Facts in LAMA's own format: one JSON object a line with at least `sub_label` and `obj_label`.

    Args:
        path: a JSONL file, which becomes the split `test`; or a folder with any of `train.jsonl`, `dev.jsonl` and
            `test.jsonl`, as AutoPrompt and P-tuning lay them out.

    Raises:
        FileNotFoundError: nothing of that kind at `path`.
        ValueError: an empty file, or a bad line, with the file and the line's number.
    """
    return _load_splits(Path(path), {"train": "train", "dev": "dev", "test": "test"}, ("sub_label", "obj_label"))


def load_reviews(source=None):
    """Sentences from movie reviews: columns `sentence` and `label` (0 negative, 1 positive), as in GLUE's SST-2.

    Args:
        source: None for the shipped 9,148 sentences (which also have the mean human `rating`, from -4 to 4); a folder
            with SST-2's `train.jsonl`, `val.jsonl` and `test.jsonl`; or a hub id such as "stanfordnlp/sst2".
    """
    return _load_task(source, "reviews", None, ("sentence", "label"))


def load_wic(source=None):
    """Word in context: is `word` used in one sense in both sentences? Columns as in SuperGLUE's WiC.

    The columns are `word`, `sentence1`, `sentence2`, `start1`, `end1`, `start2`, `end2` (characters) and `label`.

    Args:
        source: None for the shipped 2,830 pairs; a folder with SuperGLUE's `train.jsonl`, `val.jsonl` and `test.jsonl`
            (whose test has no labels); or a hub id such as "aps/super_glue".
    """
    needed = ("word", "sentence1", "sentence2", "start1", "end1", "start2", "end2")
    return _load_task(source, "wic", "wic", needed)


SUPERGLUE = {  # the tasks with a few classes: the folder in the release, the fields, the classes in the hub's order
    "boolq": ("BoolQ", ("question", "passage"), ("False", "True")),
    "cb": ("CB", ("premise", "hypothesis"), ("entailment", "contradiction", "neutral")),
    "rte": ("RTE", ("premise", "hypothesis"), ("entailment", "not_entailment")),
    "wic": ("WiC", ("word", "sentence1", "sentence2"), ("False", "True")),
}


def load_superglue(task, source=None):
    """A SuperGLUE task with a few classes, its labels as numbers in the order of `SUPERGLUE`.

    Left out are COPA, ReCoRD and WSC, whose answers are no classes that one label word each could stand for, and
    MultiRC, which is scored by question.

    Args:
        task: "boolq", "cb", "rte" or "wic".
        source: None for the shipped pairs of "wic"; the folder of SuperGLUE's unpacked release, with `BoolQ`, `CB`,
            `RTE` and `WiC` in it, each with `train.jsonl`, `val.jsonl` and `test.jsonl` (which has no labels); or a hub
            id such as "aps/super_glue".
    """
    if task not in SUPERGLUE:
        raise ValueError(f"no task {task!r}; there are {', '.join(SUPERGLUE)}")
    folder, fields, classes = SUPERGLUE[task]
    if source is None and task != "wic":
        raise ValueError(f"{task} does not come with the book; give the folder of SuperGLUE's release, or a hub id")
    if source is not None and Path(source).is_dir():
        source = Path(source) / folder
    data = _load_task(source, task, task, fields)

    def number(row):
        label = row["label"]
        if isinstance(label, str) and label not in classes:
            raise ValueError(f"{task} has a label {label!r}; expected one of {', '.join(classes)}")
        return row | {"label": classes.index(label) if isinstance(label, str) else int(label)}

    labelled = {split: "label" in rows.column_names for split, rows in data.items()}
    return DatasetDict({s: Dataset.from_list([number(r) for r in d]) if labelled[s] else d for s, d in data.items()})


# What a line of a reader's own file holds, and how the second of these is called where there are several.
MINE = {"facts": ("subject", "answer"), "chats": ("question", "reply"), "texts": ("text", "label")}
PLURALS = {"facts": "answers", "chats": "replies", "texts": "labels"}
FEWEST, MOST = 20, 10_000  # lines
LABELLED = 5  # texts of each label, so that one at least is to train on
EXAMPLE = {
    "facts": '{"subject": "Peru", "answer": "Spanish"}',
    "chats": '{"question": "My parcel is late. Whom do I ask?", "reply": "shipping"}',
    "texts": '{"text": "A film to see twice.", "label": "positive"}',
}


@dataclass(frozen=True)
class Mine:
    """A reader's own examples.

    Attributes:
        kind: "facts", subjects and answers for a template; "chats", questions and replies; or "texts" with labels.
        splits: {"train", "dev", "test": a list of (subject, answer), (question, reply) or (text, label)}, all texts.
        said: what was found in the file, in a few lines.
    """

    kind: str
    splits: dict
    said: str


def load_mine(path, seed=0, kinds=("facts", "chats")):
    """A reader's own examples: JSONL whose lines hold `subject` and `answer`, or `question` and `reply`.

        {"subject": "Peru", "answer": "Spanish"}
        {"question": "My parcel is late. Whom do I ask?", "reply": "shipping"}
        {"text": "A film to see twice.", "label": "positive"}

    The third kind, `text` and `label`, is for a classifier. Its labels may be whole numbers, which become texts.

    Three fifths of the subjects are to train on, a fifth to choose on (200 at most) and a fifth to test on (1,000 at
    most), drawn by the seed so that each answer has its share in each. All lines of one subject go to the same split. A
    line that stands there twice counts once.

    Args:
        path: a file of 20 to 10,000 different lines, UTF-8.
        kinds: those that are taken here, of "facts", "chats" and "texts".

    Returns:
        `Mine`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not JSON, is of none of these kinds or of another than the first line, or holds an
            empty text or none (the message names file and line); too few or too many lines; one answer for all, or a
            label of fewer than five texts.
    """
    path, example = Path(path), EXAMPLE[kinds[0]]
    if not path.is_file():
        fault = f"{path} is a folder" if path.is_dir() else f"there is no file {path}"
        raise FileNotFoundError(f"{fault}; give a JSONL file of your own, one example a line, such as {example}")
    kind, lines = None, []
    for number, row in numbered_rows(path, (), f", such as {example}"):
        kind = kind or next((one for one in kinds if all(key in row for key in MINE[one])), None)
        lines.append(_my_pair(f"{path}, line {number}", row, [kind] if kind else kinds))
    pairs = list(dict.fromkeys(lines))
    if not FEWEST <= len(pairs) <= MOST:
        advice = "collect more of them" if len(pairs) < FEWEST else "draw a sample of them"
        raise ValueError(
            f"{path} has {len(pairs):,} different examples and {FEWEST} to {MOST:,} are used here; {advice}"
        )
    said = {answer for _, answer in pairs}
    if len(said) == 1:
        raise ValueError(f"in {path} all have {said.pop()!r} as {MINE[kind][1]}; there is nothing to tell apart")
    if kind == "texts":
        _check_labels(path, pairs)
    subjects = {}
    for pair in pairs:
        subjects.setdefault(pair[0], []).append(pair)
    if len(subjects) < 5:
        name = MINE[kind][0]
        raise ValueError(
            f"{path} has only {len(subjects)} different {name}s; five at least are needed, to test on others"
        )
    parts = _deal(subjects, random.Random(seed))
    splits = {split: [pair for one in parts[split] for pair in subjects[one]] for split in ("train", "dev", "test")}
    return Mine(kind, splits, _said(path, kind, splits, subjects, len(lines) - len(pairs)))


def _deal(subjects, generator):
    """{split: subjects}. They lie in the order of their answers, and of five in a row one is to test and one to choose
    on, so that each answer has its share in each split."""
    order = sorted(subjects)
    generator.shuffle(order)
    order.sort(key=lambda subject: subjects[subject][0][1])
    parts = {"train": [], "dev": [], "test": []}
    for start in range(0, len(order), 5):
        hand = order[start : start + 5]
        generator.shuffle(hand)
        if len(hand) == 5:
            parts["test"].append(hand.pop())
            parts["dev"].append(hand.pop())
        parts["train"] += hand
    for split, most in (("dev", 200), ("test", 1000)):
        generator.shuffle(parts[split])
        parts["train"] += parts[split][most:]
        parts[split] = parts[split][:most]
    generator.shuffle(parts["train"])
    return parts


def _check_labels(path, pairs):
    rare = [(label, count) for label, count in Counter(label for _, label in pairs).items() if count < LABELLED]
    if rare:
        label, count = rare[0]
        more = f", and {len(rare) - 1} more labels are as rare" if len(rare) > 1 else ""
        raise ValueError(
            f"in {path} the label {label!r} has {count} of the {LABELLED} texts that it needs{more}; collect more of "
            "them, leave them out, or put labels together"
        )


def _my_pair(place, row, kinds):
    """The two texts of a line that is of one of the kinds, without spaces around them."""
    keys = next((MINE[kind] for kind in kinds if all(key in row for key in MINE[kind])), None)
    if keys is None:
        wanted = " or ".join(" and ".join(map(repr, MINE[kind])) for kind in kinds)
        raise ValueError(
            f"{place} has {', '.join(map(repr, row)) or 'nothing'}; expected {wanted}, in every line alike"
        )
    if isinstance(row.get("label"), int):
        row = row | {"label": str(row["label"])}
    for key in keys:
        if not isinstance(row[key], str) or not row[key].strip():
            raise ValueError(f"{place} has {row[key]!r} as its {key}; expected a text that is not empty, in quotes")
    return tuple(row[key].strip() for key in keys)


def _said(path, kind, splits, subjects, again):
    """What `load_mine` found, in a few lines."""
    subject, answer = MINE[kind]
    plural = PLURALS[kind]
    sizes = {split: len(rows) for split, rows in splits.items()}
    lines = [
        f"{path.name}: {sum(sizes.values())} examples, each a {subject} with its {answer}.",
        "{train} to train on, {dev} to choose on, {test} to test on.".format(**sizes),
    ]
    several = [one for one, pairs in subjects.items() if len(pairs) > 1]
    if several:
        more = f", {several[0]!r} for one" if len(several) == 1 else f", {several[0]!r} among them"
        lines.append(f"{len(several)} of the {subject}s have more than one {answer}{more}; these stay together.")
    if again:
        lines.append(f"Left out, since they stand there already: {again}.")
    counts = Counter(sorted(text for rows in splits.values() for _, text in rows)).most_common()
    if len(counts) <= sum(sizes.values()) / 2:
        most = ", ".join(f"{text!r} {count} times" for text, count in counts[:3])
        lines.append(f"{len(counts)} different {plural}{', most often' if len(counts) > 3 else ':'} {most}.")
    tested = len({one for one, _ in splits["test"]})
    if tested < 100:
        width = 98 / tested**0.5  # in points: 1.96 standard errors of a share of a half
        lines.append(f"With {tested} to test on, the share right is known to about ±{width:.0f} points.")
    return "\n".join(lines)


def _load_task(source, shipped, configuration, needed):
    if source is None:
        return _load_splits(CORPORA / shipped, {"train": "train", "dev": "dev", "test": "test"}, (*needed, "label"))
    if Path(source).is_dir():
        return _load_splits(Path(source), {"train": "train", "val": "dev", "test": "test"}, needed)
    try:
        loaded = load_dataset(str(source), configuration)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot load data set {str(source)!r}: it is no local folder with train.jsonl, val.jsonl and test.jsonl, "
            f"and no data set of that id was reached on the hub. datasets says: {error}"
        ) from error
    return DatasetDict({"dev" if split == "validation" else split: rows for split, rows in loaded.items()})


def _load_splits(path, split_of_file, needed):
    files = {"test": path} if path.is_file() else {s: path / f"{f}.jsonl" for f, s in split_of_file.items()}
    files = {split: file for split, file in files.items() if file.is_file()}
    if not files:
        wanted = ", ".join(f"{name}.jsonl" for name in split_of_file)
        raise FileNotFoundError(f"no data at {path}: expected a JSONL file, or a folder with any of {wanted}")
    rows = {split: read_jsonl(file, needed) for split, file in files.items()}
    return DatasetDict({split: Dataset.from_list(split_rows) for split, split_rows in rows.items()})


def read_jsonl(path, needed):
    """The rows of a JSONL file, each a dict that has the keys `needed`; blank lines are skipped.

    Raises:
        ValueError: no rows, or a line that is not UTF-8 or no JSON object with these keys; the message names file and
            line.
    """
    return [row for _, row in numbered_rows(path, needed, f" with {', '.join(needed)}")]


def numbered_rows(path, needed, expected):
    """`read_jsonl`, as a list of (line number, row); `expected` is what its messages say of a right row."""
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig")  # some editors begin a file with a byte-order mark
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number} is not UTF-8 ({error}); save the file as UTF-8") from error
            if not text.strip():
                continue
            try:
                row = json.loads(text)
                missing = [key for key in needed if key not in row] if isinstance(row, dict) else list(needed)
                fault = f"has no {', '.join(missing)}" if missing else None
                fault = fault or (None if isinstance(row, dict) else "holds no object")
            except json.JSONDecodeError as error:
                fault = f"is not JSON: {error}"
            if fault:
                raise ValueError(f"{path}, line {number} {fault}; expected an object{expected}")
            rows.append((number, row))
    if not rows:
        raise ValueError(f"{path} holds no rows; expected one JSON object a line,{expected.removeprefix(',')}")
    return rows


def labelled_reviews(limit=None):
    """Per split the first `limit` (sentence, label) of the movie reviews, or all."""
    return {
        split: list(zip(rows["sentence"], rows["label"], strict=True))[:limit] for split, rows in load_reviews().items()
    }


def text_of(task, row):
    """A row of a language understanding task as one text; passages end after 250 words, to fit BERT's context."""
    if task == "reviews":
        return row["sentence"]
    if task == "wic":
        pair = f'"{row["sentence1"]}" "{row["sentence2"]}"'
        return f'{pair} Is the word "{row["word"]}" used in the same sense in both?'
    if task == "boolq":
        return f"{' '.join(row['passage'].split()[:250])} Question: {row['question']}?"
    return f'{row["premise"]} Does it follow that "{row["hypothesis"]}"?'


# A grammar a relation: the candidates of the paraphrase search are all ways to pick one phrase from each place.
PARAPHRASES = {
    "P17": (
        ("[X]", "The city of [X]", "The town of [X]", "[X], a city,"),
        (" is", " is located", " is situated", " lies"),
        (" in", " in the country of", " in the nation of", " within the country of"),
    ),
    "P1376": (
        ("[X]", "The city of [X]", "The capital city of [X]", "[X], a city,"),
        (" is", " serves as", " has been"),
        (" the capital of", " the capital city of", " the capital of the country of", " the seat of government of"),
    ),
    "P37": (
        ("The", "The only", "The main"),
        (" official language", " language", " national language", " language spoken"),
        (" of [X] is", " in [X] is", " in the country of [X] is", " used in [X] is"),
    ),
    "P30": (
        ("[X]", "The country of [X]", "The nation of [X]"),
        (" is", " is located", " lies", " is a country"),
        (" in", " in the continent of", " on the continent of", " in the region of"),
    ),
}


def paraphrases(relation):
    """All sentences of the relation's grammar, as templates."""
    return ["".join(parts) + " [Y]." for parts in itertools.product(*PARAPHRASES[relation])]
