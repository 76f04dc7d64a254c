import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from tuning import prompts
from tuning.data import load_facts, load_reviews
from tuning.evaluate import as_hits, bootstrap_interval, difference, hits_at_1, paired_interval
from tuning.models import load_lm
from tuning.prompts import (
    answer_id,
    answer_logits,
    calibrate,
    class_log_probs,
    encode,
    few_shot,
    hotflip,
    search_triggers,
    trigger_gradient,
)

CAUSAL = pytest.mark.parametrize("lm", ["smollm2", "gpt2"], indirect=True)
EVERY = pytest.mark.parametrize("lm", ["smollm2", "gpt2", "bert"], indirect=True)


def one_at_a_time(model, tokenizer, ids):
    """The independent reference: transformers' own forward of one unpadded prompt."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    return logits[ids.index(tokenizer.mask_token_id) if tokenizer.mask_token else -1]


# --- templates


def test_a_causal_prompt_ends_before_the_answer(smollm2):
    tokenizer = smollm2[1]
    assert tokenizer.decode(encode(tokenizer, "The capital of [X] is [Y].", "Britain")) == "The capital of Britain is"


def test_an_answer_that_the_vocabulary_does_not_know_is_refused(bert):
    with pytest.raises(ValueError, match="use one-token answers"):
        answer_id(bert[1], "Norway")


def test_a_masked_prompt_has_its_mask_at_the_answer(bert):
    tokenizer = bert[1]
    ids = encode(tokenizer, "The capital of [X] is [Y].", "Britain")
    expected = ["[CLS]", "the", "capital", "of", "britain", "is", "[MASK]", ".", "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(ids) == expected
    assert encode(tokenizer, "[Y] is the capital of [X].", "France").index(tokenizer.mask_token_id) == 1


def test_ids_are_those_of_the_whole_sentence(smollm2):
    tokenizer = smollm2[1]
    for subject in ("Osaka", "Al Waqf", "Belišće", "Treinta y Tres"):
        text = f"The city of {subject} is in the country of"
        assert encode(tokenizer, "The city of [X] is in the country of [Y].", subject) == tokenizer(text).input_ids


def test_triggers_stand_where_the_template_says(smollm2, bert):
    tokenizer = smollm2[1]
    ids = encode(tokenizer, "[T] [X] [T] is [T] [Y].", "Osaka", (7, 8, 9))
    plain = [tokenizer(text).input_ids for text in (" Osaka", " is")]
    assert ids == [7, *plain[0], 8, *plain[1], 9]
    tokenizer = bert[1]
    ids = encode(tokenizer, "[X] [T] [T] [Y].", "Paris", (5, 6))
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "paris", "the", "capital", "[MASK]", ".", "[SEP]"]


def test_a_tokenizer_that_begins_texts_with_a_token(smollm2, tmp_path):
    from transformers import AutoTokenizer

    smollm2[1].save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    ids = encode(tokenizer, "The capital of [X] is [Y].", "Britain")
    assert ids == [1, *smollm2[1]("The capital of Britain is").input_ids]


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("Paris is in [Y].", r"'Paris is in \[Y\].' has no \[X\] slot; write one, e.g."),
        ("[X] and [X] are in [Y].", r"has 2 \[X\] slots"),
        ("[X] is in France.", r"has no \[Y\] slot"),
        ("[X] is in [Y] or [Y].", r"has 2 \[Y\] slots"),
        ("[Y] is the capital of [X].", "does not suit a causal model"),
        ("[X] is in [Y] today.", r"end it on ' \[Y\]'"),
        ("[X] is in:[Y]", "answers with a word after a space"),
        ("[X] [T] [Y].", r"has 1 \[T\] slots for 0 triggers"),
        ("[P][P] [X] is in [Y].", r"has 2 \[P\] slots and no vectors for them; pass `vectors` \(2, hidden\)"),
    ],
)
def test_bad_templates(template, fault, smollm2):
    with pytest.raises(ValueError, match=fault):
        encode(smollm2[1], template, "Paris")


def test_few_shot_prompts_are_templates():
    template = few_shot("[X] is in [Y].", [("Paris", "France"), ("Osaka", "Japan")])
    assert template == "Paris is in France.\nOsaka is in Japan.\n[X] is in [Y]."
    assert few_shot("[X]: [Y]", []) == "[X]: [Y]"
    assert few_shot("[X]: [Y]", [("a", "b")], separator=" | ") == "a: b | [X]: [Y]"


def test_an_answer_of_more_than_one_token(smollm2, bert):
    assert smollm2[1].decode(answer_id(smollm2[1], "France")) == " France"
    assert bert[1].decode(answer_id(bert[1], "France")) == "france"
    with pytest.raises(ValueError, match=r"answer 'South Korea' is 2 tokens"):
        answer_id(smollm2[1], "South Korea")
    with pytest.raises(ValueError, match=r"is \d tokens"):
        answer_id(bert[1], "")


# --- scoring

SENTENCES = [
    ("The capital of [X] is [Y].", ["France", "South Korea", "Britain"]),
    ("[X] is the capital of [Y].", ["London", "Paris", "Seoul"]),
    (few_shot("The capital of [X] is [Y].", [("France", "Paris"), ("Britain", "London")]), ["South Korea", "Paris"]),
    ("[X] is [Y]", ["a", "the capital of South Korea", "London"]),
]


@EVERY
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_logits_do_not_depend_on_the_batch(lm, batch_size):
    """Prompts of several lengths, with and without a shared prefix, against one unpadded forward each."""
    model, tokenizer = lm
    for template, subjects in SENTENCES:
        rows = [encode(tokenizer, template, subject) for subject in subjects]
        expected = torch.stack([one_at_a_time(model, tokenizer, ids) for ids in rows])
        found = answer_logits(model, tokenizer, rows, batch_size=batch_size)
        assert found.dtype == torch.float32 and found.shape == (len(rows), model.config.vocab_size)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@CAUSAL
def test_logits_in_a_mixed_batch(lm):
    model, tokenizer = lm
    rows = [encode(tokenizer, template, subject) for template, subjects in SENTENCES for subject in subjects]
    expected = torch.stack([one_at_a_time(model, tokenizer, ids) for ids in rows])
    torch.testing.assert_close(answer_logits(model, tokenizer, rows, 5), expected, atol=1e-4, rtol=0)


def test_the_test_above_can_fail(gpt2):
    """Without positions that start at the first real token, left padding changes the logits by more than the bound."""
    model, tokenizer = gpt2
    short, long = (encode(tokenizer, "[X] is [Y]", subject) for subject in ("a", "the capital of South Korea"))
    gap = len(long) - len(short)
    ids = torch.tensor([[tokenizer.pad_token_id] * gap + short, long])
    mask = torch.tensor([[0] * gap + [1] * len(short), [1] * len(long)])
    with torch.no_grad():
        wrong = model(ids, attention_mask=mask, position_ids=torch.arange(len(long))[None].expand(2, -1)).logits[0, -1]
    assert (wrong - one_at_a_time(model, tokenizer, short)).abs().max() > 1e-2


def test_equal_prompts_and_prefixes_that_are_prompts(smollm2):
    model, tokenizer = smollm2
    ids = encode(tokenizer, "The capital of [X] is [Y].", "Britain")
    rows = [ids, ids, ids[:2], ids[:4]]
    expected = torch.stack([one_at_a_time(model, tokenizer, row) for row in rows])
    torch.testing.assert_close(answer_logits(model, tokenizer, rows), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("in_peft", [False, True])
def test_the_shared_prefix_is_used(in_peft, smollm2):
    model, tokenizer = smollm2
    shown = few_shot("[X] is in [Y].", [("Osaka", "Japan")] * 4)
    rows = [encode(tokenizer, shown, subject) for subject in ("Paris", "London")]
    read = []
    hook = model.model.register_forward_pre_hook(
        lambda _, __, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    asked = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj"])) if in_peft else model
    answer_logits(asked, tokenizer, rows)
    hook.remove()
    assert 0 < sum(read) < sum(map(len, rows)) / 1.8


class Wrapped(torch.nn.Module):
    """A model behind a forward that takes anything, as peft wraps it, or only the ids and their mask."""

    def __init__(self, model, takes_anything):
        super().__init__()
        self.inner, self.config, self.device = model, model.config, model.device
        if takes_anything:
            self.forward = lambda *arguments, **options: self.inner(*arguments, **options)

    def forward(self, input_ids, attention_mask):
        return self.inner(input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize("takes_anything", [True, False])
def test_wrapped_models_answer_the_same(takes_anything, smollm2):
    model, tokenizer = smollm2
    rows = [encode(tokenizer, SENTENCES[2][0], subject) for subject in ("Paris", "South Korea", "London")]
    expected = torch.stack([one_at_a_time(model, tokenizer, ids) for ids in rows])
    found = answer_logits(Wrapped(model, takes_anything), tokenizer, rows)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def tiny(name, **settings):
    """A model with random weights of an architecture whose attention is not that of the book's models."""
    config = AutoConfig.for_model(name, vocab_size=99, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)  # far from uniform attention
    return model


