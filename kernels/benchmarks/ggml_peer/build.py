"""Builds libggml_peer.so, ggml's CPU kernels as a peer of `vllm-flute bench kernels`, outside the repository.

    python kernels/benchmarks/ggml_peer/build.py --into DIR                        # llama.cpp
    python kernels/benchmarks/ggml_peer/build.py --into DIR --sources vlut.cpp     # a checkout of Vec-LUT's authors
    vllm-flute bench kernels --peer ggml=DIR/ggml/libggml_peer.so --peer vlut=DIR/vlut/libggml_peer.so

llama.cpp's sources are those inside the source distribution of llama-cpp-python, which pip downloads. They get one
cure: gcc 12 drops the stores of the AMX tile configuration before it is loaded, and the first tile instruction faults.
Compiled for the CPU of this machine (GGML_NATIVE), with ggml's own threads in place of OpenMP. `--llama` also builds
llama.cpp's llama-server, llama-batched-bench, llama-bench and llama-quantize, from the same sources, cured alike.

vlut.cpp (github.com/Cipherxzc/vlut.cpp, 2cfd9b3) is built as it is. At that commit its results are wrong for more than
32 tokens, for inputs whose largest value is negative, and for I1 types where K is not a multiple of 20; its speed is
not affected, and the benchmark shows which results are wrong.
"""

import argparse
import os
import subprocess
import sys
import tarfile
from pathlib import Path

PACKAGE = "llama-cpp-python==0.3.36"
COMMIT = "0c1e570"  # of llama.cpp, in that package
HERE = Path(__file__).resolve().parent
LOAD, BARRIER = "    _tile_loadconfig(&tc);", '    asm volatile("" :: "r"(&tc) : "memory");\n'
TOOLS = ("llama-server", "llama-batched-bench", "llama-bench", "llama-quantize")


def run(*command) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True)


def download(into: Path) -> Path:
    """llama.cpp's folder, unpacked and cured."""
    found = sorted(into.glob("llama_cpp_python-*/vendor/llama.cpp"))
    if not found:
        into.mkdir(parents=True, exist_ok=True)
        options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        run(sys.executable, "-m", "pip", "download", *options, "-d", into, PACKAGE)
        with tarfile.open(next(into.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(into, filter="data")
        found = sorted(into.glob("llama_cpp_python-*/vendor/llama.cpp"))
    source = found[-1] / "ggml/src/ggml-cpu/amx/mmq.cpp"
    text = source.read_text()
    if BARRIER not in text:
        source.write_text(text.replace(LOAD, BARRIER + LOAD))
    return found[-1]


def has_avx512() -> bool:
    path = Path("/proc/cpuinfo")
    return path.exists() and "avx512bw" in path.read_text()


def configure(source: Path, build: Path, *options: str) -> None:
    generator = ["-G", "Ninja"] if subprocess.run(["ninja", "--version"], capture_output=True).returncode == 0 else []
    run("cmake", "-S", source, "-B", build, *generator, "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", *options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--into", type=Path, required=True, help="folder of downloads and builds, outside the repository"
    )
    parser.add_argument("--sources", type=Path, help="a checkout to build in place of llama.cpp's")
    parser.add_argument("--llama", action="store_true", help="also build llama.cpp's server, benchmarks and quantizer")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    sources = (args.sources or download(args.into / "src")).resolve()
    vlut = (sources / "ggml/src/ggml-quants-vlut.c").exists()
    if vlut:
        name, words = "vlut", "vlut.cpp 2cfd9b3"
        definitions = ["TABLE_ENTRY_SIZE=32", "WEIGHT_UNROLL_BLOCK=16", *(["VLUT_AVX512"] if has_avx512() else [])]
    else:
        name, definitions = "ggml", []
        words = "sources of " + sources.name if args.sources else f"llama.cpp {COMMIT} ({PACKAGE}), AMX cure"
    compiler = subprocess.run(["c++", "-dumpfullversion"], capture_output=True, text=True).stdout.strip()
    build = (args.into / name).resolve()
    configure(
        HERE,
        build,
        f"-DPEER_GGML={sources / 'ggml'}",
        f"-DPEER_DESCRIPTION={words}, native, c++ {compiler}",
        f"-DPEER_DEFINITIONS={';'.join(definitions)}",
    )
    run("cmake", "--build", build, "--target", "ggml_peer", "--parallel", args.jobs)
    print(build / "libggml_peer.so")
    if args.llama and not vlut:
        build = (args.into / "llama").resolve()
        options = ["-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF"]
        configure(sources, build, "-DBUILD_SHARED_LIBS=OFF", *options)
        run("cmake", "--build", build, "--target", *TOOLS, "--parallel", args.jobs)
        print(build / "bin")


if __name__ == "__main__":
    main()
