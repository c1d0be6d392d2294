"""Compiles the Triton kernels for an H200, which needs none, and prints what becomes of each.

TRITON_INTERPRET=0 python tests/model/compile_kernels.py
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from w2v2.model import kernels

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
LOW, FULL, INT = "*bf16", "*fp32", "i32"


def variants(D: int, F: int):
    """(name, kernel, elements a program takes at once, arguments: types, or values that are compiled in)."""
    tile = dict(N=INT, D=F, ROWS=kernels.ROWS, COLUMNS=kernels.COLUMNS)
    for bias in (FULL, None):
        forward = dict(x_ptr=LOW, bias_ptr=bias, out_ptr=LOW)
        backward = forward | dict(d_out_ptr=LOW, d_x_ptr=LOW, sums_ptr=bias, STEPS=kernels.STEPS)
        elements, name = kernels.ROWS * kernels.COLUMNS, f"gelu{' with bias' if bias else ''}"
        yield f"{name}, forward", kernels._gelu_forward, elements, forward | tile
        yield f"{name}, backward", kernels._gelu_backward, elements, backward | tile
    row = dict(seed_ptr="*i64", scale="fp32", LEAST=round(0.1 * 2**32), D=D, BLOCK=triton.next_power_of_2(D))
    for name, wide, d_sum, normed in (
        ("post-norm", LOW, None, LOW),
        ("pre-norm", FULL, FULL, LOW),
        ("no norm", FULL, FULL, None),
    ):
        norm = dict.fromkeys(("weight_ptr", "offset_ptr", "stats_ptr"), normed and FULL)
        forward = norm | dict(x_ptr=LOW, bias_ptr=FULL, residual_ptr=wide, sum_ptr=wide, normed_ptr=normed, eps="fp32")
        backward = norm | dict(d_sum_ptr=d_sum, d_normed_ptr=normed, sum_ptr=wide, sums_ptr=FULL, N=INT, num_rows=INT)
        backward |= dict(d_residual_ptr=normed and wide, d_x_ptr=LOW)
        yield f"{name}, forward", kernels._add_forward, D, forward | row
        yield f"{name}, backward", kernels._add_backward, D, backward | row


def compile_kernel(kernel, arguments: dict) -> tuple[int, str]:
    """Number of machine instructions, and the resources' line."""
    names = kernel.arg_names
    signature = {n: arguments[n] if isinstance(arguments[n], str) else "constexpr" for n in names}
    constants = {(i,): arguments[n] for i, n in enumerate(names) if signature[n] == "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, GPUTarget("cuda", 90, 32), dict(num_warps=kernels.WARPS))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        code, usage = (
            subprocess.run([TOOL, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-sass", "-res-usage")
        )
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!.*NOP)", code, re.MULTILINE)
    return len(instructions), re.search(r"REG:.*", usage)[0]


def main() -> None:
    for D in map(int, sys.argv[1:]):
        for name, kernel, elements, arguments in variants(D, 4 * D):
            count, usage = compile_kernel(kernel, arguments)
            per_element = count * kernels.WARPS * 32 / elements
            print(f"{D}, {name}: {count} instructions, {per_element:.1f} an element; {usage}", flush=True)


if __name__ == "__main__":
    main()
