"""Conversations: from messages to token ids, the loss on the reply only, and replies from a model.

A message is `{"role": "system", "user" or "assistant", "content": text}`. The tokenizer's chat template writes a
conversation as one text, with special tokens around each message.
"""

import re

import torch

from .prompts import check_vectors, context_of, evaluating, inputs_with_vectors, tokens_of

__all__ = ["encode_chat", "pad_chats", "reply", "reply_loss"]

IGNORED = -100  # the label that cross-entropy leaves out


def encode_chat(tokenizer, messages):
    """A conversation that ends on an assistant's message, as token ids and labels.

    Returns:
        `(input_ids, labels)`, lists of one length. Only the last message and the end token behind it have labels;
        whatever the template writes behind that token is left out.

    Raises:
        ValueError: the last message is not the assistant's, is empty or answers nothing, or the template is not one
            that a reply is appended to as it stands.
    """
    _check_reply(messages)
    asked = _ids(tokenizer, messages[:-1], add_generation_prompt=True)
    said = [*_reply_ids(tokenizer, messages, asked), tokenizer.eos_token_id]
    return asked + said, [IGNORED] * len(asked) + said


def pad_chats(tokenizer, chats):
    """A batch from the results of `encode_chat`: `input_ids`, `attention_mask` and `labels`, each (batch, seq).

    Rows are filled up on the right. The mask comes from their lengths and not from the padding token, which may be the
    end token that a reply is to learn.

    Raises:
        ValueError: no conversations.
    """
    _check_chats(chats)
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
        ValueError: a row, with the vectors in front, is longer than the model's context; or vectors of another size.
    """
    length = batch["input_ids"].shape[1]
    _check_length(model, length, vectors, "leave it out")
    batch = {name: values.to(model.device) for name, values in batch.items()}
    inputs, mask = _with_prompt(model, batch["input_ids"], batch["attention_mask"], vectors)
    logits = model(**inputs, attention_mask=mask).logits[:, -length:]  # (batch, seq, vocab)
    wanted = batch["labels"][:, 1:]
    told = wanted != IGNORED
    return torch.nn.functional.cross_entropy(logits[:, :-1][told].float(), wanted[told])


@torch.no_grad()
def reply(model, tokenizer, questions, max_new_tokens=64, vectors=None, batch_size=16):
    """What the model answers, greedily, to each question as the first message of a conversation.

    The model answers in evaluation mode, whatever mode it is in.

    Args:
        questions: texts, or lists of messages.
        vectors: None, or (length, hidden), a trained prompt in front of every conversation.

    Returns:
        A list of `(text, stopped)`: the reply without special tokens, and whether it came to its end token.

    Raises:
        ValueError: a question and the tokens asked for are more than the model's context holds; an empty conversation;
            or vectors of another size.
    """
    replies = []
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        inputs, old = _asked(model, tokenizer, batch, max_new_tokens, vectors)
        with evaluating(model):
            out = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,  # greedy, whatever the model's own settings for generation are
                num_beams=1,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        replies += [_read(tokenizer, row[old:]) for row in out.tolist()]
    return replies


def _asked(model, tokenizer, questions, max_new_tokens, vectors):
    """What `generate` takes for a batch, and how many tokens of what it gives are not new.

    Rows are padded on the left: they end together, and go on from there.
    """
    rows = [_question_ids(tokenizer, question) for question in questions]
    length = max(map(len, rows))
    _check_length(model, length + max_new_tokens, vectors, "ask less, or lower max_new_tokens")
    ids = torch.tensor([[tokenizer.pad_token_id] * (length - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=model.device)
    inputs, mask = _with_prompt(model, ids, mask, vectors)
    # From vectors it gives the new tokens only.
    return inputs | {"attention_mask": mask}, length if vectors is None else 0


def _read(tokenizer, row):
    """The text of new tokens up to the end token, and whether there is one."""
    stopped = tokenizer.eos_token_id in row
    said = row[: row.index(tokenizer.eos_token_id)] if stopped else row
    return tokenizer.decode(said, skip_special_tokens=True), stopped


def _question_ids(tokenizer, question):
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    return _ids(tokenizer, messages, add_generation_prompt=True)


def _reply_ids(tokenizer, messages, asked):
    """The tokens of the last message as they follow those of the question, `asked`, up to the end token."""
    text = _reply_text(tokenizer, messages)
    whole = _ids(tokenizer, messages)
    if whole[: len(asked)] == asked:
        return whole[len(asked) : whole.index(tokenizer.eos_token_id, len(asked))]
    # White space that a reply begins with can melt into one token with what stands before it. Generation begins behind
    # the question's own tokens, so the reply is read apart from them.
    return _plain_ids(tokenizer, text)


def _reply_text(tokenizer, messages):
    """What the template writes between the question and the end token: the reply, and white space at most."""
    asked, whole = _written(tokenizer, messages[:-1], add_generation_prompt=True), _written(tokenizer, messages)
    said, end = messages[-1]["content"], tokenizer.eos_token
    before, found, behind = whole.removeprefix(asked).partition(said)
    if not whole.startswith(asked) or not found or before.strip() or not behind.lstrip().startswith(end):
        raise ValueError(
            f"this tokenizer's chat template does not append a reply and {end!r} to the question as they stand: behind "
            f"{asked[-30:]!r} it writes {whole.removeprefix(asked)[:60]!r} for the reply {said[:30]!r}. If it strips "
            "the reply, strip the message too; else set a template that appends"
        )
    return before + said + behind[: behind.index(end)]


def _ids(tokenizer, messages, **options):
    """The tokens of a conversation as the template writes it.

    A message may spell out a special token, such as the end token; as text it is no end. So it is kept out of the
    template's way, behind a character that this conversation does not have, and read as plain text.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    used = set(_written(tokenizer, messages, **options))
    free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in used)  # for private use, in Unicode
    stands_for = {next(free): text for text in special}
    hidden = [_hide(message, stands_for) for message in messages]
    ids = []
    for piece in re.split(f"({'|'.join(stands_for) or '(?!)'})", _written(tokenizer, hidden, **options)):
        ids += _plain_ids(tokenizer, stands_for[piece]) if piece in stands_for else tokens_of(tokenizer, piece)
    return ids


