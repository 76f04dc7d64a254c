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


def cases(question, generator):
    """[(tensors, settings)]."""

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    def numbers(*shape):
        return torch.randn(shape, generator=generator)

    found = []
    for _ in range(3):
        length, layers, heads, words = draw(2, 6), draw(1, 4), 2 * draw(1, 3), draw(30, 60)
        settings = {"layers": layers, "heads": heads, "words": words, "seed": draw(0, 10**6)}
        if question == "q1":
            width, middle = draw(4, 9), draw(5, 12)
            out = layers * 2 * heads * 8
            tensors = {"places": numbers(length, width), "W1": numbers(middle, width), "b1": numbers(middle)}
            tensors |= {"W2": numbers(out, middle), "b2": numbers(out)}
        elif question in ("q3", "q4"):
            tensors = {"logits": 2 * numbers(draw(20, 40), words)}
            settings["groups"] = torch.randperm(words, generator=generator)[:9].view(3, 3).tolist()
            settings["groups"][0] = settings["groups"][0][: draw(1, 3)]
        else:
            rows, longest = draw(3, 6), draw(4, 8)
            lengths = torch.randint(1, longest + 1, (rows, 1), generator=generator)
            lengths[0] = longest
            tensors = {"mask": (torch.arange(longest, 0, -1) <= lengths).long()}  # padded on the left
            tensors |= {"ids": torch.randint(words, (rows, longest), generator=generator)}
            tensors |= {name: 0.5 * numbers(layers, heads // 2, length, 8) for name in ("keys", "values")}
            tensors["answers"] = torch.randint(words, (rows,), generator=generator)
            settings |= {"lr": draw(1, 9) / 100, "steps": draw(2, 5)}
        found.append((tensors, settings))
    return found


def call(question, functions, inputs, settings):
    """Tensors that the submission's functions give."""
    if question == "q1":
        names = ("places", "W1", "b1", "W2", "b2")
        made = functions["make_prefix"](*(inputs[n] for n in names), settings["layers"], settings["heads"])
        return dict(zip(("keys", "values"), made, strict=True))
    if question in ("q3", "q4"):
        found = functions["verbalize"](inputs["logits"], settings["groups"])
        if question == "q4":
            found = functions["balance"](found)
        return {"log-probabilities": found}
    model, prefix = tiny(settings), (inputs["keys"], inputs["values"])
    if question == "q2":
        whole = functions["prefix_logits"](model, *prefix, inputs["ids"], inputs["mask"])
        one = functions["prefix_logits"](model, *prefix, inputs["ids"][:1], inputs["mask"][:1])
        return {"logits": whole, "logits of one row": one}
    batch = inputs["ids"], inputs["mask"], inputs["answers"]
    keys, values = functions["train_prefix"](model, *prefix, batch, settings["lr"], settings["steps"])
    return {"keys": keys, "values": values}
