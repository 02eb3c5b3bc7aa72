"""What a compiled kernel needs of its part, and what that part has."""

import re
import subprocess
import sys
import tempfile

import triton
from triton.runtime.jit import JITFunction

SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}  # bytes a block may use, by capability
# bytes a thread that the tuned kernels spill all the same; may only shrink
KNOWN_SPILLS = {"forward_sm90_kernel": 0, "fused_backward_kernel": 0, "near_sums_kernel": 0}


def resources(kernel) -> dict:
    """Registers, spilled bytes and shared memory of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    used = {"registers": int(registers), "stack": int(stack), "shared": kernel.metadata.shared}
    return {"kernel": kernel.metadata.name, **used}


def kernel_functions() -> list[JITFunction]:
    """Every Triton function of `fat5.model` that is imported, kernels and what they call."""
    modules = [module for name, module in sys.modules.items() if name.startswith("fat5.model.")]
    functions = {id(x): x for module in modules for x in vars(module).values() if isinstance(x, JITFunction)}
    return list(functions.values())


def compiled_so_far() -> list[dict]:
    """Resources of every kernel of `fat5.model` that this process has compiled or loaded, each variant once."""
    return [
        resources(kernel)
        for function in kernel_functions()
        for kernels, *_ in function.device_caches.values()
        for kernel in kernels.values()
    ]
