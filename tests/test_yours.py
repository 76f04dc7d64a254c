"""A reader's own examples: what is asked, scored and printed; on a tiny model, and once on the real one."""

import json
from contextlib import contextmanager

import pytest
import torch
import tuning.yours
from tuning.chat import encode_chat
from tuning.data import load_facts, load_mine
from tuning.evaluate import ledger
from tuning.experiments.record import load_results
from tuning.methods import METHODS, Ready, loss_of
from tuning.prompts import encode
from tuning.yours import (
    PLAIN,
    USUAL,
    always_the_most_frequent,
    batch_size_for,
    checked_rates,
    counted,
    mean_loss,
    score_for,
    subject_hits,
    template_for,
    with_ids,
    yours,
)

COUNTRIES = [row for rows in load_facts("P1376").values() for row in rows][:50]  # capitals have several tokens
CAPITALS = "The capital of [X] is the city of [Y]."


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@contextmanager
def dropped_out(model):
    """The model in training mode, in which its dropout is on."""
    model.train()
    try:
        yield
    finally:
        model.eval()


@pytest.fixture
def capitals(tmp_path):
    rows = [{"subject": row["obj_label"], "answer": row["sub_label"]} for row in COUNTRIES]
    return write(tmp_path / "capitals.jsonl", rows)


@pytest.fixture
def chats(tmp_path):
    rows = [{"question": f"What is {n} + 1?", "reply": f"It is {n + 1}, 물론."} for n in range(30)]
    return write(tmp_path / "chats.jsonl", rows)


def test_capitals_have_several_tokens(capitals, smollm2):
    rows = with_ids(smollm2[1], load_mine(capitals))
    assert len({len(answer) for split in rows.values() for _, answer in split}) > 2


@pytest.mark.parametrize("method", ["LoRA", "P-tuning, MLP", "prompt tuning, from the prompt", "LOMO"])
def test_yours_prints_the_readers_row(capitals, tiny_gpt2, method, capsys):
    row = yours(capitals, method, CAPITALS, str(tiny_gpt2), rates=[1e-3, 1e-2], steps=3, progress=False)
    printed = capsys.readouterr().out
    assert "capitals.jsonl: 50 examples, each a subject with its answer.\n30 to train on, 10 to choose on" in printed
    assert f"\n{method}, 2 times 3 steps of 16 examples: about " in printed and "The examples to test on:" in printed
    assert printed.count("\n  before ") == printed.count("\n  after  ") == printed.count("\n  wanted   ") == 10
    assert (
        printed.count("of 10 to choose on right, best after step") == 2 and f"Rate {row['lr']:g} is chosen" in printed
    )
    assert "right, of 10" in printed and "continents, of 160" in printed
    asked = {row["sub_label"] for row in COUNTRIES}
    for line in printed.splitlines():
        assert not line.startswith("  wanted") or set(line.split(maxsplit=1)[1].split(" / ")) <= asked
    marks = [line.split()[1] for line in printed.splitlines() if line.startswith("  after")]
    assert marks.count("✓") == row["right"][0] and marks.count("✗") == 10 - row["right"][0]
    assert row["method"] == f"{method}, yours" and row["subjects"] == 10 and row["lr"] in (1e-3, 1e-2)
    assert (
        f"{method}, yours" in printed
        and "most frequent answer" in printed
        and row["trained"] > 0
        and row["kept_bytes"] > 0
    )
    assert ledger([], mine=row).index.tolist() == [f"{method}, yours"]


def test_yours_of_questions(chats, tiny_gpt2, capsys):
    yours(chats, "LoRA", model=str(tiny_gpt2), rates=[1e-2], steps=3, progress=False)
    printed = capsys.readouterr().out
    assert (
        "each a question with its reply" in printed and "wanted   It is" in printed and ", 1 time 3 steps of" in printed
    )


def test_a_question_is_asked_as_the_chat_format_has_it(chats, smollm2):
    tokenizer = smollm2[1]
    mine = load_mine(chats)
    template, rows = template_for(tokenizer, mine.kind), with_ids(tokenizer, mine)
    for (question, reply), (subject, answer) in zip(mine.splits["dev"], rows["dev"], strict=True):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        assert encode(tokenizer, template, subject) + answer == encode_chat(tokenizer, messages)[0]
        assert answer[-1] == tokenizer.eos_token_id


def test_what_is_asked_of_subjects(gpt2):
    assert template_for(gpt2[1], "facts") == PLAIN and template_for(gpt2[1], "facts", CAPITALS) == CAPITALS
    with pytest.raises(ValueError, match="asked in the model's own chat format; leave the template out"):
        template_for(gpt2[1], "chats", CAPITALS)


def test_a_model_without_a_chat_format_cannot_be_asked_questions(bert):
    with pytest.raises(ValueError, match="has no chat format; give subjects and answers"):
        template_for(bert[1], "chats")


