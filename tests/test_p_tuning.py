"""Prompt tuning and P-tuning: against peft, against a prompt put together by hand, and on bad input."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from notebook_rules import ROOT, defined, read
from safetensors.torch import save_file
from small_models import tiny_llama
from torch import nn
from tuning.files import same_trace, trace
from tuning.models import load_lm
from tuning.p_tuning import (
    Prefixed,
    PrefixEncoder,
    PromptEncoder,
    PromptVectors,
    answer_loss,
    encode_pseudo,
    load_prompt,
    nearest_tokens,
    prefix_shape,
    prompt_logits,
    save_prompt,
    soften,
)
from tuning.prompts import (
    answer_id,
    answer_logits,
    embedding_size,
    embeddings_of,
    encode,
    hotflip,
    inputs_with_vectors,
    trigger_gradient,
)

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


def test_chapter_3s_small_prompt_and_loss_are_the_librarys(gpt2, smollm2):
    book = read(ROOT / "book/1-prompts/3-from-words-to-vectors.ipynb")
    for model, tokenizer in (gpt2, smollm2):
        names = {"nn": nn, "torch": torch, "model": model, "tokenizer": tokenizer, "encode_pseudo": encode_pseudo}
        names |= {"template": "[P][P] [X] is[P] [Y]."}
        Prompt, loss_of = defined(book, "Prompt", names), defined(book, "loss_of", names)
        small = Prompt(random_vectors(model, 3))
        ids = torch.tensor([[-1, 5, -3], [7, -2, -2]])
        theirs = inputs_with_vectors(model, ids, small.vectors)["inputs_embeds"]
        assert torch.equal(small(ids), theirs)
        facts = [("South Korea", 11), ("France", 3)]
        mine = sum(loss_of(small, *fact) for fact in facts) / 2
        loss = answer_loss(model, tokenizer, names["template"], facts, small.vectors)
        torch.testing.assert_close(mine, loss, rtol=1e-4, atol=1e-4)
        gradients = [torch.autograd.grad(one, small.vectors)[0] for one in (mine, loss)]
        assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[1].norm()


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


# --- models whose words enter otherwise: scaled by the embedding's module or behind it, or narrower than the states

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"initializer_range": 0.3, "max_position_embeddings": 64}
HEADS = SMALL | {"num_key_value_heads": 1, "head_dim": 16}
FAMILIES = {  # the configuration's class -> what it is made with
    "LlamaConfig": HEADS,
    "Qwen3Config": HEADS,
    "GPT2Config": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3},
    "GPTNeoXConfig": SMALL,
    "GemmaConfig": HEADS,
    "Gemma2Config": HEADS | {"sliding_window": 4},
    "Gemma3TextConfig": HEADS | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "GraniteConfig": HEADS | {"embedding_multiplier": 5.0},
    "OPTConfig": SMALL | {"word_embed_proj_dim": 12, "ffn_dim": 64, "init_std": 0.3},
    "BertConfig": SMALL,
    "AlbertConfig": SMALL | {"embedding_size": 12},
    "ElectraConfig": SMALL | {"embedding_size": 12},
    "ModernBertConfig": SMALL,
}


@pytest.fixture(params=FAMILIES)
def family(request, tiny_bert):
    """A tiny model of a family with random weights, and a tokenizer."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert)
    options = FAMILIES[request.param] | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    options |= {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    torch.manual_seed(0)
    config = getattr(transformers, request.param)(**options)
    masked = type(config) in transformers.AutoModelForMaskedLM._model_mapping
    if not masked:
        tokenizer.mask_token = None
    kind = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    return kind.from_config(config).eval(), tokenizer


def test_words_as_vectors_answer_as_the_words(family):
    """Several subjects, so that there is padding and a beginning that all share, against one prompt of words each."""
    model, tokenizer = family
    subjects = ["Britain", "South Korea"]
    for template in ("The capital of [X] is [Y].", "[X] is the capital of [Y]"):
        soft, start = soften(model, tokenizer, template)
        assert start.shape == (soft.count("[P]"), embedding_size(model))
        rows = [encode(tokenizer, template, subject) for subject in subjects]
        places = [ids.index(tokenizer.mask_token_id) if tokenizer.mask_token else -1 for ids in rows]
        with torch.no_grad():
            logits = [model(torch.tensor([ids])).logits[0, place] for ids, place in zip(rows, places, strict=True)]
        expected = torch.stack(logits).float()
        torch.testing.assert_close(answer_logits(model, tokenizer, rows), expected, atol=1e-4, rtol=0)
        found = prompt_logits(model, tokenizer, soft, subjects, start)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        assert (expected[0] - expected[1]).abs().max() > 1e-2  # the model listens
        tokens, distances = nearest_tokens(start, embeddings_of(model))
        assert soften(model, tokenizer, tokenizer.decode(tokens) + " [X] [Y]")[1].tolist() == start.tolist()
        assert (distances == 0).all()
        facts = list(zip(subjects, expected.argmax(dim=1).tolist(), strict=True))
        loss = F.cross_entropy(expected, expected.argmax(dim=1)).item()
        encoder = PromptEncoder(len(start), embedding_size(model), start)
        assert answer_loss(model, tokenizer, soft, facts, encoder()).item() == pytest.approx(loss, rel=1e-4)


def test_the_slope_is_that_of_what_enters_the_model(family):
    """Against autograd at the output of the model's own embedding, and `hotflip` against the change it predicts."""
    model, tokenizer = family
    model.double().requires_grad_(False)
    template, triggers = "[T] [T] [X] [Y].", [answer_id(tokenizer, word) for word in ("the", "capital")]
    answer = answer_id(tokenizer, "London")
    found = trigger_gradient(model, tokenizer, template, triggers, [("Britain", answer)])
    ids = encode(tokenizer, template, "Britain", triggers)
    kept = []

    def keep(_, __, output):
        kept.append(output.requires_grad_())

    with model.get_input_embeddings().register_forward_hook(keep):
        logits = model(torch.tensor([ids])).logits[0]
    logits = logits[ids.index(tokenizer.mask_token_id) if tokenizer.mask_token else -1]
    gradient = torch.autograd.grad(F.cross_entropy(logits[None], torch.tensor([answer])), kept[0])[0][0]
    expected = gradient[[ids.index(token) for token in triggers]]
    assert (found - expected).norm() < 1e-5 * expected.norm()
    change = torch.stack([model.get_input_embeddings()(torch.tensor(v)) for v in range(len(tokenizer))]) @ expected[0]
    allowed = torch.ones(len(tokenizer), dtype=torch.bool)
    assert hotflip(found[0], embeddings_of(model), allowed, 5) == change.argsort()[:5].tolist()


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


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("tie", [1, 2])  # heads of keys and values, of two that ask
def test_a_deep_prompt_equals_pefts_weight_for_weight(tie, projection):
    """Logits, loss and gradients, in a batch with padding on the left."""
    from peft import PrefixTuningConfig, get_peft_model

    model = tiny_llama(num_key_value_heads=tie, initializer_range=0.5)
    shape = prefix_shape(model, 3)
    assert shape == (3, 2, 2, tie, 8)
    ours = PrefixEncoder(shape) if projection else PromptVectors(torch.randn(shape))
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=projection)
    theirs = get_peft_model(copy.deepcopy(model), config)
    encoder = theirs.prompt_encoder["default"]
    pairs = {"embedding.weight": "vectors"}
    if projection:
        pairs = {name: name.replace("transform", "mlp") for name, _ in encoder.named_parameters()}
    with torch.no_grad():
        for name, mine in pairs.items():
            weight = encoder.get_parameter(name)
            weight.copy_(ours.get_parameter(mine).reshape(weight.shape))
    prefixed = Prefixed(model, ours)
    for length in (4, 6):  # of the first row; the second has six tokens
        ids = torch.arange(12).view(2, 6)
        mask = torch.ones_like(ids)
        mask[0, : 6 - length] = 0
        places = (mask.cumsum(dim=1) - 1).clamp(min=0)
        found = prefixed(ids, mask, places, logits_to_keep=2).logits
        expected = theirs(input_ids=ids, attention_mask=mask, position_ids=places).logits[:, -2:]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        bare = model(ids, attention_mask=mask, position_ids=places).logits[:, -2:]
        assert (found - bare).abs().max() > 0.01  # it is read
        for logits in (found, expected):
            logits.float().logsumexp(-1).sum().backward()
    for name, mine in pairs.items():
        gradient = encoder.get_parameter(name).grad
        torch.testing.assert_close(ours.get_parameter(mine).grad.reshape(gradient.shape), gradient)
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("lm", ["gpt2", "smollm2"], indirect=True)
def test_a_prefix_of_a_texts_own_keys_and_values_says_what_the_text_says(lm):
    """The reference is the model itself, reading the text in front."""
    model, tokenizer = lm
    front = torch.tensor([rest(tokenizer, "The capital of")])
    with torch.no_grad():
        cache = model(front, use_cache=True).past_key_values
    layers = torch.stack([torch.cat([keys, values]) for keys, values, *_ in cache])
    prefix = PromptVectors(layers.permute(3, 0, 1, 2, 4))
    assert prefix().shape == prefix_shape(model, front.shape[1])
    subjects = ["Britain", "South Korea", "France"]
    found = prompt_logits(Prefixed(model, prefix), tokenizer, "[X] is [Y].", [" " + subject for subject in subjects])
    expected = prompt_logits(model, tokenizer, "The capital of [X] is [Y].", subjects)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


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
    assert tokens == [5, 700, 41000]
    torch.testing.assert_close(distances, torch.full((3,), 1e-4 * embeddings.shape[1] ** 0.5), rtol=1e-2, atol=0)


