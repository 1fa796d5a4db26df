"""Look through compiled programs for addresses whose two halves do not belong together.

    python tests/addresses.py [~/.triton/cache …]      # folders of .cubin files, or files

ptxas 12.8, which comes inside Triton 3.6, makes `pointer + (index << s)` of two instructions, LEA
for the lower 32 bits and LEA.HI.X for the upper ones. Where registers are short it may drop the
second one's index and make it again, from the register that the LEA has just overwritten:

    LEA R26, P3, R26, R21, 0x5               R26 is the lower half now
    IMAD.SHL.U32 R21, R26, 0x10, RZ          and should have been the index here
    LEA.HI.X R27, R21, R236, RZ, 0x1, P3

One bit of the pointer then decides whether the address is 4 GiB off. The PTX is right; a change of
the source as small as the width of an offset makes it go away.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[\dT]+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;"
)
REGISTER = re.compile(r"\bU?R\d+\b")
# They have no destination: their first register is read.
STORES = ("ST", "RED", "BAR", "BRA", "EXIT", "SYNCS", "WARP", "UTMA", "DEPBAR", "LDGSTS")


def mixed_addresses(assembly: str) -> Iterator[str]:
    """Yield the addresses of the LEA.HI.X whose index was made of the lower half."""
    # By carry, the lower half that an LEA has made, and what has been made of it since.
    made_of_lower: dict[str, set[str]] = {}
    for line in assembly.splitlines():
        if line.startswith(".L"):
            made_of_lower.clear()
        found = INSTRUCTION.match(line)
        if found is None:
            continue
        at, name, rest = found.groups()
        operands = [x.strip() for x in rest.replace(".reuse", "").split(",")]
        if name.startswith(STORES):
            continue
        read = set(REGISTER.findall(" ".join(operands[1:])))
        if name.startswith(("LEA.HI.X", "ULEA.HI.X")) and operands[1] in made_of_lower.get(
            operands[-1], ()
        ):
            yield at
        for tainted in made_of_lower.values():
            # What is loaded from an address is not made of it.
            if tainted & read and not name.startswith(("LD", "ULD")):
                tainted.add(operands[0])
            else:
                tainted.discard(operands[0])
        for carry in operands[:3]:
            if not re.fullmatch(r"U?[PR]\w+", carry):
                break
            # Whatever sets a predicate: an addition's carry is not an LEA's.
            made_of_lower.pop(carry, None)
        if name in ("LEA", "ULEA") and re.fullmatch(r"U?P\d", operands[1]):
            made_of_lower[operands[1]] = {operands[0]}


def disassemble(program: Path) -> str:
    """Return a program's instructions, by the disassembler that comes inside Triton."""
    # Here, since pytest looks for examples in this file too, also where there is no triton.
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    result = subprocess.run([tool, "-c", program], capture_output=True, text=True, check=True)
    return result.stdout


def look(program: Path) -> tuple[Path, list[str]]:
    return program, list(mixed_addresses(disassemble(program)))


def main(paths: list[str]) -> int:
    programs = [
        program
        for path in map(Path, paths or [os.path.expanduser("~/.triton/cache")])
        for program in (sorted(path.rglob("*.cubin")) if path.is_dir() else [path])
    ]
    wrong = 0
    with ProcessPoolExecutor() as pool:
        for program, places in pool.map(look, programs, chunksize=4):
            wrong += bool(places)
            for place in places:
                print(f"{program}: /*{place}*/", flush=True)
    print(f"{len(programs)} programs, {wrong} of them with addresses of mixed halves")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
