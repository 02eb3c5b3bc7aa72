"""What a compiled kernel needs of its part, and what that part has."""

import re
import subprocess
import sys
import tempfile

import triton
from triton.runtime.jit import JITFunction

SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}  # bytes a block may use, by capability
TUNED = ("forward_sm90_kernel", "fused_backward_kernel", "near_sums_kernel")  # by measuring; they spill nothing
MEASURED = (*TUNED, "forward_kernel")  # at the head widths of the benchmark, no spills either
MOST_WAITS = 16  # of their code for products of warpgroups: 4 to 8 as written, twice as many a tile if serialised


def resources(kernel) -> dict:
    """Registers, spilled bytes and shared memory of a compiled kernel; how often a tuned one waits for products."""
    is_tuned = kernel.metadata.name in TUNED
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", *["--dump-sass"] * is_tuned, file.name]
        text = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    used = {"registers": int(registers), "stack": int(stack), "shared": kernel.metadata.shared}
    if is_tuned:
        used["waits"] = text.count("WARPGROUP.DEPBAR")
    return {"kernel": kernel.metadata.name, **used}


def complaint(kernel: dict) -> str | None:
    """What the compiler has made of a kernel that should be fast, if it has spilled, or serialised its products."""
    if kernel["stack"]:
        return f"{kernel['kernel']} spills {kernel['stack']} bytes"
    if kernel.get("waits", 0) > MOST_WAITS:
        return f"{kernel['kernel']} waits for products in {kernel['waits']} places"
    return None


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
