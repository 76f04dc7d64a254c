"""What measures (intervals of P@1 and of paired seeds: test_prompts.py; perplexity: test_experiments.py)."""

import math

import pytest
import torch
import torch.nn.functional as F
from tuning.data import load_facts
from tuning.evaluate import (
    accuracy,
    bootstrap_interval,
    facts_with_ids,
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