OTHERS = {
    "positions by index": lambda: tiny("mpt", d_model=16, n_heads=2, n_layers=2, max_seq_len=64),
    "local attention": lambda: tiny(
        "gpt_neo",
        hidden_size=16,
        num_heads=2,
        num_layers=2,
        attention_types=[[["global", "local"], 1]],
        window_size=6,
        max_position_embeddings=64,
    ),
    "states of a convolution": lambda: tiny(
        "lfm2",
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["conv", "full_attention"],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
}


@pytest.mark.parametrize("own", [[[7], [8, 9, 10, 11], [12, 13], [14] * 9], [[7, 8], [9, 10], [11, 12]]])
@pytest.mark.parametrize("kind", OTHERS)
def test_a_shared_prefix_changes_no_models_logits(kind, own, smollm2):
    """With padding between the prefix and the shorter prompts, and without."""
    model, tokenizer = OTHERS[kind](), smollm2[1]
    rows = [[5, 6, 20, 21, *ids] for ids in own]
    expected = torch.stack([one_at_a_time(model, tokenizer, ids) for ids in rows])
    torch.testing.assert_close(answer_logits(model, tokenizer, rows), expected, atol=1e-4, rtol=1e-4)


def test_sixteen_bit_models_answer_in_float32(tiny_gpt2):
    model, tokenizer = load_lm(tiny_gpt2, device="cpu", dtype=torch.bfloat16)
    logits = answer_logits(model, tokenizer, [encode(tokenizer, "[X] is in [Y].", "Paris")])
    assert logits.dtype == torch.float32 and logits.isfinite().all()


def test_no_prompts(smollm2):
    with pytest.raises(ValueError, match="is the data set empty"):
        answer_logits(*smollm2, [])


def test_a_prompt_without_a_token(gpt2):
    model, tokenizer = gpt2
    rows = [encode(tokenizer, "[X] [Y].", subject) for subject in ("Paris", "")]
    with pytest.raises(ValueError, match=r"prompt 1 has no token; write words"):
        answer_logits(model, tokenizer, rows)


@EVERY
def test_vectors_that_are_missing_or_do_not_fit(lm):
    model, tokenizer = lm
    prompts, size = [[5, -1, 6, -3]], model.config.hidden_size
    for vectors in (None, torch.zeros(2, size)):
        with pytest.raises(ValueError, match=r"places for 3 vectors; pass `vectors` \(3, hidden\)"):
            answer_logits(model, tokenizer, prompts, vectors=vectors)
    with pytest.raises(ValueError, match=r"there are no vectors; give at least one, or None"):
        answer_logits(model, tokenizer, [[5, 6]], vectors=torch.zeros(0, size))
    with pytest.raises(ValueError, match=rf"shape \(3, 7\) do not fit this model.*give \(length, {size}\)"):
        answer_logits(model, tokenizer, prompts, vectors=torch.zeros(3, 7))


def in_training(model):
    """A copy in training mode with dropout and checkpoints, one layer of which is frozen in evaluation mode."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.gradient_checkpointing_enable()
    model.get_input_embeddings().eval()
    return model


@pytest.mark.parametrize("lm", ["gpt2", "bert"], indirect=True)
def test_scores_are_those_of_evaluation_mode(lm):
    """Without dropout, and from the shared beginning's keys and values, which checkpoints would not keep."""
    model, tokenizer = lm
    rows = [encode(tokenizer, "The capital of [X] is [Y].", subject) for subject in ("France", "South Korea")]
    facts, triggers = facts_and_triggers(tokenizer)
    training = in_training(model)
    modes = [module.training for module in training.modules()]
    found = answer_logits(training, tokenizer, rows)
    torch.testing.assert_close(found, answer_logits(model, tokenizer, rows), atol=1e-5, rtol=0)
    gradient = trigger_gradient(training, tokenizer, TEMPLATE, triggers, facts)
    expected = trigger_gradient(model, tokenizer, TEMPLATE, triggers, facts)
    assert (gradient - expected).norm() < 1e-4 * expected.norm()
    assert [module.training for module in training.modules()] == modes


def test_the_mode_comes_back_after_an_error(gpt2):
    model = in_training(gpt2[0])
    modes = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError, match="stop"), prompts.evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("stop")
    assert [module.training for module in model.modules()] == modes and any(modes) and not all(modes)


