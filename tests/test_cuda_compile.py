"""What the compiler made of the GPU kernels: registers, spills and the instructions that they are written for.

Every source in kernels/cuda is compiled for all GPUs that the project names; ptxas reports, and the machine code is
disassembled. None of it runs. `python tests/test_cuda_compile.py` prints the table.
"""

import concurrent.futures
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
ARCHS = ("80", "89", "90a", "100a", "120")
SOURCES = sorted((KERNELS / "cuda").glob("*.cu"))
# For sm_90a alone, as CMakeLists.txt has it: wgmma's instructions are in no other.
HOPPER = sorted([*(KERNELS / "cuda").glob("lut_wgmma_*.cu"), *(KERNELS / "cuda").glob("lut_mma_bulk_*.cu")])
MICRO = KERNELS / "benchmarks" / "gpu" / "micro.cu"
# A model's every step; the others run at load, or write more than they compute.
HOT = ("lut_mma", "lut_mma_bulk", "lut_wgmma")
# Sums, x, codes and lookups under way take all but a dozen of the registers there (setmaxnreg's 112): nvcc 13.0 stores
# some of the others, nearly all of them where a tile is done. Within the loop a warp reads at most so many an item, the
# addresses of its codes, its x and its scales in a stage (each would be three to ten instructions to compute again),
# and stores none; and the loop is at most so long where a block has one group.
FULL = re.compile(r"lut_mma_bulk<(?P<bits>[234]), (true|false), (?P<fine>true|false), BulkTile<(?P<tokens>16|32)>>")
FULL_STACK, FULL_LOADS = 40, 3  # bytes, and instructions of the loop
FULL_LOOP = {("2", "16"): 200, ("2", "32"): 160, ("3", "16"): 320, ("3", "32"): 235, ("4", "16"): 265, ("4", "32"): 205}
# Where wgmma is serialised or setmaxnreg ignored, ptxas says "info : (C7510) Potential Performance Loss" and the like.
WARNING = re.compile(r"warning|error|\(C\d+\)|performance", re.IGNORECASE)
REGISTERS = 65536  # of a multiprocessor, CUDA C++ Programming Guide, "Technical specifications per compute capability"
REGISTER_UNIT = 256  # a warp's registers are allocated in units of so many, same table


class Kernel(NamedTuple):
    """A kernel's entry in ptxas's report; ``name`` is demangled, without arguments."""

    name: str
    arch: str
    registers: int
    stack: int
    spills: int
    shared: int


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cuobjdump() -> str | None:
    """cuobjdump of the CUDA toolkit, or the one in triton's package."""
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    spec = importlib.util.find_spec("triton")
    if not found and spec:
        inside = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(inside) if inside.exists() else None
    return found


def demangle(names: list[str]) -> list[str]:
    """Kernels' names with their template arguments, without namespaces and parameters."""
    done = subprocess.run(
        ["c++filt", "--no-params"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    short = (
        re.sub(r"\(anonymous namespace\)::|flute::(cuda::)?|^void ", "", line) for line in done.stdout.splitlines()
    )
    return [name.replace("> >", ">>") for name in short]


class Compiled:
    """A source's kernels for some archs: ptxas's report and warnings, and the file that cuobjdump reads."""

    def __init__(self, source: Path, archs: tuple[str, ...], folder: Path):
        self.source, self.file = source, folder / f"{source.stem}.fatbin"
        command = [
            nvcc(),
            "-std=c++17",
            "-O3",
            "-DNDEBUG",
            f"-I{KERNELS / 'include'}",
            f"-I{source.parent}",
            "-DFLUTE_SM90A",
        ]
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        command += ["-Xptxas=-v", "-fatbin", "-o", str(self.file), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        self.code, self.output = done.returncode, done.stdout + done.stderr
        self.warnings = [line for line in self.output.splitlines() if WARNING.search(line)]
        self.kernels = self._report()

    def _report(self) -> list[Kernel]:
        entry = re.compile(
            r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'.*?"
            r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
            r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
            re.DOTALL,
        )
        found = list(entry.finditer(self.output))
        kernels = []
        for match, name in zip(found, demangle([match["name"] for match in found]), strict=True):
            shared = re.search(r"(\d+) bytes smem", match["rest"])
            numbers = int(match["registers"]), int(match["stack"]), int(match["stores"]) + int(match["loads"])
            kernels.append(Kernel(name, match["arch"], *numbers, int(shared[1]) if shared else 0))
        return kernels

    def entries(self) -> int:
        return self.output.count("Compiling entry function")

    def code_of(self, tool: str) -> dict[tuple[str, str], list[str]]:
        """{(kernel, arch): the instructions of its machine code, in order}."""
        instruction = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)")
        return self._dumped(tool, "-sass", re.compile(r"\s*Function : (\w+)"), instruction)

    def threads_of(self, tool: str) -> dict[tuple[str, str], int]:
        """{(kernel, arch): the most threads of a block}, which __launch_bounds__ says."""
        found = self._dumped(
            tool, "-elf", re.compile(r"\.nv\.info\.(_Z\w+)"), re.compile(r"\s*(?:Attribute|Value):\t(.*\S)")
        )
        threads = {}
        for key, words in found.items():
            if "EIATTR_MAX_THREADS" in words:
                sizes = words[words.index("EIATTR_MAX_THREADS") + 1].split()
                threads[key] = math.prod(int(size, 16) for size in sizes)
        return threads

    def _dumped(self, tool: str, what: str, kernel: re.Pattern, word: re.Pattern) -> dict[tuple[str, str], list[str]]:
        """{(kernel, arch): what ``word`` matches behind the kernel's heading} of one of cuobjdump's dumps."""
        found: dict[tuple[str, str], list[str]] = {}
        arch, words = "", []
        with subprocess.Popen([tool, what, str(self.file)], stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if match := re.match(r"arch = sm_(\w+)", line):
                    arch = match[1]
                elif match := kernel.match(line):
                    words = found[match[1], arch] = []
                elif match := word.match(line):
                    words.append(match[1])
        assert process.returncode == 0, f"cuobjdump {what} failed on {self.file}"
        names = demangle([name for name, _ in found])
        return {(name, arch): words for name, ((_, arch), words) in zip(names, found.items(), strict=True)}


def compile_all(folder: Path) -> dict[str, Compiled]:
    """Every source, two at a time, by the source's name."""
    work = [(source, ("90a",) if source in HOPPER else ARCHS) for source in SOURCES] + [(MICRO, ("90a",))]
    work.sort(key=lambda item: -item[0].stat().st_size)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda item: Compiled(*item, folder), work)
    return {each.source.stem: each for each in done}


def table(kernels: list[Kernel]) -> str:
    rows = [("kernel", "arch", "registers", "stack", "spills", "shared"), *sorted(kernels)]
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(Kernel._fields))]
    cells = [[str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in cells)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, Compiled]:
    if not nvcc():
        pytest.skip("needs nvcc, of NVIDIA's CUDA toolkit")
    return compile_all(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="module")
