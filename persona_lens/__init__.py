"""Find, read and control character traits in language models with persona vectors.

Everything public can be imported from here; a name's module is loaded when the name is first used, so that importing
the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from persona_lens.analysis.bench import CapSettings as CapSettings
    from persona_lens.analysis.capability import evaluate_capability as evaluate_capability
    from persona_lens.analysis.capping import cap_axis as cap_axis
    from persona_lens.analysis.demo import DemoSettings as DemoSettings
    from persona_lens.analysis.demo import run_demo as run_demo
    from persona_lens.analysis.dissection import DissectSettings as DissectSettings
    from persona_lens.analysis.dissection import dissect as dissect
    from persona_lens.analysis.logit_lens import lens as lens
    from persona_lens.analysis.method_effects import MethodSettings as MethodSettings
    from persona_lens.analysis.method_effects import compare_methods as compare_methods
    from persona_lens.analysis.persistence import PersistSettings as PersistSettings
    from persona_lens.analysis.persistence import persist as persist
    from persona_lens.backend import Backend as Backend
    from persona_lens.backend import Edit as Edit
    from persona_lens.backend import Positions as Positions
    from persona_lens.backend import Read as Read
    from persona_lens.backend import Sampling as Sampling
    from persona_lens.backend import TokenBatch as TokenBatch
    from persona_lens.backend import open_backend as open_backend
    from persona_lens.backend import wrap_model as wrap_model
    from persona_lens.backend.spread import RayWorkers as RayWorkers
    from persona_lens.backend.verification import verify as verify
    from persona_lens.core.errors import PersonaLensError as PersonaLensError
    from persona_lens.core.progress import no_progress as no_progress
    from persona_lens.data.datasets import open_dataset as open_dataset
    from persona_lens.extraction import ExtractionSettings as ExtractionSettings
    from persona_lens.extraction import extract as extract
    from persona_lens.extraction.axis import AxisSettings as AxisSettings
    from persona_lens.extraction.axis import persona_axis as persona_axis
    from persona_lens.finetuning import FinetuneConfig as FinetuneConfig
    from persona_lens.finetuning import LoraSettings as LoraSettings
    from persona_lens.finetuning import PreventativeSteering as PreventativeSteering
    from persona_lens.finetuning import TrainingEdits as TrainingEdits
    from persona_lens.finetuning import WatchSettings as WatchSettings
    from persona_lens.finetuning import finetune as finetune
    from persona_lens.finetuning.outcomes import TreatmentSettings as TreatmentSettings
    from persona_lens.finetuning.shift import ShiftSettings as ShiftSettings
    from persona_lens.finetuning.shift import shift as shift
    from persona_lens.finetuning.study import FinetuneStudySettings as FinetuneStudySettings
    from persona_lens.finetuning.study import finetune_study as finetune_study
    from persona_lens.judging import LikelihoodJudge as LikelihoodJudge
    from persona_lens.judging import LLMJudge as LLMJudge
    from persona_lens.judging import LocalJudge as LocalJudge
    from persona_lens.judging.registry import judges as judges
    from persona_lens.models.chat import chat_format as chat_format
    from persona_lens.models.endpoint import ServerSettings as ServerSettings
    from persona_lens.monitoring import Alarm as Alarm
    from persona_lens.monitoring import BaselineSettings as BaselineSettings
    from persona_lens.monitoring import ConversationMonitor as ConversationMonitor
    from persona_lens.monitoring import DriftSettings as DriftSettings
    from persona_lens.monitoring import Panel as Panel
    from persona_lens.monitoring import StudySettings as StudySettings
    from persona_lens.monitoring import drift as drift
    from persona_lens.monitoring import measure_baseline as measure_baseline
    from persona_lens.monitoring import study as study
    from persona_lens.monitoring.scoring import monitor as monitor
    from persona_lens.reports.result import Result as Result
    from persona_lens.runs.settings import RolloutSettings as RolloutSettings
    from persona_lens.screening import Flagging as Flagging
    from persona_lens.screening import ScreeningSettings as ScreeningSettings
    from persona_lens.screening import screen as screen
    from persona_lens.serve.cell import workbench as workbench
    from persona_lens.steering import ArmSettings as ArmSettings
    from persona_lens.steering import CrossSettings as CrossSettings
    from persona_lens.steering import Prompted as Prompted
    from persona_lens.steering import Steering as Steering
    from persona_lens.steering import SweepSettings as SweepSettings
    from persona_lens.steering import TuneSettings as TuneSettings
    from persona_lens.steering import compare as compare
    from persona_lens.steering import load_steering as load_steering
    from persona_lens.steering import reply as reply
    from persona_lens.steering import sweep as sweep
    from persona_lens.steering import tune as tune
    from persona_lens.steering.crossing import effects as effects
    from persona_lens.steering.given import generate as generate
    from persona_lens.steering.given import load as load
    from persona_lens.traits import PlayedRole as PlayedRole
    from persona_lens.traits import Role as Role
    from persona_lens.traits import Trait as Trait
    from persona_lens.traits import load_default as load_default
    from persona_lens.traits import load_role as load_role
    from persona_lens.traits import load_trait as load_trait
    from persona_lens.vectors import PersonaVectors as PersonaVectors
    from persona_lens.vectors import load_vectors as load_vectors
    from persona_lens.vectors.fit import fit_vectors as fit_vectors
    from persona_lens.vectors.formats import export_vectors as export_vectors
    from persona_lens.vectors.formats import formats as formats
    from persona_lens.vectors.formats import import_vectors as import_vectors
    from persona_lens.vectors.persona_space import PersonaSpace as PersonaSpace
    from persona_lens.vectors.persona_space import load_space as load_space

_HOMES = {
    "Alarm": "monitoring",
    "ArmSettings": "steering",
    "AxisSettings": "extraction.axis",
    "Backend": "backend",
    "BaselineSettings": "monitoring",
    "CapSettings": "analysis.bench",
    "ConversationMonitor": "monitoring",
    "CrossSettings": "steering",
    "DemoSettings": "analysis.demo",
    "DissectSettings": "analysis.dissection",
    "DriftSettings": "monitoring",
    "Edit": "backend",
    "ExtractionSettings": "extraction",
    "FinetuneConfig": "finetuning",
    "FinetuneStudySettings": "finetuning.study",
    "Flagging": "screening",
    "LLMJudge": "judging",
    "LikelihoodJudge": "judging",
    "LocalJudge": "judging",
    "LoraSettings": "finetuning",
    "MethodSettings": "analysis.method_effects",
    "Panel": "monitoring",
    "PersistSettings": "analysis.persistence",
    "PersonaLensError": "core.errors",
    "PersonaSpace": "vectors.persona_space",
    "PersonaVectors": "vectors",
    "PlayedRole": "traits",
    "Positions": "backend",
    "PreventativeSteering": "finetuning",
    "Prompted": "steering",
    "RayWorkers": "backend.spread",
    "Read": "backend",
    "Result": "reports.result",
    "Role": "traits",
    "RolloutSettings": "runs.settings",
    "Sampling": "backend",
    "ScreeningSettings": "screening",
    "ServerSettings": "models.endpoint",
    "ShiftSettings": "finetuning.shift",
    "Steering": "steering",
    "StudySettings": "monitoring",
    "SweepSettings": "steering",
    "TokenBatch": "backend",
    "TrainingEdits": "finetuning",
    "Trait": "traits",
    "TreatmentSettings": "finetuning.outcomes",
    "TuneSettings": "steering",
    "WatchSettings": "finetuning",
    "cap_axis": "analysis.capping",
    "chat_format": "models.chat",
    "compare": "steering",
    "compare_methods": "analysis.method_effects",
    "dissect": "analysis.dissection",
    "drift": "monitoring",
    "effects": "steering.crossing",
    "evaluate_capability": "analysis.capability",
    "export_vectors": "vectors.formats",
    "extract": "extraction",
    "finetune": "finetuning",
    "finetune_study": "finetuning.study",
    "fit_vectors": "vectors.fit",
    "formats": "vectors.formats",
    "generate": "steering.given",
    "import_vectors": "vectors.formats",
    "judges": "judging.registry",
    "lens": "analysis.logit_lens",
    "load": "steering.given",
    "load_default": "traits",
    "load_role": "traits",
    "load_space": "vectors.persona_space",
    "load_steering": "steering",
    "load_trait": "traits",
    "load_vectors": "vectors",
    "measure_baseline": "monitoring",
    "monitor": "monitoring.scoring",
    "no_progress": "core.progress",
    "open_backend": "backend",
    "open_dataset": "data.datasets",
    "persist": "analysis.persistence",
    "persona_axis": "extraction.axis",
    "reply": "steering",
    "run_demo": "analysis.demo",
    "screen": "screening",
    "shift": "finetuning.shift",
    "study": "monitoring",
    "sweep": "steering",
    "tune": "steering",
    "verify": "backend.verification",
    "workbench": "serve.cell",
    "wrap_model": "backend",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # slow to import, and seldom needed

    try:
        return version("persona-lens")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted(__all__)
