"""What measures (intervals of P@1 and of paired seeds: test_prompts.py; perplexity: test_experiments.py)."""

import math

import pytest
import torch
import torch.nn.functional as F
from tuning.charts import compare
from tuning.data import load_facts
from tuning.evaluate import (
    accuracy,
    bootstrap_interval,
    elsewhere,
    facts_with_ids,
    in_bytes,
    ledger,
    ledger_points,
    p_at_1,
    perplexity,
    predictions,
    ratio_interval,
    share_right,
    text_losses,
)
from tuning.models import load_lm


def test_share_right_is_the_first_choice_of_the_vocabulary():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0], [0.0, 0.0, 9.0]])
    assert share_right(logits, [("a", 1), ("b", 1), ("c", 2)]).tolist() == [True, False, True]


def test_rows_hold_the_mean_and_the_interval():
    hits = torch.arange(400) < 100
    low, high = bootstrap_interval(hits)
    assert p_at_1(hits) == {"p_at_1": 0.25, "low": low, "high": high, "n": 400}
    assert accuracy(hits) == {"accuracy": 0.25, "low": low, "high": high, "n_test": 400}
    half_width = 1.96 * math.sqrt(0.25 * 0.75 / 400)  # the normal approximation
    assert low == pytest.approx(0.25 - half_width, abs=0.006) and high == pytest.approx(0.25 + half_width, abs=0.006)


def test_one_item_has_no_interval():
    with pytest.raises(ValueError, match="two or more observations"):
        bootstrap_interval(torch.tensor([True]))


def test_a_ratio_is_taken_on_the_same_texts():
    """Texts differ a thousandfold and the models by a tenth: unpaired, the interval would be far wider."""
    torch.manual_seed(0)
    base = torch.stack([torch.rand(60).double() * 1000 + 1, torch.full((60,), 10).double()], dim=1)
    more = base.clone()
    more[:, 0] += 1 + 0.1 * torch.rand(60).double()
    ratio, low, high = ratio_interval(more, base)
    assert ratio == pytest.approx(math.exp(0.105), rel=0.01)
    assert low < ratio < high and high - low < 0.01
    assert ratio_interval(base, base) == (1, 1, 1)


def test_predictions_stand_in_the_order_of_the_rows():
    rows = [("x" * length, length % 2) for length in (5, 1, 8, 2, 7)]
    asked = []

    def classifier(texts):
        asked.append(len(texts))
        return F.one_hot(torch.tensor([len(text) % 2 if len(text) > 1 else 0 for text in texts]), 2).float()

    assert predictions(classifier, rows, batch_size=2).tolist() == [True, False, True, True, True]
    assert asked == [2, 2, 1]


@pytest.mark.parametrize("relation", ["P1376", "P37"])
def test_facts_with_ids_are_those_of_the_files(smollm2, relation):
    tokenizer = smollm2[1]
    facts = facts_with_ids(tokenizer, relation, fold=1, limit=7)
    rows = load_facts(relation, 1)["test"]
    assert len(facts["test"]) == 7
    for (subject, answer), row in zip(facts["test"], rows, strict=False):
        assert (subject, tokenizer.decode([answer])) == (row["sub_label"], " " + row["obj_label"])


def test_losses_of_texts_do_not_hang_on_their_batch(smollm2):
    model, tokenizer = smollm2
    texts = ["The train was late.", "No", "It rained for three days in the north of the country."]
    found = text_losses(model, tokenizer, texts, batch_size=2)
    for text, (total, count) in zip(texts, found.tolist(), strict=True):
        ids = torch.tensor([tokenizer(text).input_ids], device=model.device)
        with torch.no_grad():
            logs = model(ids).logits[0, :-1].double().log_softmax(dim=1)
        assert count == ids.shape[1] - 1
        assert total == pytest.approx(-logs.gather(1, ids[0, 1:, None]).sum().item(), rel=1e-4, abs=1e-6)


def test_losses_are_those_of_evaluation_mode(tiny_gpt2):
    model, tokenizer = load_lm(str(tiny_gpt2), device="cpu")  # has dropout
    texts = ["the city of paris", "is in"]
    expected = text_losses(model, tokenizer, texts)
    model.train()
    assert torch.equal(text_losses(model, tokenizer, texts), expected)
    assert model.training
    with pytest.raises(ValueError, match="no texts"):
        text_losses(model, tokenizer, [])


def test_an_empty_text_has_no_token_to_predict(smollm2):
    model, tokenizer = smollm2
    found = text_losses(model, tokenizer, ["", "The train was late.", ""], batch_size=2)
    assert found[0].tolist() == found[2].tolist() == [0, 0] and found[1, 1] == 4
    with pytest.raises(ValueError, match="no text has a second token"):
        perplexity(model, tokenizer, ["", "The"])


# --- the ledger