def kernels(compiled) -> list[Kernel]:
    """Of the package: those of the microbenchmarks are not served."""
    return [kernel for stem, each in compiled.items() if stem != MICRO.stem for kernel in each.kernels]


@pytest.fixture(scope="module")
def tool() -> str:
    found = cuobjdump()
    if not found:
        pytest.skip("needs cuobjdump: it is in NVIDIA's CUDA toolkit and in triton's package")
    return found


@pytest.fixture(scope="module")
def listing(compiled, tool) -> dict[tuple[str, str], list[str]]:
    return {key: instructions for each in compiled.values() for key, instructions in each.code_of(tool).items()}


@pytest.fixture(scope="module")
def code(listing) -> dict[tuple[str, str], Counter]:
    """{(kernel, arch): how often each instruction is in its machine code}."""
    return {key: Counter(instructions) for key, instructions in listing.items()}


def of(code: dict[tuple[str, str], Counter], kernel: str) -> dict[tuple[str, str], Counter]:
    found = {key: count for key, count in code.items() if re.match(rf"{kernel}\b", key[0])}
    assert found, f"no kernel {kernel} among {sorted({name for name, _ in code})}"
    return found


def any_of(count: Counter, *prefixes: str) -> int:
    return sum(times for name, times in count.items() if name.startswith(prefixes))


def test_every_source_compiles_without_a_warning(compiled):
    failed = {stem: each.output[-2000:] for stem, each in compiled.items() if each.code}
    assert not failed
    assert not {stem: each.warnings for stem, each in compiled.items() if each.warnings}


def test_every_kernel_is_compiled_for_every_gpu(compiled, kernels):
    assert all(len(each.kernels) == each.entries() for each in compiled.values())
    found = {arch: {kernel.name for kernel in kernels if kernel.arch == arch} for arch in ARCHS}
    everywhere = found["80"]
    # Two types, three widths, three tiles of tokens.
    assert sum(name.startswith("lut_mma<") for name in everywhere) == 18
    for arch in ARCHS:
        hopper = {name for name in found[arch] if name.startswith(("lut_wgmma<", "lut_mma_bulk<"))}
        assert found[arch] - hopper == everywhere and bool(hopper) == (arch == "90a")
    # Two types, three widths, groups within a block or not; and tiles of tokens, some in two heights.
    tiles = Counter(re.search(r"(Wgmma|Bulk)Tile<[\d, ]+>", name)[0] for name in found["90a"] - everywhere)
    bulk = [f"BulkTile<{tokens}>" for tokens in (8, 16, 32)]
    wgmma = [f"WgmmaTile<{tokens}, {strips}>" for tokens in (16, 32, 64, 128) for strips in (2, 4)]
    assert tiles == dict.fromkeys([*bulk, *wgmma], 12)


