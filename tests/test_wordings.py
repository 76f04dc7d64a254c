"""The values of chapter 2's chart are what the model says, and the city is chosen by the rule that is stated."""

import pytest
import torch
from tuning.data import load_facts
from tuning.experiments import wordings
from tuning.experiments.record import load_results


def test_the_recorded_values_are_what_the_model_says(smollm2):
    model, tokenizer = smollm2
    saved = load_results("wordings")
    assert saved["provenance"]["settings"]["limit"] is None and "dirty" not in saved["provenance"]["commit"]
    found = saved["results"]["P17"]
    assert len(found["wordings"]) == 8
    for wording in found["wordings"]:
        with torch.no_grad():
            logits = model(**tokenizer(wording["prompt"], return_tensors="pt")).logits[0, -1]
        likeliest = logits.softmax(-1).sort(descending=True)
        for place, word in enumerate(wording["words"]):
            assert word["probability"] == pytest.approx(likeliest.values[place].item(), abs=1e-4)
            assert word["token"] == tokenizer.decode(likeliest.indices[place])
            assert word["right"] == (word["token"] == f" {found['country']}")


def test_the_city_is_the_first_whose_country_a_wording_brings_out(smollm2, tmp_path):
    committed = load_results("wordings")["results"]["P17"]
    place = committed["passed_over"]
    assert load_facts("P17")["dev"][place] == {"sub_label": committed["city"], "obj_label": committed["country"]}
    with pytest.raises(ValueError, match="no wording brings out the country of any of these cities"):
        wordings.first_known_city(*smollm2, limit=place)
    wordings.main(["--device", "cpu", "--limit", str(place + 1), "--out", str(tmp_path)])
    assert load_results("wordings", tmp_path)["results"]["P17"]["city"] == committed["city"]
