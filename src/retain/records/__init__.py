"""What a study writes of its runs, and the report reads: one set of classes for both.

    StudyRecord  ``study.json``, schema ``retain.study/1``: a study with its runs
    RunRecord    ``runs/KEY.json``, schema ``retain.run/1``: one run, what was done and came of it
    RunSpec      ``config`` of a run: all that its result depends on, data files and versions aside
    EvalRecord   ``result.json`` of ``retain eval``, schema ``retain.result/2``

Fields that a class does not know are kept, so that a record survives being read and written, and a
file of a newer version opens; what was not measured is null. `Part.plain` gives the fields that
were set and no others, so a `RunSpec` is the same text again, and has the same key.
"""

from __future__ import annotations

from retain.records.answers import (
    CERTIFICATE_SCHEMA,
    AnswerGroup,
    AnswersRecord,
    CertificateRecord,
    SkillRecord,
)
from retain.records.evals import (
    RESULT_SCHEMA,
    Between,
    EvalAdapter,
    EvalAnswer,
    EvalData,
    EvalItem,
    EvalRecord,
    EvalScore,
)
from retain.records.parts import (
    Hardware,
    Interval,
    Listed,
    Measure,
    Part,
    Step,
    bits_of,
    digest_of,
    finite,
    flags_of,
)
from retain.records.studies import (
    RUN_SCHEMA,
    STUDY_SCHEMA,
    Claim,
    General,
    Generation,
    Parameters,
    Retention,
    RunAdapter,
    RunData,
    RunEvaluation,
    RunGeneral,
    RunMethod,
    RunOrder,
    RunRecord,
    RunSource,
    RunSpec,
    RunTraining,
    Seconds,
    Sizes,
    Skipped,
    StudyRecord,
)

__all__ = [
    "CERTIFICATE_SCHEMA", "RESULT_SCHEMA", "RUN_SCHEMA", "STUDY_SCHEMA", "AnswerGroup",
    "AnswersRecord", "Between", "CertificateRecord", "Claim", "EvalAdapter", "EvalAnswer",
    "EvalData", "EvalItem", "EvalRecord", "EvalScore", "General", "Generation", "Hardware",
    "Interval", "Listed", "Measure", "Parameters", "Part", "Retention", "RunAdapter", "RunData",
    "RunEvaluation", "RunGeneral", "RunMethod", "RunOrder", "RunRecord", "RunSource", "RunSpec",
    "RunTraining", "Seconds", "Sizes", "SkillRecord", "Skipped", "Step", "StudyRecord", "bits_of",
    "digest_of", "finite", "flags_of",
]  # fmt: skip
