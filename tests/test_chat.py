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


@pytest.mark.parametrize(
    "chat",
    [[], CHATS[0][:1], [CHATS[0][0], {"role": "assistant", "content": "  "}]],
    ids=["empty", "no reply", "blank reply"],
)
def test_a_chat_without_a_reply_is_refused(smollm2, chat):
    with pytest.raises(ValueError, match="must end on a message of the assistant"):
        encode_chat(smollm2[1], chat)


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
