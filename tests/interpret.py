"""Run a test file as a script under Triton's interpreter, without three of its detours.

Together they are more than half of the processor time of such files, and change nothing of what
kernels see:

- A function that a kernel calls has the language patched once more, over what the kernel's launch
  has patched already.
- Sums, differences and products of 32-bit integers are made in 64 bits as well, and compared; of
  tiny cases none gets that far.
- An exclusive or over many entries goes through them one by one, in Python.
"""

import dataclasses
import functools
import runpy
import sys
from pathlib import Path

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def take_no_detours() -> None:
    """Replace them in Triton's interpreter."""
    patch_lang, reduce = interpreter._patch_lang, interpreter.ReduceOps.generic_reduce

    @functools.cache
    def languages(function):
        seen = [id(x) for x in function.__globals__.values()]
        return [language for language in (tl, tl.core) if id(language) in seen]

    def patch_once(function):
        if any(tl.core.is_builtin(language.load) for language in languages(function)):
            return patch_lang(function)
        return interpreter._LangPatchScope()

    def reduce_at_once(self, tensors):
        if self.combine_fn is not tl.standard._xor_combine or self.axis is None:
            return reduce(self, tensors)
        (x,) = tensors
        result = np.bitwise_xor.reduce(x.handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(result, x.dtype)

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang = patch_once
    interpreter.ReduceOps.generic_reduce = reduce_at_once


if __name__ == "__main__":
    file = sys.argv[1]
    sys.path[0] = str(Path(file).parent)
    take_no_detours()
    runpy.run_path(file, run_name="__main__")