@pytest.mark.parametrize("lm", ["gpt2", "bert"], indirect=True)
def test_a_prompt_longer_than_the_context(lm):
    model, tokenizer = lm
    rows = [encode(tokenizer, "[X] is [Y].", "Paris"), encode(tokenizer, "[X] is [Y].", "a " * 300)]
    limit = model.config.max_position_embeddings
    with pytest.raises(ValueError, match=rf"prompt 1 is \d+ tokens long and the model's context holds {limit}"):
        answer_logits(model, tokenizer, rows)


# --- metrics


def test_hits_over_the_vocabulary_and_over_candidates():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0], [5.0, 0.0, 1.0, 2.0], [0.0, 1.0, 9.0, 3.0]])
    assert hits_at_1(logits, [1, 3, 3]).tolist() == [True, False, False]
    assert hits_at_1(logits, [2, 3, 3], candidates=[2, 3]).tolist() == [True, True, False]
    assert logits[1, 0] == 5  # the caller's logits are left alone


def test_bootstrap_interval_against_scipys_kind_of_answer():
    """For a mean of n coin flips the interval is close to the normal one, and it shrinks with the root of n."""
    for n in (100, 400):
        hits = torch.arange(n) < 0.3 * n
        low, high = bootstrap_interval(hits)
        half = 1.96 * (0.3 * 0.7 / n) ** 0.5
        assert abs(low - (0.3 - half)) < 0.25 * half and abs(high - (0.3 + half)) < 0.25 * half
    assert bootstrap_interval(hits) == bootstrap_interval(hits)
    assert bootstrap_interval(torch.ones(5)) == (1.0, 1.0)


