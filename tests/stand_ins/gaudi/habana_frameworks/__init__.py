"""A stand-in for Intel Gaudi's PyTorch bridge, over the fake device `hpu`: no Habana software is here.

It imitates the names that an inference backend uses, as the public source of HabanaAI/gaudi-pytorch-bridge
(python_packages/habana_frameworks/torch) and of vllm-project/vllm-gaudi shows them, and the documented runtime flag
PT_HPU_LAZY_MODE.  Two things differ and a test cannot show them here: the real device is PyTorch's own `HPU` dispatch
key, not PrivateUse1, and importing torch loads the real bridge by itself.
"""