def test_rows_that_lie_close_are_told_apart(smollm2):
    """Row 7 of SmolLM2 lies a thousandth from the others, which are equal: less than the error of |a|² - 2ab + |b|²."""
    embeddings = smollm2[0].get_input_embeddings().weight.detach()
    rows = [7, 8, 10, 13, 15, 16, 36744, 48047]
    tokens, distances = nearest_tokens(embeddings[rows], embeddings)
    assert torch.equal(embeddings[tokens], embeddings[rows]) and (distances == 0).all()
    assert tokens.count(7) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_nearest_tokens_of_a_model_in_another_dtype(dtype):
    embeddings = torch.randn(50, 16).to(dtype)
    tokens, distances = nearest_tokens(embeddings[:5], embeddings)
    assert tokens == list(range(5)) and distances.dtype == torch.float32 and (distances == 0).all()


@pytest.mark.parametrize("size", [5, 64])
def test_the_nearest_of_close_rows_is_that_of_float64(size):
    torch.manual_seed(0)
    embeddings = torch.randn(size) * 3 + 1e-4 * torch.randn(300, size)
    vectors = embeddings[:30] + 2e-5 * torch.randn(30, size)
    expected = (vectors.double()[:, None] - embeddings.double()).norm(dim=2).argmin(dim=1)
    assert nearest_tokens(vectors, embeddings)[0] == expected.tolist()


