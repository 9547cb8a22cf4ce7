"""How unusable data is reported: every reason at once, each with file, problem and remedy."""

from collections.abc import Sequence
from dataclasses import dataclass

MAX_LISTED = 20  # issues printed in full; the rest is counted


@dataclass(frozen=True)
class DataIssue:
    """One reason why a data set cannot be used.

    Attributes:
        file: the file or folder that is wrong.
        problem: what is wrong, naming the entry where there is one.
        remedy: what the user can do about it.
    """

    file: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}\n      -> {self.remedy}"


class DatasetError(ValueError):
    """A data set that cannot be trained or evaluated on; `issues` lists every reason found."""

    def __init__(self, issues: Sequence[DataIssue]) -> None:
        self.issues = list(issues)
        super().__init__(self.issues)

    def __str__(self) -> str:
        shown = [f"  {i}. {c}" for i, c in enumerate(self.issues[:MAX_LISTED], start=1)]
        if len(self.issues) > MAX_LISTED:
            shown.append(f"  ... and {len(self.issues) - MAX_LISTED} more")
        return "the data set cannot be used:\n" + "\n".join(shown)
