"""Where there is no GPU, the Triton kernels run under Triton's interpreter, on CPU tensors.

Triton reads the variable when it is first imported, which may be by any test.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
