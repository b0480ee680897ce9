"""What is CUDA's alone (and ROCm's, which torch calls by the same name): compute capability, builds, memory it takes.

It knows `torch.cuda` and what NVIDIA's cards take; what any accelerator can be asked is in `device`, and the driver's
call that pins host memory in `pins`.
"""

from __future__ import annotations

import torch

CONTEXT_BYTES = 512 << 20
"""Device bytes of one process's context: the driver's tables and stacks, and kernels, loaded when first used.

No counter of torch's has them. Reported were, before any kernel of a training step, 426 MiB on an RTX 6000 Ada (CUDA
13; github.com/unslothai/unsloth-zoo/pull/1053), about 400 MB by a torch engineer's word (pytorch issue 109888) and 274
MiB (pytorch pull 86509). They grow with a card's multiprocessors, of which T4, P100, A100, H100 and GeForce cards up
to the RTX 4090 have no more than that Ada's 142. Not measured here.
"""

WORKSPACE_BYTES = 2 * (32 << 20)
"""Device bytes of matmul workspaces: one for each cuBLAS handle and stream, and there are two handles, that of the
forward's thread and that of autograd's. torch's counters include them.

By torch's aten/src/ATen/cuda/CublasHandlePool.cpp a workspace has 8.1 MiB on P100, T4, A100, RTX 30 and 40, and 32 MiB
on compute capability 9 (H100, H200), in newer torch on 10 to 12 (B200, RTX 50), and on ROCm. AMD's gfx942 and gfx950
take 128 MiB, and hipBLASLt 76 MiB more on each: a budget there needs that much room beside it.
CUBLAS_WORKSPACE_CONFIG sets another size.
"""


def has_bfloat16(device: torch.device) -> bool:
    """Whether a card has bf16 arithmetic: from compute capability 8.0 on.

    `torch.cuda.is_bf16_supported()` says yes to a T4 as well, where bf16 is emulated and ten times slower.
    """
    return capability(device) >= (8, 0)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability, as in (8, 9)."""
    return torch.cuda.get_device_capability(device)


def architectures() -> tuple[str, ...]:
    """Cards this torch has kernels for: sm_80, compute_90 and so on."""
    return tuple(torch.cuda.get_arch_list())


def why_absent() -> str:
    """Why a torch built for CUDA sees no card, in its own words; empty where it says nothing."""
    if torch.version.cuda is None:
        return ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().partition("\n")[0]
    return ""