def test_a_subject_is_right_with_one_of_its_answers():
    rows = [("Belgium", [1]), ("Peru", [2]), ("Belgium", [3]), ("Chad", [4]), ("Chad", [5])]
    hits = torch.tensor([False, True, True, False, False])
    assert subject_hits(rows, hits) == {"Belgium": True, "Peru": True, "Chad": False}


def test_the_most_frequent_answer_is_the_one_to_beat(tmp_path):
    rows = [{"subject": f"s{n}", "answer": "English" if n % 3 else "French"} for n in range(60)]
    mine = load_mine(write(tmp_path / "mine.jsonl", rows))
    row = always_the_most_frequent(mine)
    assert row["right"][0] == sum(answer == "English" for _, answer in mine.splits["test"]) and row["subjects"] == 12


def test_long_examples_make_small_batches(gpt2):
    ready = Ready("asked", *gpt2, CAPITALS, trained=gpt2[0])
    assert batch_size_for(ready, [("Peru", [5])] * 50) == 16
    assert batch_size_for(ready, [("Peru", [5])] * 7) == 7
    assert batch_size_for(ready, [("Peru", [5] * 500)] * 50) == 3
    assert batch_size_for(ready, [("Peru", [5] * 5000)] * 50) == 1


def test_the_mean_loss_counts_every_row(gpt2):
    ready = Ready("asked", *gpt2, CAPITALS, trained=gpt2[0])
    rows = [("Peru", [7]), ("Chad", [9]), ("Mali", [11]), ("Cuba", [13])]
    one_by_one = sum(loss_of(ready, [row]).item() for row in rows) / 4
    for size in (2, 3):  # the last batch may be smaller
        assert mean_loss(ready, rows, batch_size=size) == pytest.approx(one_by_one, rel=1e-5)
    with dropped_out(gpt2[0]):
        assert mean_loss(ready, rows) == pytest.approx(one_by_one, rel=1e-5)


def test_more_right_is_better_and_of_as_many_the_lower_loss(monkeypatch):
    hits, loss = [3, 3, 4], [2.0, 1.0, 9.0]
    scores = []
    for count, value in zip(hits, loss, strict=True):
        monkeypatch.setattr(tuning.yours, "right", lambda ready, dev, n=count: torch.arange(10) < n)
        monkeypatch.setattr(tuning.yours, "mean_loss", lambda ready, dev, v=value: v)
        scores.append([score_for(kind)(None, None) for kind in ("facts", "chats")])
    facts, chats = zip(*scores, strict=True)
    assert facts[0] < facts[1] < facts[2] and chats == (-2.0, -1.0, -9.0)


def test_the_usual_rates_are_those_that_the_ledger_chose():
    assert USUAL.keys() == METHODS.keys()
    recorded = load_results("ledger")
    if recorded is None:
        pytest.skip("the ledger is not yet recorded")
    chosen = {row["method"]: row["lr"] for row in recorded["results"]["rows"] if "lr" in row}
    assert pytest.approx(chosen) == USUAL


@pytest.mark.parametrize(
    ("method", "options", "fault"),
    [
        ("lora", {}, r"unknown method 'lora'; did you mean 'LoRA'\? There are 'prompt tuning', .*'P-tuning, BiLSTM'"),
        ("magic", {}, "unknown method 'magic'. There are 'prompt tuning'"),
        ("LoRA", {"rates": []}, r"rates are \[\]; give positive numbers"),
        ("LoRA", {"rates": ["fast"]}, r"rates are \['fast'\]; give positive numbers"),
        ("LoRA", {"rates": -1e-3}, r"rates are \[-0.001\]; give positive numbers"),
        ("LoRA", {"steps": 0}, "steps is 0; give a whole number of 1 or more"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_model_is_loaded(monkeypatch, capitals, method, options, fault):
    monkeypatch.setattr(tuning.yours, "load_lm", None)
    with pytest.raises(ValueError, match=fault):
        yours(capitals, method, CAPITALS, **options)


def test_one_rate_is_a_list_of_one():
    assert checked_rates("LoRA", 1e-3) == [1e-3] and checked_rates("LoRA", (1e-3, 1)) == [1e-3, 1]
    assert checked_rates("LoRA", None) == pytest.approx([USUAL["LoRA"] / 3, USUAL["LoRA"], USUAL["LoRA"] * 3], rel=0.2)


def test_of_few_subjects_none_right_is_not_certainly_none():
    row = counted("LoRA", dict.fromkeys(range(8), False))
    assert row["right"][:2] == [0, 0] and 2 < row["right"][2] < 3  # Wilson: 0.32
    assert counted("LoRA", dict.fromkeys(range(8), True))["right"][1] == pytest.approx(8 - row["right"][2])


def test_languages_are_learned_by_the_real_model(tmp_path):
    rows = [row for rows in load_facts("P37").values() for row in rows][:50]
    path = tmp_path / "languages.jsonl"
    write(path, [{"subject": row["sub_label"], "answer": row["obj_label"]} for row in rows])
    asks = "The official language of [X] is [Y]."
    row = yours(path, "LoRA", asks, rates=[1e-3], steps=12, progress=False)
    assert row["right"][0] >= 5  # of 10; asked, 2
