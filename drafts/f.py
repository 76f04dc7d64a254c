import torch, sys, json
torch.set_num_threads(1)
from tuning.p_tuning import PromptEncoder
from tuning.evaluate import difference
import warnings
from peft import PromptEncoder as PE, PromptEncoderConfig
def looks(v): return [round(x,3) for x in (v.norm(dim=1).mean().item(), torch.pdist(v).mean().item())]
torch.manual_seed(0)
for kind,h in (("MLP",576),("LSTM",288),("LSTM",576)):
    e=PE(PromptEncoderConfig(task_type="CAUSAL_LM",num_virtual_tokens=6,token_dim=576,num_transformer_submodules=1,encoder_hidden_size=h,encoder_reparameterization_type=kind,encoder_dropout=0.0,encoder_num_layers=2))
    print(kind,h,looks(e(torch.arange(6)).detach()), sum(p.numel() for p in e.parameters()))
torch.manual_seed(0)
e=PromptEncoder(6,576); s=e.lstm(e.embedding.weight.unsqueeze(0))[0][0]
print('states',looks(s.detach()), 'mlp(0)', e.mlp(torch.zeros(576)).norm().item(), 'h', looks(e().detach()))
m=PromptEncoder(6,576,lstm_layers=0); print('S',looks(m.embedding.weight.detach()))
p=json.load(open('lib/tuning/results/ledger.json'))['results']
H=lambda m:[p[f'run/{m}/{s}']['hits'] for s in range(3)]
A=[p['asked']['hits']]*3
B,M,PV,BE,FP,PF,L=map(H,("P-tuning, BiLSTM","P-tuning, MLP","prompt tuning","P-tuning beside the prompt","P-tuning, from the prompt","prompt tuning, from the prompt","LoRA"))
for n,a,b in (("B-plain",B,PV),("M-plain",M,PV),("M-B",M,B),("BE-B",BE,B),("BE-asked",BE,A),("FP-PF",FP,PF),("FP-BE",FP,BE),("LoRA-FP",L,FP),("LoRA-BE",L,BE),("LoRA-PF",L,PF),("BE-PF",BE,PF),("B-asked",B,A),("BE-plain",BE,PV)): print(n,difference(a,b))
