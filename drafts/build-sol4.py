import sys; sys.path.insert(0, "/tmp/w")
from nb import md, code, setup, write

md(r"""
# Solutions to chapter 4

One solution for each exercise of [chapter 4](../4-p-tuning.ipynb). Each begins with its answer. Sums are rounded in
another order on another machine, and forty steps of training make visible differences of that: your counts may be others.
What should stay is what the asserts say. All runs together take about «MINUTES» minutes on two cores.
""", id="title")
setup("book/2-lora/6-lora.ipynb")
code(r"""
import pandas as pd
import torch
from torch import nn
from tuning.checks import (
    check_deep_inputs,
    check_depends,
    check_spread,
    sized,
)
from tuning.evaluate import difference, facts_with_ids, hits_at_1
from tuning.models import load_lm
from tuning.p_tuning import (
    Prefixed,
    PromptEncoder,
    PromptVectors,
    answer_loss,
    encode_pseudo,
    prefix_shape,
    prompt_logits,
    soften,
)
from tuning.prompts import embeddings_of
from tuning.training import train

BARE = "[P][P][P] [X][P][P][P] [Y]."  # (3,3,0)
ASK = "The city of [X] is in the country of [Y]."
model, tokenizer = load_lm(dtype=torch.float32)
model.model.layers = model.model.layers[: sized(None, 2)]  # all; in tests two
model.config.num_hidden_layers = len(model.model.layers)
model.requires_grad_(False)
hidden = model.config.hidden_size
facts, STEPS = facts_with_ids(tokenizer, "P17"), sized(40, 1)
dev = facts["dev"][: sized(200, 4)]
""", tags=["hide-cell"], title="Imports, model and data", id="imports")
md(r"""
Two functions serve the exercises that train. `trained` trains an encoder by chapter 1's loop, keeps the last state and gives its vectors. `hits` says which facts
are right, as a text that `difference` takes.
""", id="helpers-text")
code(r"""
def trained(template, encoder, lr, seed=0):
    def loss_on(batch):
        return answer_loss(model, tokenizer, template, batch, encoder())

    train(encoder, loss_on, facts["train"], lr, STEPS, seed=seed)
    return encoder().detach()


def hits(template, rows, vectors):
    logits = prompt_logits(model, tokenizer, template, rows, vectors)
    found = hits_at_1(logits, [answer for _, answer in rows])
    return "".join(str(int(hit)) for hit in found)
""", id="helpers")
md(r"""
## Exercise 1. Who depends on whom?

**With the LSTM each vector depends on every row, without it on its own alone. Yet one step for $h_0$ moves all six vectors of the MLP, and only one of six plain
vectors: in training the MLP's weights are shared.**
""", id="one")
code(r"""
def depends(encoder):
    rows = encoder.embedding.weight
    lines = []
    for vector in encoder():
        (gradient,) = torch.autograd.grad(
            vector.sum(), rows, retain_graph=True
        )
        lines.append(gradient.any(dim=1))  # (length,)
    return torch.stack(lines)


check_depends(depends)
for layers in (2, 0):
    torch.manual_seed(0)
    table = depends(PromptEncoder(6, hidden, lstm_layers=layers))
    print(f"{layers} layers of LSTM: {table.sum().item()} of 36 pairs")
    assert torch.equal(table, torch.eye(6).bool() if layers == 0 else table > -1)
""", id="depends")
code(r"""
def moved(prompt):  # vectors that move in a step for the first one alone
    before = prompt().detach().clone()
    optimizer = torch.optim.SGD(prompt.parameters(), lr=0.1)
    prompt()[0].square().sum().backward()
    optimizer.step()
    return (prompt() != before).any(dim=1).sum().item()


torch.manual_seed(0)
counts = {
    "plain": moved(PromptVectors(torch.randn(6, hidden))),
    "MLP": moved(PromptEncoder(6, hidden, lstm_layers=0)),
}
print(counts)
assert counts == {"plain": 1, "MLP": 6}
""", id="moved")
md(r"""
A zero is exact here: where there is no path, the gradient is zero. Without the LSTM nothing of the paper's second reason is left in the *vectors*. The first remains: a vector is moved through
a network, which can take it further than a short step of its own. And all six move together, as long as the network is there.

## Exercise 2. Spread the start

**«N, N and N of 200 dev cities are right at the three rates, and N without the spread.» «What that shows.»**
""", id="two")
code(r"""
def spread(vectors, length):
    middle = vectors.mean(dim=0)  # (hidden,)
    away = (vectors - middle).norm(dim=1).mean()
    return middle, (length / away).item()


check_spread(spread)


class Spread(nn.Module):
    def __init__(self, encoder, length):
        super().__init__()
        self.encoder = encoder
        middle, self.factor = spread(encoder().detach(), length)
        self.register_buffer("middle", middle)

    def forward(self):
        return self.factor * (self.encoder() - self.middle)
""", id="spread")
code(r"""
words = embeddings_of(model).float().norm(dim=1).mean()  # length of a word


def encoder_for(length):
    torch.manual_seed(0)
    encoder = PromptEncoder(6, hidden)
    return encoder if length is None else Spread(encoder, length)


rows, right = {}, {}
for name, length, lr in sized(
    (
        ("as it is", None, 3e-4),
        ("spread", words, 3e-5),
        ("spread", words, 3e-4),
        ("spread", words, 3e-3),
    ),
    (("as it is", None, 3e-4), ("spread", words, 3e-4)),
):
    encoder = encoder_for(length)
    began = torch.pdist(encoder().detach()).mean().item()
    vectors = trained(BARE, encoder, lr)
    right[name, lr] = hits(BARE, dev, vectors)
    rows[name, lr] = {
        "apart, before": round(began, 1),
        "after": round(torch.pdist(vectors).mean().item(), 1),
        f"right, of {len(dev)}": right[name, lr].count("1"),
        "over as it is": difference(
            [right[name, lr]], [right["as it is", 3e-4]]
        ),
    }
pd.DataFrame(rows).T
""", tags=["nbval-ignore-output"], id="spread-train")
code(r"""
begins = pd.DataFrame(rows).T["apart, before"]
assert begins["as it is"].max() < 0.4 and begins["spread"].min() > 3.5
# RANGES WAIT FOR THE RUN
print("spread, six vectors begin as far apart as words")
""", tags=["hide-cell"], title="✓ Spread, six vectors begin as far apart as words", id="spread-check")
md(r"""
«TEXT: what 40 steps say; one seed; the recorded runs of the chapter have 150 steps and three seeds.» A factor behind the encoder also makes each step of training larger, by about 20. That is why the rate is tried anew.

## Exercise 3. An anchor

**«The word country is ahead by …, with an interval from … to …: …»**
""", id="three")
code(r"""
TEMPLATES = {
    "country": "[P][P][P] [X] [P] country[P] [Y].",
    "the": "[P][P][P] [X] [P] the[P] [Y].",
}
SEEDS = sized((0, 1), (0,))
found = {}
for name, template in TEMPLATES.items():
    found[name] = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        encoder = PromptEncoder(5, hidden, lstm_layers=0)
        vectors = trained(template, encoder, 1e-2, seed)
        found[name].append(hits(template, dev, vectors))
for name, texts in found.items():
    print(f"{name}: {[text.count('1') for text in texts]} of {len(dev)}")
print("country over the:", difference(found["country"], found["the"]))
""", tags=["nbval-ignore-output"], id="anchor")
code(r"""
gap = difference(found["country"], found["the"])
ends = [int(end) for end in gap.split("(")[1].rstrip(")").split(" to ")]
assert ends[0] <= ends[1]
if sized(True, False):
    assert ends[0] <= 0 <= ends[1]  # RANGES WAIT FOR THE RUN
print("these cities do not tell whether the anchor helps")
""", tags=["hide-cell"], title="✓ These cities do not tell whether the anchor helps", id="anchor-check")
md(r"""
Leave the word out, and two things change: what is said, and how many places there are. Each place is one more at which the frozen model can compute and to which the last place can
look. With *the* in its stead only the word differs. Two seeds tell little about seeds, and the rate is the ledger's for (3,3,0), swept for neither template.

## Exercise 4. A batch with a deep prompt

**With the position ids a city's logits are the same alone and in a batch, to a thousandth. Without them they are off by up to «N».** Then the model counts the padding too, and the padded text
stands further from the prompt.
""", id="four")
code(r"""
def deep_inputs(mask, length):
    ones = mask.new_ones(len(mask), length)
    whole = torch.cat([ones, mask], dim=1)  # (batch, length + seq)
    positions = whole.cumsum(dim=1) - 1  # masked places may have any
    return whole, positions[:, length:]


check_deep_inputs(deep_inputs)
""", id="deep-inputs")
code(r"""
from transformers import DynamicCache

torch.manual_seed(0)
prefix = torch.randn(prefix_shape(model, 3))


def asked(cities, counted=True):
    prompts = [f" {city} is in the country of" for city in cities]
    batch = tokenizer(
        prompts, padding=True, padding_side="left", return_tensors="pt"
    ).to(model.device)
    whole, positions = deep_inputs(batch.attention_mask, 3)
    layers = prefix.permute(1, 2, 3, 0, 4).unsqueeze(2)
    cache = DynamicCache(layers.expand(-1, -1, len(cities), -1, -1, -1))
    return model(
        batch.input_ids,
        attention_mask=whole,
        position_ids=positions if counted else None,
        past_key_values=cache,
    ).logits[:, -1]  # (batch, vocab)


two = ["Osaka", "Thiruvananthapuram"]
alone = asked(two[:1])[0]
off = {
    counted: (asked(two, counted)[0] - alone).abs().max().item()
    for counted in (True, False)
}
print(f"with position ids {off[True]:.4f}, without {off[False]:.1f}")
assert off[True] < 1e-3 < 0.1 < off[False]
""", tags=["nbval-ignore-output"], id="deep-batch")
code(r"""
library = Prefixed(model, PromptVectors(prefix))
template = " [X] is in the country of [Y]."
logits = prompt_logits(library, tokenizer, template, two)
torch.testing.assert_close(logits[0], alone, rtol=1e-3, atol=1e-3)
print("the library's Prefixed gives the same logits")
""", tags=["hide-cell"], title="✓ The library's Prefixed gives the same logits", id="deep-library")
md(r"""
## Exercise 5. A start of zeros

**A vector of zeros in the first place stays zero in every layer, and on the way back each RMSNorm multiplies its gradient by 316. After thirty layers that is more than a number of 32 bits holds. With a word
in front the zeros see something, and the gradient is finite.**
""", id="five")
code(r"""
soft, start = soften(model, tokenizer, ASK)  # start: (8, hidden)
some = facts["train"][:4]


def gradient_of(template):
    zeros = torch.zeros_like(start).requires_grad_()
    loss = answer_loss(model, tokenizer, template, some, zeros)
    (gradient,) = torch.autograd.grad(loss, zeros)
    return loss.item(), gradient


for template in (soft, "The" + soft):
    loss, gradient = gradient_of(template)
    finite = gradient.isfinite().all(dim=1).sum().item()
    print(f"{template}\n  loss {loss:.1f}; {finite} of 8 gradients are finite")
    if sized(True, False):
        assert (finite == 8) == template.startswith("The")
""", tags=["nbval-ignore-output"], id="zeros")
md(r"""
What does RMSNorm do to the gradient of a zero? Take a vector of zeros, and one that is as long as a word's:
""", id="slope-text")
code(r"""
def slope(value):  # of RMSNorm at a number that is 0, beside others
    x = torch.full((hidden,), value, dtype=torch.double)
    x[0] = 0
    x.requires_grad_()
    normed = x / (x.square().mean() + 1e-5).sqrt()
    return torch.autograd.grad(normed[0], x)[0][0].item()


print(f"zeros: {slope(0.0):.0f}, a word: {slope(0.136):.1f}")
assert abs(slope(0.0) - 1e-5**-0.5) < 1e-6
""", id="slope")
code(r"""
ids = torch.tensor(encode_pseudo(tokenizer, soft, "Osaka"))
words = embeddings_of(model, ids.clamp(min=0).tolist())
rows = words.masked_fill((ids < 0).unsqueeze(1), 0).requires_grad_()
output = model(inputs_embeds=rows.unsqueeze(0), output_hidden_states=True)
states = output.hidden_states  # embeddings, and behind each layer
assert not any(state[0, 0].any() for state in states[:-1])  # all zero
loss = output.logits[0, -1].logsumexp(dim=0)  # any scalar will do
gradients = torch.autograd.grad(loss, states[:-1])
sizes = [gradient[0, 0].double().norm().item() for gradient in gradients]
print("behind layer", {k: f"{sizes[k]:.0e}" for k in range(len(sizes))[-2::-3]})
if sized(True, False):
    assert sizes[20] > 100 * sizes[27] and sizes[0] != sizes[0]  # nan
""", tags=["nbval-ignore-output"], id="zero-states")
md(r"""
In a causal model the first place sees only itself. RMSNorm makes zero of zero, so its query, key and value are zero, attention adds nothing, and the MLP of zero is zero. The state stays zero in all layers. Forward, that
does no harm.

Backward, each layer's norm multiplies by $1/\sqrt{\epsilon} = 316$, beside what passes along the residual connection. The numbers grow by the same factor layer after layer. Past the largest number of 32 bits there are
infinities, and infinity minus infinity is no number.

With *The* in front, the zeros' attention finds a value that is not zero. Behind the first layer they are zeros no longer, and only the norms of the first layer multiply by 316. So not zeros are the trouble, but zeros in the first place.
""", id="end")
write("/tmp/w/ch4/sol4.ipynb")