def test_paired_interval_against_the_variances_of_both_designs():
    """Three seeds that agree: the same 200 items tell as much as one seed does, 600 different ones as much as 600."""
    gains = [(torch.arange(200) < 60).float()] * 3
    for same_items, n in ((True, 200), (False, 600)):
        half = 1.96 * (0.3 * 0.7 / n) ** 0.5
        low, high = paired_interval(gains, same_items)
        assert abs(low - (0.3 - half)) < 0.1 * half and abs(high - (0.3 + half)) < 0.1 * half


def test_a_difference_is_told_in_items_with_its_paired_interval():
    one, other = ["1" * 60 + "0" * 40, "1" * 70 + "0" * 30], ["1" * 40 + "0" * 60, "1" * 40 + "0" * 60]
    gaps = [as_hits(mine) - as_hits(theirs) for mine, theirs in zip(one, other, strict=True)]
    low, high = paired_interval(gaps, same_items=True)
    assert difference(one, other) == f"+25 ({100 * low:+.0f} to {100 * high:+.0f})" and 10 < 100 * low < 20
    assert difference(other, one).startswith("-25 (-") and difference(one, one) == "+0 (+0 to +0)"
    for wrong in (one[:1], ["1", "0"], [one[0], "10"]):
        with pytest.raises(ValueError, match="cannot be paired"):
            difference(one, wrong)


def test_paired_interval_draws_seeds_too():
    """Items without variance: of the 27 ways to draw three seeds, one in 27 takes the worst seed three times."""
    gains = [torch.full((50,), value) for value in (0.0, 0.3, 0.6)]
    for same_items in (True, False):
        low, high = paired_interval(gains, same_items)
        assert abs(low) < 1e-6 and abs(high - 0.6) < 1e-6
    unequal = [torch.tensor([0.0, 1.0]), torch.tensor([1.0])]
    assert paired_interval(unequal, same_items=False)[0] < 0.5
    with pytest.raises(ValueError, match=r"\[2, 1\] items cannot share them; pass same_items=False"):
        paired_interval(unequal, same_items=True)


def test_class_log_probs_sum_over_label_words():
    logits = torch.randn(3, 10, dtype=torch.float64)
    found = class_log_probs(logits, [[1, 2], [7]])
    weights = torch.stack([logits[:, 1].exp() + logits[:, 2].exp(), logits[:, 7].exp()], dim=1)
    torch.testing.assert_close(found, (weights / weights.sum(dim=1, keepdim=True)).log())


