import torch, copy; torch.set_num_threads(1)
import sys; sys.path.insert(0,'tests')
from small_models import tiny_llama
from tuning.p_tuning import *
from tuning.p_tuning import Prefixed, PrefixEncoder, prefix_shape
from peft import PrefixTuningConfig, get_peft_model
for tie in (1,2):
  for projection in (False,True):
    model=tiny_llama(num_key_value_heads=tie, initializer_range=0.5); shape=prefix_shape(model,3)
    ours = PrefixEncoder(shape) if projection else PromptVectors(torch.randn(shape))
    theirs = get_peft_model(copy.deepcopy(model), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=projection))
    enc=theirs.prompt_encoder["default"]
    pairs={"embedding.weight":"vectors"} if not projection else {n:n.replace("transform","mlp") for n,_ in enc.named_parameters()}
    with torch.no_grad():
        for n,m in pairs.items():
            w=enc.get_parameter(n); w.copy_(ours.get_parameter(m).reshape(w.shape))
    ids=torch.arange(12).view(2,6); mask=torch.ones_like(ids); mask[0,:2]=0; places=(mask.cumsum(1)-1).clamp(min=0)
    f=Prefixed(model,ours)(ids,mask,places,logits_to_keep=2).logits; e=theirs(input_ids=ids,attention_mask=mask,position_ids=places).logits[:,-2:]
    print(tie,projection,(f-e).abs().max().item())
    f.logsumexp(-1).sum().backward(); e.logsumexp(-1).sum().backward()
    print(max((ours.get_parameter(m).grad.reshape(-1)-enc.get_parameter(n).grad.reshape(-1)).abs().max().item() for n,m in pairs.items()))
