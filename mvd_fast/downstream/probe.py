"""Linear probes: what a linear classifier reads from frozen features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ProbeResult:
    """accuracy in [0, 1] and confusion int64 [classes, classes] (rows: truth) on the test clips."""

    accuracy: float
    confusion: np.ndarray


def linear_probe(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, regularisation: float = 1.0
) -> ProbeResult:
    """Multinomial logistic regression on standardised features (mean and scale of the training set).

    x float [S, C], y int [S]; `regularisation`: scikit-learn's C, larger is weaker.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import confusion_matrix
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=regularisation, max_iter=2000))
    probe.fit(train_x, train_y)
    predicted = probe.predict(test_x)
    labels = np.unique(train_y)
    return ProbeResult(float((predicted == test_y).mean()), confusion_matrix(test_y, predicted, labels=labels))