def ledger_row(method, chapter, right, over, kept_bytes, **more):
    return {"method": method, "chapter": chapter, "right": right, "over asking": over, "kept_bytes": kept_bytes, **more}


ASKED = {"continents": 106.0, "perplexity": 402.7}
TRAINED = {"continents": 46.3, "perplexity": 396.0, "trained": 2_442_240, "lr": 1e-3}
ROWS = [
    ledger_row("most frequent answer", 1, [6, 2, 11], [-301, -330, -270], 7),
    ledger_row("asked", 1, [307, 279, 335], [0, 0, 0], 41, **ASKED),
    ledger_row("LoRA", 6, [410.3, 381, 438], [103.3, 80, 127], 9_768_960, **TRAINED, seconds=250.0, peak_bytes=1.961e9),
]


def test_the_ledger_shows_the_rows_that_were_met():
    assert list(ledger(ROWS, chapter=1).index) == ["most frequent answer", "asked"]
    table = ledger(ROWS)
    assert table.loc["LoRA"].tolist() == ["410 (381 to 438)", "46", "9.8 MB", "2,442,240", "4.2", "2.0 GB"]
    assert table.loc["most frequent answer"].tolist() == ["6 (2 to 11)", "", "7 B", "", "", ""]
    other = ledger(ROWS, columns=("over asking", "perplexity", "rate"))
    assert (
        other.loc["LoRA"].tolist() == ["+103 (+80 to +127)", "396", "0.001"] and other.loc["asked", "over asking"] == ""
    )
    assert list(other) == ["over asking", "perplexity", "rate"]


def test_counts_say_of_how_many():
    rows = [row | {"subjects": 1064, "countries": 160} for row in ROWS]
    assert list(ledger(rows, columns=("right", "continents", "rate"))) == [
        "right, of 1,064",
        "continents, of 160",
        "rate",
    ]
    own = {"method": "LoRA, yours", "chapter": 0, "subjects": 10, "right": [8, 5, 9], "kept_bytes": 9_768_960}
    table = ledger(rows, 1, mine=own, columns=("right", "over asking", "continents"))
    assert list(table) == ["right", "over asking", "continents, of 160"]
    assert table.loc["LoRA, yours"].tolist() == ["8 (5 to 9), of 10", "", ""]
    assert table.loc["asked", "right"] == "307 (279 to 335), of 1,064"


def test_the_ledgers_points():
    rows = [row | {"subjects": 1064, "countries": 160} for row in ROWS]
    asked, lora = ledger_points(rows)
    assert asked["choice"] == "asked" and asked["value"] == [307, 279, 335] and asked["up"] == 106
    assert lora["said"] == ["410 (381 to 438) of 1,064 cities", "46 continents of 160 countries", "9.8 MB kept a task"]
    assert asked["size"] == pytest.approx((math.log10(41) - 1) / 8) and 0 < asked["size"] < lora["size"] < 1
    assert [point["choice"] for point in ledger_points(rows, chapter=5)] == ["asked"]
    assert compare([asked, lora], "Which?", "Two points.", "countries", "continents").still().startswith("<svg")


def test_a_ledger_that_cannot_be_shown():
    with pytest.raises(ValueError, match="unknown column 'speed'; choose from right, over asking"):
        ledger(ROWS, columns=("right", "speed"))
    with pytest.raises(ValueError, match="7 columns do not fit a page"):
        ledger(ROWS, columns=("right", "continents", "perplexity", "kept a task", "trained", "rate", "minutes"))
    with pytest.raises(ValueError, match="no row of the ledger is met by chapter 0"):
        ledger(ROWS, chapter=0)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KB"),
        (13_824, "13.8 KB"),
        (99_960, "100 KB"),
        (538_060_032, "538 MB"),
        (999_600, "1.0 MB"),
        (5.1e12, "5100 GB"),
        (None, ""),
    ],
)
def test_bytes_have_their_unit(count, text):
    assert in_bytes(count) == text


def test_elsewhere_is_what_share_right_and_perplexity_say(smollm2):
    found = elsewhere(*smollm2, limit=30)
    facts = [fact for rows in facts_with_ids(smollm2[1], "P30").values() for fact in rows][:30]
    prompts = [smollm2[1](f"{s} is located in the continent of", return_tensors="pt") for s, _ in facts]
    with torch.no_grad():
        said = [smollm2[0](**prompt).logits[0, -1].argmax().item() for prompt in prompts]
    assert found["continents"].tolist() == [token == answer for token, (_, answer) in zip(said, facts, strict=True)]
    assert 0 < found["continents"].sum() < 30 and found["perplexity"] > 1


def test_elsewhere_leaves_out_what_the_vocabulary_does_not_know(bert):
    found = elsewhere(*bert)
    assert len(found["continents"]) == 0 and found["perplexity"] is None
