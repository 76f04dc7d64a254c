"""Every method by its name: what it trains, equal to the chapters' own functions, and answers of several tokens."""

import copy

import pytest
import torch
from tuning.lora import add_lora
from tuning.methods import BARE, METHODS, Ready, fit, loss_of, prepare, right, says
from tuning.models import load_lm
from tuning.p_tuning import answer_loss, prompt_logits
from tuning.prompts import answer_id, encode
from tuning.training import train

TEMPLATE = "The capital of [X] is [Y]."
FACTS = [("Britain", "London"), ("France", "Paris"), ("Japan", "Tokyo"), ("Spain", "Madrid"), ("Italy", "Rome")]


@pytest.fixture
def model_and_rows(gpt2):
    model, tokenizer = gpt2
    rows = [(subject, [answer_id(tokenizer, answer)]) for subject, answer in FACTS]
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model, tokenizer, rows


@pytest.fixture
def spelled_out(gpt2):
    """Rows whose answers have one token to three."""
    tokenizer = gpt2[1]
    answers = [" London", " Paris it", " Tokyo of course", " Madrid", " Rome again"]
    return [(subject, tokenizer(answer).input_ids) for (subject, _), answer in zip(FACTS, answers, strict=True)]


@pytest.mark.parametrize("method", METHODS)
def test_each_method_learns_and_says_what_is_kept(model_and_rows, method):
    model, tokenizer, rows = model_and_rows
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    ready = prepare(method, model, tokenizer, TEMPLATE, rank=2, alpha=6)
    rate = {"all weights": 1e-2, "AdaLomo": 1e-2, "LOMO": 1e-2, "LoRA": 5e-2, "QLoRA": 5e-2}.get(method, 1e-1)
    first = loss_of(ready, rows).item()
    done = fit(ready, rows, rows, rate, 20, batch_size=5, every=5)
    assert len(done.losses) == 20 and done.stopped is None and [step for step, _ in done.scores] == [0, 5, 10, 15, 20]
    assert min(done.losses) < first - 0.3
    assert done.dev == max(score for _, score in done.scores) == right(ready, rows).double().mean().item()
    if "tuning" in method:
        assert ready.kept() == ready.template.count("[P]") * 32
        assert all(torch.equal(value, frozen[name]) for name, value in model.state_dict().items())
    elif "LoRA" in method:
        assert ready.kept() == sum(w.numel() for n, w in model.named_parameters() if n.endswith((".A", ".B"))) > 0
    else:
        assert ready.kept() == sum(weight.numel() for weight in model.parameters())


def test_the_templates_of_the_kinds_of_p_tuning(model_and_rows):
    model, tokenizer, _ = model_and_rows
    templates = {
        method: prepare(method, model, tokenizer, TEMPLATE).template for method in METHODS if "tuning" in method
    }
    assert templates == {
        "prompt tuning": BARE,
        "prompt tuning, from the prompt": "[P][P][P] [X][P] [Y]",
        "P-tuning, BiLSTM": BARE,
        "P-tuning, MLP": BARE,
        "P-tuning beside the prompt": "[P][P][P] The capital of [X] is[P][P][P] [Y].",
        "P-tuning, from the prompt": "[P][P][P] [X][P] [Y]",
    }
    assert prepare("P-tuning, MLP", model, tokenizer, TEMPLATE).encoder.lstm is None


@pytest.mark.parametrize("method", ["prompt tuning, from the prompt", "P-tuning, from the prompt", "LoRA", "LOMO"])
def test_these_begin_at_the_handcrafted_prompt(model_and_rows, method):
    model, tokenizer, rows = model_and_rows
    wanted = prompt_logits(model, tokenizer, TEMPLATE, [subject for subject, _ in rows])
    ready = prepare(method, model, tokenizer, TEMPLATE)
    with torch.no_grad():
        given = prompt_logits(model, tokenizer, ready.template, [s for s, _ in rows], ready.vectors())
    torch.testing.assert_close(given, wanted, atol=1e-4, rtol=1e-4)


def test_one_token_answers_have_the_loss_of_p_tuning(model_and_rows):
    model, tokenizer, rows = model_and_rows
    ready = prepare("P-tuning, BiLSTM", model, tokenizer, TEMPLATE)
    theirs = answer_loss(model, tokenizer, BARE, [(s, a) for s, (a,) in rows], ready.vectors())
    torch.testing.assert_close(loss_of(ready, rows), theirs)