@pytest.mark.parametrize(("vocab", "size"), [(100, 7), (3000, 576)])
def test_distances_are_those_of_float64_and_none_to_itself(vocab, size):
    torch.manual_seed(0)
    embeddings = torch.randn(vocab, size) + 3
    tokens, distances = nearest_tokens(embeddings[:40], embeddings)
    assert tokens == list(range(40)) and (distances == 0).all()
    vectors = torch.randn(40, size)
    expected = (vectors.double()[:, None] - embeddings.double()).norm(dim=2).min(dim=1)
    tokens, distances = nearest_tokens(vectors, embeddings)
    assert tokens == expected.indices.tolist()
    torch.testing.assert_close(distances.double(), expected.values, rtol=1e-5, atol=0)


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


def test_the_models_trace_stands_in_the_files_metadata(gpt2, tmp_path):
    from safetensors import safe_open

    save_prompt(tmp_path / "a" / "prompt.safetensors", gpt2[0], "[P] [X] [Y].", random_vectors(gpt2[0], 1))
    with safe_open(tmp_path / "a" / "prompt.safetensors", "pt") as file:
        assert list(file.keys()) == ["vectors"]
        assert same_trace(json.loads(file.metadata()["prompt"])["trace"], trace(gpt2[0]))


def test_a_prompt_of_an_older_version_is_refused(gpt2, tmp_path):
    tensors = {"vectors": torch.zeros(1, 32), "model_trace": torch.tensor(trace(gpt2[0]))}
    prompt = {"template": "[P] [X] [Y].", "model": "gpt2"}
    save_file(tensors, tmp_path / "old.safetensors", {"prompt": json.dumps(prompt)})
    with pytest.raises(ValueError, match=r"or an older version of it did \(KeyError\('trace'\)\); save it anew"):
        load_prompt(tmp_path / "old.safetensors", gpt2[0])


