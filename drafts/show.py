import sys
sys.path.insert(0,'lib')
from tuning import drawings
from tuning.plots import *
for n in sys.argv[1:]:
    d=getattr(drawings,n)(); d.figure.savefig(f'/tmp/w/ch4/{n}.png',dpi=110)
