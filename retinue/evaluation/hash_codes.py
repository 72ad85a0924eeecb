"""Binary codes of classes for retrieval by Hamming distance: target codes of training images, and the figure."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retinue.utils.files import replacing

# Rounds of the optimisation of the codes, and the weight of their distance from the embedding, as in EET.
ROUNDS, QUANTISATION = 15, 1e-4


def learn_codes(labels: np.ndarray, num_classes: int, bits: int, seed: int) -> np.ndarray:
    """Return a binary code for each training image, by which its class can be regressed: int8 (n, bits), -1 or 1.

    The codes B, an embedding V and a rotation R lower ||L - U V||^2 + QUANTISATION ||B - R V||^2 in turn, where L are
    the labels as one-hot columns and U is the least-squares regression of L on V; V and B are random at the start. This
    is how the authors' code of EET makes its targets.

    Args:
        labels: (n,), label of each image.
        num_classes: number of classes.
        bits: length of a code.
        seed: seed of the start.
    """
    rng = np.random.default_rng(seed)
    truth = np.eye(num_classes)[labels].T  # (K, n)
    embedding, codes = rng.standard_normal((bits, len(labels))), np.sign(rng.standard_normal((bits, len(labels))))
    rotation = nearest_rotation(codes @ embedding.T)
    for _ in range(ROUNDS):
        codes = np.where(rotation @ embedding >= 0, 1.0, -1.0)
        regression = truth @ embedding.T @ np.linalg.pinv(embedding @ embedding.T)  # (K, bits)
        embedding = np.linalg.pinv(regression.T @ regression + QUANTISATION * rotation.T @ rotation) @ (
            regression.T @ truth + QUANTISATION * rotation.T @ codes
        )
        rotation = nearest_rotation(codes @ embedding.T)
    return codes.T.astype(np.int8)


def nearest_rotation(matrix: np.ndarray) -> np.ndarray:
    """Return the orthogonal matrix that is nearest to a square matrix (orthogonal Procrustes problem)."""
    left, _, right = np.linalg.svd(matrix)
    return left @ right


def average_precisions(
    codes: np.ndarray, labels: np.ndarray, database_codes: np.ndarray, database_labels: np.ndarray
) -> np.ndarray:
    """Return the average precision of each query, (Q,), when a database is ranked by its Hamming distance.

    Database images of the query's class are relevant. Images at one distance count together, as in scikit-learn: the
    precision at each distance is weighted by the increase of the recall. Queries without a relevant image have NaN.

    Args:
        codes: int8 (Q, bits), -1 or 1, codes of the queries.
        labels: (Q,), labels of the queries.
        database_codes: int8 (N, bits), codes of the database.
        database_labels: (N,), labels of the database.
    """
    bits = codes.shape[1]
    database = database_codes.astype(np.float32)
    values = np.full(len(codes), np.nan)
    for i, (code, label) in enumerate(zip(codes.astype(np.float32), labels, strict=True)):
        distance = np.rint((bits - database @ code) / 2).astype(np.int64)
        shown = np.bincount(distance, minlength=bits + 1).cumsum()
        relevant = np.bincount(distance[database_labels == label], minlength=bits + 1)
        if relevant.any():
            precision = np.divide(relevant.cumsum(), shown, where=shown > 0, out=np.zeros(bits + 1))
            values[i] = precision @ relevant / relevant.sum()
    return values


def write_codes(path: Path, codes: np.ndarray, image_names: Sequence[str]) -> None:
    """Write a CSV table of the columns image and code, such as 0110.

    Args:
        path: file to write.
        codes: int8 (N, bits), -1 or 1.
        image_names: name of each image, (N,).
    """
    # A file system's names need not be UTF-8; `surrogateescape` writes their bytes as they are.
    with (
        replacing(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["image", "code"])
        for name, code in zip(image_names, codes, strict=True):
            writer.writerow([name, "".join("1" if bit > 0 else "0" for bit in code)])