def test_a_prompt_that_cannot_be_written_leaves_the_old_one(gpt2, tmp_path, monkeypatch):
    path = tmp_path / "prompt.safetensors"
    save_prompt(path, gpt2[0], "[P] [X] [Y].", random_vectors(gpt2[0], 1))

    def half(tensors, path, metadata):
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr("tuning.p_tuning.save_file", half)
    with pytest.raises(OSError, match="disk full"):
        save_prompt(path, gpt2[0], "[P] [X] [Y].", torch.zeros(1, 32))
    assert [file.name for file in tmp_path.iterdir()] == ["prompt.safetensors"]
    assert torch.equal(load_prompt(path, gpt2[0])[1], random_vectors(gpt2[0], 1))


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


def test_slots_without_vectors_are_no_text(smollm2):
    """The text "[P]" would be scored as a word."""
    model, tokenizer = smollm2
    message = r"has 2 \[P\] slots and no vectors for them; pass `vectors` \(2, hidden\)"
    with pytest.raises(ValueError, match=message):
        prompt_logits(model, tokenizer, "[P][P] [X] [Y].", ["Britain"])
    with pytest.raises(ValueError, match=message):
        answer_loss(model, tokenizer, "[P][P] [X] [Y].", [("Britain", 5)])
    with pytest.raises(ValueError, match=message):
        soften(model, tokenizer, "[P][P] [X] is in [Y].")


def test_vectors_of_another_size_are_refused(gpt2):
    with pytest.raises(ValueError, match=r"shape \(1, 16\) do not fit this model.*give \(length, 32\)"):
        answer_loss(*gpt2, "[P] [X] [Y].", [("Britain", 5)], torch.zeros(1, 16))


@EVERY
def test_nothing_to_read_is_refused(lm):
    model, tokenizer = lm
    vectors = random_vectors(model, 1)
    with pytest.raises(ValueError, match="no prompts to score; is the data set empty"):
        answer_loss(model, tokenizer, "[P] [X] [Y].", [], vectors)
    with pytest.raises(ValueError, match="no prompts to score; is the data set empty"):
        prompt_logits(model, tokenizer, "[P] [X] [Y].", [], vectors)
    with pytest.raises(ValueError, match="are there words, or"):
        soften(model, tokenizer, "[X] [Y]")
    with pytest.raises(ValueError, match="there are no `words` to choose among; give their token ids"):
        answer_loss(model, tokenizer, "[P] [X] [Y].", [("Britain", 0)], vectors, words=[])


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


def test_logits_of_facts_are_those_of_their_subjects(smollm2):
    model, tokenizer = smollm2
    cities = ["Osaka", "Lyon"]
    facts = [(city, 1) for city in cities]
    template = "The city of [X] is in the country of [Y]."
    assert torch.equal(
        prompt_logits(model, tokenizer, template, facts), prompt_logits(model, tokenizer, template, cities)
    )
