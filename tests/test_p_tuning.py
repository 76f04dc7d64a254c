"""Prompt tuning and P-tuning: against peft, against a prompt put together by hand, and on bad input."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tuning.models import load_lm
from tuning.p_tuning import (
    PromptEncoder,
    PromptVectors,
    answer_loss,
    encode_pseudo,
    load_prompt,
    nearest_tokens,
    prompt_logits,
    save_prompt,
    soften,
)
from tuning.prompts import answer_id, answer_logits, encode

CAUSAL = pytest.mark.parametrize("lm", ["smollm2", "gpt2"], indirect=True)
EVERY = pytest.mark.parametrize("lm", ["smollm2", "gpt2", "bert"], indirect=True)


def rest(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def random_vectors(model, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = model.get_input_embeddings().embedding_dim
    return torch.randn(length, hidden, generator=generator) * 0.1


# --- where the vectors stand


def test_pseudo_tokens_are_negative_ids_among_the_words(smollm2):
    tokenizer = smollm2[1]
    ids = encode_pseudo(tokenizer, "[P][P] [X] has the capital[P] [Y].", "Britain")
    assert ids == [-1, -2, *rest(tokenizer, " Britain has the capital"), -3]


def test_a_masked_model_reads_on_behind_its_mask(bert):
    tokenizer = bert[1]
    ids = encode_pseudo(tokenizer, "[P] [Y] [P][P] [X] [P]", "Britain")
    special = [tokenizer.cls_token_id, tokenizer.sep_token_id]
    assert ids == [special[0], -1, tokenizer.mask_token_id, -2, -3, *rest(tokenizer, "Britain"), -4, special[1]]


@EVERY
def test_logits_equal_those_of_vectors_put_in_by_hand(lm):
    """Interleaved, in batches of unlike length, against one unpadded row of embeddings at a time."""
    model, tokenizer = lm
    template = "[P][P] [X] is [P] the[P] [Y]." if tokenizer.mask_token is None else "[P] [X] is [P][P] [Y] the[P]"
    vectors = random_vectors(model, template.count("[P]"))
    subjects = ["Britain", "South Korea", "France"]
    found = prompt_logits(model, tokenizer, template, subjects, vectors)
    words = model.get_input_embeddings()
    for row, subject in zip(found, subjects, strict=True):
        ids = encode_pseudo(tokenizer, template, subject)
        embedded = torch.stack([vectors[-1 - i] if i < 0 else words.weight[i] for i in ids]).detach()
        with torch.no_grad():
            logits = model(inputs_embeds=embedded.unsqueeze(0)).logits[0]
        place = ids.index(tokenizer.mask_token_id) if tokenizer.mask_token else -1
        torch.testing.assert_close(row, logits[place], atol=1e-4, rtol=1e-4)


@EVERY
def test_a_softened_template_says_what_the_words_said(lm):
    model, tokenizer = lm
    subjects = ["Britain", "South Korea"]
    for template in ("The capital of [X] is [Y].", "[X] is the capital of [Y]", "[X] [Y]. the"):
        if template.endswith("the") and tokenizer.mask_token is None:
            continue
        soft, start = soften(model, tokenizer, template)
        assert soft.count("[P]") == len(start) > 0
        assert [i for i in encode_pseudo(tokenizer, soft, "Britain") if i < 0] == [-1 - i for i in range(len(start))]
        expected = answer_logits(model, tokenizer, [encode(tokenizer, template, subject) for subject in subjects])
        found = prompt_logits(model, tokenizer, soft, subjects, start)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# --- against peft


@CAUSAL
@pytest.mark.parametrize("length", [1, 4])
def test_prompt_tuning_equals_peft_in_logits_and_gradients(lm, length):
    from peft import PromptTuningConfig, get_peft_model

    model, tokenizer = lm
    theirs = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length))
    vectors = PromptVectors(random_vectors(model, length))
    embedding = theirs.prompt_encoder["default"].embedding
    embedding.weight.data.copy_(vectors())
    facts = [("Britain", answer_id(tokenizer, "London")), ("France", answer_id(tokenizer, "Paris"))]
    template = "[P]" * length + " [X] is [Y]."
    loss = 0
    for subject, answer in facts:
        ids = torch.tensor([rest(tokenizer, f" {subject} is")])
        logits = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
        ours = prompt_logits(model, tokenizer, template, [subject], vectors())
        torch.testing.assert_close(ours, logits.detach(), atol=1e-4, rtol=1e-4)
        loss = loss + F.cross_entropy(logits, torch.tensor([answer])) / len(facts)
    expected = torch.autograd.grad(loss, embedding.weight)[0]
    found = torch.autograd.grad(answer_loss(model, tokenizer, template, facts, vectors()), vectors.vectors)[0]
    assert (found - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize(("length", "hidden_size"), [(3, 8), (6, 32), (9, 576)])
def test_the_encoder_equals_pefts_weight_for_weight(length, hidden_size):
    from peft import PromptEncoder as Theirs
    from peft import PromptEncoderConfig

    torch.manual_seed(0)
    config = PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=length,
        token_dim=hidden_size,
        num_transformer_submodules=1,
        encoder_reparameterization_type="LSTM",
        encoder_hidden_size=hidden_size // 2,
        encoder_num_layers=2,
        encoder_dropout=0.0,
    )
    theirs = Theirs(config)
    ours = PromptEncoder(length, hidden_size)
    renamed = {
        name.replace("lstm_head", "lstm").replace("mlp_head", "mlp"): w for name, w in theirs.state_dict().items()
    }
    ours.load_state_dict(renamed)  # strict: nothing is missing and nothing left over
    expected = theirs(torch.arange(length))
    torch.testing.assert_close(ours(), expected)
    weights = torch.randn(length, hidden_size)
    (ours() * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, weight in theirs.named_parameters():
        mine = ours.get_parameter(name.replace("lstm_head", "lstm").replace("mlp_head", "mlp"))
        torch.testing.assert_close(mine.grad, weight.grad)


def test_the_papers_count_of_parameters():
    """9 pseudo tokens on BERT-base: what is trained, and what of it is kept."""
    encoder = PromptEncoder(9, 768)
    assert sum(weight.numel() for weight in encoder.parameters()) == 8_278_272
    assert encoder().numel() == 6_912


# --- the encoder


@pytest.mark.parametrize("lstm_layers", [0, 2])
def test_an_encoder_with_a_start_begins_there(lstm_layers):
    start = torch.randn(5, 16)
    encoder = PromptEncoder(5, 16, start, lstm_layers)
    assert torch.equal(encoder(), start)
    assert (encoder.lstm is None) == (lstm_layers == 0)
    encoder().square().sum().backward()
    assert encoder.mlp[-1].weight.grad.abs().sum() > 0


def test_in_an_encoder_each_vector_depends_on_every_pseudo_token():
    """What plain vectors lack: the LSTM runs both ways over the prompt."""
    torch.manual_seed(0)
    encoder = PromptEncoder(4, 16)
    for place in (0, 3):
        gradient = torch.autograd.grad(encoder()[place].sum(), encoder.embedding.weight)[0]
        assert (gradient.abs().sum(dim=1) > 0).all()


def test_the_start_is_kept_with_the_weights():
    first, second = PromptEncoder(2, 8, torch.randn(2, 8)), PromptEncoder(2, 8, torch.zeros(2, 8))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(), second())


# --- the loss


@EVERY
def test_the_loss_is_cross_entropy_over_the_vocabulary_or_the_words(lm):
    model, tokenizer = lm
    template, subjects = "The capital of [X] is [Y].", ["Britain", "South Korea"]
    answers = [answer_id(tokenizer, "London"), answer_id(tokenizer, "Seoul")]
    logits = answer_logits(model, tokenizer, [encode(tokenizer, template, subject) for subject in subjects]).double()
    expected = F.cross_entropy(logits, torch.tensor(answers)).item()
    facts = list(zip(subjects, answers, strict=True))
    assert answer_loss(model, tokenizer, template, facts).item() == pytest.approx(expected, rel=1e-4)
    words = [answers[1], answers[0], answer_id(tokenizer, "Paris")]
    chosen = F.cross_entropy(logits[:, words], torch.tensor([1, 0])).item()
    facts = list(zip(subjects, [1, 0], strict=True))
    assert answer_loss(model, tokenizer, template, facts, words=words).item() == pytest.approx(chosen, rel=1e-4)


@EVERY
def test_a_batch_has_the_gradient_of_its_rows(lm):
    """Subjects of unlike length, so that there is padding, and vectors among the words."""
    model, tokenizer = lm
    model = copy.deepcopy(model).double()  # thirty layers of float32 differ by more than a ten-thousandth
    template = "[P] [X] is[P] the [Y]." if tokenizer.mask_token is None else "[P] [Y] is[P] the [X]"
    facts = [(s, answer_id(tokenizer, a)) for s, a in [("Britain", "London"), ("South Korea", "Seoul"), ("a", "Paris")]]
    vectors = random_vectors(model, 2).double().requires_grad_()
    together = torch.autograd.grad(answer_loss(model, tokenizer, template, facts, vectors), vectors)[0]
    alone = sum(
        torch.autograd.grad(answer_loss(model, tokenizer, template, [fact], vectors), vectors)[0] for fact in facts
    )
    assert (together - alone / len(facts)).norm() < 1e-6 * together.norm()


def test_a_learned_prompt_knows_its_facts(smollm2):
    """Adam's first steps go up and down, differently on each processor; after 25 the facts are learned."""
    model, tokenizer = smollm2
    facts = [(s, answer_id(tokenizer, a)) for s, a in [("Britain", "London"), ("France", "Paris"), ("Japan", "Tokyo")]]
    torch.manual_seed(0)
    encoder = PromptEncoder(4, model.config.hidden_size)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3)
    losses = []
    for _ in range(25):
        loss = answer_loss(model, tokenizer, "[P][P] [X][P][P] [Y].", facts, encoder())
        optimizer.zero_grad()
        loss.backward(inputs=list(encoder.parameters()))
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 4 and losses[-1] < 1
    assert all(weight.grad is None for weight in model.parameters())