def _hide(message, stands_for):
    text = message["content"]
    if not isinstance(text, str):  # e.g. none, where a tool was called
        return message
    for character, special in sorted(stands_for.items(), key=lambda item: -len(item[1])):  # the longest first
        text = text.replace(special, character)
    return message | {"content": text}


def _plain_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def _written(tokenizer, messages, **options):
    if tokenizer.chat_template is None:
        raise ValueError("this tokenizer has no chat template; take an instruction model's, or set one")
    if not messages:
        raise ValueError("a conversation without messages asks nothing; begin with one of the user")
    for place, message in enumerate(messages):
        if not {"role", "content"} <= message.keys():
            right = {"role": "user", "content": "text"}
            raise ValueError(f"message {place} is {message}; write it as {right}")
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def _with_prompt(model, ids, mask, vectors):
    """The model's inputs, with the vectors' pseudo tokens (ids below zero) in front of each row, and their mask."""
    if vectors is not None:
        check_vectors(model, vectors)
        slots = -1 - torch.arange(len(vectors), device=ids.device).expand(len(ids), -1)
        ids = torch.cat([slots, ids], dim=1)
        mask = torch.cat([torch.ones_like(slots), mask], dim=1)
    return inputs_with_vectors(model, ids, vectors), mask


def _check_reply(messages):
    last = messages[-1] if messages else {}
    said = last.get("content")
    if last.get("role") != "assistant" or not isinstance(said, str) or not said.strip():
        raise ValueError(
            "a conversation to train on must end on a message of the assistant that says something, as a text; this "
            f"one ends on {last or 'nothing'}"
        )


def _check_chats(chats):
    if not chats:
        raise ValueError("there are no conversations to make a batch of; is the data set empty?")


def _check_length(model, length, vectors, advice):
    length, context = length + (0 if vectors is None else len(vectors)), context_of(model)
    if context and length > context:
        raise ValueError(f"a conversation takes {length} tokens and the model's context holds {context}; {advice}")
