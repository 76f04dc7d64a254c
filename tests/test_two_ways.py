"""The small code that chapter 1's page shows is the library's, but for what the page says the library adds."""

import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from notebook_rules import ROOT, defined, read
from torch import nn
from tuning import training
from tuning.models import load_encoder
from tuning.prompts import answer_logits, encode
from tuning.training import Classifier, batch_rows, mean_of_tokens, train

PAGE = read(ROOT / "book/1-prompts/1-two-ways.ipynb")
TEXTS = ["the capital", "seoul", "the capital of south korea is seoul", "paris . paris . a capital is a paris"]
CITIES = {"britain": "london", "france": "paris", "south korea": "seoul"}
PAIRS = [(place, city) for place in CITIES for city in CITIES.values()]
ROWS = [(f"the capital of {place} is {('a', 'the')[i % 2]} {city}", i % 2) for i, (place, city) in enumerate(2 * PAIRS)]


@pytest.fixture
def with_head(tiny_bert):
    """A function that makes the page's model, the same each time, without dropout."""
    WithHead = defined(PAGE, "WithHead", {"nn": nn})

    def make(classes=2):
        body, tokenizer = load_encoder(str(tiny_bert), device="cpu", dtype=torch.float32)
        for module in body.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        torch.manual_seed(1)
        return WithHead(body, tokenizer, classes)

    return make


@pytest.mark.parametrize("classes", [2, 5])
def test_the_pages_head_is_the_librarys(with_head, classes):
    ours = with_head(classes)
    theirs = Classifier(ours.body, ours.tokenizer, classes, mean_of_tokens)
    theirs.head.load_state_dict(ours.head.state_dict())
    assert ours(TEXTS).shape == (4, classes)
    torch.testing.assert_close(ours(TEXTS), theirs(TEXTS))
    torch.testing.assert_close(ours(TEXTS)[1], ours(TEXTS[1:2])[0], rtol=1e-4, atol=1e-5)  # padding is left out


@pytest.mark.parametrize(("steps", "batch_size", "lr"), [(5, 4, 0.01), (12, 3, 0.003)])
def test_the_pages_loop_is_the_librarys_without_warm_up_and_clipping(with_head, steps, batch_size, lr, monkeypatch):
    """The library is given the page's schedule and a limit that no gradient reaches, the page the library's batches."""
    monkeypatch.setattr(training, "rate_factor", lambda step, steps: (steps - step) / steps)
    monkeypatch.setattr(training, "clip_grad_norm_", lambda weights, limit: nn.utils.clip_grad_norm_(weights, 1e9))
    drawn = iter([[ROWS[i] for i in batch_rows(step, len(ROWS), batch_size, seed=3)] for step in range(steps)])
    sizes = []

    def sample(rows, k):
        sizes.append((len(rows), k))
        return next(drawn)

    fine_tune = defined(PAGE, "fine_tune", {"torch": torch, "F": F, "random": SimpleNamespace(sample=sample)})
    page, library, start = with_head(), with_head(), with_head()
    fine_tune(page, ROWS, lr, steps, batch_size)
    assert sizes == [(len(ROWS), batch_size)] * steps and not page.training

    def loss_on(rows):
        return F.cross_entropy(library([text for text, _ in rows]), torch.tensor([label for _, label in rows]))

    train(library, loss_on, ROWS, lr, steps, batch_size=batch_size, seed=3)
    for name in ("body.encoder.layer.0.attention.self.query.weight", "body.embeddings.word_embeddings.weight",
                 "body.encoder.layer.1.output.dense.bias", "head.weight", "head.bias"):  # fmt: skip
        torch.testing.assert_close(page.get_parameter(name), library.get_parameter(name), msg=name)
        assert not torch.equal(page.get_parameter(name), start.get_parameter(name))


def test_the_pages_loop_leaves_a_frozen_body_alone(with_head):
    fine_tune = defined(PAGE, "fine_tune", {"torch": torch, "F": F, "random": random.Random(0)})
    model, start = with_head(), with_head()
    model.body.requires_grad_(False)
    fine_tune(model, ROWS, lr=0.01, steps=3, batch_size=4)
    for name, weight in model.body.named_parameters():
        assert torch.equal(weight, start.body.get_parameter(name))
    assert not torch.equal(model.head.weight, start.head.weight)


@pytest.mark.parametrize("batch_size", [1, 2, 10])
def test_the_pages_question_is_the_librarys(smollm2, batch_size):
    model, tokenizer = smollm2
    names = {"torch": torch, "lm": model, "lm_tokenizer": tokenizer, "WORDS": (" negative", " positive")}
    ask = defined(PAGE, "ask", names)
    reviews = ["A triumph.", "A bore of two hours, and a loud one.", "It is long."]
    prompts = [encode(tokenizer, "Review: [X]\nSentiment: [Y].", text) for text in reviews]
    logits = answer_logits(model, tokenizer, prompts)
    for pair in ((" negative", " positive"), (" bad", " good")):
        ids = [tokenizer(word).input_ids[0] for word in pair]
        found = ask([f"Review: {text}\nSentiment:" for text in reviews], pair, batch_size)
        torch.testing.assert_close(found, logits[:, ids], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("text", ["the capital of france is [Y] .", "[Y] is the capital of south korea"])
def test_the_pages_cloze_asks_a_masked_model(bert, text):
    cloze = defined(PAGE, "cloze", {"torch": torch})
    model, tokenizer = bert
    logits = answer_logits(model, tokenizer, [encode(tokenizer, text.replace("france", "[X]").replace("korea", "[X]"),
                                                     "france" if "france" in text else "korea")])[0]  # fmt: skip
    for pair in (["london", "paris"], ["paris", "london"], ["seoul", "a"]):
        best = max(pair, key=lambda word: logits[tokenizer.convert_tokens_to_ids(word)])
        assert cloze(model, tokenizer, text, pair) == best
