"""Run a notebook's code cells in one namespace, with a tiny model in place of the real one, nothing asserted."""
import sys, os, time, traceback, io, contextlib
sys.path.insert(0,'/work/c5/lib')
os.environ["HF_HUB_OFFLINE"]="1"
import matplotlib; matplotlib.use("Agg")
import matplotlib.pyplot as plt
import nbformat, torch, pandas as pd
torch.set_num_threads(1)
pd.set_option("display.width",200); pd.set_option("display.max_columns",20)
from pathlib import Path
tiny=Path("/tmp/w/ch5/tiny")
import tuning.models as M
real=M.load_lm
if not tiny.exists():
    from transformers import LlamaConfig, LlamaForCausalLM
    _,tok=real()
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=49152,hidden_size=32,intermediate_size=64,num_hidden_layers=2,num_attention_heads=2,num_key_value_heads=1,tie_word_embeddings=True,max_position_embeddings=8192)).save_pretrained(tiny); tok.save_pretrained(tiny)
M.load_lm=lambda *a,**k: real(str(tiny),*a[1:],**k)
nb=nbformat.read(sys.argv[1],4); ns={}; n=0
skip=set(sys.argv[2].split(",")) if len(sys.argv)>2 else set()
for c in nb.cells:
    if c.cell_type!="code" or c.id in skip: continue
    t=time.time()
    src="\n".join(l for l in c.source.splitlines())
    import ast
    tree=ast.parse(src); last=None
    if tree.body and isinstance(tree.body[-1],ast.Expr): last=ast.Expression(tree.body.pop().value)
    print("=====",c.id)
    try:
        exec(compile(tree,c.id,"exec"),ns)
        if last is not None:
            v=eval(compile(last,c.id,"eval"),ns)
            if v is not None: print(v.to_string() if hasattr(v,"to_string") else repr(v)[:200])
    except AssertionError as e: print("ASSERT", traceback.format_exc()[-300:])
    except Exception: print("ERROR", traceback.format_exc()[-800:])
    for f in plt.get_fignums():
        n+=1; plt.figure(f).savefig(f"/tmp/w/ch5/fig-{c.id}.png",dpi=100)
    plt.close("all")
    print(f"   {time.time()-t:.1f} s")
