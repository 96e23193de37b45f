"""What every executor of inversions can do, and the one that does them itself."""

from __future__ import annotations

from concurrent.futures import Future
from types import TracebackType
from typing import Protocol, Self

from smi_fed.executors.job import InversionJob, Show, invert_stored
from smi_fed.pipeline import InversionRecord


class WorkerDiedError(RuntimeError):
    """The process or machine that did a job ended before the job did, twice."""


class Executor(Protocol):
    """Does inversions, one or several side by side, to the same images. A context manager, which closes it."""

    def submit(self, job: InversionJob, show: Show) -> Future[InversionRecord]:
        """Hand over a job, which may have to wait for others.

        Args:
            show: called with the progress now and then, maybe from another thread; never after the future is done.

        Returns:
            What the inversion took, once its images are on this machine's disk; or what `invert_stored` raised, or
            `WorkerDiedError`.
        """
        ...

    def close(self) -> None:
        """End at once what is in work, and every process that was started; its checkpoints stay."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None: ...


class Closing:
    """The context manager of an executor."""

    def close(self) -> None:
        """See `Executor`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


class Here(Closing):
    """Does each job in this process, before `submit` returns."""

    def submit(self, job: InversionJob, show: Show) -> Future[InversionRecord]:
        """See `Executor`."""
        done: Future[InversionRecord] = Future()
        try:
            done.set_result(invert_stored(job, show))
        except Exception as error:  # Ctrl-C ends the caller, not the job
            done.set_exception(error)
        return done
