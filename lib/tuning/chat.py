"""Conversations: from messages to token ids, the loss on the reply only, and replies from a model.

A message is `{"role": "system", "user" or "assistant", "content": text}`. The tokenizer's chat template writes a
conversation as one text, with special tokens around each message.
"""

import torch

from .prompts import _inputs

IGNORED = -100  # the label that cross-entropy leaves out


def encode_chat(tokenizer, messages):
    """A conversation that ends on an assistant's message, as token ids and labels.

    Returns:
        `(input_ids, labels)`, lists of one length. Only the last message and the end token behind it have labels;
        whatever the template writes behind that token is left out.

    Raises:
        ValueError: the last message is not the assistant's or is empty, or the template is not one that a reply is
            simply appended to.
    """
    if not messages or messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise ValueError("a conversation to train on must end on a message of the assistant that says something")
    asked = _ids(tokenizer, messages[:-1], add_generation_prompt=True)
    whole = _ids(tokenizer, messages)
    if whole[: len(asked)] != asked or tokenizer.eos_token_id not in whole[len(asked) :]:
        raise ValueError(
            f"this tokenizer's chat template does not append a reply and {tokenizer.eos_token!r} to the question, so "
            "there is no telling which tokens are the reply's"
        )
    end = whole.index(tokenizer.eos_token_id, len(asked)) + 1
    return whole[:end], [IGNORED] * len(asked) + whole[len(asked) : end]


def pad_chats(tokenizer, chats):
    """A batch from the results of `encode_chat`: `input_ids`, `attention_mask` and `labels`, each (batch, seq).

    Rows are filled up on the right. The mask comes from their lengths and not from the padding token, which may be the
    end token that a reply is to learn.
    """
    length = max(len(ids) for ids, _ in chats)
    rows = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, labels in chats:
        empty = length - len(ids)
        rows["input_ids"].append(ids + [tokenizer.pad_token_id] * empty)
        rows["attention_mask"].append([1] * len(ids) + [0] * empty)
        rows["labels"].append(labels + [IGNORED] * empty)
    return {name: torch.tensor(values) for name, values in rows.items()}


def reply_loss(model, batch, vectors=None):
    """The mean of -log p over the tokens that have a label, each predicted from those before it.

    With `vectors` (length, hidden) a trained prompt stands in front of every conversation.

    Raises:
        ValueError: a row is longer than the model's context.
    """
    length = batch["input_ids"].shape[1]
    context = getattr(model.config, "max_position_embeddings", None) or length
    if length > context:
        raise ValueError(f"a conversation has {length} tokens and the model's context holds {context}; leave it out")
    batch = {name: values.to(model.device) for name, values in batch.items()}
    inputs, mask = _with_prompt(model, batch["input_ids"], batch["attention_mask"], vectors)
    logits = model(**inputs, attention_mask=mask).logits[:, -length:]  # (batch, seq, vocab)
    wanted = batch["labels"][:, 1:]
    told = wanted != IGNORED
    return torch.nn.functional.cross_entropy(logits[:, :-1][told].float(), wanted[told])


@torch.no_grad()
def reply(model, tokenizer, questions, max_new_tokens=64, vectors=None, batch_size=16):
    """What the model answers, greedily, to each question as the first message of a conversation.

    Args:
        questions: texts, or lists of messages.
        vectors: None, or (length, hidden), a trained prompt in front of every conversation.

    Returns:
        A list of `(text, stopped)`: the reply without special tokens, and whether it came to its end token.
    """
    replies = []
    for start in range(0, len(questions), batch_size):
        chats = [
            [{"role": "user", "content": question}] if isinstance(question, str) else question
            for question in questions[start : start + batch_size]
        ]
        ids = [_ids(tokenizer, chat, add_generation_prompt=True) for chat in chats]
        length = max(map(len, ids))
        asked = torch.tensor([[tokenizer.pad_token_id] * (length - len(row)) + row for row in ids])  # ends together
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids])
        inputs, mask = _with_prompt(model, asked.to(model.device), mask.to(model.device), vectors)
        out = model.generate(
            **inputs,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        new = out if vectors is not None else out[:, length:]  # from vectors generate gives the new tokens only
        for row in new.tolist():
            stopped = tokenizer.eos_token_id in row
            row = row[: row.index(tokenizer.eos_token_id)] if stopped else row
            replies.append((tokenizer.decode(row, skip_special_tokens=True), stopped))
    return replies


def _ids(tokenizer, messages, **options):
    if tokenizer.chat_template is None:
        raise ValueError("this tokenizer has no chat template; take an instruction model's, or set one")
    return tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"]


def _with_prompt(model, ids, mask, vectors):
    """The model's inputs, with the vectors' pseudo tokens (ids below zero) in front of each row, and their mask."""
    if vectors is not None:
        slots = -1 - torch.arange(len(vectors), device=ids.device).expand(len(ids), -1)
        ids = torch.cat([slots, ids], dim=1)
        mask = torch.cat([torch.ones_like(slots), mask], dim=1)
    return _inputs(model, ids, vectors), mask