def test_several_tokens_have_the_loss_of_each_token_after_those_before(model_and_rows, spelled_out):
    model, tokenizer, _ = model_and_rows
    ready = Ready("asked", model, tokenizer, TEMPLATE, trained=model)
    parts = []
    for subject, answer in spelled_out:
        ids = torch.tensor([encode(tokenizer, TEMPLATE, subject) + answer])
        logits = model(ids).logits[0].log_softmax(-1)
        start = ids.shape[1] - len(answer)
        parts += [-logits[start + place - 1, token] for place, token in enumerate(answer)]
    torch.testing.assert_close(loss_of(ready, spelled_out), torch.stack(parts).mean())


def test_an_answer_is_right_when_greedy_decoding_begins_with_it(model_and_rows, spelled_out):
    model, tokenizer, _ = model_and_rows
    ready = prepare("all weights", model, tokenizer, TEMPLATE)
    fit(ready, spelled_out, spelled_out, 1e-2, 40, batch_size=5, every=20)
    hits = right(ready, spelled_out).tolist()
    texts = says(ready, [subject for subject, _ in spelled_out], 3)
    begins = [text.startswith(tokenizer.decode(ids).strip()) for text, (_, ids) in zip(texts, spelled_out, strict=True)]
    assert hits == begins and sum(hits) > 0
    theirs = model.generate(
        torch.tensor([encode(tokenizer, TEMPLATE, "Japan")]), max_new_tokens=3, do_sample=False, pad_token_id=0
    )
    assert texts[2] == tokenizer.decode(theirs[0, -3:]).strip()
    assert right(ready, [(s, [(a[0] + 1) % 1000, *a[1:]]) for s, a in spelled_out]).sum() == 0


def test_lora_trains_as_by_the_books_loop(model_and_rows):
    """The same start, batches and schedule; AdamW is the fused one here, which rounds otherwise."""
    model, tokenizer, rows = model_and_rows
    other = copy.deepcopy(model).requires_grad_(False)
    ready = prepare("LoRA", model, tokenizer, TEMPLATE, seed=3, rank=2, alpha=6)
    done = fit(ready, rows, None, 1e-2, 6, seed=3, batch_size=2)
    torch.manual_seed(3)
    add_lora(other, "all-linear", rank=2, alpha=6)
    facts = [(subject, answer) for subject, (answer,) in rows]
    theirs = train(other, lambda b: answer_loss(other, tokenizer, TEMPLATE, b), facts, 1e-2, 6, batch_size=2, seed=3)
    torch.testing.assert_close(torch.tensor(done.losses), torch.tensor(theirs.losses), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["all weights", "LOMO"])
def test_a_training_that_diverges_is_ended_and_the_best_state_kept(model_and_rows, method):
    model, tokenizer, rows = model_and_rows
    ready = prepare(method, model, tokenizer, TEMPLATE)
    before = [weight.detach().clone() for weight in ready.weights()]
    done = fit(ready, rows, rows, float("1e30"), 12, batch_size=5, every=20)
    assert "finite" in done.stopped or "nan" in done.stopped
    assert done.step == 0 and all(torch.equal(a, b) for a, b in zip(before, ready.weights(), strict=True))
    assert not getattr(ready.weights()[0], "_post_accumulate_grad_hooks", None)


def test_bad_input(model_and_rows, bert, tiny_gpt2):
    model, tokenizer, rows = model_and_rows
    with pytest.raises(ValueError, match=r"unknown method 'lora'; did you mean 'LoRA'\?"):
        prepare("lora", model, tokenizer, TEMPLATE)
    with pytest.raises(ValueError, match="masked model cannot write an answer of several tokens"):
        prepare("LoRA", *bert, TEMPLATE)
    with pytest.raises(ValueError, match=r"has no \[Y\] slot"):
        prepare("LoRA", model, tokenizer, "[X] is in")
    ready = prepare("LoRA", load_lm(tiny_gpt2)[0], tokenizer, TEMPLATE)
    with pytest.raises(ValueError, match="5 rows are fewer than one batch of 16"):
        fit(ready, rows, rows, 1e-3, 2)