@pytest.mark.parametrize("words", [[], [[1], []]])
def test_a_class_without_words(words):
    with pytest.raises(ValueError, match="give each class at least one token id"):
        class_log_probs(torch.zeros(3, 10), words)


def test_calibration_on_nothing():
    with pytest.raises(ValueError, match="no reference inputs"):
        calibrate(torch.zeros(3, 2), torch.zeros(0, 2))


def test_calibration_takes_out_a_constant_preference():
    torch.manual_seed(0)
    clean = torch.randn(400, 2).log_softmax(dim=1)
    biased = (clean + torch.tensor([2.0, 0.0])).log_softmax(dim=1)
    found = calibrate(biased, biased)
    torch.testing.assert_close(
        found[:, 0] - found[:, 1], (clean[:, 0] - clean[:, 1]) - (clean[:, 0] - clean[:, 1]).mean()
    )
    torch.testing.assert_close(found.exp().sum(dim=1), torch.ones(400))


def test_calibration_helps_on_the_reviews(smollm2):
    model, tokenizer = smollm2
    rows = load_reviews()["dev"].select(range(120))
    words = [[answer_id(tokenizer, "bad")], [answer_id(tokenizer, "good")]]
    logits = answer_logits(model, tokenizer, [encode(tokenizer, "[X] It was [Y].", text) for text in rows["sentence"]])
    log_probs, labels = class_log_probs(logits, words), torch.tensor(rows["label"])
    before, after = (
        (scores.argmax(dim=1) == labels).float().mean() for scores in (log_probs, calibrate(log_probs, log_probs))
    )
    assert after > before + 0.05


# --- the search for trigger tokens

TEMPLATE = "[X] [T] [T] [T] [Y]."


def facts_and_triggers(tokenizer):
    words = ("is", "of", "the")
    facts = [
        (subject, answer_id(tokenizer, answer)) for subject, answer in (("Paris", "France"), ("London", "Britain"))
    ]
    return facts, [answer_id(tokenizer, word) for word in words]


def gradient_error(model, tokenizer):
    """The error of `trigger_gradient` relative to autograd at all input embeddings, one unpadded prompt at a time."""
    facts, triggers = facts_and_triggers(tokenizer)
    found = trigger_gradient(model, tokenizer, TEMPLATE, triggers, facts)
    total = torch.zeros_like(found)
    for subject, answer in facts:
        ids = encode(tokenizer, TEMPLATE, subject, triggers)
        inputs = model.get_input_embeddings()(torch.tensor([ids])).detach().requires_grad_()
        place = ids.index(tokenizer.mask_token_id) if tokenizer.mask_token else -1
        loss = F.cross_entropy(model(inputs_embeds=inputs).logits[0, place][None], torch.tensor([answer]))
        gradient = torch.autograd.grad(loss, inputs)[0]
        total += gradient[0, [ids.index(trigger) for trigger in triggers]] / len(facts)
    return ((found - total).norm() / total.norm()).item()


@EVERY
def test_trigger_gradient_equals_that_of_single_prompts(lm):
    """In float32; few rows in the output layer's backward pass sum 49,152 products naively, which costs a digit."""
    assert gradient_error(*lm) < 1e-3


@pytest.mark.parametrize("folder", ["tiny_gpt2", "tiny_bert"])
def test_trigger_gradient_in_float64(folder, request):
    """The weights in float64; only the loss is taken in float32."""
    model, tokenizer = load_lm(request.getfixturevalue(folder), device="cpu", dtype=torch.float64)
    assert gradient_error(model, tokenizer) < 1e-5


@torch.no_grad()
def test_trigger_gradient_where_gradients_are_off(gpt2):
    facts, triggers = facts_and_triggers(gpt2[1])
    found = trigger_gradient(*gpt2, TEMPLATE, triggers, facts)
    assert not torch.is_grad_enabled()
    with torch.enable_grad():
        assert torch.equal(found, trigger_gradient(*gpt2, TEMPLATE, triggers, facts))


