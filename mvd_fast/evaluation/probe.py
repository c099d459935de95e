"""Linear and nearest-neighbour probes: what simple classifiers read from frozen features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NEIGHBOURS, TEMPERATURE = 20, 0.07


@dataclass(frozen=True)
class AttentiveSettings:
    """The attentive probe's: AdamW with cosine decay to zero."""

    epochs: int = 20
    batch: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.01


@dataclass(frozen=True)
class ProbeResult:
    """accuracy in [0, 1] and confusion int64 [classes, classes] (rows: truth) on the test clips."""

    accuracy: float
    confusion: np.ndarray


def linear_probe(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, regularisation: float = 1.0
) -> ProbeResult:
    """`linear_scores`, compared with the truth. x float [S, C], y int [S]."""
    from sklearn.metrics import confusion_matrix

    labels = np.unique(train_y)
    predicted = labels[linear_scores(train_x, train_y, test_x, regularisation).argmax(1)]
    return ProbeResult(float((predicted == test_y).mean()), confusion_matrix(test_y, predicted, labels=labels))


def linear_scores(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, regularisation: float = 1.0
) -> np.ndarray:
    """Multinomial logistic regression on standardised features (mean and scale of the training set).

    x float [S, C], y int [S] -> probabilities [S_test, classes], classes in the order of `np.unique(train_y)`.
    `regularisation`: scikit-learn's C, larger is weaker.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=regularisation, max_iter=2000))
    return probe.fit(train_x, train_y).predict_proba(test_x)


def knn_scores(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> np.ndarray:
    """Votes of the nearest training clips by cosine, each weighing exp(cosine / temperature).

    Wu et al. 2018 (arXiv 1805.01978, section 3.4), as DINO (Caron et al. 2021) evaluates. Shares of the votes
    [S_test, classes], classes in the order of `np.unique(train_y)`.
    """
    from sklearn.neighbors import KNeighborsClassifier

    def weigh(distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - distance) / temperature)

    probe = KNeighborsClassifier(neighbours, weights=weigh, metric="cosine", algorithm="brute")
    return probe.fit(train_x, train_y).predict_proba(test_x)


def top_k(scores: np.ndarray, labels: np.ndarray, truth: np.ndarray, k: int) -> float:
    """Share of the rows of scores [S, classes] whose true class is among the k best; labels int [classes]."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return float((labels[best] == truth[:, None]).any(1).mean())