def test_nearest_tokens_of_embeddings_are_themselves(smollm2):
    embeddings = smollm2[0].get_input_embeddings().weight.detach()
    tokens, distances = nearest_tokens(embeddings[[5, 700, 41000]] + 1e-4, embeddings)
    assert tokens == [5, 700, 41000] and (distances < 0.01).all()


# --- saving


def test_a_saved_prompt_comes_back_with_its_template(smollm2, tmp_path):
    model, _ = smollm2
    vectors = random_vectors(model, 6)
    save_prompt(tmp_path / "p17.safetensors", model, "[P][P][P] [X] [P][P][P] [Y].", vectors)
    template, loaded = load_prompt(tmp_path / "p17.safetensors", model)
    assert template == "[P][P][P] [X] [P][P][P] [Y]." and torch.equal(loaded, vectors)
    assert [path.name for path in tmp_path.iterdir()] == ["p17.safetensors"]
    assert (tmp_path / "p17.safetensors").stat().st_size < 6 * model.config.hidden_size * 4 + 1000
    in_bfloat16, _ = load_lm(dtype=torch.bfloat16, device="cpu")
    assert torch.equal(load_prompt(tmp_path / "p17.safetensors", in_bfloat16)[1], vectors)


def test_a_prompt_of_another_model_is_refused(smollm2, gpt2, tmp_path):
    path = tmp_path / "prompt.safetensors"
    save_prompt(path, smollm2[0], "[P] [X] [Y].", random_vectors(smollm2[0], 1))
    with pytest.raises(ValueError, match="trained on HuggingFaceTB/SmolLM2-135M-Instruct and means nothing to"):
        load_prompt(path, gpt2[0])


