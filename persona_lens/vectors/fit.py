"""`fit_vectors`: a trait's directions made anew, by another method, of what a finished extraction saved.

Nothing is generated and no model is opened. Other traits can be kept out: erased from the activations before the method
sees them, or projected out of the direction that it gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from persona_lens.backend.registry import installed_version
from persona_lens.core.plugins import install_command
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.vectors.diagnosis import SEPARATION
from persona_lens.vectors.diagnostics import LayerDiagnostics, rounded
from persona_lens.vectors.erasure import PACKAGE, eraser
from persona_lens.vectors.methods import DIFFERENCE, METHODS, FitError, Method
from persona_lens.vectors.provenance import FOUND_OF_IT, inherited
from persona_lens.vectors.samples import Array, RunSamples, Samples, read_samples
from persona_lens.vectors.separation import FOLDS, null_units, separation_row
from persona_lens.vectors.vectors import PROMPT_MEAN, PersonaVectors, load_vectors

EXTRA = "fit"
OF_RESPONSES = ("consistency", "consistency_null", "accessibility", "accessibility_null")
"""Diagnostics that are of the responses alone, and hold of any direction that is made of them."""
Run: TypeAlias = RunSamples | Path | str
Vectors: TypeAlias = PersonaVectors | Path | str


def fit_vectors(
    run: Run,
    method: str = DIFFERENCE,
    *,
    without: Sequence[Vectors] = (),
    erase: Sequence[Run] = (),
    progress: Progress = shown_progress,
) -> PersonaVectors:
    """Make a trait's vectors anew of the responses that an extraction kept.

    Every reduction is made that the run has, and everything in ``without`` and ``erase`` too. What the run's vectors
    carry of judge, trait and counts is kept; under ``fit`` the provenance says what made them. ``separation`` is that
    of the method on questions that it has not seen, of activations as they are, beside random directions.

    Args:
        run: Run folder of an extraction, or what `read_samples` made of it; it is not changed.
        method: Its name; see `persona_lens.vectors.methods.methods`.
        without: Vectors of other traits of the same model, whose directions are projected out at every layer.
        erase: Extractions of other traits from the same model, whose arms are erased from the activations first.
        progress: Told how far the work is.

    Raises:
        FitError: If there is no such method, it cannot be applied, needs what is not installed, or nothing is left.
        RunError: If a run is no finished extraction, or is damaged.
        VectorsError: If vectors cannot be read, or are of another model.
    """
    found = METHODS.find(method)
    _check_installed(f"the method {method}", found.requires, method in METHODS.built_in)
    _check_installed("erasing", (PACKAGE,) if erase else (), ours=True)
    kept_out = tuple(each if isinstance(each, PersonaVectors) else load_vectors(each) for each in without)
    return _Fit(samples_of(run), found, kept_out, tuple(map(samples_of, erase))).vectors(progress)


def maker_of(
    vectors: PersonaVectors, run: RunSamples, others: Sequence[RunSamples], layer: int, reduction: str
) -> Callable[[Samples], Array] | None:
    """What made vectors of a run's responses, to be used on some of the responses alone.

    Args:
        vectors: The run's own, or those that `fit_vectors` made of it.
        run: The run.
        others: Runs whose traits may have been kept out of them.
        layer: Block index, 0-based.
        reduction: Which of what was read.

    Returns:
        From samples at the layer to a vector; None for vectors that were not made of the run.

    Raises:
        FitError: If they were, and it cannot be done again.
    """
    own, made = run.vectors.content_hash, vectors.stored("fit")
    if vectors.content_hash == own:
        return _Fit(run, METHODS.find(DIFFERENCE), (), ())._at(layer, reduction)
    if made.get("vectors_of_the_run") != own:
        return None
    known = {each.vectors.content_hash: each for each in others}
    kept_out = {how: [str(each.get("content_hash")) for each in made.get(how, ())] for how in ("without", "erased")}
    if strange := [each for hashes in kept_out.values() for each in hashes if each not in known]:
        raise FitError(
            f"what was kept out of the vectors of {vectors.trait!r} is of no run that is given ({strange[0]}), so that "
            "they cannot be made anew; give its run too"
        )
    without, erased = (tuple(known[each] for each in kept_out[how]) for how in ("without", "erased"))
    found = METHODS.find(str(made.get("method")))
    return _Fit(run, found, tuple(each.vectors for each in without), erased)._at(layer, reduction)


def samples_of(run: Run) -> RunSamples:
    """A run's responses; they themselves stay."""
    return run if isinstance(run, RunSamples) else read_samples(run)


