"""What is called of a submission of *The sign is enough*, and with what."""

import torch
from torch import nn

TOLERANCE = {"q1": 1e-6, "q2": 1e-5, "q3": 1e-5, "q4": 1e-6}


class Probe(torch.autograd.Function):
    """Nothing in forward; in backward it looks at weights that backward has passed already."""

    @staticmethod
    def forward(ctx, x, weights, seen):
        ctx.weights, ctx.seen = weights, seen
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        numbers = torch.stack([weight.detach().sum() for weight in ctx.weights]).sum()
        gradients = sum(weight.grad is not None for weight in ctx.weights)
        ctx.seen.append(torch.stack([numbers, torch.tensor(float(gradients))]))
        return grad, None, None


class Net(nn.Module):
    """A few layers between an embedding and the same weight as output; probes between the layers."""

    def __init__(self, weights):
        super().__init__()
        self.table = nn.Parameter(weights["table"].clone())
        layers = [weights[name] for name in sorted(weights) if name.startswith("layer")]
        self.layers = nn.ParameterList([nn.Parameter(weight.clone()) for weight in layers])
        self.frozen = nn.Parameter(torch.ones(weights["table"].shape[1]), requires_grad=False)
        self.seen = []

    def forward(self, ids):
        h = self.table[ids] * self.frozen
        for place, weight in enumerate(self.layers):
            h = Probe.apply(h, list(self.layers)[place:], self.seen)
            h = torch.tanh(h @ weight.T)
        return nn.functional.cross_entropy((h @ self.table.T).flatten(0, 1), ids.roll(-1, 1).flatten())


def cases(question, draw):
    """[(tensors, settings)]."""

    found = []
    for number in range(3):
        settings = {
            "lr": draw.whole(1, 9) / 100,
            "beta": draw.whole(5, 10) / 10 - 0.05,
            "weight_decay": draw.whole(0, 3) / 10,
        }
        if question == "q1":
            shape = (draw.whole(3, 9), draw.whole(3, 9))
            tensors = {
                "weight": draw.numbers(*shape),
                "grad": draw.numbers(*shape),
                "momentum": 0.3 * draw.numbers(*shape),
            }
            tensors["grad"][0], tensors["momentum"][0] = 0, 0  # whose sign is zero
        elif question == "q4":
            sizes = [[draw.whole(20, 90), draw.whole(20, 90)] for _ in range(draw.whole(3, 7))] + [[draw.whole(20, 90)]]
            tensors, settings = {}, {"shapes": sizes, "bytes": (2, 4, 2)[number]}
        else:
            width, words = draw.whole(6, 12), draw.whole(15, 30)
            tensors = {"table": 0.5 * draw.numbers(words, width)}
            tensors |= {f"layer{k}": draw.numbers(width, width) / width**0.5 for k in range(draw.whole(2, 5))}
            tensors["ids"] = torch.randint(words, (draw.whole(2, 5), draw.whole(4, 9)), generator=draw.generator)
        found.append((tensors, settings))
    return found


def call(question, functions, inputs, settings):
    """Tensors that the submission's functions give."""
    if question == "q1":
        new, momentum = functions["sign_step"](inputs["weight"], inputs["grad"], inputs["momentum"], **settings)
        given = torch.stack([inputs[name] for name in ("weight", "grad", "momentum")])
        return {"weight": new, "momentum": momentum, "what was given, afterwards": given}
    if question == "q4":
        rows = {m: functions["sheet"](settings["shapes"], settings["bytes"], m) for m in METHODS}
        return {method: torch.tensor([row[name] for name in PARTS], dtype=torch.double) for method, row in rows.items()}
    ids, net = inputs.pop("ids"), Net(inputs)
    inputs["ids"] = ids
    optimizer = functions["FusedSignum"](net, **settings)
    if any(kind.__module__ == "tuning.lomo" for kind in type(optimizer).__mro__):
        raise TypeError("FusedSignum is to be your own, not built on a class of tuning.lomo")
    raised = False
    if question == "q3":
        try:
            net(ids).backward()
        except RuntimeError:
            raised = True
    for _ in range(3):
        optimizer.backward(net(ids))
    found = weights_of(net) | {"seen inside backward": torch.stack(net.seen[-len(net.layers) * 3 :])}
    if question == "q2":
        trained = {name: weight for name, weight in net.named_parameters() if weight.requires_grad}
        return found | {f"average of {name}": optimizer.state[weight]["average"] for name, weight in trained.items()}
    found["whether a bare loss.backward() raises RuntimeError"] = torch.tensor([raised])
    optimizer.detach()
    net(ids).backward()
    with torch.no_grad():
        for weight in (net.table, *net.layers):
            weight -= 0.1 * weight.grad
    return found | {f"{name}, afterwards": weight for name, weight in weights_of(net).items()}


METHODS = ("AdamW", "SGD", "Signum", "fused Signum")
PARTS = ("parameters", "gradients", "states")


def weights_of(net):
    return {name: weight.detach().clone() for name, weight in net.named_parameters()}
