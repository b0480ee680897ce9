"""`lema kaggle`: notebooks to Kaggle, and what they leave behind back.

Each verb is its options, one or two calls, and what is said meanwhile.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lema.cli.paths import expands_paths
from lema.errors import KaggleError

from .options import (
    Accelerator,
    Attach,
    Benchmarks,
    Dataset,
    Hours,
    Internet,
    Kernel,
    Name,
    Output,
    Parameters,
    Public,
    ResumeFrom,
    Title,
    User,
)

if TYPE_CHECKING:
    from ..client import Kernels, Pushed

kaggle = typer.Typer(no_args_is_help=True)


@kaggle.callback()
def _kaggle() -> None:
    """Run training on Kaggle's cards: build a notebook, push it, wait, fetch what it made.

    Credentials: KAGGLE_API_TOKEN, ~/.kaggle/access_token or kaggle.json.

    Example: lema kaggle run proof
    """


@kaggle.command()
@expands_paths
def build(
    notebook: Name,
    output: Output = None,
    user: User = None,
    title: Title = None,
    accelerator: Accelerator = None,
    hours: Hours = None,
    resume_from: ResumeFrom = None,
    attach: Attach = None,
    dataset: Dataset = None,
    public: Public = False,
    internet: Internet = True,
    parameters: Parameters = None,
    benchmarks: Benchmarks = None,
) -> None:
    """Write a notebook that carries this version of LEMA, and its kernel-metadata.json.

    Example: lema kaggle build proof --user NAME -o kaggle/proof
    """
    from ..folder import Order, build

    order = Order(
        notebook, user or _kernels(None).user, title, accelerator or _accelerator(), hours, resume_from, attach or (),
        dataset or (), not public, internet, _parameters(parameters), benchmarks,
    )  # fmt: skip
    folder = output or Path("kaggle") / notebook
    path = build(order, folder)
    typer.echo(f"{path}: {path.stat().st_size:,} bytes\nnext: lema kaggle push {folder}")


@kaggle.command()
@expands_paths
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What build wrote.", show_default=False)],
    accelerator: Accelerator = None,
    user: User = None,
) -> None:
    """Save the notebook on Kaggle and run it there. Refused where no GPU time is left this week.

    Example: lema kaggle push kaggle/proof
    """
    pushed = _push(_kernels(user), folder, accelerator, user)
    typer.echo(f"next: lema kaggle status {pushed.ref}")


@kaggle.command()
@expands_paths
def status(
    kernel: Annotated[str | None, typer.Argument(metavar="KERNEL", show_default=False)] = None,
    once: Annotated[bool, typer.Option("--once", help="Say where it is now, do not wait.")] = False,
    quota: Annotated[bool, typer.Option("--quota", help="The GPU time left this week.")] = False,
    user: User = None,
) -> None:
    """Wait until a kernel has ended, looking less and less often; status 1 if it did not end well.

    Example: lema kaggle status NAME/lema-proof
    """
    from ..watch import check_end, wait_for_end

    kernels = _kernels(user)
    if quota:
        typer.echo(_quota_text(kernels))
    if kernel is None:
        if not quota:
            raise typer.BadParameter("give a kernel, or --quota", param_hint="KERNEL")
        return
    ref = kernels.ref(kernel)
    if once:
        found = kernels.status(ref)
        typer.echo(f"{ref}: {found.state.lower().replace('_', ' ')}{f' ({found.failure})' if found.failure else ''}")
        if found.ended:
            check_end(kernels, ref, found)
        return
    check_end(kernels, ref, wait_for_end(kernels, ref, say=typer.echo))
    typer.echo(f"next: lema kaggle pull {ref}")


@kaggle.command()
@expands_paths
def logs(
    kernel: Kernel,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the kernel has ended.")] = False,
    user: User = None,
) -> None:
    """What a kernel printed.

    Example: lema kaggle logs NAME/lema-proof --follow
    """
    from ..watch import check_end, follow_log

    kernels = _kernels(user)
    ref = kernels.ref(kernel)
    if follow:
        check_end(kernels, ref, follow_log(kernels, ref, lambda text: typer.echo(text, nl=False)))
    else:
        typer.echo(kernels.log(ref), nl=False)


@kaggle.command()
@expands_paths
def pull(
    kernel: Kernel,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="Default: the slug.")] = None,
    only: Annotated[str | None, typer.Option(metavar="REGEX", help="Files whose names contain it.")] = None,
    any_state: Annotated[
        bool, typer.Option("--any-state", help="Also of a kernel that failed, was cancelled or still runs.")
    ] = False,
    user: User = None,
) -> None:
    """Fetch what a kernel left behind. Stopped, it goes on where it was when called again.

    Example: lema kaggle pull NAME/lema-proof -o proof
    """
    from ..watch import check_end

    kernels = _kernels(user)
    ref = kernels.ref(kernel)
    if not any_state:
        check_end(kernels, ref, kernels.status(ref))
    _pull(kernels, ref, output or Path(ref.split("/")[1]), only)


@kaggle.command()
@expands_paths
def run(
    notebook: Name,
    output: Output = None,
    user: User = None,
    title: Title = None,
    accelerator: Accelerator = None,
    hours: Hours = None,
    resume_from: ResumeFrom = None,
    attach: Attach = None,
    dataset: Dataset = None,
    public: Public = False,
    internet: Internet = True,
    parameters: Parameters = None,
    benchmarks: Benchmarks = None,
    parts: Annotated[
        int, typer.Option(min=1, help="Kernels in a row at most, each going on where the one before had to stop.")
    ] = 1,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show the log while it runs.")] = False,
) -> None:
    """Build, push, wait, pull; and, where training had to stop before its end, go on in a further kernel.

    Example: lema kaggle run llama2 --parts 3
    """
    from ..folder import Order, build, next_title
    from ..watch import check_end, follow_log, wait_for_end, wait_for_start

    kernels = _kernels(user)
    folder = output or Path("kaggle") / notebook
    given = _given(output, user, accelerator, hours, attach, dataset, public, internet, parameters, benchmarks)
    for part in range(1, parts + 1):
        order = Order(
            notebook, kernels.user, title, accelerator or _accelerator(), hours, resume_from, attach or (),
            dataset or (), not public, internet, _parameters(parameters), benchmarks,
        )  # fmt: skip
        build(order, folder)
        ref = _push(kernels, folder, None).ref
        if follow:
            wait_for_start(kernels, ref)
            follow_log(kernels, ref, lambda text: typer.echo(text, nl=False))
        check_end(kernels, ref, wait_for_end(kernels, ref, pushed=not follow, say=typer.echo))
        target = folder / "output"
        if resume_from is not None:
            target = folder / f"output-{ref.split('/')[1]}"
        if _pull(kernels, ref, target, None) != "stopped":
            return
        resume_from = ref
        title = title and next_title(title, ref)
        if part < parts:
            typer.echo(f"training stopped before its end, part {part + 1} of at most {parts} goes on")
    again = ["lema", "kaggle", "run", notebook, "--resume-from", ref, *(["--title", title] if title else []), *given]
    typer.echo(f"training stopped before its end. Go on with:\n  {shlex.join(again)}")


# -- parts of verbs --------------------------------------------------------------------------------


def _kernels(user: str | None) -> Kernels:
    from .. import credentials
    from ..client import Kernels
    from ..retry_policy import RetryPolicy

    retry_policy = RetryPolicy(say=lambda text: typer.echo(text, err=True))
    if user is not None:
        credentials.check_user(user, "--user")
    return Kernels(credentials.find(), retry_policy, user)


def _given(
    output: Path | None, user: str | None, accelerator: str | None, hours: float | None, attach: list[str] | None,
    dataset: list[str] | None, public: bool, internet: bool, parameters: list[str] | None, benchmarks: Path | None,
) -> list[str]:  # fmt: skip
    """The options of `run` as they were given, for a command that does the same again."""
    single = {"-o": output, "--user": user, "--accelerator": accelerator, "--hours": hours, "--benchmarks": benchmarks}
    several = {"--kernel": attach, "--dataset": dataset, "--set": parameters}
    words = [word for name, value in single.items() if value is not None for word in (name, str(value))]
    words += [word for name, values in several.items() for value in values or () for word in (name, value)]
    return [*words, *(["--public"] if public else []), *([] if internet else ["--no-internet"])]


def _push(kernels: Kernels, folder: Path, accelerator: str | None, user: str | None = None) -> Pushed:
    from ..folder import read
    from ..metadata import CPU, check_accelerator

    described, source, seconds = read(folder)
    if user is not None and user != described["id"].partition("/")[0]:
        raise KaggleError(f"{folder} was built for {described['id']}: build it again with --user {user}")
    if accelerator is not None:
        check_accelerator(accelerator)
        described |= {
            "machine_shape": None if accelerator == CPU else accelerator,
            "enable_gpu": accelerator != CPU,
        }
    if described["enable_gpu"]:
        quota = kernels.quota()
        if quota is not None and not quota.left:
            raise KaggleError(f"{_quota_text(kernels)}. Wait, or push with --accelerator none")
    pushed = kernels.push(described, source, seconds)
    version = "" if pushed.version is None else f", version {pushed.version}"
    ends = "" if seconds is None else f"; ended by Kaggle after {seconds / 3600:.1f} h at the latest"
    typer.echo(f"{pushed.ref}{version}: {described['machine_shape'] or 'CPU'}{ends}\n{pushed.url}")
    return pushed


def _pull(kernels: Kernels, ref: str, folder: Path, only: str | None) -> str | None:
    """Fetch, say what came and what to do with it; returns how the notebook says its training ended."""
    import json

    from ..download import pull

    pull(kernels, ref, folder, only, say=typer.echo)
    adapter, result = folder / "adapter", folder / "result.json"
    if (adapter / "adapter_config.json").is_file():
        quoted = shlex.quote(str(adapter))
        typer.echo(f"adapter: {adapter}\nnext:\n  lema chat {quoted}\n  lema merge {quoted} merged")
    return str(json.loads(result.read_text(encoding="utf-8")).get("status")) if result.is_file() else None


def _quota_text(kernels: Kernels) -> str:
    quota = kernels.quota()
    if quota is None:
        return "Kaggle does not say how much GPU time is left"
    left, allowed = (time.total_seconds() / 3600 for time in (quota.left, quota.allowed))
    renewed = "" if quota.renewed is None else f", more on {quota.renewed:%Y-%m-%d %H:%M} UTC"
    return f"GPU time left this week: {left:.1f} of {allowed:.0f} hours{renewed}"


def _accelerator() -> str:
    from ..metadata import ACCELERATOR

    return ACCELERATOR


def _parameters(pairs: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE as texts by name; the notebook says of what type they are."""
    found: dict[str, Any] = {}
    for pair in pairs or ():
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{pair!r} must be NAME=VALUE", param_hint="--set")
        found[name.strip().upper()] = text
    return found