def _check_installed(what: str, needed: Sequence[str], ours: bool) -> None:
    missing = [name for name in needed if installed_version(name) is None]
    if missing:
        command = install_command(EXTRA) if ours else f"pip install {' '.join(missing)}"
        raise FitError(f"{what} needs {', '.join(missing)}, which is not installed: {command}")


@dataclass(frozen=True, eq=False)
class _Fit:
    """One making of vectors.

    Attributes:
        run: What they are made of.
        method: How.
        without: What is projected out.
        erased: What is erased before.
    """

    run: RunSamples
    method: Method
    without: tuple[PersonaVectors, ...]
    erased: tuple[RunSamples, ...]

    def __post_init__(self) -> None:
        own = self.run.vectors
        for doing, others in (("projected out", self.without), ("erased", self._erased_vectors)):
            for other in others:
                if different := own.model.differences(other.model):
                    raise FitError(
                        f"what is to be {doing}, {other.trait!r}, belongs to another model than {self.run.folder}: "
                        f"{'; '.join(different)}; give what was extracted from the same model"
                    )
                if other.trait == own.trait:
                    raise FitError(
                        f"what is to be {doing} is of {own.trait!r} itself, which would leave nothing of it; give "
                        "other traits"
                    )
        if own.default_reduction not in self.reductions:
            raise FitError(
                f"not all of what is to be kept out has {own.default_reduction} vectors, which are made first of all; "
                "give others"
            )

    @property
    def _erased_vectors(self) -> tuple[PersonaVectors, ...]:
        return tuple(each.vectors for each in self.erased)

    @property
    def reductions(self) -> tuple[str, ...]:
        """Those that everything has; prompt means with and without attention sinks are not the same."""
        own, others = self.run.vectors, (*self.without, *self._erased_vectors)
        alike = all(other.prompt_mean_sinks == own.prompt_mean_sinks for other in others)
        return tuple(
            name
            for name in self.run.reductions
            if all(name in other.directions for other in others) and (alike or name != PROMPT_MEAN)
        )

    def vectors(self, progress: Progress) -> PersonaVectors:
        """Every layer, one in memory at a time."""
        own, label = self.run.vectors, f"{self.method.name} directions"
        shape = own.model.n_layers, own.model.d_model
        rows = {name: np.zeros(shape, dtype=np.float32) for name in self.reductions}
        origin = inherited(own, *self.without)
        seed = own.stored("settings").get("seed")
        nulls = null_units(*shape, seed if isinstance(seed, int) and seed >= -(2**63) else 0)
        separation: list[dict[str, Any] | None] = []
        for layer in range(own.model.n_layers):
            progress(layer, own.model.n_layers, label)
            for name in self.reductions if layer not in origin.get("missing_layers", ()) else ():
                samples, make = self.run.layer(layer, name), self._at(layer, name)
                rows[name][layer] = make(samples)
                if name == own.default_reduction:
                    separation.append(_held_out(layer, samples, make, nulls[:, layer].double().numpy()))
        progress(own.model.n_layers, own.model.n_layers, label)
        kept = {name: value for name, value in own.provenance.items() if name not in FOUND_OF_IT}
        versions = {**own.stored("versions"), **self._versions()}
        made = {"fit": self._made(), "separation": [row for row in separation if row], "versions": versions}
        directions = {name: torch.from_numpy(found) for name, found in rows.items()}
        return _with_diagnostics(PersonaVectors(own.trait, own.model, directions, {**kept, **made, **origin}), own)

    def _at(self, layer: int, reduction: str) -> Callable[[Samples], Array]:
        """What makes the vector of a layer of samples there."""
        erase = eraser([each.layer(layer, reduction) for each in self.erased]) if self.erased else None
        rows = [each.rows(reduction)[layer].double().numpy() for each in self.without]
        span = _span(rows, self.run.vectors.model.d_model)

        def make(samples: Samples) -> Array:
            vector = self.method.apply(
                samples if erase is None else replace(samples, activations=erase(samples.activations))
            )
            left: Array = vector - span.T @ (span @ vector)
            if np.linalg.norm(left) < 1e-6 * np.linalg.norm(vector):
                raise FitError(
                    f"the {reduction} vector of layer {layer} lies within what is projected out, so that nothing is "
                    "left of it; project out less"
                )
            return left

        return make

    def _versions(self) -> dict[str, str]:
        needed = (*self.method.requires, *((PACKAGE,) if self.erased else ()))
        return {each: version for each in needed if (version := installed_version(each)) is not None}

    def _made(self) -> dict[str, Any]:
        """What made the vectors, for their provenance."""
        return {
            "method": self.method.name,
            "package": METHODS.everything()[self.method.name].package,
            "summary": self.method.summary,
            "source": self.method.source,
            "settings": dict(self.method.settings),
            "length": "its own" if self.method.own_length else "that of the difference of means",
            "vectors_of_the_run": self.run.vectors.content_hash,
            "without": list(map(_named, self.without)),
            "erased": list(map(_named, self._erased_vectors)),
        }


