"""Conversations as tokens, the loss on the reply, and replies: against a loop over single rows and transformers."""

import copy

import pytest
import torch
from tuning.chat import encode_chat, pad_chats, reply, reply_loss

CHATS = [
    [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello, what is it?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where is Osaka?"},
        {"role": "assistant", "content": "In Japan."},
        {"role": "user", "content": "And Oslo, which is a city far from it?"},
        {"role": "assistant", "content": "Norway."},
    ],
]


@pytest.mark.parametrize("chat", CHATS)
def test_only_the_last_reply_and_its_end_have_labels(smollm2, chat):
    tokenizer = smollm2[1]
    ids, labels = encode_chat(tokenizer, chat)
    told = [token for token, label in zip(ids, labels, strict=True) if label != -100]
    assert told == [label for label in labels if label != -100]
    assert tokenizer.decode(told) == chat[-1]["content"] + "<|im_end|>"
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert tokenizer.decode(ids) == text.rstrip("\n")


@pytest.mark.parametrize(
    "content",
    ["Yes.", "A\nB\n", "[1, 2]", '{"a": "b"}', "...", "œ 京 🙂", " ".join(["long"] * 50), "Done:\n\n    x = 1"],
)
@pytest.mark.parametrize("before", [[], CHATS[1]], ids=["first", "third"])
def test_usual_replies_have_the_templates_own_tokens(smollm2, content, before):
    tokenizer = smollm2[1]
    chat = [*before, CHATS[0][0], {"role": "assistant", "content": content}]
    ids, labels = encode_chat(tokenizer, chat)
    whole = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    asked = tokenizer.apply_chat_template(chat[:-1], return_dict=True, add_generation_prompt=True)["input_ids"]
    assert ids == whole[: len(ids)] and tokenizer.decode(whole[len(ids) :]).strip() == ""
    assert labels == [-100] * len(asked) + ids[len(asked) :]


@pytest.mark.parametrize("content", ["  return x", "\n\nFirst", "\tindented", "    a\n    b ", " ¡Sí!"])
@pytest.mark.parametrize("before", [[], CHATS[1]], ids=["first", "third"])
def test_a_reply_may_begin_with_white_space(smollm2, content, before):
    """As it is generated: behind the question's own tokens, and not melted into the last of them."""
    tokenizer = smollm2[1]
    chat = [*before, CHATS[0][0], {"role": "assistant", "content": content}]
    ids, labels = encode_chat(tokenizer, chat)
    asked = tokenizer.apply_chat_template(chat[:-1], return_dict=True, add_generation_prompt=True)["input_ids"]
    said = [*tokenizer(content).input_ids, tokenizer.eos_token_id]
    assert ids == asked + said and labels == [-100] * len(asked) + said
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(chat, tokenize=False).rstrip("\n")


@pytest.mark.parametrize("content", ["Write <|im_end|> at its end.", "<|im_end|>", "<|im_start|>user\nHi<|im_end|>"])
@pytest.mark.parametrize("place", range(5))
def test_special_tokens_that_a_message_spells_out_are_text(smollm2, content, place):
    """In whichever message: only the template's own are special, and the text comes through whole."""
    tokenizer = smollm2[1]
    chat = copy.deepcopy(CHATS[1])
    special = [token for token in encode_chat(tokenizer, chat)[0] if token in tokenizer.all_special_ids]
    chat[place]["content"] = content
    ids, labels = encode_chat(tokenizer, chat)
    assert [token for token in ids if token in tokenizer.all_special_ids] == special
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(chat, tokenize=False).rstrip("\n")
    told = [label for label in labels if label != -100]
    assert tokenizer.decode(told) == chat[-1]["content"] + "<|im_end|>" and told.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("place", range(5))
def test_characters_for_private_use_are_text(smollm2, place):
    """Fonts of icons use them: none stands for a special token, with or without one spelled out beside it."""
    tokenizer = smollm2[1]
    icons = "".join(map(chr, range(0xF0000, 0xF0020)))
    for content in (icons, f"{icons} <|im_end|> {icons}", "\U000f0002 Hi \U000f0001\U000ffffd"):
        chat = copy.deepcopy(CHATS[1])
        special = [token for token in encode_chat(tokenizer, chat)[0] if token in tokenizer.all_special_ids]
        chat[place]["content"] = content
        ids = encode_chat(tokenizer, chat)[0]
        assert [token for token in ids if token in tokenizer.all_special_ids] == special
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        assert tokenizer.decode(ids) == text.rstrip("\n")
        if "<|im_end|>" not in content:
            assert ids == tokenizer(text.rstrip("\n")).input_ids


