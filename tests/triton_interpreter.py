"""Make the interpreter of Triton 3.6 run what the compiler compiles. Used by tests and by benchmarks at toy size."""

import numpy as np
from triton import language as tl
from triton.runtime import interpreter


def mend() -> None:
    """Supply three things that it lacks.

    Loop bounds are arrays of one element, of which numpy 2.4 refuses `int()`; bf16 numbers, held as their bit
    patterns, are multiplied as such by `tl.dot`; and fp32 becomes bf16 by cutting off, where the hardware rounds.
    """
    patch_tensor, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patch_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    convert = interpreter._convert_float

    def convert_rounding(data, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        bits = np.ascontiguousarray(data).view(np.uint32)
        rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    interpreter._patch_lang_tensor = patch_and_index
    interpreter._convert_float = convert_rounding
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
