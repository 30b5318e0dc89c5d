"""Traits and roles: what a YAML file says about a character trait or a role, and where such files are found.

A trait is added by dropping a file called NAME.yaml into one of the folders that `find_traits` searches, or
by installing a package with an entry point in the group ``persona_lens.traits``; a role likewise (`find_roles`). No
model is needed here: importing this package loads neither torch nor transformers.

Example:
    >>> from persona_lens.traits import Arm, load_trait
    >>> load_trait("evil").adjective(Arm.POSITIVE)
    'evil'
"""

from __future__ import annotations

from persona_lens.traits.checks import Advice, Report, check_deeply, check_file, check_role, check_trait
from persona_lens.traits.discovery import (
    USER_FOLDER_VARIABLE,
    Catalogue,
    DefinitionFile,
    SourceKind,
    TraitFile,
    file_at,
    find_traits,
    is_path,
    load_trait,
    resolve_trait,
    user_folder,
)
from persona_lens.traits.parsing import parse_trait, read_trait
from persona_lens.traits.problems import DefinitionError, Problem, RoleError, Severity, TraitError
from persona_lens.traits.rendering import role_template, trait_template
from persona_lens.traits.role import DefaultAssistant, PlayedRole, Role, find_roles, load_default, load_role
from persona_lens.traits.schema import Arm, Trait, json_schema

__all__ = [
    "USER_FOLDER_VARIABLE",
    "Advice",
    "Arm",
    "Catalogue",
    "DefaultAssistant",
    "DefinitionError",
    "DefinitionFile",
    "PlayedRole",
    "Problem",
    "Report",
    "Role",
    "RoleError",
    "Severity",
    "SourceKind",
    "Trait",
    "TraitError",
    "TraitFile",
    "check_deeply",
    "check_file",
    "check_role",
    "check_trait",
    "file_at",
    "find_roles",
    "find_traits",
    "is_path",
    "json_schema",
    "load_default",
    "load_role",
    "load_trait",
    "parse_trait",
    "read_trait",
    "resolve_trait",
    "role_template",
    "trait_template",
    "user_folder",
]