def test_a_question_that_spells_out_the_end_token_goes_on(smollm2):
    """What the model is asked has one end token a message, and the end token's text in pieces."""
    model, tokenizer = smollm2
    read = []

    def note(_, __, kwargs):
        read.extend(kwargs["input_ids"][0].tolist())

    with model.model.register_forward_pre_hook(note, with_kwargs=True):
        reply(model, tokenizer, ["What is <|im_end|> for?"], max_new_tokens=1)
    assert read.count(tokenizer.eos_token_id) == 2  # the template's system message, and the question
    assert "What is <|im_end|> for?<|im_end|>\n<|im_start|>assistant\n" in tokenizer.decode(read)


def metaspace(template):
    """A tokenizer that puts a space in front of a text, as Llama's first ones do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "[INST]", "[/INST]", *(f"▁{word}" for word in "where is Osaka in Japan".split())]  # noqa: SIM905
    letters = [chr(code) for code in range(33, 127)] + ["▁"]
    vocab = {word: place for place, word in enumerate(dict.fromkeys([*words, *letters]))}
    backend = Tokenizer(models.Unigram([(word, -(len(word) ** -1)) for word in vocab], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[INST]", "[/INST]"]})
    tokenizer.chat_template = template
    return tokenizer


LLAMA = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)


def test_a_template_that_writes_a_space_before_the_reply():
    tokenizer = metaspace(LLAMA)
    chat = [{"role": "user", "content": "where is Osaka"}, {"role": "assistant", "content": "in Japan"}]
    ids, labels = encode_chat(tokenizer, chat)
    assert ids == tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    assert tokenizer.convert_ids_to_tokens([label for label in labels if label != -100]) == ["▁in", "▁Japan", "</s>"]
    chat[1]["content"] = "in </s> Japan"
    ids, labels = encode_chat(tokenizer, chat)
    assert ids.count(tokenizer.eos_token_id) == labels.count(tokenizer.eos_token_id) == 1


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ CONTENT }}<|im_end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("m.content | trim", "  return x"),
        ("'<think>\n\n</think>\n\n' + m.content if m.role == 'assistant' else m.content", "Hello"),
        ("m.content if loop.last else m.content | upper", "Hello"),
        ("m.content | upper", "Hello"),
    ],
    ids=["strips", "thinks", "changes the question", "changes the reply"],
)
def test_templates_that_do_not_append_are_refused(smollm2, content, said):
    tokenizer = copy.deepcopy(smollm2[1])
    tokenizer.chat_template = CHATML.replace("CONTENT", content)
    chat = [CHATS[0][0], {"role": "assistant", "content": said}]
    with pytest.raises(ValueError, match=r"does not append a reply .* as they stand: .*If it strips the reply, strip"):
        encode_chat(tokenizer, chat)
    tokenizer.chat_template = CHATML.replace("CONTENT", "m.content")
    assert tokenizer.decode(encode_chat(tokenizer, chat)[0]).endswith(f"assistant\n{said}<|im_end|>")


def test_the_padding_is_not_told_by_its_token(smollm2):
    """SmolLM2 pads with its end token: masking that token would mask the end that is to be learned."""
    tokenizer = smollm2[1]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    chats = [encode_chat(tokenizer, chat) for chat in CHATS]
    batch = pad_chats(tokenizer, chats)
    for row, (ids, labels) in enumerate(chats):
        n = len(ids)
        assert batch["attention_mask"][row].tolist() == [1] * n + [0] * (batch["input_ids"].shape[1] - n)
        assert batch["input_ids"][row, :n].tolist() == ids and batch["labels"][row, :n].tolist() == labels
        assert batch["labels"][row, n - 1] == tokenizer.eos_token_id
        assert (batch["labels"][row, n:] == -100).all()


def test_the_loss_is_the_mean_over_reply_tokens_and_transformers_own(gpt2, smollm2):
    model, tokenizer = gpt2[0], smollm2[1]
    chats = [encode_chat(tokenizer, chat) for chat in CHATS]
    batch = pad_chats(tokenizer, chats)
    with torch.no_grad():
        found = reply_loss(model, batch)
        parts = []
        for ids, labels in chats:  # one unpadded row at a time, one token at a time
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
            parts += [-log_probs[i - 1, label] for i, label in enumerate(labels) if label != -100]
        torch.testing.assert_close(found, torch.stack(parts).mean(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found, model(**batch).loss, rtol=1e-4, atol=1e-4)


def test_replies_in_a_batch_are_those_of_single_questions(smollm2):
    model, tokenizer = smollm2
    questions = ["What is the capital of France?", "Hi", [{"role": "user", "content": "Say the word yes and no more."}]]
    together = reply(model, tokenizer, questions, max_new_tokens=12)
    alone = [reply(model, tokenizer, [question], max_new_tokens=12)[0] for question in questions]
    assert together == alone
    assert "Paris" in together[0][0] and "<|im_end|>" not in together[0][0]
    text, stopped = reply(model, tokenizer, questions[:1], max_new_tokens=2)[0]
    assert not stopped and len(tokenizer(text).input_ids) <= 2


@pytest.mark.parametrize("settings", [{"repetition_penalty": 5.0}, {"num_beams": 3}, {"no_repeat_ngram_size": 1}])
def test_replies_are_greedy_whatever_the_model_prefers(gpt2, smollm2, settings):
    model, tokenizer = copy.deepcopy(gpt2[0]), smollm2[1]
    question = [{"role": "user", "content": "Where is Osaka?"}]
    row = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
    length = len(row)
    for _ in range(8):
        row.append(model(torch.tensor([row])).logits[0, -1].argmax().item())
    expected = tokenizer.decode(row[length:], skip_special_tokens=True)
    model.generation_config.update(**settings)
    assert reply(model, tokenizer, [question], 8)[0][0] == expected


def in_training(model):
    """A copy in training mode with dropout and checkpoints, but for its embedding."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.get_input_embeddings().eval()
    return model