def _with_diagnostics(found: PersonaVectors, own: PersonaVectors) -> PersonaVectors:
    """With what the run's vectors say of the responses, whatever the direction, and what is known of this one."""
    stored = own.diagnostics
    if stored is None or stored.reduction != own.default_reduction or found.missing_layers:
        return found
    separated = {row["layer"]: row for row in found.provenance["separation"]}
    longer = (found.norms().double() / own.norms().double()).tolist()
    layers = []
    for each in stored.layers:
        said: dict[str, float | None] = {name: getattr(each, name) for name in OF_RESPONSES}
        if (row := separated.get(each.layer)) is not None:
            said |= {name: row[theirs] for name, theirs in SEPARATION.items()}
        if each.relative_norm is not None:
            said["relative_norm"] = each.relative_norm * longer[each.layer]
        layers.append(LayerDiagnostics(each.layer, **rounded(said)))
    return found.with_provenance(diagnostics=replace(stored, layers=tuple(layers)).to_json())


def _named(vectors: PersonaVectors) -> Mapping[str, str]:
    return {"trait": vectors.trait, "content_hash": vectors.content_hash}


def _span(rows: Sequence[Array], width: int) -> Array:
    """An orthonormal basis of what rows span, [rank, width]."""
    units = [row / np.linalg.norm(row) for row in rows if row.any()]
    _, sizes, basis = np.linalg.svd(np.reshape(units, (-1, width)), full_matrices=False)
    found: Array = basis[sizes > 1e-6]
    return found


def _held_out(layer: int, samples: Samples, make: Callable[[Samples], Array], nulls: Array) -> dict[str, Any] | None:
    """How well the vector of each half of the questions separates the other; None where a half does not suffice.

    Args:
        layer: Block index, 0-based.
        samples: The kept responses there.
        make: From samples to a vector.
        nulls: Random directions of length one, [directions, d_model].
    """
    folds = [samples.chosen(samples.question % FOLDS == fold) for fold in range(FOLDS)]
    if any(np.bincount(fold.positive, minlength=2).min() < 2 for fold in folds):
        return None
    projections = []
    for tested, seen in zip(folds, reversed(folds), strict=True):
        try:
            vector = make(seen)
        except FitError:  # such as no twins among half of the questions
            return None
        tried = np.stack([vector / max(float(np.linalg.norm(vector)), 1e-12), *nulls])
        values = tried @ tested.activations.T
        projections.append((values[:, tested.positive], values[:, ~tested.positive]))
    return separation_row(layer, projections)
