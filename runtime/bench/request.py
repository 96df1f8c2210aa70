"""What ``bench`` is asked for, checked before anything runs: hours may hang on a name.

Turns a ``Request`` into a ``Job``, one ``Spec`` per case. Runs nothing and measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import UserError, option
from ..formats.layout import ModelLayout
from ..formats.open import read_layout
from ..history import routing_path
from ..options import Options
from ..sizes import parse_size
from ..system import check_writable
from . import cgroup, plot
from .cases import Case, cases_of, memory_for_all, parse_caps, parse_rows, row_of, timeline_row_of
from .cgroup import DiskLimit, Limits
from .spec import Spec

# Options that bench does not ask for: rows and caps say three, stock lacks the others.
NO_OPTIONS = ("memory", "policy", "repack", "experts_used", "device")


@dataclass(frozen=True)
class Request:
    """Everything ``bench`` can be told; of its options those in ``NO_OPTIONS`` do not matter."""

    model: Path
    caps: str  # of every limited row, separated by commas
    options: Options = field(default_factory=Options)
    rows: str = "stock-mmap,stock-resident,load-on-demand,lru,lfu"
    repeat: int = 3  # runs of each row
    n_predict: int = 64  # decoded tokens per run
    prompt_tokens: int = 64
    n_ctx: int = 1024  # 0: the model's own
    n_threads: int | None = None
    server: str | None = None  # llama-cpp-python's examples/server/server.py, for its rows
    disk_bw: str | None = None  # a size: what every row may read per second
    json_file: str | None = None
    plot_file: str | None = None
    layers_file: str | None = None  # a plot of hits and recall by layer
    timeline_file: str | None = None
    timeline_row: str | None = None

    @property
    def files(self) -> list[Path]:
        """What is to be written."""
        named = (self.json_file, self.plot_file, self.layers_file, self.timeline_file)
        return [Path(file) for file in named if file is not None]


@dataclass(frozen=True)
class Job:
    """A request that can work."""

    request: Request  # its context length is a number of tokens
    caps: list[int]
    specs: dict[Case, Spec]  # in the order of a round
    forms: dict[str, ModelLayout]  # by row
    layout: ModelLayout  # of MODEL
    disk_limit: DiskLimit | None

    @property
    def files(self) -> list[Path]:
        """Of every form of the model."""
        return list(dict.fromkeys(file for form in self.forms.values() for file in form.files))


def check(request: Request) -> Job:
    """UserError for what cannot work: names, sizes, files that cannot be written."""
    paths = {
        name: Path(form or request.model).absolute()
        for name, form in parse_rows(request.rows).items()
    }
    caps = parse_caps(request.caps)
    _check_numbers(request)
    _check_rows(request, paths)
    for file in request.files:
        check_writable(file)
    if request.plot_file is not None or request.layers_file is not None:
        plot.require()
    timeline_row = (
        None
        if request.timeline_file is None
        else timeline_row_of(request.timeline_row, list(paths))
    )
    layout = read_layout(request.model)
    read = {path: read_layout(path) for path in dict.fromkeys(paths.values())}
    forms = {name: read[path] for name, path in paths.items()}
    request = replace(request, n_ctx=request.n_ctx or layout.n_ctx_train)
    _check_context(request)
    specs = {}
    for case in cases_of(list(paths), caps):
        drawn = case.name == timeline_row and case.cap in (caps[0], None)
        spec = _spec(request, case, paths[case.name], forms[case.name])
        if drawn and request.timeline_file is not None:
            spec = replace(spec, timeline=str(Path(request.timeline_file).absolute()))
        specs[case] = spec
    job = Job(request, caps, specs, forms, layout, None)
    return replace(job, disk_limit=_disk_limit(request.disk_bw, job.files))


def _check_numbers(request: Request) -> None:
    if min(request.repeat, request.n_predict, request.prompt_tokens) < 1:
        names = option("repeat"), option("n_predict"), option("prompt_tokens")
        raise UserError("{}, {} and {} must be at least 1".format(*names))


def _check_context(request: Request) -> None:
    if request.prompt_tokens + request.n_predict > request.n_ctx:
        raise UserError(
            f"{request.prompt_tokens} prompt tokens and {request.n_predict} decoded ones do not "
            f"fit a context of {request.n_ctx}: raise {option('n_ctx')}"
        )


def _check_rows(request: Request, paths: dict[str, Path]) -> None:
    options = request.options
    if any(row_of(name).low for name in paths) != bool(options.losses()):
        lossy = " and ".join(option(n) for n in options.lossless() if n not in NO_OPTIONS)
        raise UserError(
            f"{lossy} are for rows that end in +low, like lru+low: give both such a row and one "
            "of the options, or neither"
        )
    if any(row_of(name).server for name in paths) != (request.server is not None):
        raise UserError(
            f"{option('server')} names the file of llama-cpp-python's example server for the row "
            "stock-server: give both, or neither"
        )
    if request.server is not None and not Path(request.server).is_file():
        raise UserError(f"{request.server} is not there: it is part of the source distribution")
    for name, path in paths.items():
        if row_of(name).policy is None and path.is_dir():
            raise UserError(
                f"{name}: stock llama.cpp does not open bundles; name a GGUF behind an @"
            )
    if options.warm and not (statistics_file := routing_path(request.model)).exists():
        raise UserError(
            f"{statistics_file} does not exist: moe-gguf trace --save-routing makes it for "
            f"{option('warm')}"
        )


def _spec(request: Request, case: Case, path: Path, layout: ModelLayout) -> Spec:
    row, options = row_of(case.name), request.options
    return Spec(
        model=str(path),
        n_predict=request.n_predict,
        prompt_tokens=request.prompt_tokens,
        n_ctx=request.n_ctx,
        n_threads=request.n_threads,
        options=replace(
            options,
            # A group's cells come on top of the experts, and are as many as its tokens.
            memory=case.cap or ("auto" if row.sequences else memory_for_all(layout)),
            policy=row.policy or options.policy,
            repack="on" if row.repack else "off",
            **({} if row.low else options.lossless()),
        ),
        stock=row.policy is None,
        mmap=row.mmap,
        repack=row.repack,
        fill=not row.capped,
        sequences=row.sequences,
        way=row.way,
        whole=row.whole,
        server=str(Path(request.server).absolute()) if row.server and request.server else None,
    )


def _disk_limit(disk_bw: str | None, files: Sequence[Path]) -> DiskLimit | None:
    """The limit asked for, tried out: a run at another speed than the table says is worthless."""
    if disk_bw is None:
        return None
    speed = parse_size(disk_bw.removesuffix("/s"), "a disk speed")
    try:
        limit = DiskLimit(cgroup.disks_of(files), speed)
    except OSError as error:
        raise UserError(f"{option('disk_bw')} cannot be kept to ({error}): leave it out") from None
    if reason := cgroup.refusal(Limits(disk=limit)):
        raise UserError(
            f"{option('disk_bw')} cannot be kept to (no disk cgroup can be made: {reason}): run as "
            "root, or leave it out"
        )
    return limit
