import sys; sys.path.insert(0,'/work/c5/tests')
import nbformat
from notebook_rules import violations
setup=nbformat.read('/work/c5/book/2-lora/6-lora.ipynb',4)
setup=next(c for c in setup.cells if c.cell_type=="code").source
for p,ch in (("book/1-prompts/5-four-ways.ipynb",True),("book/1-prompts/lab/5-four-ways.ipynb",False),("book/1-prompts/solutions/5-four-ways.ipynb",False)):
    nb=nbformat.read(f"{p}",4)
    print(p); print(*[v for v in violations(nb,setup,chapter=ch,remade=True) if "fold is not the same" not in v and "execution counts" not in v and "stripped" not in v],sep="\n")
