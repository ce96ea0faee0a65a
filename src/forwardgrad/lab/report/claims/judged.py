"""The claims of the papers, one by one, beside what was measured; none is decided beforehand. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from forwardgrad.lab.report.blocks import Judged, Section, count
from forwardgrad.lab.report.claims import newer
from forwardgrad.lab.report.claims.baydin import BY_BAYDIN
from forwardgrad.lab.report.claims.evidence import CONFIRMED, OPEN, REFUTED, Evidence
from forwardgrad.lab.report.claims.paper import PAPER
from forwardgrad.lab.store import StudyResult

ABOUT = ("table1", "baydin", "noise")  # studies that claims of the paper and of Baydin et al. speak of, and measurements
ABOUT_MEASURED = ("bench.json", "functions.json", "quality.json")
NOTE = (
    "Each claim has its rule, and nothing but the rule and the stored results decides it. Runs that diverged or failed count as infinitely "
    "bad. What is missing, or of one seed where seeds matter, decides nothing, and the command that would is named. Which arm is lower can "
    "be decided by runs that are shorter than the paper's in both arms alike: by how much is said with them."
)


def judge(studies: Sequence[StudyResult], measured: dict[str, dict[str, Any]]) -> tuple[Judged, ...]:
    """Every claim of the paper and of Baydin et al., in the order of their arguments."""
    fullest = {study.family: study for study in sorted(studies, key=_weight)}  # where one is stored several times
    evidence = Evidence(fullest, measured)
    return tuple(decide(evidence) for decide in (*PAPER, *BY_BAYDIN))


def _weight(study: StudyResult) -> tuple[int, int, bool]:
    """How much a record can decide: its arms at full length, then its complete arms. Of two alike the first record counts."""
    complete = [arm for arm in study.arms if arm.complete]
    return sum(not arm.shortened for arm in complete), len(complete), not study.of


def claims_section(studies: Sequence[StudyResult], measured: dict[str, dict[str, Any]]) -> Section | None:
    """The claims as a part of the page, those of newer papers last; of each, where something is stored about it. None where nothing is."""
    about = any(study.family in ABOUT for study in studies) or any(name in measured for name in ABOUT_MEASURED)
    later = newer.fullest(studies)
    found = (*(judge(studies, measured) if about else ()), *(newer.judge(later) if later else ()))
    if not found:
        return None
    return Section("claims", f"The papers' {len(found)} claims, one by one", _counted(found), (NOTE, found))


def _counted(found: Sequence[Judged]) -> str:
    sums = {word: sum(claim.status == word for claim in found) for word in (CONFIRMED, REFUTED, OPEN)}
    are = "is" if sums[CONFIRMED] == 1 else "are"
    return f"Of {count(len(found), 'claim')}, {sums[CONFIRMED]} {are} {CONFIRMED}, {sums[REFUTED]} {REFUTED} and {sums[OPEN]} {OPEN}."
