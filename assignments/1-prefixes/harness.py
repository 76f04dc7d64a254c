"""What is called of a submission of *Prefixes*, and with what."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

TOLERANCE = {"q1": 1e-5, "q2": 1e-4, "q3": 1e-5, "q4": 1e-3, "q5": 1e-4}


def tiny(settings):
    """A small random LLaMA."""
    torch.manual_seed(settings["seed"])
    config = LlamaConfig(
        vocab_size=settings["words"],
        hidden_size=8 * settings["heads"],
        intermediate_size=48,
        num_hidden_layers=settings["layers"],
        num_attention_heads=settings["heads"],
        num_key_value_heads=settings["heads"] // 2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def cases(question, draw):
    """[(tensors, settings)]."""

    found = []
    for number in range(3):
        length, layers, heads, words = draw.whole(2, 6), draw.whole(1, 4), 2 * draw.whole(1, 3), draw.whole(30, 60)
        settings = {"layers": layers, "heads": heads, "words": words, "seed": draw.whole(0, 10**6)}
        if question == "q1":
            width, middle = draw.whole(4, 9), draw.whole(5, 12)
            out = layers * 2 * heads * 8
            tensors = {
                "places": draw.numbers(length, width),
                "W1": draw.numbers(middle, width),
                "b1": draw.numbers(middle),
            }
            tensors |= {"W2": draw.numbers(out, middle), "b2": draw.numbers(out)}
        elif question == "q4":
            tensors = {"log_probs": (2 * draw.numbers(draw.whole(20, 40), 3) + draw.numbers(3)).log_softmax(dim=1)}
        elif question == "q3":
            size = 2 if number else 40  # with 40 some probabilities are less than any float32
            tensors = {"logits": size * draw.numbers(draw.whole(20, 40), words)}
            settings["groups"] = torch.randperm(words, generator=draw.generator)[:9].view(3, 3).tolist()
            settings["groups"][0] = settings["groups"][0][: draw.whole(1, 3)]
        else:
            rows, longest = draw.whole(3, 6), draw.whole(4, 8)
            lengths = torch.randint(1, longest + 1, (rows, 1), generator=draw.generator)
            lengths[0] = longest
            tensors = {"mask": (torch.arange(longest, 0, -1) <= lengths).long()}  # padded on the left
            tensors |= {"ids": torch.randint(words, (rows, longest), generator=draw.generator)}
            tensors |= {name: 0.5 * draw.numbers(layers, heads // 2, length, 8) for name in ("keys", "values")}
            tensors["answers"] = torch.randint(words, (rows,), generator=draw.generator)
            settings |= {"lr": draw.whole(1, 9) / 100, "steps": draw.whole(2, 5)}
        found.append((tensors, settings))
    return found


def call(question, functions, inputs, settings):
    """Tensors that the submission's functions give."""
    if question == "q1":
        names = ("places", "W1", "b1", "W2", "b2")
        made = functions["make_prefix"](*(inputs[n] for n in names), settings["layers"], settings["heads"])
        return dict(zip(("keys", "values"), made, strict=True))
    if question == "q3":
        return {"log-probabilities": functions["verbalize"](inputs["logits"], settings["groups"])}
    if question == "q4":
        given = inputs["log_probs"]
        return {"log-probabilities": functions["balance"](given), "the argument, afterwards": given}
    model, prefix = tiny(settings), (inputs["keys"], inputs["values"])
    if question == "q2":
        whole = functions["prefix_logits"](model, *prefix, inputs["ids"], inputs["mask"])
        one = functions["prefix_logits"](model, *prefix, inputs["ids"][:1], inputs["mask"][:1])
        return {"logits": whole, "logits of one row": one}
    batch = inputs["ids"], inputs["mask"], inputs["answers"]
    model.requires_grad_(True)
    keys, values = functions["train_prefix"](model, *prefix, batch, settings["lr"], settings["steps"])
    weights = list(model.parameters())
    about = [sum(w.grad is not None for w in weights), sum(w.requires_grad for w in weights)]
    return {
        "keys": keys,
        "values": values,
        "the model's weights, afterwards": torch.stack([w.detach().sum() for w in weights]),
        "weights with a gradient, trainable weights": torch.tensor(about),
        "the keys that were given, afterwards": inputs["keys"],
        "the values that were given, afterwards": inputs["values"],
    }
