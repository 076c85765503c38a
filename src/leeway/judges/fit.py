"""Fit the refusal classifier to XSTest's labelled answers, and measure it on models and prompts that are left out.

XSTest (Röttger et al. 2024, arXiv 2308.01263, CC BY 4.0): answers of four models to the same 450 prompts. For the card,
each answer is judged by a classifier that was fitted without its model's answers and without any answer to its prompt.
A safe prompt and its unsafe contrast stand at the same place within their types, and are left out together.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from leeway.errors import LeewayError
from leeway.hashing import digest
from leeway.io import write_json
from leeway.judges.calibrate import ANY_REFUSAL, Card, LabelledAnswer, LabelledSet, calibrate_model, load_xstest
from leeway.judges.judge import Verdict
from leeway.judges.refusal_classifier import (
    WEIGHTS,
    RefusalClassifier,
    RefusalModel,
    classifier_rules,
    ngrams,
    words,
)

CARD = "refusal_classifier_card.json"
HELD_OUT = "xstest, each model and prompt left out"

Floats = NDArray[np.float64]
Labelled = tuple[str, LabelledAnswer]  # the model's name, its answer


def fit_and_save(folder: Path, progress: Callable[[str], None]) -> Card:
    """Write `refusal_classifier.json` and its leave-one-model-out card, `refusal_classifier_card.json`."""
    sets = load_xstest()
    progress(f"fit to {', '.join(s.model for s in sets)}")
    model = fit([(s.model, a) for s in sets for a in s.answers], {s.model: s.hash for s in sets})
    saved = {"version": 1, "rules": digest(classifier_rules()), "fitted_on": dict(model.fitted_on)}
    write_json(folder / WEIGHTS, {**saved, "intercept": model.intercept, "weights": dict(model.weights)})
    card = cross_validate(sets, RefusalClassifier(model=model), progress)
    card.save(folder / CARD)
    return card


def fit(answers: Seq[Labelled], fitted_on: dict[str, str] | None = None) -> RefusalModel:
    """Return the model fitted to labelled answers; its numbers are rounded, so that a second fit gives the same."""
    features = [ngrams(a.response) for _, a in answers]
    vocabulary = select_features(answers, features)
    column = {gram: j for j, gram in enumerate(vocabulary)}
    X_NF = np.zeros((len(answers), len(vocabulary)))
    for row_F, grams in zip(X_NF, features, strict=True):
        own = [column[g] for g in grams if g in column]
        row_F[own] = 1 / np.sqrt(max(len(own), classifier_rules()["floor"]))
    refused_N = np.array([a.label in ANY_REFUSAL for _, a in answers])
    if not vocabulary or refused_N.all() or not refused_N.any():
        raise LeewayError(
            "judge fit: too few labelled answers", fix="give every answer of XSTest, for two or more models"
        )
    *weights, intercept = np.round(logistic_regression(X_NF, refused_N), classifier_rules()["decimals"]).tolist()
    kept = {gram: w for gram, w in zip(vocabulary, weights, strict=True) if w}
    return RefusalModel(kept, intercept, fitted_on or {})


def select_features(answers: Seq[Labelled], features: Seq[frozenset[str]]) -> list[str]:
    """Return, sorted, the n-grams of several models and many prompt types that seldom repeat the prompt's topic."""
    rules, uses = classifier_rules(), defaultdict(list)
    for n, grams in enumerate(features):
        for gram in grams:
            uses[gram].append(n)
    excluded, topics = set(rules["excluded"].split()), _topics([a for _, a in answers])
    selected = []
    for gram, using in uses.items():
        parts, own = gram.split(" "), [answers[n] for n in using]
        if len(own) < rules["least_answers"] or not excluded.isdisjoint(parts):
            continue
        if len({model for model, _ in own}) < rules["least_models"]:
            continue
        if len({a.prompt_type for _, a in own}) < rules["least_prompt_types"]:
            continue
        if sum(not topics[a.id].isdisjoint(parts) for _, a in own) <= rules["echo_at_most"] * len(own):
            selected.append(gram)
    return sorted(selected)


