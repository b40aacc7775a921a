"""Maps of texts: their embeddings in two dimensions, coloured by label, cluster or prediction."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from skembed._validation import check_bool, check_int, check_real, check_string, name_our_words
from skembed.embedding import check_text_column
from skembed.plotting.drawing import (
    draw_legend,
    draw_names,
    draw_points,
    make_figure,
    set_frame,
)
from skembed.plotting.groups import MapGroups, read_groups
from skembed.plotting.plotly import make_plotly
from skembed.plotting.projection import (
    check_coordinates,
    check_vectors,
    embed_input,
    is_matrix,
    knows_rows,
    place_vectors,
    predict_groups,
    project,
    read_hover_texts,
    split_estimator,
)

__all__ = ["EmbeddingMapDisplay"]

_OWNER = "EmbeddingMapDisplay"


class EmbeddingMapDisplay:
    """Map of texts: one point a text, near one another where the embeddings are.

    Make one with `from_estimator` (texts) or `from_embeddings` (vectors); both draw it. Colours
    are safe for colour-blind readers; from eight groups the points differ in their signs too.

    Parameters
    ----------
    coordinates : array-like of float, shape (n_texts, 2)
        Position of each text.
    y : array-like, shape (n_texts,), optional
        Colours of the points: labels of str, int or bool; or floats, which get a continuous
        scale. None: one colour.
    texts : list, tuple, ndarray, Series or one-column frame of str, n_texts rows, optional
        Texts that the interactive map shows on hover.
    names : mapping or sequence of str, optional
        Label -> name; or the names of the labels 0, 1, ... They also fix the order of the
        colours: two maps with the same names give each label the same colour.
    noise_label : int, str or None, default=-1
        The label of texts that belong to no group, as clusterers of scikit-learn mark them: drawn
        in grey, below the others and smaller. None where -1 is a label like any other.
    colors : mapping of label to str, optional
        Colours such as "#0072b2" that replace the default ones.
    reducer : transformer, optional
        The fitted reducer behind the coordinates, for `place`.
    vectorizer : transformer or encoder, optional
        Encoder of the texts, for `place`.

    Attributes
    ----------
    coordinates : ndarray of float64, shape (n_texts, 2)
        Hand them to another map of the same texts.
    reducer_ : transformer or None
        The fitted reducer, such as ``umap.UMAP``.
    vectorizer_ : transformer or None
        Encoder of the texts that `place` gets; None where it gets embeddings.
    ax_ : matplotlib Axes
        Axes of the map.
    embedding_dim_ : int or None
        Width of the embeddings; None where the display was made of coordinates alone.
    figure_ : matplotlib Figure
        The figure of the axes.
    points_ : list of matplotlib PathCollection
        Points as drawn: noise first, then the others in turns, so that no group covers another.
    annotations_ : list of matplotlib Annotation
        The names on the map. Names that find no room, smallest groups first, are left out.
    legend_ : matplotlib Legend or None
        The largest 24 groups, with their counts; None where there is nothing to tell apart.
    colorbar_ : matplotlib Colorbar or None
        The scale, where y are floats.

    See Also
    --------
    EmbeddingClusterer : Finds and names clusters to colour by.

    Notes
    -----
    UMAP keeps neighbours together. Distances between islands, their sizes, and empty space between
    them mean little.

    With a seed UMAP runs on one thread, and gives the same map on the same machine with the same
    versions. ``random_state=None`` uses all cores and gives another map each time.

    References
    ----------
    L. McInnes, J. Healy, J. Melville, UMAP, arXiv 1802.03426.

    M. Okabe, K. Ito, Color universal design, 2008 (the first seven colours).

    G. M. Machado, M. M. Oliveira, L. A. F. Fernandes, A physiologically-based model for simulation
    of color vision deficiency, IEEE TVCG 15 (6), 2009 (how the others were chosen).

    Examples
    --------
    >>> import numpy as np
    >>> from skembed.plotting import EmbeddingMapDisplay
    >>> embeddings = np.random.default_rng(0).normal(size=(40, 8))
    >>> labels = ["cats", "dogs"] * 20
    >>> display = EmbeddingMapDisplay.from_embeddings(embeddings, labels, reducer="pca")
    >>> [text.get_text() for text in display.annotations_]
    ['cats', 'dogs']
    """

    @name_our_words
    def __init__(
        self,
        coordinates: Any,
        *,
        y: Any = None,
        texts: Any = None,
        names: Any = None,
        noise_label: Any = -1,
        colors: Any = None,
        reducer: Any = None,
        vectorizer: Any = None,
    ) -> None:
        self.coordinates = coordinates
        self.y = y
        self.texts = texts
        self.names = names
        self.noise_label = noise_label
        self.colors = colors
        self.reducer_ = reducer
        self.vectorizer_ = vectorizer
        self.embedding_dim_: int | None = None

    @classmethod
    def from_embeddings(
        cls,
        X: Any,
        y: Any = None,
        *,
        texts: Any = None,
        names: Any = None,
        noise_label: Any = -1,
        colors: Any = None,
        coordinates: Any = None,
        reducer: Any = "umap",
        random_state: Any = 0,
        ax: Any = None,
        **plot_options: Any,
    ) -> EmbeddingMapDisplay:
        """Reduce embeddings to two dimensions and draw them.

        Parameters
        ----------
        X : array-like of float, shape (n_texts, dim)
            The embeddings.
        y : array-like, shape (n_texts,), optional
            Labels, or floats for a continuous scale; as in the class.
        texts : list, tuple, ndarray, Series or one-column frame of str, n_texts rows, optional
            Texts that the interactive map shows on hover.
        names : mapping or sequence of str, optional
            Names of the labels, as in the class.
        noise_label : int, str or None, default=-1
            Label of texts that belong to no group.
        colors : mapping of label to str, optional
            Colours that replace the default ones.
        coordinates : array-like of float, shape (n_texts, 2), optional
            Those of another map, to take instead of computing new ones. To `place` new texts too,
            pass its `reducer_` as `reducer`.
        reducer : {"umap", "pca"} or transformer, default="umap"
            "umap" is UMAP by cosine with 15 neighbours; "pca" is fast and keeps large distances.
            A transformer is cloned and fitted, unless `coordinates` are given.
        random_state : int, RandomState instance or None, default=0
            Seed of "umap" and "pca".
        ax : matplotlib Axes, optional
            Axes to draw on; None makes a figure.
        **plot_options : dict
            Options of `plot`.

        Returns
        -------
        EmbeddingMapDisplay
            The map, drawn.

        Raises
        ------
        TypeError
            If X is not numbers, or a parameter is of the wrong type.
        ValueError
            If X is not finite or has fewer than 2 rows; or if labels, texts or coordinates are
            not as many as embeddings, or labels are missing.
        ImportError
            If umap-learn or matplotlib is not installed.

        Warns
        -----
        SkembedWarning
            If there are fewer texts than UMAP needs (10): PCA takes its place.

        Examples
        --------
        >>> import numpy as np
        >>> from skembed.plotting import EmbeddingMapDisplay
        >>> embeddings = np.random.default_rng(0).normal(size=(12, 8))
        >>> first = EmbeddingMapDisplay.from_embeddings(embeddings, reducer="pca")
        >>> again = EmbeddingMapDisplay.from_embeddings(
        ...     embeddings, np.arange(12.0), coordinates=first.coordinates
        ... )
        >>> np.array_equal(first.coordinates, again.coordinates)
        True
        """
        vectors = check_vectors(X, owner=_OWNER, name="X")
        display = cls(
            coordinates,
            y=y,
            texts=texts,
            names=names,
            noise_label=noise_label,
            colors=colors,
            reducer=None if isinstance(reducer, str) else reducer,
        )
        if coordinates is not None:
            display.coordinates = check_coordinates(coordinates, len(vectors), owner=_OWNER)
        display.embedding_dim_ = vectors.shape[1]
        display._check(len(vectors))  # before the reduction, which may take minutes
        if coordinates is None:
            display.coordinates, display.reducer_ = project(
                vectors, reducer, random_state=random_state, owner=_OWNER
            )
        return display.plot(ax, **plot_options)

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        y: Any = None,
        *,
        names: Any = None,
        noise_label: Any = -1,
        colors: Any = None,
        coordinates: Any = None,
        reducer: Any = "umap",
        random_state: Any = 0,
        ax: Any = None,
        **plot_options: Any,
    ) -> EmbeddingMapDisplay:
        """Embed texts, once, and draw them, coloured by what the estimator says of them.

        Parameters
        ----------
        estimator : estimator, Pipeline or vectorizer
            A fitted `EmbeddingClassifier`, `ZeroShotClassifier` or `EmbeddingClusterer`; a Pipeline
            that embeds, with or without a predictor at its end; a search over one of these; or
            anything with `transform` or `encode`, or a callable.
        X : list, tuple, ndarray, Series or one-column frame of str, n_texts rows
            The texts, which the interactive map shows on hover; or embeddings, where the estimator
            takes these.
        y : array-like, shape (n_texts,), optional
            Values to colour by. None: the estimator's predictions, if it makes some; the `labels_`
            of a clusterer where X are the texts that it was fitted on.
        names : mapping or sequence of str, optional
            Names of the labels, as in the class. None: a clusterer's `cluster_names_` where it
            colours, and the `classes_` of a classifier fix the order of the colours.
        noise_label : int, str or None, default=-1
            Label of texts that belong to no group.
        colors : mapping of label to str, optional
            Colours that replace the default ones.
        coordinates : array-like of float, shape (n_texts, 2), optional
            Those of another map, to take instead of computing new ones.
        reducer : {"umap", "pca"} or transformer, default="umap"
            As in `from_embeddings`.
        random_state : int, RandomState instance or None, default=0
            Seed of "umap" and "pca".
        ax : matplotlib Axes, optional
            Axes to draw on; None makes a figure.
        **plot_options : dict
            Options of `plot`.

        Returns
        -------
        EmbeddingMapDisplay
            The map, drawn.

        Raises
        ------
        TypeError
            If the estimator neither embeds nor predicts, X is not texts, or a parameter is of
            the wrong type.
        ValueError
            If `from_embeddings` would raise it, or a clusterer without `predict` was fitted on
            other texts.
        NotFittedError
            If the estimator is not fitted.
        ImportError
            If umap-learn or matplotlib is not installed.

        Warns
        -----
        SkembedWarning
            If there are fewer texts than UMAP needs (10): PCA takes its place.

        Examples
        --------
        >>> from skembed import NVEmbedVectorizer
        >>> from skembed.plotting import EmbeddingMapDisplay
        >>> texts = ["my card was stolen", "card lost", "open an account", "a new account please"]
        >>> display = EmbeddingMapDisplay.from_estimator(
        ...     NVEmbedVectorizer(), texts, ["card", "card", "account", "account"], reducer="pca"
        ... )
        >>> display.place(["I lost my card"]).shape
        (1, 2)
        """
        vectorizer, predictor = split_estimator(estimator, owner=_OWNER)
        vectors = embed_input(vectorizer, X, owner=_OWNER)
        is_predicted = y is None
        if is_predicted:
            y = predict_groups(predictor, X, vectors, owner=_OWNER)
        elif knows_rows(predictor, X):
            is_predicted = np.array_equal(np.asarray(y), predictor.labels_)
        if names is None and is_predicted:
            names = getattr(predictor, "cluster_names_", None)
        if names is None:
            names = _name_classes(predictor, y)
        display = cls.from_embeddings(
            vectors,
            y,
            texts=read_hover_texts(X),
            names=names,
            noise_label=noise_label,
            colors=colors,
            coordinates=coordinates,
            reducer=reducer,
            random_state=random_state,
            ax=ax,
            **plot_options,
        )
        display.vectorizer_ = vectorizer
        return display

    def plot(
        self,
        ax: Any = None,
        *,
        annotate: bool = True,
        legend: bool = True,
        point_size: float | None = None,
        alpha: float | None = None,
        cmap: str = "viridis",
    ) -> EmbeddingMapDisplay:
        """Draw the map with matplotlib.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Axes to draw on; None makes a figure. Make figures of your own with
            ``layout="constrained"``, so that the legend finds room beside the axes; without, it
            lies on the map.
        annotate : bool, default=True
            Write the name of each group where it is densest. Names are placed for the size that
            the figure has now.
        legend : bool, default=True
            Name the groups beside the map; the scale, where y are floats.
        point_size : float, optional
            Area of a point in points squared (1/72 inch). None: the smaller, the more there are.
        alpha : float, optional
            Opacity in (0, 1]. None: the lower, the more points there are.
        cmap : str, default="viridis"
            Name of matplotlib's colour map for floats.

        Returns
        -------
        EmbeddingMapDisplay
            This display.

        Raises
        ------
        TypeError, ValueError
            If coordinates, labels, names or colours have an invalid type or value.
        ImportError
            If matplotlib is not installed.
        """
        annotate = check_bool(annotate, name="annotate", owner=_OWNER)
        legend = check_bool(legend, name="legend", owner=_OWNER)
        limits: dict[str, Any] = {"owner": _OWNER, "low": 0, "inclusive": "right"}
        point_size = check_real(point_size, name="point_size", allow_none=True, **limits)
        alpha = check_real(alpha, name="alpha", high=1, allow_none=True, **limits)
        positions, groups = self._read()
        axes = make_figure() if ax is None else ax
        set_frame(axes, positions, groups)
        self.points_ = draw_points(
            axes, positions, groups, point_size=point_size, alpha=alpha, cmap=cmap
        )
        self.ax_, self.figure_ = axes, axes.figure
        self.colorbar_ = None
        if legend and groups.values is not None:
            self.colorbar_ = axes.figure.colorbar(self.points_[0], ax=axes)
            self.colorbar_.solids.set_alpha(1)
        self.legend_ = draw_legend(axes, groups) if legend else None
        self.annotations_ = draw_names(axes, positions, groups) if annotate else []
        return self

    def place(self, X: Any) -> npt.NDArray[np.float64]:
        """Find where new texts lie on the map.

        Parameters
        ----------
        X : list, tuple, ndarray, Series or one-column frame of str, n_texts rows
            The texts, where the map was made of texts; or embeddings of shape (n_texts, dim).

        Returns
        -------
        ndarray of float64, shape (n_texts, 2)
            Their coordinates, in input order. UMAP finds them by a short optimisation, so they
            depend a little on the texts that are placed with them.

        Raises
        ------
        TypeError
            If X is neither texts nor numbers, or texts where the map was made of embeddings.
        ValueError
            If the map has no reducer that can place new texts (see `coordinates` in
            `from_embeddings`), or X is not finite or of another width.
        """
        as_vectors = self.vectorizer_ is None or is_matrix(X)
        vectors = embed_input(None if as_vectors else self.vectorizer_, X, owner=_OWNER)
        width = self.embedding_dim_ or vectors.shape[1]
        if vectors.shape[1] != width:
            raise ValueError(
                f"The `X` parameter of `{_OWNER}.place` must be of shape (n_texts, {width}); "
                f"got shape {vectors.shape}."
            )
        return place_vectors(self.reducer_, vectors, owner=_OWNER)

    def to_plotly(
        self, *, annotate: bool = True, text_length: int = 300, title: str | None = None
    ) -> Any:
        """Make an interactive map: hovering shows the text, a click in the legend hides a group.

        Parameters
        ----------
        annotate : bool, default=True
            Write the name of each group where it is densest.
        text_length : int, default=300
            Characters of a text that hovering shows; longer ones are cut.
        title : str, optional
            Title above the map.

        Returns
        -------
        plotly Figure
            One WebGL trace a group, noise first.

        Raises
        ------
        TypeError, ValueError
            If a parameter, coordinates, labels, names or colours have an invalid type or value.
        ImportError
            If plotly is not installed.
        """
        annotate = check_bool(annotate, name="annotate", owner=_OWNER)
        text_length = check_int(text_length, name="text_length", owner=_OWNER, low=1)
        title = check_string(title, name="title", owner=_OWNER, allow_none=True)
        positions, groups = self._read()
        texts = self._read_texts(len(positions))
        return make_plotly(
            positions, groups, texts, annotate=annotate, text_length=text_length, title=title
        )

    def to_html(
        self,
        path: str | os.PathLike[str],
        *,
        annotate: bool = True,
        text_length: int = 300,
        title: str | None = None,
        include_plotlyjs: bool | str = True,
    ) -> Path:
        """Write the interactive map to a page of its own.

        The page holds the texts, cut to `text_length`: whoever opens it can read them.

        Parameters
        ----------
        path : str or path
            File to write; an older one is replaced.
        annotate : bool, default=True
            Write the name of each group where it is densest.
        text_length : int, default=300
            Characters of a text that hovering shows; longer ones are cut.
        title : str, optional
            Title above the map.
        include_plotlyjs : bool or str, default=True
            True puts plotly's script (some 5 MB) into the page, which then needs no network; "cdn"
            links to it.

        Returns
        -------
        pathlib.Path
            The file.

        Raises
        ------
        TypeError, ValueError
            If `to_plotly` would raise it.
        ImportError
            If plotly is not installed.
        """
        figure = self.to_plotly(annotate=annotate, text_length=text_length, title=title)
        config = {"scrollZoom": True, "displaylogo": False}
        page = figure.to_html(include_plotlyjs=include_plotlyjs, config=config)
        file = Path(path)
        file.write_text(page, encoding="utf-8")
        return file

    def _check(self, n: int) -> MapGroups:
        """Check labels and texts against the number of points, and return the groups."""
        self._read_texts(n)
        return read_groups(
            self.y,
            n,
            names=self.names,
            colors=self.colors,
            noise_label=self.noise_label,
            owner=_OWNER,
        )

    def _read_texts(self, n: int) -> list[str] | None:
        """Return the texts of n points, or None where there are none."""
        if self.texts is None:
            return None
        texts = check_text_column(self.texts, vectorizer=None, owner=_OWNER, name="texts")
        if len(texts) != n:
            raise ValueError(
                f"The `texts` parameter of `{_OWNER}` must hold {n} texts, one a point; "
                f"got {len(texts)}."
            )
        return [text or "" for text in texts]

    def _read(self) -> tuple[npt.NDArray[np.float64], MapGroups]:
        """Return the checked coordinates (n, 2) and groups of the points."""
        positions = check_coordinates(self.coordinates, None, owner=_OWNER)
        return positions, self._check(len(positions))


def _name_classes(predictor: Any, y: Any) -> dict[Any, str] | None:
    """Return the names of a classifier's labels, in its order; None where y has none of them."""
    classes = getattr(predictor, "classes_", None)
    if isinstance(classes, np.ndarray) and classes.ndim == 1 and np.isin(y, classes).any():
        return {label: str(label) for label in classes.tolist()}
    return None
