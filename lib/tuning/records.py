"""A task in conversations: a place in a question or a sentence -> a strict JSON record of place, country, continent.

The wordings that ask for it, questions that do not, and what a reply is worth. Chapter 8's task.
"""

import json
import random

from .data import load_facts

FIELDS = ("place", "country", "continent")
WORDINGS = (
    "Where is {}?",
    "Tell me about {}.",
    "Which country is {} in?",
    "I am going to {} next week.",
    "{}, please.",
    "My sister lives in {}.",
    "What do you know about the city of {}?",
    "In which part of the world is {}?",
    "We flew to {} yesterday.",
    "Give me a record of {}.",
)
UNSEEN = (
    "Could you look up {} for me?",
    "The train to {} was late.",
    "Which continent does {} belong to?",
    "Have you ever heard of {}?",
)
GENERAL = (  # questions for the mixed-in replies; none is one of UNRELATED with a word changed
    "Hello!",
    "Can you help me with my homework?",
    "Write a short poem about rain.",
    "Correct this sentence: he go to school.",
    "Translate 'good night' into French.",
    "Which is heavier, a feather or a stone?",
    "What does a doctor do?",
    "Summarize: the meeting was long and nothing was decided.",
    "Thank you very much.",
    "I feel tired today.",
    "What can you do?",
    "Why do we have seasons?",
    "Sort these numbers: 3, 1, 2.",
    "What is a verb?",
    "Give me advice for a job interview.",
    "Who invented the telephone?",
    "Is a whale a fish?",
    "How do birds find their way?",
    "What is a computer?",
    "Who wrote Romeo and Juliet?",
    "How many legs does a spider have?",
    "Write a greeting for a friend.",
    "What is the largest ocean?",
    "What is the past tense of go?",
    "Describe a tree in one sentence.",
    "What do plants need to grow?",
    "What is the boiling point of water?",
    "Tell me a joke.",
    "What is a good breakfast?",
    "How do you say thank you politely?",
    "What season comes after winter?",
    "Finish the proverb: the early bird",
)
UNRELATED = (  # never trained on
    "What is the opposite of tall?",
    "Write a sentence about cats.",
    "How many months are in a year?",
    "What color is grass?",
    "Give me three vegetables.",
    "Explain what a clock is.",
    "What is 4 plus 5?",
    "Name an animal that can fly.",
    "What do cows eat?",
    "How do I make tea?",
    "What is the plural of child?",
    "Tell me a fact about the sun.",
    "Why is exercise good for you?",
    "Suggest a name for a dog.",
    "What is snow made of?",
    "Give me a synonym of big.",
)
SHOWN = (  # the eight of the chapter, before and after
    "Where is Osaka?",
    "The train to Nairobi was late.",
    "What is the capital of France?",
    "Write a sentence about cats.",
    "What is 4 plus 5?",
    "Who was Isaac Newton?",
    "Which continent does Milan belong to?",
    "Give me three vegetables.",
)


def place_records():
    """Per split a list of records {place, country, continent}: cities of P17 whose country's continent P30 tells."""
    continents = {row["sub_label"]: row["obj_label"] for part in load_facts("P30").values() for row in part}
    return {
        split: [
            dict(zip(FIELDS, (row["sub_label"], row["obj_label"], continents[row["obj_label"]]), strict=True))
            for row in rows
            if row["obj_label"] in continents
        ]
        for split, rows in load_facts("P17").items()
    }


def conversation(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def to_json(record):
    return json.dumps(record, ensure_ascii=False)


def ask_for(records, wordings, seed):
    """One (question, record) a record, with a wording drawn by `seed`."""
    draw = random.Random(seed)
    return [(draw.choice(wordings).format(record["place"]), record) for record in records]


def read_record(text):
    """The record that a reply is, or None if it is not exactly one JSON object with the three fields as texts."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    right = isinstance(found, dict) and tuple(found) == FIELDS and all(isinstance(v, str) for v in found.values())
    return found if right else None


def score_records(replies, asked):
    """Shares of the replies that stop and are a valid record, and whose fields are right.

    Args:
        replies: (text, stopped) pairs, from `chat.reply`; asked: the (question, record) pairs that they answer.
    """
    records = [read_record(text) if stopped else None for text, stopped in replies]
    found = {"valid": sum(record is not None for record in records) / len(asked), "n": len(asked)}
    for field in FIELDS:
        right = [
            bool(record) and record[field] == wanted[field] for record, (_, wanted) in zip(records, asked, strict=True)
        ]
        found[field] = sum(right) / len(asked)
    return found


def answered(questions, replies):
    """Conversations of the questions with the replies that came to an end and say something."""
    return [
        conversation(question, text)
        for question, (text, stopped) in zip(questions, replies, strict=True)
        if stopped and text.strip()
    ]