def test_a_prompt_of_a_model_of_the_same_shape_is_refused(gpt2, tmp_path):
    torch.manual_seed(1)
    other = type(gpt2[0])(gpt2[0].config)
    save_prompt(tmp_path / "prompt.safetensors", other, "[P] [X] [Y].", random_vectors(other, 1))
    with pytest.raises(ValueError, match="means nothing to"):
        load_prompt(tmp_path / "prompt.safetensors", gpt2[0])


def test_a_file_that_is_no_prompt_is_refused(gpt2, tmp_path):
    (tmp_path / "bad.safetensors").write_text("no")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("bad", "other"):
        with pytest.raises(ValueError, match="is no prompt that `save_prompt` wrote"):
            load_prompt(tmp_path / f"{name}.safetensors", gpt2[0])
    with pytest.raises(FileNotFoundError):
        load_prompt(tmp_path / "none.safetensors", gpt2[0])


# --- bad input


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("The capital of [X] is [Y].", r"has no \[P\] slot; write e\.g\. '\[P\]\[P\]"),
        ("[P][P] is [Y].", r"has no \[X\] slot"),
        ("[P] [X] [Y] [P][X].", "2 .X. slots"),
        ("[P] [X] [Y] and so on", "does not suit a causal model"),
        ("[Y] is [P] of [X]", "does not suit a causal model"),
    ],
)
def test_a_template_that_cannot_work_is_refused(smollm2, template, message):
    with pytest.raises(ValueError, match=message):
        encode_pseudo(smollm2[1], template, "Britain")


