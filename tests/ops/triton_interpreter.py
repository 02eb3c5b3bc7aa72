"""Make the interpreter of Triton 3.6 run what the compiler compiles. Used by tests and by benchmarks at toy size."""

import numpy as np
from triton import language as tl
from triton.runtime import interpreter


def mend() -> None:
    """Supply two things that it lacks.

    Loop bounds are arrays of one element, of which numpy 2.4 refuses `int()`; and bf16 numbers, held as their bit
    patterns, are multiplied as such by `tl.dot`.
    """
    patch_tensor, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patch_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    interpreter._patch_lang_tensor = patch_and_index
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
