"""What is called of a submission of *Magnitude and direction*, and with what."""

import torch
from torch import nn

TOLERANCE = {"q1": 1e-5, "q2": 1e-4, "q3": 1e-4, "q4": 1e-4}


def cases(question, draw):
    """[(tensors, settings)]."""

    found = []
    for number in range(3):
        inside, outside, rank = draw.whole(12, 30), draw.whole(12, 30), draw.whole(2, 6)
        alpha = rank * draw.whole(2, 5) / 2 + 0.5  # not the rank
        if question == "q4":
            tensors, settings = {}, {"alphas": [], "coefficients": [], "rank": draw.whole(2, 5)}
            least = 1
            if number == 2:  # fewer outputs than the ranks together, and than the rank that is asked for
                outside, settings["rank"], least = draw.whole(3, 6), draw.whole(6, 9), 3
            for place in range(draw.whole(2, 4)):
                own = draw.whole(least, 4)
                tensors |= {f"A{place}": draw.numbers(own, inside), f"B{place}": draw.numbers(outside, own)}
                settings["alphas"].append(own * draw.whole(3, 6) / 2)
                settings["coefficients"].append(draw.whole(1, 20) / 10 * (-1 if place else 1))
        else:
            tensors = {
                "weight": draw.numbers(outside, inside),
                "A": draw.numbers(rank, inside),
                "B": 0.1 * draw.numbers(outside, rank),
            }
            tensors |= {"magnitude": draw.numbers(outside).abs() + 0.5}
            if number:  # the first layer has no bias
                tensors["bias"] = draw.numbers(outside)
            tensors |= {"x": draw.numbers(draw.whole(2, 5), 3, inside), "g": draw.numbers(1, 3, outside)}
            settings = {"alpha": alpha, "rank": rank}
        found.append((tensors, settings))
    return found


def layer_of(functions, inputs, settings):
    """A `DoRALinear` with the weights of the case, and its base."""
    given = {name: inputs[name] for name in ("weight", "bias") if name in inputs}
    base = nn.Linear(*reversed(inputs["weight"].shape), bias="bias" in given)
    base.load_state_dict(given)
    return functions["DoRALinear"](base, rank=settings["rank"], alpha=settings["alpha"]), base


def set_weights(layer, inputs):
    with torch.no_grad():
        for name in ("A", "B", "magnitude"):
            getattr(layer, name).copy_(inputs[name])


def call(question, functions, inputs, settings):
    """Tensors that the submission's functions give."""
    if question == "q1":
        names = ("weight", "A", "B", "magnitude")
        return {"weight": functions["dora_weight"](*(inputs[name] for name in names), settings["alpha"])}
    if question == "q4":
        adapters = [(inputs[f"A{k}"], inputs[f"B{k}"], alpha) for k, alpha in enumerate(settings["alphas"])]
        A, B = functions["combine"](adapters, settings["coefficients"], settings["rank"])
        return {"product": B @ A, "rank": torch.tensor([A.shape[0], B.shape[1]])}
    layer, base = layer_of(functions, inputs, settings)
    x = inputs["x"].clone().requires_grad_()
    if question == "q2":
        found = {"start": layer(x)}
        set_weights(layer, inputs)
        found["y"] = layer(x)
        (found["y"] * inputs["g"]).sum().backward()
        found |= {f"gradient of {name}": getattr(layer, name).grad for name in ("A", "B", "magnitude")}
        trained = sum(weight.numel() for weight in layer.parameters() if weight.requires_grad)
        return found | {"gradient of x": x.grad, "trained": torch.tensor([trained])}
    set_weights(layer, inputs)
    merged = functions["merged"](layer)
    found = {"y": merged(x)} | {name: weight.clone() for name, weight in merged.named_parameters()}
    found["weights to train"] = torch.tensor([sum(weight.requires_grad for weight in merged.parameters())])
    for weight in merged.parameters():  # the base must not notice
        nn.init.zeros_(weight)
    return found | {f"{name} of the base": weight.clone() for name, weight in base.named_parameters()}
