"""A made-up ways.json to try the page's cells; never committed."""
import sys, json, random
sys.path.insert(0,'/work/c5/lib')
from tuning.experiments import ways
from tuning.experiments.record import load_results
random.seed(0)
led=load_results("ledger")["results"]
P={"untouched":{w:{"continents":led["asked"]["elsewhere"]["continents"],"perplexity":p} for w,p in (("wic",157.0),("others",402.67))}}
def hits(n,p): return "".join("1" if random.random()<p else "0" for _ in range(n))
base={"P1376":.45,"P37":.7,"reviews":.8,"wic":.52}
ns={"P1376":(40,38,38),"P37":(46,46,44),"reviews":(400,)*3,"wic":(400,)*3,"P17":(1064,)*3}
def run(task,s,p,way,lr):
    d={"hits":hits(ns[task][s],p),"lr":lr,"seed":s,"dev":p,"step":48,"scores":[[0,.4],[60,p]],"stopped":None,"seconds":60.,"losses":[1.0]*60,"template":"x","trained":134515008,"kept_bytes":538060032,"as before":way in(ways.PROMPT,ways.ALONE)}
    if d["as before"]: d|={"trained":4658688,"kept_bytes":13824}
    else: d["elsewhere"]={"continents":hits(160,.4),"perplexity":(157 if task=="wic" else 402.67)*random.uniform(.95,3)}
    if task in("reviews","wic"): d["macro_f1"]=p
    return d
for task,b in base.items():
    for s in range(3):
        P[f"most frequent/{task}/{s}"]={"hits":hits(ns[task][s],.2 if task=="P37" else .0 if task=="P1376" else .5)}
        t,w=ways.wordings(task,{"lama":None})[1]
        P[f"asked/{task}/{s}"]={"dev":b,"template":t,"words":w,"tried":[[b,t,w]],"hits":hits(ns[task][s],b)}
        P[f"shown/{task}/{s}"]={"dev":b,"count":16,"prompt":"x","tried":[[b,c] for c in (1,2,4,8,16,32)],"hits":hits(ns[task][s],b+.05)}
        for way in ways.WAYS:
            if way==ways.ALONE and task in("reviews","wic"): continue
            lr=[1e-4,3e-3] if way==ways.BOTH else [3e-5,1e-2] if way==ways.HEAD and task in("reviews","wic") else 1e-4
            P[f"run/{way}/{task}/{s}"]=run(task,s,{ways.HEAD:b-.1,ways.WEIGHTS:b+.15,ways.PROMPT:b+.1,ways.BOTH:b+.12,ways.ALONE:b-.05}[way],way,lr)
for s in range(3):
    for way in (ways.HEAD,ways.BOTH): P[f"run/{way}/P17/{s}"]=run("P17",s,.3 if way==ways.HEAD else .4,way,1e-4)
for task in("P17","P1376","P37"): P[f"untaught/{ways.PROMPT}/{task}"]=run(task,0,.01,ways.PROMPT,3e-3)
for swept in("P17","P1376","reviews"):
    for way in ways.WAYS:
        if way==ways.ALONE and swept=="reviews": continue
        if swept=="P17" and way in ways.IN_LEDGER: continue
        if way==ways.BOTH or (way==ways.HEAD and swept=="reviews"):
            for lr in ([3e-5,1e-2],[1e-4,1e-2],[1e-5,1e-2],[3e-5,1e-1],[3e-5,1e-3]):
                P[f"sweep/{way}/{swept}/{lr[0]:g} and {lr[1]:g}"]={"lr":lr,"dev":random.uniform(.5,.8),"step":48,"scores":[[0,.4],[60,.5]],"stopped":None}
            if swept!="P17": P[f"one rate/{way}/{swept}"]=run(swept,0,.6,way,[3e-5,3e-5])
        else:
            for lr in ways.RATES[way]: P[f"sweep/{way}/{swept}/{lr:g}"]={"lr":lr,"dev":random.uniform(.5,.8),"step":48,"scores":[[0,.4],[60,.5]],"stopped":None}
P[f"twice/{ways.HEAD}/reviews"]=run("reviews",0,.7,ways.HEAD,[3e-5,1e-2]); P[f"twice/{ways.BOTH}/P1376"]=run("P1376",0,.6,ways.BOTH,[3e-5,1e-2])
P["rows"]=ways.summary(P,["P17","P1376","P37","reviews","wic"],led)
json.dump({"provenance":{"date":"2026-11-29","command":"FAKE","commit":"0000000","seconds":0,"machine":"none","versions":{}},"results":P},open('/work/c5/lib/tuning/results/ways.json','w'))
