"""Counts and what follows from them, against scikit-learn."""

import sys
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    jaccard_score,
    top_k_accuracy_score,
)

from groups import run_group, work
from lib.errors import InputError
from lib.runs.processes import Processes
from mdeq_vision.metrics import ConfusionMatrix, topk_correct

# ---- top-k -----------------------------------------------------------------------------------


def test_topk_correct():
    torch.manual_seed(0)
    output, target = torch.randn(200, 10), torch.randint(10, (200,))
    found = topk_correct(output, target, (1, 3, 5))
    assert list(found) == [1, 3, 5]
    for k, count in found.items():
        expected = top_k_accuracy_score(target, output, k=k, normalize=False, labels=range(10))
        assert count.dtype == torch.int64
        assert count == expected


def test_topk_above_the_number_of_classes():
    output, target = torch.randn(7, 3), torch.randint(3, (7,))
    assert topk_correct(output, target)[5] == 7


def test_topk_of_an_empty_batch():
    found = topk_correct(torch.randn(0, 4), torch.zeros(0, dtype=torch.int64))
    assert found == {1: 0, 5: 0}


@pytest.mark.parametrize(
    ("output", "target", "topk"),
    [((3, 4), (2,), (1,)), ((3, 4, 2), (3,), (1,)), ((3, 4), (3,), (0,)), ((3, 4), (3,), ())],
)
def test_topk_of_bad_input(output, target, topk):
    with pytest.raises(InputError):
        topk_correct(torch.zeros(output), torch.zeros(target, dtype=torch.int64), topk)


# ---- confusion matrix ------------------------------------------------------------------------


def pixels(n=6, seed=0, classes=(0, 1, 3, 4, 5)):
    """Prediction and label (4, 9, 11), with some agreement; class 2 occurs in neither."""
    rng = np.random.default_rng(seed)
    label = rng.choice(classes, (4, 9, 11))
    prediction = np.where(rng.random(label.shape) < 0.6, label, rng.choice(classes, label.shape))
    label[rng.random(label.shape) < 0.1] = 255
    return torch.from_numpy(prediction), torch.from_numpy(label)


def counted(prediction, label, n=6, **options):
    matrix = ConfusionMatrix(n, **options)
    for p, y in zip(prediction, label, strict=True):
        matrix.update(p, y)
    return matrix


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_confusion_matrix_is_scikit_learns(dtype):
    prediction, label = pixels()
    found = counted(prediction.to(dtype), label.to(dtype))
    truth = label[label != 255], prediction[label != 255]
    assert found.matrix.dtype == torch.int64
    assert (found.matrix.numpy() == confusion_matrix(*truth, labels=range(6))).all()
    iou = jaccard_score(*truth, labels=[0, 1, 3, 4, 5], average=None)
    np.testing.assert_allclose(found.iou[[0, 1, 3, 4, 5]], iou, rtol=1e-12)
    assert found.iou[2].isnan()
    assert found.mean_iou == pytest.approx(jaccard_score(*truth, average="macro"), rel=1e-12)
    assert found.pixel_accuracy == pytest.approx(accuracy_score(*truth), rel=1e-12)
    assert found.mean_accuracy == pytest.approx(balanced_accuracy_score(*truth), rel=1e-12)


def test_many_classes_in_a_uint8():
    """19 * 18 + 18 would overflow."""
    label = torch.arange(19, dtype=torch.uint8)
    found = counted(label[None], label[None], n=19)
    assert (found.matrix == torch.eye(19)).all()
    assert found.mean_iou == 1


def test_class_in_predictions_alone_counts_as_missed():
    prediction, label = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 1, 1])
    found = counted(prediction[None], label[None], n=4)
    assert found.iou[:3].tolist() == [1, 0.5, 0]
    assert found.mean_iou == pytest.approx(jaccard_score(label, prediction, average="macro"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that class 2 is not in the labels
        expected = balanced_accuracy_score(label, prediction)
    assert found.mean_accuracy == pytest.approx(expected)


@pytest.mark.parametrize("ignore", [255, -1, 0])
def test_prediction_at_ignored_pixels_does_not_matter(ignore):
    prediction, label = torch.tensor([1, 77, 2]), torch.tensor([1, ignore, 2])
    found = counted(prediction[None], label[None], n=3, ignore_label=ignore)
    assert found.matrix.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_nothing_labelled():
    found = counted(torch.zeros(1, 5, dtype=torch.int64), torch.full((1, 5), 255))
    assert found.matrix.sum() == 0
    assert found.iou.isnan().all()
    for value in (found.mean_iou, found.pixel_accuracy, found.mean_accuracy):
        assert np.isnan(value)


@pytest.mark.parametrize(
    ("prediction", "label", "message"),
    [
        ([0, 3], [0, 1], r"prediction 3 is not a class in 0\.\.2"),
        ([0, -1], [0, 1], "prediction -1"),
        ([0, 1], [0, 3], r"label 3 is neither a class in 0\.\.2 nor the ignore label 255"),
        ([0, 1], [0, -1], "label -1"),
        ([0, 1], [0], r"shape \(2,\), but label has \(1,\)"),
    ],
)
def test_bad_pixels(prediction, label, message):
    found = ConfusionMatrix(3)
    with pytest.raises(InputError, match=message):
        found.update(torch.tensor(prediction), torch.tensor(label))
    assert found.matrix.sum() == 0


def test_table():
    found = counted(torch.tensor([[0, 0, 1]]), torch.tensor([[0, 0, 0]]), n=3)
    assert found.table(["road", "traffic_light", "sky"]).splitlines() == [
        "road            66.67",
        "traffic_light    0.00",
        "sky                 -",
    ]
    with pytest.raises(InputError, match="class_names has 1 names, but there are 3 classes"):
        found.table(["road"])


# ---- several processes -----------------------------------------------------------------------


def test_reduce_in_one_process_changes_nothing():
    found = counted(*pixels())
    before = found.matrix.clone()
    assert found.reduce() is found
    assert (found.matrix == before).all()


def found_by(processes: Processes) -> torch.Tensor:
    confusion = ConfusionMatrix(6)
    prediction, label = pixels()
    for i in range(processes.rank, 4, 3):  # 0 and 3, 1
        confusion.update(prediction[i], label[i])
    return confusion.reduce().matrix


def test_reduce_over_two_processes(server, tmp_path):
    prediction, label = pixels()
    expected = counted(prediction[[0, 1, 3]], label[[0, 1, 3]]).matrix
    for matrix in run_group(__file__, 2, tmp_path / "found", server=server, timeout=180):
        assert (matrix == expected).all()


if __name__ == "__main__":
    work(found_by, sys.argv[1:])
