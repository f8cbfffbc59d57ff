"""What the GPU kernels compile to, for every target, without a GPU: registers, spills, shared memory, tensor cores.

Ends with an error if a variant does not compile, a hot one spills registers or leaves the tensor cores idle, or one
takes more shared memory than its target has. `--quick` looks at the hot variants alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.gpu.launches import SHARED_LIMITS, TARGETS, Binary, compiled, recorded
from benchmarks.gpu.variants import Variant, variants

RESULTS = Path(__file__).parents[1] / "results" / "gpu_kernels.json"


@dataclass(frozen=True, slots=True)
class Line:
    """One kernel of one variant on one target."""

    variant: str
    target: str
    hot: bool
    binary: Binary

    @property
    def fault(self) -> str | None:
        """Why it must not stay so."""
        if self.binary.shared > (limit := SHARED_LIMITS[self.target]):
            return f"takes {self.binary.shared} bytes of shared memory; there are {limit}"
        if self.hot and self.binary.spills:
            return f"is hot and spills {self.binary.spills} registers"
        return None


def lines(chosen: Iterable[Variant], targets: Sequence[str]) -> Iterator[Line]:
    """Every kernel that the variants launch, compiled. Raises what the compiler raises."""
    for variant in chosen:
        for target in targets:
            with recorded() as launches:
                variant.call(target)
            for launch in launches:
                yield Line(variant.name, target, variant.hot, compiled(launch, target))


def show(found: Iterable[Line]) -> None:
    """Print the table."""
    table = Table("variant", "kernel", "target", "registers", "spills", "shared", "tensor cores")
    for line in found:
        binary = line.binary
        products = ", ".join(f"{count} {name}" for name, count in binary.products.items())
        numbers = (str(n) for n in (binary.registers, binary.spills, binary.shared))
        table.add_row(line.variant + " *" * line.hot, binary.kernel, line.target, *numbers, products)
    Console(width=150).print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print, keep; 1 if something must not stay so."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.gpu.compiled", description=__doc__)
    options.add_argument("--quick", action="store_true", help="the hot variants alone, nothing is kept")
    options.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    args = options.parse_args(argv)
    found = list(lines((v for v in variants() if v.hot or not args.quick), args.targets))
    show(found)
    if not args.quick:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps([asdict(line) for line in found], indent=1) + "\n")
    faults = [f"{line.variant}: {line.binary.kernel} on {line.target} {line.fault}" for line in found if line.fault]
    if faults:
        print("\n".join(faults), file=sys.stderr)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
