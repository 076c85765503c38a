"""Fit the refusal classifier to XSTest's labelled answers, and measure it on models and prompts that are left out.

XSTest (Röttger et al. 2024, arXiv 2308.01263, CC BY 4.0): four sets of answers to the same 450 prompts, two of them by
one model, Llama 2, without and with its system prompt. For a card, each answer is judged by a classifier that was
fitted without its set (and, in the second card, without the other set of the same model) and without any answer to its
prompt or to a near-duplicate of it.

Two prompts are near-duplicates if the cosine of their words, weighted by inverse document frequency, is at least 0.5,
if their words overlap by 0.6 (Jaccard index), or if they are a safe prompt and its unsafe contrast, which stand at the
same place within their types. Chains of near-duplicates are one group, and a group is in one fold.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse.csgraph import connected_components

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

CARD, CARD_BY_MODEL = "refusal_classifier_card.json", "refusal_classifier_card_llama2.json"
HELD_OUT = "xstest, each set of answers and near-duplicate prompts left out"
HELD_OUT_MODEL = "xstest, both sets of Llama 2 and near-duplicate prompts left out"
ONE_MODEL = ("llama2new", "llama2orig")  # Llama 2, without and with its system prompt
COSINE, JACCARD = 0.5, 0.6  # of near-duplicate prompts
CONTRAST = "contrast_"  # begins the type of the unsafe contrasts of a type's safe prompts

Floats = NDArray[np.float64]
Labelled = tuple[str, LabelledAnswer]  # the model's name, its answer


def fit_and_save(folder: Path, progress: Callable[[str], None]) -> tuple[Card, Card]:
    """Write `refusal_classifier.json` and two cards, each set of answers left out and both sets of Llama 2 left out."""
    sets = load_xstest()
    progress(f"fit to {', '.join(s.model for s in sets)}")
    model = fit([(s.model, a) for s in sets for a in s.answers], {s.model: s.hash for s in sets})
    saved = {"version": 1, "rules": digest(classifier_rules()), "fitted_on": dict(model.fitted_on)}
    write_json(folder / WEIGHTS, {**saved, "intercept": model.intercept, "weights": dict(model.weights)})
    judge = RefusalClassifier(model=model)
    cards = (
        cross_validate(sets, [(s.model,) for s in sets], judge, HELD_OUT, progress),
        cross_validate(sets, [ONE_MODEL], judge, HELD_OUT_MODEL, progress),
    )
    for card, name in zip(cards, (CARD, CARD_BY_MODEL), strict=True):
        card.save(folder / name)
    return cards


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


def cross_validate(
    sets: Seq[LabelledSet], left_out: Seq[Seq[str]], judge: RefusalClassifier, on: str, progress: Callable[[str], None]
) -> Card:
    """Return the card of `judge` on sets of answers that are left out, those named together at once."""
    parts = []
    for names in left_out:
        progress(f"leave out {' and '.join(names)}")
        for data, verdicts in held_out_verdicts(sets, names).items():
            own = next(s for s in sets if s.model == data)
            parts.append(calibrate_model(verdicts, own, ANY_REFUSAL))
    return Card(judge.name, judge.hash, judge.note, on, tuple(parts), positive="full or partial refusal")


def held_out_verdicts(sets: Seq[LabelledSet], names: Seq[str]) -> dict[str, list[Verdict]]:
    """Judge the answers of the named sets by classifiers fitted to the other sets' answers to other prompts."""
    folds = _folds(sets)
    others, own = [s for s in sets if s.model not in names], [s for s in sets if s.model in names]
    if len(others) < 2 or not own:
        what = f"judge fit: {len(others)} sets of answers without {', '.join(names)}"
        raise LeewayError(what, fix="give XSTest's four sets in LEEWAY_DATA/xstest")
    verdicts: dict[str, dict[str, Verdict]] = {s.model: {} for s in own}
    for fold in range(classifier_rules()["folds"]):
        judge = RefusalClassifier(model=fit([(s.model, a) for s in others for a in s.answers if folds[a.id] != fold]))
        for data in own:
            judged = {a.id: judge.verdict(a.response, a.prompt) for a in data.answers if folds[a.id] == fold}
            verdicts[data.model] |= judged
    return {s.model: [verdicts[s.model][a.id] for a in s.answers] for s in own}


def _folds(sets: Seq[LabelledSet]) -> dict[str, int]:
    """Return each prompt's fold. Groups of near-duplicates, the largest first, go to the smallest fold so far."""
    for data in sets[1:]:
        if [a.id for a in data.answers] != [a.id for a in sets[0].answers]:
            raise LeewayError(
                f"judge fit: {data.origin} has other prompts than {sets[0].origin}", fix="use XSTest's own files"
            )
    answers = sets[0].answers
    groups = prompt_groups(answers)
    members = Counter(groups)
    sizes, fold_of = [0] * classifier_rules()["folds"], dict[int, int]()
    for group in sorted(members, key=lambda g: (-members[g], g)):
        fold_of[group] = sizes.index(min(sizes))
        sizes[fold_of[group]] += members[group]
    return {a.id: fold_of[g] for a, g in zip(answers, groups, strict=True)}


def prompt_groups(answers: Seq[LabelledAnswer]) -> list[int]:
    """Return the group of each answer's prompt: chains of near-duplicates, numbered in order."""
    texts = [frozenset(words(a.prompt)) for a in answers]
    vocabulary = {word: k for k, word in enumerate(sorted(frozenset().union(*texts)))}
    has_NW = np.zeros((len(texts), len(vocabulary)))
    for row_W, text in zip(has_NW, texts, strict=True):
        row_W[[vocabulary[word] for word in text]] = 1
    size_N, shared_NN = has_NW.sum(axis=1), has_NW @ has_NW.T
    jaccard_NN = shared_NN / np.maximum(size_N[:, None] + size_N - shared_NN, 1)
    weighted_NW = has_NW * np.log(len(texts) / has_NW.sum(axis=0))
    weighted_NW /= np.maximum(np.linalg.norm(weighted_NW, axis=1, keepdims=True), 1e-12)
    near_NN = (jaccard_NN >= JACCARD) | (weighted_NW @ weighted_NW.T >= COSINE)
    return [int(g) for g in connected_components(near_NN | _contrasts(answers), directed=False)[1]]


def _contrasts(answers: Seq[LabelledAnswer]) -> NDArray[np.bool_]:
    """Return which prompts are a safe prompt and its unsafe contrast: at one place within types of one name."""
    places: Counter[str] = Counter()
    at = []
    for a in answers:
        at.append((a.prompt_type, places[a.prompt_type]))
        places[a.prompt_type] += 1
    names = {t: set(t.removeprefix(CONTRAST).split("_")) for t in places}
    related = {(one, other) for one in names for other in names if names[one] <= names[other]}  # discr, …_discr
    pairs = [[i == j and ((one, other) in related or (other, one) in related) for other, j in at] for one, i in at]
    return np.array(pairs, dtype=bool)