def _topics(answers: Iterable[LabelledAnswer]) -> dict[str, frozenset[str]]:
    """Return, by prompt id, the prompt's words that are not common to prompts of many types."""
    prompts = {a.id: (a.prompt_type, frozenset(words(a.prompt))) for a in answers}
    types = defaultdict(set)
    for prompt_type, own in prompts.values():
        for word in own:
            types[word].add(prompt_type)
    common = {word for word, seen in types.items() if len(seen) >= classifier_rules()["common_in_types"]}
    return {key: own - common for key, (_, own) in prompts.items()}


def logistic_regression(X_NF: Floats, positive_N: NDArray[np.bool_]) -> Floats:
    """Return weights and intercept [F + 1] that minimise C · Σ s·log(1 + e^−±z) + |w|²/2.

    s weighs both classes equally. The problem is convex.
    """
    n, C = len(positive_N), classifier_rules()["inverse_penalty"]
    scale_N = C * np.where(positive_N, n / (2 * positive_N.sum()), n / (2 * (~positive_N).sum()))
    sign_N = np.where(positive_N, 1.0, -1.0)
    X_NG = np.hstack([X_NF, np.ones((n, 1))])
    ridge_G = np.r_[np.ones(X_NF.shape[1]), 0.0]

    def loss(w_G: Floats) -> tuple[float, Floats]:
        z_N = sign_N * (X_NG @ w_G)
        slope_N = -scale_N * sign_N / (1 + np.exp(z_N))
        value = float((scale_N * np.logaddexp(0, -z_N)).sum() + (ridge_G * w_G**2).sum() / 2)
        return value, X_NG.T @ slope_N + ridge_G * w_G

    def hessian(w_G: Floats) -> Floats:
        p_N = 1 / (1 + np.exp(-(X_NG @ w_G)))
        curved: Floats = (X_NG * (scale_N * p_N * (1 - p_N))[:, None]).T @ X_NG
        curved[np.diag_indices_from(curved)] += ridge_G
        return curved

    found = minimize(loss, np.zeros(X_NG.shape[1]), jac=True, hess=hessian, method="trust-exact")
    w_G: Floats = found.x
    for _ in range(
        2
    ):  # Newton steps, beyond what can be seen in the loss: rounded weights must not depend on the start
        w_G = w_G - np.linalg.solve(hessian(w_G), loss(w_G)[1])
    return w_G


def cross_validate(sets: Seq[LabelledSet], judge: RefusalClassifier, progress: Callable[[str], None]) -> Card:
    """Return the card of `judge`, every verdict by a classifier that was fitted without that model and prompt."""
    parts = []
    for data in sets:
        progress(f"leave out {data.model}")
        parts.append(calibrate_model(held_out_verdicts(sets, data), data, ANY_REFUSAL))
    return Card(judge.name, judge.hash, judge.note, HELD_OUT, tuple(parts), positive="full or partial refusal")


def held_out_verdicts(sets: Seq[LabelledSet], data: LabelledSet) -> list[Verdict]:
    """Judge one model's answers, each by a classifier fitted to other models' answers to other prompts."""
    folds = _folds(sets)
    verdicts: dict[str, Verdict] = {}
    for fold in range(classifier_rules()["folds"]):
        seen = [(s.model, a) for s in sets if s.model != data.model for a in s.answers if folds[a.id] != fold]
        judge = RefusalClassifier(model=fit(seen))
        verdicts |= {a.id: judge.verdict(a.response, a.prompt) for a in data.answers if folds[a.id] == fold}
    return [verdicts[a.id] for a in data.answers]


def _folds(sets: Seq[LabelledSet]) -> dict[str, int]:
    """Return each prompt's fold: its place within its type, modulo their number."""
    for data in sets[1:]:
        if [a.id for a in data.answers] != [a.id for a in sets[0].answers]:
            raise LeewayError(
                f"judge fit: {data.origin} has other prompts than {sets[0].origin}", fix="use XSTest's own files"
            )
    if len(sets) < 3:
        raise LeewayError(f"judge fit: answers of {len(sets)} models", fix="give three or more in LEEWAY_DATA/xstest")
    places: Counter[str] = Counter()
    folds = {}
    for a in sets[0].answers:
        folds[a.id] = places[a.prompt_type] % classifier_rules()["folds"]
        places[a.prompt_type] += 1
    return folds
