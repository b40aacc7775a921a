"""Checked columns of texts."""

import numpy as np

from skembed._inputs import check_texts


def run(X, **kwargs):
    return check_texts(X, owner="Owner", **kwargs)


def assert_columns(result, *expected):
    assert result.columns == [list(column) for column in expected]
    assert all(type(text) is str for column in result.columns for text in column)
    assert len(result.missing) == len(expected)
    for mask, column in zip(result.missing, expected, strict=True):
        assert mask.dtype == np.bool_
        assert mask.shape == (len(column),)
        assert not mask.any()


def object_array(items):
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array
