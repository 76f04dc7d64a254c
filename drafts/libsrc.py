import ast, re
def lib(module, *names):
    """The library's source of some definitions, without docstrings, behind the mark; long lines' comments stand above."""
    src=open(f"/work/c4/lib/tuning/{module}.py",encoding="utf-8").read(); tree=ast.parse(src); lines=src.split("\n"); out=[]
    nodes={n.name:n for n in tree.body if isinstance(n,(ast.ClassDef,ast.FunctionDef))}
    for name in names:
        n=nodes[name]; drop=set()
        for inner in ast.walk(n):
            if isinstance(inner,(ast.ClassDef,ast.FunctionDef)) and ast.get_docstring(inner) is not None:
                d=inner.body[0]; drop|=set(range(d.lineno,d.end_lineno+1))
                if lines[d.end_lineno].strip()=="" : drop.add(d.end_lineno+1)
        kept=[]
        for i,l in enumerate(lines[n.lineno-1:n.end_lineno],n.lineno):
            if i in drop: continue
            m=re.match(r"( *)(.*?)  (# .*)$", l)
            if m and len(l)>80: kept+= [m[1]+m[3], m[1]+m[2]]
            else: kept.append(l)
        out.append("\n".join(kept))
    return f"# tuning/{module}.py\n"+"\n\n\n".join(out)
