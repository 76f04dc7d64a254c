import torch; torch.set_num_threads(1)
from tuning.experiments import p_tuning as P, ledger
from tuning.models import load_lm
from tuning.methods import loss_of, right
m,t=load_lm("smollm2-135m")
rows=ledger.rows_of(t,"P17",16)
A="The city of [X] is in the country of [Y]."
for kind in ("deep, plain","deep, MLP","BiLSTM, spread"):
    r=P.made(kind,m,t,A,0)
    l=loss_of(r,rows["train"][:4]); l.backward()
    with torch.no_grad(): k=P.looks(r.trained())
    print(kind,l.item(),max(w.grad.abs().max().item() for w in r.weights()),k, right(r,rows["dev"][:4]).tolist(), len(r.weights()),flush=True)
print(P.own("smollm2-135m",A,"Osaka"))
w=P.words_of(t,set()); print(len(w))