def test_trigger_gradient_leaves_the_model_alone(gpt2):
    model, tokenizer = gpt2
    facts, triggers = facts_and_triggers(tokenizer)
    trigger_gradient(model, tokenizer, TEMPLATE, triggers, facts)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hotflip_ranks_by_the_first_order_change():
    torch.manual_seed(0)
    embeddings, gradient = torch.randn(50, 8), torch.randn(8)
    allowed = torch.ones(50, dtype=torch.bool)
    change = [((embeddings[v] - embeddings[7]) @ gradient).item() for v in range(50)]
    order = sorted(range(50), key=change.__getitem__)
    assert hotflip(gradient, embeddings, allowed, 5) == order[:5]
    allowed[order[0]] = allowed[order[2]] = False
    assert hotflip(gradient, embeddings, allowed, 3) == [order[1], order[3], order[4]]


@pytest.mark.parametrize(("vocab", "size", "few"), [(50, 8, 3), (1000, 24, 1)])
def test_hotflip_keeps_to_what_is_allowed_where_that_is_few(vocab, size, few):
    torch.manual_seed(0)
    embeddings, gradient = torch.randn(vocab, size), torch.randn(size)
    allowed = torch.zeros(vocab, dtype=torch.bool)
    allowed[torch.randperm(vocab)[:few]] = True
    found = hotflip(gradient, embeddings, allowed, 8)
    expected = sorted(allowed.nonzero().flatten().tolist(), key=lambda token: (embeddings[token] @ gradient).item())
    assert found == expected and len(found) == few
    with pytest.raises(ValueError, match="no token is allowed; set at least one"):
        hotflip(gradient, embeddings, torch.zeros(vocab, dtype=torch.bool), 8)
    with pytest.raises(ValueError, match=rf"`allowed` has 4 tokens and the embeddings {vocab}"):
        hotflip(gradient, embeddings, allowed[:4], 8)


def test_a_search_over_nothing(gpt2):
    model, tokenizer = gpt2
    facts, triggers = facts_and_triggers(tokenizer)
    allowed = torch.ones(model.config.vocab_size, dtype=torch.bool)
    with pytest.raises(ValueError, match="no prompts to score; is the data set empty"):
        trigger_gradient(model, tokenizer, TEMPLATE, triggers, [])
    with pytest.raises(ValueError, match="no prompts to score"):
        next(search_triggers(model, tokenizer, TEMPLATE, triggers, [], allowed, steps=1))
    with pytest.raises(ValueError, match=r"are there words, or \[T\] slots, in the template"):
        next(search_triggers(model, tokenizer, "[X] is [Y].", [], facts, allowed, steps=1))
    with pytest.raises(ValueError, match="no token is allowed"):
        next(search_triggers(model, tokenizer, TEMPLATE, triggers, facts, ~allowed, steps=1))
    with pytest.raises(ValueError, match="the model's context holds 256"):
        trigger_gradient(model, tokenizer, TEMPLATE, triggers, [("a " * 300, facts[0][1])])


@EVERY
def test_search_lowers_the_loss_and_keeps_to_what_is_allowed(lm):
    model, tokenizer = lm
    facts, triggers = facts_and_triggers(tokenizer)
    size = model.get_input_embeddings().num_embeddings
    allowed = torch.ones(size, dtype=torch.bool)
    allowed[[answer for _, answer in facts] + tokenizer.all_special_ids] = False
    before = prompts._losses(model, tokenizer, TEMPLATE, [triggers], facts).item()
    steps = list(search_triggers(model, tokenizer, TEMPLATE, triggers, facts, allowed, steps=6, k=4))
    losses = [loss for _, loss in steps]
    assert len(steps) == 6 and losses[-1] < before
    assert all(later <= earlier + 1e-4 for earlier, later in itertools.pairwise(losses))  # the facts are all scored
    found = steps[-1][0]
    assert all(allowed[token] or token in triggers for token in found)
    assert losses[-1] == pytest.approx(prompts._losses(model, tokenizer, TEMPLATE, [found], facts).item(), abs=1e-5)
    again = list(search_triggers(model, tokenizer, TEMPLATE, triggers, facts, allowed, steps=6, k=4))
    assert [triggers for triggers, _ in again] == [triggers for triggers, _ in steps]


def test_batches_give_the_predictions_of_single_prompts_on_real_facts(smollm2):
    model, tokenizer = smollm2
    rows = [encode(tokenizer, "[X] is the capital of [Y].", s) for s in load_facts("P1376")["test"]["sub_label"]]
    alone = torch.stack([one_at_a_time(model, tokenizer, ids) for ids in rows])
    together = answer_logits(model, tokenizer, rows)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert torch.equal(together.argmax(dim=1), alone.argmax(dim=1))
