"""The hot paths of the kernels do their work in no more instructions than they did. Needs nvcc and Triton, no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from cuda_emulation import build

from sparc_fast.benchmarks.tools import cuda_resources
from sparc_fast.benchmarks.tools.machine_code import Code

pytest.importorskip("triton")

COUNT = """
import json, pickle, sys
from pathlib import Path
from sparc_fast.benchmarks import cases
from sparc_fast.benchmarks.tools import predictions, step_launches

counted = predictions.instructions(predictions.TRITON, predictions.compiled_triton(cases.A))
compiled_cuda = predictions.compiled_cuda(pickle.loads(Path(sys.argv[1]).read_bytes()))
counted |= predictions.instructions((*predictions.CUDA, *predictions.STAGED), compiled_cuda)
counted |= predictions.step_counts(step_launches.emulated(Path(sys.argv[2])))
print(json.dumps({"counted": counted, "held": json.loads(predictions.BASELINE.read_text()),
                  "compilers": predictions.compilers()}))
"""

CODE = """
        .text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_outer:
        /*0010*/                   ISETP.GE.AND P0, PT, R0, R1, PT ;
        /*0020*/               @P0 BRA `(.L_narrow) ;
        /*0030*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0040*/                   BRA `(.L_sum) ;
.L_narrow:
        /*0050*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0060*/                   LDG.E.U16 R5, desc[UR4][R2.64+0x2] ;
        /*0070*/                   LDG.E R6, desc[UR4][R2.64+0x4] ;
.L_sum:
        /*0080*/                   FFMA R8, R4, R5, R8 ;
        /*0090*/               @P1 BRA `(.L_sum) ;
        /*00a0*/               @P2 BRA `(.L_outer) ;
        /*00b0*/                   STG.E.64 desc[UR4][R2.64], R8 ;
        /*00c0*/                   EXIT ;
.L_end:
        /*00d0*/                   BRA `(.L_end) ;
        /*00e0*/                   NOP ;
"""
BY_ADDRESS = CODE.replace("`(.L_narrow)", "0x50").replace("`(.L_sum)", "0x80").replace("`(.L_outer)", "0x10")


@pytest.mark.parametrize("assembly", [CODE, BY_ADDRESS], ids=["labels", "addresses"])
def test_the_shortest_way_is_the_one_that_does_the_work(assembly: str) -> None:
    code = Code(assembly)
    assert len(code.loop({"FFMA": 1})) == 2
    wide = code.loop({r"LDG.*\.128": 1})
    assert wide.opcodes == ("ISETP.GE.AND", "BRA", "LDG.E.128", "BRA", "FFMA", "BRA", "BRA")
    narrow = code.loop({"U16": 2})
    assert dict(narrow.accesses) == {"LDG 2": 2, "LDG 4": 1}
    whole = code.whole({"LDG": 1})
    assert whole.opcodes == ("S2R", *wide.opcodes, "STG.E.64", "EXIT")
    assert dict(whole.accesses) == {"LDG 16": 1, "STG 8": 1}
    with pytest.raises(LookupError, match="no loop holds"):
        code.loop({"U16": 2, "128": 1})
    with pytest.raises(LookupError, match="no way through holds"):
        code.whole({"HMMA": 1})


@pytest.mark.compilers
@pytest.mark.skipif(cuda_resources.nvcc() is None, reason="no nvcc")
@pytest.mark.skipif(build.COMPILER is None, reason="no g++")
def test_no_hot_path_takes_more_instructions_than_it_did(machine_code: Path, cuda: ModuleType) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", COUNT, str(machine_code), str(Path(cuda._cuda.__file__).parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    held = found["held"]["instructions"]
    assert set(found["counted"]) == set(held)
    same = found["compilers"] == found["held"]["compilers"]
    slack = 1.0 if same else 1.2  # another compiler may choose other instructions
    risen = {name: (held[name], now) for name, now in found["counted"].items() if now > slack * held[name]}
    assert not risen, f"instructions for a unit of work, before and now: {risen}"