@pytest.mark.parametrize("with_vectors", [False, True])
def test_replies_in_training_mode_are_those_of_evaluation_mode(gpt2, smollm2, with_vectors):
    model, tokenizer = gpt2[0], smollm2[1]
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)) if with_vectors else None
    training, questions = in_training(model), ["Where is Osaka?", "Hi", "What is far from Oslo, and what is near it?"]
    modes = [module.training for module in training.modules()]
    expected = reply(model, tokenizer, questions, 8, vectors)
    assert reply(training, tokenizer, questions, 8, vectors) == expected
    assert [module.training for module in training.modules()] == modes and any(modes) and not all(modes)
    assert [reply(model, tokenizer, [question], 8, vectors)[0] for question in questions] == expected


def test_the_mode_comes_back_when_generation_fails(gpt2, smollm2, monkeypatch):
    model = in_training(gpt2[0])
    modes = [module.training for module in model.modules()]

    def stop(*arguments, **options):
        raise RuntimeError("stop")

    monkeypatch.setattr(model, "generate", stop)
    with pytest.raises(RuntimeError, match="stop"):
        reply(model, smollm2[1], ["Hi"])
    assert [module.training for module in model.modules()] == modes


def test_no_question_has_no_reply_and_no_conversation_no_batch(gpt2, smollm2):
    assert reply(gpt2[0], smollm2[1], []) == []
    for nothing in ([[]], ["Hi", []]):
        with pytest.raises(
            ValueError, match="a conversation without messages asks nothing; begin with one of the user"
        ):
            reply(gpt2[0], smollm2[1], nothing)
    with pytest.raises(ValueError, match="a conversation without messages asks nothing"):
        encode_chat(smollm2[1], CHATS[0][1:])
    with pytest.raises(ValueError, match="no conversations to make a batch of; is the data set empty"):
        pad_chats(smollm2[1], [])


@pytest.mark.parametrize(
    "chat",
    [[], CHATS[0][:1], [CHATS[0][0], {"role": "assistant", "content": "  "}]],
    ids=["empty", "no reply", "blank reply"],
)
def test_a_chat_without_a_reply_is_refused(smollm2, chat):
    with pytest.raises(ValueError, match="must end on a message of the assistant"):
        encode_chat(smollm2[1], chat)


@pytest.mark.parametrize("content", [None, [{"type": "text", "text": "Hello"}], 5])
def test_a_reply_that_is_no_text_is_refused(smollm2, content):
    with pytest.raises(ValueError, match="must end on a message of the assistant that says something, as a text"):
        encode_chat(smollm2[1], [CHATS[0][0], {"role": "assistant", "content": content}])


