"""The stages, in order: what each runs, within which limits. Their limits make up the budget."""

from __future__ import annotations

from dataclasses import dataclass

#: Bits of the exit status.
ENVIRONMENT, BUILD, TESTS, SANITIZER, PROFILE, BENCHMARK, USAGE = 1, 2, 4, 8, 16, 32, 64
#: Seconds for everything that runs by default.
BUDGET = 470


@dataclass(frozen=True)
class Options:
    """Options of the command line for the stages.

    Attributes:
        python: the interpreter of every program.
        out: folder of results.
        wheels: folder of wheels to install first, or "".
        tests: pytest's -k expression for the device tests; None: the one of their list.
        seconds: per workload of a benchmark.
        workloads: of the benchmarks; empty: a default of each.
    """

    python: str
    out: str
    wheels: str = ""
    tests: str | None = None
    seconds: float = 2.0
    workloads: tuple[str, ...] = ()


@dataclass(frozen=True)
class Command:
    """One program.

    Attributes:
        name: key of its results.
        argv: program and arguments; the runner adds ``--out FILE`` if it reports.
        limit: seconds.
        log: file in the results folder that its output is appended to.
        reports: it writes JSON to a file that it is given.
    """

    name: str
    argv: tuple[str, ...]
    limit: float
    log: str = "checks.log"
    reports: bool = True


@dataclass(frozen=True)
class Stage:
    """Programs that run one after the other, whether or not the earlier ones succeed.

    Attributes:
        bit: of the exit status, set if one of them fails.
        by_default: whether it runs without being named; the others have limits of their own.
    """

    name: str
    bit: int
    commands: tuple[Command, ...]
    by_default: bool = True

    @property
    def limit(self) -> float:
        return sum(command.limit for command in self.commands)


PEER_WORKLOADS = ("pair-32k", "class-1m")
PROFILED = ("pair-32k", "class-1m", "partial-fc-1m")


def stages(options: Options) -> tuple[Stage, ...]:
    """All of them; see ``bench/gpu_check.sh --help`` for what they are for."""

    def module(name: str, limit: float, *arguments: str, **other: str) -> Command:
        key = other.pop("key", name.rpartition(".")[2])
        return Command(key, (options.python, "-m", name, *arguments), limit, **other)

    def own(name: str, limit: float, *arguments: str, **other: str) -> Command:
        return module(f"{__package__}.{name}", limit, *arguments, **other)

    seconds = ("--seconds", f"{options.seconds:g}")
    wheels = ("--wheels", options.wheels) if options.wheels else ()
    expression = () if options.tests is None else ("-k", options.tests)
    return (
        Stage(
            "env",
            ENVIRONMENT,
            (
                Command("nvidia-smi", ("nvidia-smi",), 10, "environment.txt", reports=False),
                Command("nvcc", ("nvcc", "--version"), 5, "environment.txt", reports=False),
                own("environment", 20, log="environment.txt"),
            ),
        ),
        Stage("build", BUILD, (own("build", 80, *wheels, log="build.log"),)),
        Stage("compile", BUILD, (own("compile_kernels", 75),)),
        Stage("cases", TESTS, (module("bench.gpu_small_cases", 40, "--jobs", "8", key="cases"),)),
        Stage("host", PROFILE, (own("host", 45),)),
        Stage(
            "profile",
            PROFILE,
            (
                own("rates", 15),
                module("bench.gpu_profile", 25, *PROFILED, key="profile"),
                own("alternatives", 25),
                own("counters", 30),
            ),
        ),
        Stage(
            "peers",
            BENCHMARK,
            (own("peers", 30, *seconds, *(options.workloads or PEER_WORKLOADS)),),
        ),
        # Last, with whatever the stages before it have left of the budget.
        Stage("tests", TESTS, (own("device_tests", 70, *expression, log="tests.log"),)),
        Stage(
            "bench",
            BENCHMARK,
            (
                Command(
                    "heads",
                    (
                        *(options.python, "-m", "bench.heads", "--device", "cuda", "--rounds", "5"),
                        *("--out", f"{options.out}/heads-cuda", "head-400k", "head-400k-sampled"),
                    ),
                    100,
                    reports=False,
                ),
                Command(
                    "bench",
                    (
                        *(options.python, "-m", "bench", "--device", "cuda", *seconds),
                        *("--out", f"{options.out}/cuda", *options.workloads),
                    ),
                    370,
                    reports=False,
                ),
            ),
            by_default=False,
        ),
        Stage(
            "sanitize",
            SANITIZER,
            (
                # Without caching, an access out of bounds is not hidden inside a cached block.
                _sanitizer(options.python, "memcheck", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"),
                _sanitizer(options.python, "racecheck"),
            ),
            by_default=False,
        ),
    )


def _sanitizer(python: str, tool: str, *environment: str) -> Command:
    api = ("--report-api-errors", "no") if tool == "memcheck" else ()
    return Command(
        tool,
        (
            *(("env", *environment) if environment else ()),
            *("compute-sanitizer", "--tool", tool, *api, "--print-limit", "20"),
            *("--error-exitcode", "9", "--target-processes", "application-only"),
            *(python, "-m", "bench.gpu_small_cases", "--dtypes", "bfloat16"),
        ),
        230,
        "sanitize.log",
        reports=False,
    )
