"""``persona-lens roles``: list, read, check and begin role files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from persona_lens.cli import options
from persona_lens.cli.authoring import AuthorOptions, author_file
from persona_lens.cli.definitions import begin, check_all, list_all, show_file
from persona_lens.cli.display import say, say_json
from persona_lens.cli.settings import Option, argument

CHECKED = argument("[ROLE]...", "Names, or paths of YAML files; every role if none.")
DEFAULT_FILE = argument("[FILE]", "One of your own; the built-in one if none.")
RolesDirs = Annotated[
    list[Path] | None,
    Option("Another folder of role files; it comes before all others. Repeatable, the last one wins.", metavar="DIR"),
]


def list_roles(roles_dir: RolesDirs = None, as_json: options.AsJson = False) -> None:
    """List the roles within reach and where each one comes from.

    From far to near: built in, installed packages, your own folder (`PERSONA_LENS_ROLES_DIR` moves it),
    `./roles`, and each `--roles-dir`. The nearest definition of a name wins.

    Example: `persona-lens roles list --roles-dir my-roles`
    """
    from persona_lens.traits.role import ROLES

    list_all(ROLES, roles_dir, "tags", lambda role: ", ".join(role.tags), as_json)


def show(role: options.RoleName, roles_dir: RolesDirs = None, as_json: options.AsJson = False) -> None:
    """Show a role: its five system prompts, and the grades by which its judge goes.

    Example: `persona-lens roles show pirate`
    """
    from persona_lens.traits.rendering import role_page
    from persona_lens.traits.role import ROLES

    show_file(options.find_file(ROLES, role, roles_dir), role_page, as_json)


def path(role: options.RoleName, roles_dir: RolesDirs = None) -> None:
    """Print the path of the file that defines a role.

    Example: `cp "$(persona-lens roles path pirate)" my-roles/`
    """
    from persona_lens.traits.role import ROLES

    say(options.find_file(ROLES, role, roles_dir).path)


def check(
    roles: Annotated[list[str] | None, CHECKED] = None,
    roles_dir: RolesDirs = None,
    strict: bool = False,
    as_json: options.AsJson = False,
) -> None:
    """Check role files, and say in which line to change what.

    The exit code is 1 if there are errors.

    Example: `persona-lens roles check my-roles/innkeeper.yaml --strict`

    Args:
        strict: Treat warnings as errors.
    """
    from persona_lens.traits import check_role
    from persona_lens.traits.role import ROLES

    check_all(ROLES, roles, roles_dir, check_role, strict, as_json)


def new(
    name: Annotated[str, argument("NAME", "The new role's name, such as innkeeper.")],
    description: str = "",
    folder: Annotated[Path, Option(names=("--dir",), metavar="DIR")] = Path("roles"),
    *,
    authored: AuthorOptions,
    dry_run: Annotated[bool, Option("Only say how many requests it would take.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Begin a role file, NAME.yaml: a commented template, or what an author model writes.

    An author model needs a description. Every reply is checked, and what is missing or weak is asked for again. A run
    that fails or is stopped leaves NAME.partial.json behind, and the same command goes on from it.

    Example: `persona-lens roles new innkeeper --description "Keeps an inn on a mountain road." --dir my-roles`

    Args:
        description: Who that is.
        folder: The folder to write to.
    """
    if authored.author_model is not None:
        from persona_lens.traits.generate import CASTING

        author_file(CASTING, name, description, folder, authored, dry_run, as_json)
        return
    authored.refuse_without_model("role", dry_run)
    from persona_lens.traits import role_template
    from persona_lens.traits.role import ROLES

    begin(ROLES, name, role_template(name, description), folder, as_json)


def default(file: Annotated[Path | None, DEFAULT_FILE] = None, as_json: options.AsJson = False) -> None:
    """Show the default Assistant: the neutral system prompts, and the questions that all roles are asked.

    A file of your own is checked: `format_version`, four `system_prompts`, at least two `questions`.

    Example: `persona-lens roles default`
    """
    from persona_lens.traits import load_default
    from persona_lens.traits.rendering import default_page
    from persona_lens.traits.role import default_file

    place, content = str(file or default_file()), load_default(file)
    if as_json:
        say_json({"path": place, "content_hash": content.content_hash(), **content.model_dump(mode="json")}, indent=2)
    else:
        say(default_page(content, place))


def schema() -> None:
    """Print the JSON Schema of role files, with which an editor completes and checks them.

    Example: `persona-lens roles schema > role.schema.json`
    """
    from persona_lens.traits import json_schema
    from persona_lens.traits.role import ROLES

    say_json(json_schema(ROLES), indent=2)