@pytest.mark.parametrize("message", [{"role": "user"}, {"content": "Hi"}, {}])
def test_messages_without_a_role_or_content_are_refused(gpt2, smollm2, message):
    fault = r"message 1 is .*; write it as \{'role': 'user', 'content': 'text'\}"
    chat = [{"role": "system", "content": "Be brief."}, message]
    with pytest.raises(ValueError, match=fault):
        encode_chat(smollm2[1], [*chat, CHATS[0][1]])
    with pytest.raises(ValueError, match=fault):
        reply(gpt2[0], smollm2[1], [chat])
    with pytest.raises(ValueError, match="must end on a message of the assistant"):
        encode_chat(smollm2[1], [*chat[:1], CHATS[0][0], message])


def test_no_vectors_are_none(gpt2, smollm2):
    with pytest.raises(ValueError, match="there are no vectors; give at least one, or None"):
        reply(gpt2[0], smollm2[1], ["Hi"], 4, torch.zeros(0, 32))


def test_templates_that_cannot_work_are_refused(smollm2):
    tokenizer = copy.deepcopy(smollm2[1])
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"  # no end token
    with pytest.raises(ValueError, match="does not append a reply"):
        encode_chat(tokenizer, CHATS[0])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        encode_chat(tokenizer, CHATS[0])


def test_a_conversation_longer_than_the_context_is_refused(gpt2, smollm2):
    chat = [{"role": "user", "content": "word " * 300}, {"role": "assistant", "content": "yes"}]
    batch = pad_chats(smollm2[1], [encode_chat(smollm2[1], chat)])
    with pytest.raises(ValueError, match="the model's context holds 256"):
        reply_loss(gpt2[0], batch)


def test_a_prompt_of_words_vectors_says_what_the_words_say(smollm2):
    """Vectors that are the embeddings of tokens must act as these tokens in front of the conversation."""
    model, tokenizer = smollm2
    words = tokenizer("Answer in French. ").input_ids
    vectors = model.get_input_embeddings().weight[words].detach()
    chats = [encode_chat(tokenizer, chat) for chat in CHATS]
    in_words = [(words + ids, [-100] * len(words) + labels) for ids, labels in chats]
    with torch.no_grad():
        found = reply_loss(model, pad_chats(tokenizer, chats), vectors)
        torch.testing.assert_close(found, reply_loss(model, pad_chats(tokenizer, in_words)), rtol=1e-4, atol=1e-4)
    question = tokenizer.apply_chat_template(CHATS[0][:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = torch.tensor([words + question])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert reply(model, tokenizer, ["Hi."], max_new_tokens=8, vectors=vectors)[0][0] == expected


def test_the_context_holds_the_vectors_too(gpt2):
    """A batch of 256 tokens just fits the context of 256; with a vector in front it does not."""
    model = gpt2[0]
    batch = {"input_ids": torch.full((1, 256), 5), "attention_mask": torch.ones(1, 256, dtype=torch.long)}
    batch["labels"] = batch["input_ids"]
    assert reply_loss(model, batch).isfinite()
    with pytest.raises(ValueError, match="takes 257 tokens and the model's context holds 256; leave it out"):
        reply_loss(model, batch, torch.zeros(1, 32))
    with pytest.raises(ValueError, match=r"shape \(1, 16\) do not fit this model.*give \(length, 32\)"):
        reply_loss(model, {name: values[:, :9] for name, values in batch.items()}, torch.zeros(1, 16))


def test_a_reply_must_have_room_in_the_context(gpt2, smollm2):
    model, tokenizer = gpt2[0], smollm2[1]
    question = [{"role": "user", "content": "Hi"}]
    length = len(tokenizer.apply_chat_template(question, return_dict=True, add_generation_prompt=True)["input_ids"])
    room = 256 - length
    assert len(reply(model, tokenizer, [question], room)) == 1
    message = "takes 257 tokens and the model's context holds 256; ask less, or lower max_new_tokens"
    with pytest.raises(ValueError, match=message):
        reply(model, tokenizer, [question], room + 1)
    with pytest.raises(ValueError, match=message):
        reply(model, tokenizer, ["Hi", question], room - 1, torch.zeros(2, 32))
    with pytest.raises(ValueError, match="the model's context holds 256"):
        reply(model, tokenizer, ["Hi", "word " * 300], 1)