def test_a_pseudo_token_behind_the_answer_is_refused_for_a_causal_model(smollm2):
    with pytest.raises(ValueError, match=r"template '\[P\] \[X\] \[Y\] \[P\]' does not suit a causal model"):
        encode_pseudo(smollm2[1], "[P] [X] [Y] [P]", "Britain")


def test_vectors_must_be_as_many_as_slots(smollm2):
    model, tokenizer = smollm2
    for length in (1, 3):
        with pytest.raises(ValueError, match=rf"2 \[P\] slots and there are {length} vectors"):
            answer_loss(model, tokenizer, "[P][P] [X] [Y].", [("Britain", 5)], random_vectors(model, length))
        with pytest.raises(ValueError, match=rf"2 \[P\] slots and there are {length} vectors"):
            prompt_logits(model, tokenizer, "[P][P] [X] [Y].", ["Britain"], random_vectors(model, length))


def test_a_prompt_longer_than_the_context_is_refused(gpt2):
    model, tokenizer = gpt2
    with pytest.raises(ValueError, match="301 tokens long and the model's context holds 256"):
        answer_loss(model, tokenizer, "[P]" * 300 + " [X] [Y].", [("Britain", 5)], random_vectors(model, 300))


@pytest.mark.parametrize("answer", [-1, 49152])
def test_an_answer_outside_the_vocabulary_is_refused(smollm2, answer):
    with pytest.raises(ValueError, match=rf"answer {answer} is outside the 49152"):
        answer_loss(*smollm2, "[X] [Y].", [("France", 5), ("Britain", answer)])
    with pytest.raises(ValueError, match=r"answer 2 is outside the 2 that the model chooses among \(0 to 1\)"):
        answer_loss(*smollm2, "[X] [Y].", [("Britain", 2)], words=[5, 6])


def test_an_odd_hidden_size_has_no_two_halves():
    with pytest.raises(ValueError, match="hidden size of 7 cannot be halved"):
        PromptEncoder(3, 7)