def test_hot_kernels_neither_spill_nor_have_a_stack(kernels):
    hot = [kernel for kernel in kernels if kernel.name.startswith(HOT)]
    full = [kernel for kernel in hot if FULL.fullmatch(kernel.name)]
    bad = [kernel for kernel in hot if kernel not in full and (kernel.spills or kernel.stack)]
    bad += [kernel for kernel in full if kernel.stack > FULL_STACK]
    assert len(full) == 24 and not bad, "\n" + table(bad)


def test_registers_leave_room_for_a_block(compiled, kernels, tool):
    """The registers of as many threads as a launch may have fit into a multiprocessor."""
    threads = {key: count for each in compiled.values() for key, count in each.threads_of(tool).items()}
    for kernel in kernels:
        of_warp = -(-kernel.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
        assert of_warp * threads[kernel.name, kernel.arch] // 32 <= REGISTERS, "\n" + table([kernel])


def test_mma_kernels_load_16_bytes_and_use_tensor_cores(code):
    for key, count in of(code, "lut_mma").items():
        assert any_of(count, "HMMA.16816"), key
        assert any_of(count, "LDGSTS.E.BYPASS.128", "LDGSTS.E.128", "LDG.E.128"), (key, count)
        assert any_of(count, "LDSM.16.M88"), (key, count)


def test_bulk_kernels_use_the_copy_engine_and_tensor_cores(code):
    for key, count in of(code, "lut_mma_bulk").items():
        assert any_of(count, "HMMA.16816") and any_of(count, "LDSM.16.M88"), (key, count)
        assert any_of(count, "UTMALDG") and any_of(count, "UBLKCP"), (key, count)
        assert any_of(count, "USETMAXREG") and not any_of(count, "HGMMA", "LDGSTS"), (key, count)


def test_wgmma_kernels_use_the_copy_engine_and_wgmma(code):
    for key, count in of(code, "lut_wgmma").items():
        assert any_of(count, "HGMMA"), key
        assert any_of(count, "UTMALDG") and any_of(count, "UBLKCP"), (key, count)
        assert any_of(count, "USETMAXREG") and not any_of(count, "HMMA"), key


def main_loop(instructions: list[str]) -> list[str]:
    """From the wait for a stage to its release, which enclose all products."""
    products = [i for i, name in enumerate(instructions) if name.startswith("HMMA")]
    begin = max(i for i in range(products[0]) if instructions[i].startswith("SYNCS.PHASECHK"))
    end = min(i for i in range(products[-1], len(instructions)) if instructions[i].startswith("SYNCS.ARRIVE"))
    return instructions[begin:end]


def test_hot_kernels_have_no_local_memory_in_their_code(code, listing):
    for kernel in HOT:
        for key, count in of(code, kernel).items():
            if full := FULL.fullmatch(key[0]):
                loop = main_loop(listing[key])
                count = Counter(loop)
                assert full["fine"] == "true" or len(loop) <= FULL_LOOP[full["bits"], full["tokens"]], (key, len(loop))
                # Units x steps x times 8 tokens: 4 x 4 x 2, or 2 x 4 x 4.
                assert any_of(count, "HMMA") == 32, (key, count)
                assert any_of(count, "LDL") <= FULL_LOADS and not any_of(count, "STL"), (key, count)
            else:
                assert not any_of(count, "LDL", "STL"), (key, count)


# What is in the loop of each microbenchmark, and how often: kOps of micro.cu.
MICRO_LOOPS = {
    "Prmt": ("PRMT", 64),
    "Lop3": ("LOP3.LUT", 64),
    "Shf": ("SHF", 64),
    "Shfl": ("SHFL.BFLY", 64),
    "Hmul2": (("HMUL2", "HFMA2"), 64),
    "Mma": ("HMMA.16816.F32.BF16", 64),
    "Ldmatrix": ("LDSM.16.M88.4", 64),
    "Table<1, 32>": ("LDS", 64),
    "Table<2, 16>": ("LDS.64", 64),
    "Table<4, 8>": ("LDS.128", 64),
    "Decode<4, 256, 1>": ("PRMT", 64),
    "Decode<2, 128, 1>": ("LDS.64", 32),
}


def test_microbenchmarks_are_what_they_are_called(compiled, code):
    """The compiler neither folded nor dropped what is to be measured: a loop has it as often as it was written."""
    for name, (instructions, times) in MICRO_LOOPS.items():
        found = next(count for (kernel, _), count in code.items() if kernel == f"rate<{name}>")
        prefixes = (instructions,) if isinstance(instructions, str) else instructions
        extra = any_of(found, *prefixes) - times  # outside of the loop, some to address the results
        assert 0 <= extra <= 16, (name, found)
    assert not any(kernel.spills for kernel in compiled[MICRO.stem].kernels)


if __name__ == "__main__":
    if not nvcc():
        sys.exit("needs nvcc, of NVIDIA's CUDA toolkit")
    os.nice(5)
    with tempfile.TemporaryDirectory() as folder:
        results = compile_all(Path(folder))
    print(table([kernel for each in results.values() for kernel in each.kernels]))
    for each in results.values():
        print("\n".join(each.warnings), end="")
    sys.exit(any(each.code for each in results.values()))
