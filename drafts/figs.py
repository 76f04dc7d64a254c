"""Runs the recorded cells (no model) of a page with a stand-in record, to look at layout only."""
import sys, json, random, ast
sys.path.insert(0,'lib')
import torch; torch.set_num_threads(1)
import nbformat
import matplotlib; matplotlib.use("agg")
import matplotlib.pyplot as plt
from tuning.experiments import p_tuning, ledger as L
from tuning.experiments.record import load_results as real
import tuning.experiments.record as rec
pieces=real("ledger")["results"]; random.seed(0)
def flip(h,p): return "".join(str(1-int(c)) if random.random()<p else c for c in h)
base=[pieces[f"run/P-tuning, MLP/{s}"]["hits"] for s in range(3)]
def run(lr,seed,kind):
    best=.3 if lr not in (1e-6,1e-4,30.0,1e-2) else .2
    deep=kind.startswith("deep")
    look={"keys":8.,"values":8.} if deep else {"length":3.,"apart":4.}
    return {"lr":lr,"dev":best+random.random()*.02,"step":90,"scores":[[i*30,.1] for i in range(6)],"looks":[look]*6,"hits":flip(base[seed],.05),"trained":69120,"kept":69120 if deep else 3456,
     "among words":flip(base[seed],.05),"among countries":flip(base[seed],.05)}
R={"words":{"length":3.2,"apart":4.5,"keys":10.,"values":3.}}
for kind,rates in p_tuning.RATES.items():
    for lr in rates: R[f"{kind}/{lr:g}/0"]=run(lr,0,kind)
    b=max(rates,key=lambda lr:R[f"{kind}/{lr:g}/0"]["dev"])
    for s in (1,2): R[f"{kind}/{b:g}/{s}"]=run(b,s,kind)
for kind,lr in (("BiLSTM",3e-4),("MLP",1e-2)):
    for x in (lr/3,lr,3*lr): R[f"{kind}, long/{x:g}/0"]=run(x,0,kind)
    b=max((lr/3,lr,3*lr),key=lambda x:R[f"{kind}, long/{x:g}/0"]["dev"])
    for s in (1,2): R[f"{kind}, long/{b:g}/{s}"]=run(b,s,kind)
R["BiLSTM, long/0.0003/0"]["looks"]=[{"length":1,"apart":.2*(i+1)} for i in range(6)]
for n in range(4):
    R[f"wording/{n}/by hand"]={"hits":"0"*1064,"among words":flip("0"*1064,.05),"among countries":flip("0"*1064,.1*(n+1)),"said":[[" the",700],[" a",100]]}
    for s in range(3): R[f"wording/{n}/{s}"]=run(3e-3,s,"BiLSTM beside")
S={"results":R,"provenance":real("p_tuning")["provenance"]}
def load_results(name): return S if name=="p_tuning" else real(name)
rec.load_results=load_results
nb=nbformat.read(sys.argv[1],4); out=sys.argv[2]; skip=sys.argv[3].split(",") if len(sys.argv)>3 else []
ns={}; n=[0]
def show():
    n[0]+=1; plt.gcf().savefig(f"{out}-{n[0]}.png",dpi=100); plt.close("all")
plt.show=show
class Fake: 
    def __getattr__(self,x): return self
    def __call__(self,*a,**k): return self
for c in nb.cells:
    if c.cell_type!="code" or c.id=="set-up": continue
    src=c.source
    if "imports" in c.id or "Imports" in src.split("\n")[0]:
        src="\n".join(l for l in src.split("\n") if not l.startswith(("model","hidden =","facts =")))
        exec(src,ns); ns["load_results"]=load_results; ns["plt"].show=show; continue
    names={x.id for x in ast.walk(ast.parse(src)) if isinstance(x,ast.Name)}
    if names & {"model","tokenizer","facts","encoders","masked","loaded","Encoder","PeftEncoder","encoder","starts","table_of_live","of","shape","cache","prefixed"} and c.id not in ("ablation",): continue
    if c.id in skip: continue
    tree=ast.parse(src); last=tree.body[-1] if tree.body else None
    print("##",c.id)
    try:
        if isinstance(last,ast.Expr):
            exec(compile(ast.Module(tree.body[:-1],[]),c.id,"exec"),ns); v=eval(compile(ast.Expression(last.value),c.id,"eval"),ns)
            if v is not None and "DataFrame" in type(v).__name__: print(v.to_string())
        else: exec(compile(tree,c.id,"exec"),ns)
    except Exception as e: print("ERROR",c.id,type(e).__name__,e)
