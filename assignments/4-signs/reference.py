"""The functions that the assignment *The sign is enough* asks for."""

import math

import torch


def sign_step(weight, grad, momentum, lr, beta, weight_decay):
    momentum = beta * momentum + (1 - beta) * grad
    return weight * (1 - lr * weight_decay) - lr * momentum.sign(), momentum


class FusedSignum:
    def __init__(self, model, lr, beta=0.9, weight_decay=0.0):
        self.settings = {"lr": lr, "beta": beta, "weight_decay": weight_decay}
        self.state, self.inside = {}, False
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.hooks = [weight.register_post_accumulate_grad_hook(self.update) for weight in trained]

    def backward(self, loss):
        self.inside = True
        try:
            loss.backward()
        finally:
            self.inside = False

    @torch.no_grad()
    def update(self, weight):
        grad, weight.grad = weight.grad, None
        if not self.inside:
            raise RuntimeError("call optimizer.backward(loss), not loss.backward()")
        if weight not in self.state:
            self.state[weight] = {"average": torch.zeros_like(weight)}
        average = self.state[weight]["average"]
        for old, new in zip((weight, average), sign_step(weight, grad, average, **self.settings), strict=True):
            old.copy_(new)

    def detach(self):
        for hook in self.hooks:
            hook.remove()


def sheet(shapes, number_bytes, method):
    sizes = [math.prod(shape) for shape in shapes]
    total = sum(sizes)
    master = 4 * total if number_bytes == 2 and method in ("AdamW", "SGD") else 0
    averages = {"AdamW": 8 * total, "SGD": 0}.get(method, number_bytes * total)
    gradients = number_bytes * (max(sizes) if method == "fused Signum" else total)
    return {"parameters": number_bytes * total, "gradients": gradients, "states": master + averages}
