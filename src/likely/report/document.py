"""The report: what was fitted, how good it is, and what it makes, on one page that needs nothing but a browser."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from likely.contract import Binary, Integers, Space, Table, Tokens
from likely.data.errors import needs
from likely.evaluation.evaluation import Evaluation, unit_of, with_error
from likely.evaluation.synthetic import Measure
from likely.report import figures
from likely.report.comparison import ColumnComparison, compare_columns
from likely.training.checkpoints import write_atomically
from likely.units import bits

#: Images of a grid, rows of a table, texts of a list, columns of the comparison: at most.
IMAGES, TABLE_ROWS, TEXTS, COLUMNS = 64, 10, 12, 48
#: Points of the embedding map, at most.
POINTS = 10_000


@dataclass
class ReportInput:
    """All that a report shows; what is left out has no section.

    Args:
        title: heading of the page.
        space: space of the examples.
        model: name of the model.
        options: the model's options.
        parameters: number of trained parameters.
        facts: further lines of "what was fitted" (data, examples, seed, time), name to value.
        schema: how the data was read, as text.
        evaluations: the first one gives the headline; :class:`Evaluation` or its ``to_json()``.
        history: lines of ``log.jsonl``.
        data, samples: examples of the data and of the model: arrays of shape ``(n, *space.shape)``, DataFrames for
            tables, lists of strings for texts.
        reconstructions: ``(examples, their reconstructions)``, of the same forms.
        embedding: mean embeddings, shape ``(n, latent)``; shown by its first two principal components.
        labels: one label an embedded example: numbers, or names of classes.
        label_name: what the labels are.
        columns_real, columns_sampled: tables (or arrays of shape ``(n, columns)``) to compare column by column; for
            arrays that are no images, ``data`` and ``samples`` are taken if these are None.
        measures: how good the sampled rows of a table are, each beside its value for held-out rows.
        pairs: pairs of columns with their score, sampled and held-out: names, and two numbers up to 1.
        sheets: further pictures of images: heading, caption, and an array of shape ``(rows, columns, *space.shape)``.
    """

    title: str
    space: Space
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    schema: str = ""
    evaluations: Sequence[Evaluation | Mapping[str, Any]] = ()
    history: Sequence[Mapping[str, Any]] = ()
    data: Any = None
    samples: Any = None
    reconstructions: tuple[Any, Any] | None = None
    embedding: Any = None
    labels: Any = None
    label_name: str = "label"
    columns_real: Any = None
    columns_sampled: Any = None
    measures: Sequence[Measure] = ()
    pairs: Sequence[tuple[str, str, float, float]] = ()
    sheets: Sequence[tuple[str, str, Any]] = ()


def write_report(path: str | Path, content: ReportInput) -> Path:
    """Write the report as one HTML file without any other file, script or address in it.

    Args:
        path: the file; written at once or not at all.

    Returns:
        The path.

    Raises:
        ValueError: jinja2, matplotlib or Pillow is not installed, or the content's parts do not fit together.
    """
    path = Path(path)
    page = render(content)
    write_atomically(path, lambda temporary: _write(temporary, page))
    return path


def render(content: ReportInput) -> str:
    """The report as HTML text."""
    try:
        import jinja2
        import matplotlib as mpl
        import PIL
    except ImportError:
        raise needs("report", "the report") from None
    del mpl, PIL
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = _number
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    return environment.get_template("page.html").render(**_context(content))


def _context(content: ReportInput) -> dict[str, Any]:
    evaluations = [_evaluation(e.to_json() if isinstance(e, Evaluation) else e) for e in content.evaluations]
    comparisons = _comparisons(content)
    return {
        "title": content.title,
        "model": content.model,
        "fitted": _fitted(content),
        "options": [(name, _option(value)) for name, value in content.options.items()],
        "schema": content.schema.strip(),
        "evaluations": evaluations,
        "curve": figures.learning_curve(content.history, content.space.dims),
        "parts": _parts(evaluations[0], content.space) if evaluations else [],
        "samples": _samples(content),
        "sheets": _sheets(content),
        "reconstructions": _reconstructions(content),
        "embedding": _embedding(content),
        "columns": [_column(c) for c in comparisons],
        "worst": [c.name for c in sorted(comparisons, key=lambda c: -c.excess)[:3] if c.excess > 0.02],
        "measures": [_measure(m) for m in content.measures],
        "pairs": figures.pair_matrix(content.pairs) if content.pairs else None,
        "colours": {"real": figures.REAL, "sampled": figures.SAMPLED, "model": figures.MODEL},
    }


def _measure(measure: Measure) -> dict[str, Any]:
    """A measure with its values as text, and whether it is much worse than for real rows."""
    off, usual = abs(measure.value - measure.best), abs(measure.reference - measure.best)
    shown = {key: "–" if value != value else f"{value:.3f}" for key, value in
             (("value", measure.value), ("reference", measure.reference))}  # fmt: skip
    return {"name": measure.name, "note": measure.note, "best": f"{measure.best:g}", "far": off > usual + 0.05, **shown}


# --- numbers --------------------------------------------------------------------------------------------------------


def _fitted(content: ReportInput) -> list[tuple[str, str]]:
    space = content.space
    lines = [("model", content.model)]
    if content.parameters is not None:
        lines.append(("parameters", f"{content.parameters:,}"))
    lines.append(("space", _space_in_words(space)))
    return lines + [(str(name), str(value)) for name, value in content.facts.items()]


def _space_in_words(space: Space) -> str:
    if isinstance(space, Table):
        kinds = [column.kind for column in space.columns]
        counts = [f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)]
        return f"table of {len(kinds)} columns: {', '.join(counts)}" + (", some cells missing" if space.missing else "")
    if isinstance(space, Tokens):
        return f"sequences of {space.length:,} symbols from a vocabulary of {space.vocab:,}"
    values = f"whole numbers 0 to {space.levels - 1}" if isinstance(space, Integers) else type(space).__name__.lower()
    return f"{' × '.join(map(str, space.shape)) or 'single values'}, {values}" + (
        ", some missing" if space.missing else ""
    )


def _option(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_option, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_option(item)}" for name, item in value.items())
    return f"{value:g}" if isinstance(value, float) else "–" if value is None or value == "" else str(value)


def _evaluation(record: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation's record with the lengths of its bars."""
    unit = record["unit"]
    rows = [dict(row) for row in record["rows"]]
    key = "bits" if unit else "nats"
    values = [row[key] for row in rows if row[key] is not None]
    own = rows[0][key]
    if unit and values:
        # a codec that is hopeless (a header an image) must not press all other bars together
        limit = 2.5 * max(float(np.median(values)), own)
        end = max(value for value in values if value <= limit)
        for row in rows:
            row["share"] = None if row[key] is None else min(1.0, max(0.0, row[key]) / end)
            row["beyond"] = row[key] is not None and row[key] > limit
    elif values:
        low, high = min(values), max(values)
        for row in rows:
            row["share"] = None if row[key] is None else 0.04 + 0.92 * (row[key] - low) / ((high - low) or 1.0)
            row["beyond"] = False
    for row in rows:
        row["shown"] = None if row[key] is None else with_error(row[key], row[f"{key}_standard_error"])
    weighted = record["importance_weighted"]
    best = weighted or record
    error = "bits_standard_error" if unit else "nats_standard_error"
    return {
        **record,
        "rows": rows,
        "best": best,
        "headline": with_error(best[key], best[error]),
        "headline_unit": unit or "nats per example",
        "nats_shown": with_error(best["nats"], best["nats_standard_error"]),
    }


def _parts(record: Mapping[str, Any], space: Space) -> list[dict[str, Any]]:
    unit = unit_of(space)
    parts = {name: value for name, value in record["parts"].items() if value is not None}
    largest = max((abs(value) for value in parts.values()), default=0.0) or 1.0
    return [
        {
            "name": name.replace("_", " "),
            "nats": with_error(value, None),
            "bits": with_error(-bits(value) / unit.per_example, None) if record["unit"] else None,
            "share": abs(value) / largest,
            "negative": value < 0,
        }
        for name, value in parts.items()
    ]


# --- samples --------------------------------------------------------------------------------------------------------


def _samples(content: ReportInput) -> dict[str, Any] | None:
    if content.samples is None:
        return None
    pair = [("data", content.data), ("samples", content.samples)]
    form = _form(content.samples, content.space)
    if form == "text":
        return {"form": "text", "lists": [(name, list(part)[:TEXTS]) for name, part in pair if part is not None]}
    if form == "table":
        return {"form": "table", "tables": [(name, _rows(part)) for name, part in pair if part is not None]}
    arrays = [(name, np.asarray(part)) for name, part in pair if part is not None]
    if form == "image":
        tiles = _tiles(content.space, arrays[0][1])
        number = min(IMAGES, tiles.most, *(len(part) for _, part in arrays))
        columns = max(1, int(np.ceil(np.sqrt(number))))
        grids = [
            {"name": name, "alt": f"{number} images: {name}, {columns} in a row.", **tiles.grid(part[:number], columns)}
            for name, part in arrays
        ]
        return {"form": "image", "grids": grids}
    if len(arrays) < 2:
        return None
    real, sampled = (part.reshape(len(part), -1).astype(np.float64) for _, part in arrays)
    chart = figures.scatter_pair(real, sampled) if real.shape[1] == 2 else figures.bands(real, sampled)
    return {"form": "chart", **chart}


def _sheets(content: ReportInput) -> list[dict[str, Any]]:
    """Grids of images, brightness as in the grid of the data."""
    if figures.image_shape(content.space) is None:
        return []
    found = []
    for heading, caption, images in content.sheets:
        rows = np.asarray(images)
        tiles = _tiles(content.space, rows if content.data is None else np.asarray(content.data))
        grid = tiles.grid(rows.reshape(-1, *rows.shape[2:]), rows.shape[1])
        alt = f"{rows.shape[0]} rows of {rows.shape[1]} images: {heading}."
        found.append({"heading": heading, "caption": caption, "alt": alt, **grid})
    return found


def _reconstructions(content: ReportInput) -> dict[str, Any] | None:
    if content.reconstructions is None:
        return None
    original, rebuilt = content.reconstructions
    form = _form(original, content.space)
    if form == "text":
        return {"form": "text", "pairs": list(zip(original, rebuilt))[:TEXTS]}
    if form == "table":
        return {"form": "table", "tables": [("data", _rows(original)), ("reconstructed", _rows(rebuilt))]}
    first, second = np.asarray(original), np.asarray(rebuilt)
    if first.shape != second.shape:
        raise ValueError(f"reconstructions: expected two arrays of one shape, got {first.shape} and {second.shape}")
    if form == "image":
        tiles = _tiles(content.space, first)
        columns = min(16, len(first), tiles.most // 2)
        number = min(2 * columns, len(first) - len(first) % columns, tiles.most // 2)
        number -= number % columns
        rows = [part[start : start + columns] for start in range(0, number, columns) for part in (first, second)]
        alt = f"{number} images in pairs of rows: above the data, below its reconstruction."
        return {"form": "image", "alt": alt, **tiles.grid(np.concatenate(rows), columns)}
    flat = [part.reshape(len(part), -1).astype(np.float64) for part in (first, second)]
    chart = figures.bands(*flat)
    chart["caption"] = "Median (line) and central 90 % (band) of every dimension: data, and its reconstructions."
    return {"form": "chart", **chart}


def _form(part: Any, space: Space) -> str:
    if hasattr(part, "columns"):
        return "table"
    if isinstance(part, list | tuple) and len(part) > 0 and isinstance(part[0], str):
        return "text"
    return "image" if figures.image_shape(space) is not None else "array"


def _tiles(space: Space, data: np.ndarray) -> figures.Tiles:
    shape = figures.image_shape(space)
    assert shape is not None
    if isinstance(space, Binary):
        return figures.Tiles(shape, 0, 1)
    if isinstance(space, Integers):
        return figures.Tiles(shape, 0, space.levels - 1)
    low, high = np.nanquantile(data, [0.005, 0.995])
    return figures.Tiles(shape, float(low), float(high))


def _rows(frame: Any) -> dict[str, Any]:
    """The first rows of a DataFrame as strings; a missing cell is an empty string."""
    head = frame.head(TABLE_ROWS)
    absent = head.isna().to_numpy()
    numeric = [dtype.kind in "iuf" for dtype in head.dtypes]
    body = []
    for i in range(len(head)):
        cells = [_cell(head.iat[i, j]) if not absent[i, j] else "" for j in range(head.shape[1])]
        body.append(list(zip(cells, numeric)))
    return {"head": list(zip(map(str, head.columns), numeric)), "body": body}


def _cell(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return f"{float(value):.6g}" if abs(float(value)) < 1e6 else f"{float(value):,.0f}"
    return str(value)


# --- embedding and columns ------------------------------------------------------------------------------------------


def principal_components(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first two principal components and the shares of variance they explain.

    Args:
        codes: shape ``(n, latent)`` with at least two columns.

    Returns:
        coordinates of shape ``(n, 2)``; each component points to where its largest loading is positive.
    """
    centred = codes - codes.mean(0)
    variances, directions = np.linalg.eigh(centred.T @ centred / max(1, len(codes)))
    first = directions[:, ::-1][:, :2]
    first = first * np.sign(first[np.abs(first).argmax(0), [0, 1]])
    total = variances.clip(min=0).sum()
    return centred @ first, variances[::-1][:2].clip(min=0) / (total if total > 0 else 1.0)


def _embedding(content: ReportInput) -> dict[str, Any] | None:
    if content.embedding is None:
        return None
    codes = np.asarray(content.embedding, dtype=np.float64)[:POINTS]
    if codes.ndim != 2 or not np.isfinite(codes).all():
        raise ValueError(f"embedding: expected finite numbers of shape (n, latent), got shape {codes.shape}")
    latent = codes.shape[1]
    if latent < 2:
        points, names = np.column_stack([codes[:, 0], np.zeros(len(codes))]), ("latent variable", "")
        caption = "The single latent variable."
    elif latent == 2:
        points, names = codes, ("latent variable 1", "latent variable 2")
        caption = "The two latent variables."
    else:
        points, shares = principal_components(codes)
        names = (f"component 1 ({100 * shares[0]:.0f} %)", f"component 2 ({100 * shares[1]:.0f} %)")
        caption = (
            f"First two principal components of the {latent}-dimensional mean embedding; "
            f"they explain {100 * shares.sum():.0f} % of its variance."
        )
    colours, legend, scale = _label_colours(content.labels, len(codes))
    alt = f"Map of {len(codes):,} embedded examples" + (
        f", coloured by {content.label_name}." if legend or scale else "."
    )
    return {
        "src": figures.embedding_map(points, colours, names),
        "alt": f"{alt}.",
        "caption": caption,
        "legend": legend,
        "label_name": content.label_name if legend or scale else "",
    }


def _label_colours(labels: Any, number: int) -> tuple[Any, list[tuple[str, str]], bool]:
    """Colours of the points, legend of classes, and whether the colours are a scale."""
    if labels is None:
        return None, [], False
    if len(labels) < number:
        raise ValueError(f"labels: expected one of each of {number} embedded examples, got {len(labels)}")
    values = np.asarray(labels)[:number]
    whole = values.dtype.kind in "iu" or (values.dtype.kind == "f" and bool((values == np.round(values)).all()))
    if values.dtype.kind == "f" and not (whole and len(np.unique(values)) <= len(figures.CLASSES)):
        return values.astype(np.float64), [], True
    if values.dtype.kind in "iu" and len(np.unique(values)) > len(figures.CLASSES):
        return values.astype(np.float64), [], True
    names = np.array([f"{v:g}" if isinstance(v, float | np.floating) else str(v) for v in values.tolist()])
    classes, counts = np.unique(names, return_counts=True)
    if len(classes) > len(figures.CLASSES):  # the most frequent have a colour, the others share grey
        frequent = set(classes[np.argsort(-counts, kind="stable")][: len(figures.CLASSES) - 1])
        names = np.array([name if name in frequent else "others" for name in names])
        classes = np.array([*(c for c in classes if c in frequent), "others"])
    elif values.dtype.kind in "iuf":
        classes = classes[np.argsort(classes.astype(np.float64))]
    palette = dict(zip(classes.tolist(), figures.CLASSES))
    if "others" in palette:
        palette["others"] = figures.FAINT
    return [palette[name] for name in names], list(palette.items()), False


def _comparisons(content: ReportInput) -> list[ColumnComparison]:
    real, sampled, space = content.columns_real, content.columns_sampled, content.space
    if real is None or sampled is None:
        arrays = content.data is not None and content.samples is not None and not isinstance(space, Tokens)
        if not arrays or figures.image_shape(space) is not None or _form(content.samples, space) == "text":
            return []
        real, sampled = content.data, content.samples
    comparisons = compare_columns(real, sampled, space)
    if len(comparisons) <= COLUMNS:
        return comparisons
    kept = set(np.argsort([-c.excess for c in comparisons], kind="stable")[:COLUMNS].tolist())
    return [c for i, c in enumerate(comparisons) if i in kept]


def _column(comparison: ColumnComparison) -> dict[str, Any]:
    drawable = comparison.numeric and len(comparison.real) > 0 and len(comparison.sampled) > 0
    first, second = (100 * share for share in comparison.missing)
    return {
        "name": comparison.name,
        "statistic": comparison.statistic,
        "value": f"{comparison.value:.3f}",
        "reference": f"{comparison.reference:.3f}",
        "far": comparison.excess > 0.05,
        "missing": f"{first:.1f} % missing, sampled {second:.1f} %" if first or second else "",
        "histogram": figures.histogram(comparison.real, comparison.sampled) if drawable else None,
        "shares": [] if comparison.numeric else comparison.shares(),
        "alt": (
            f"Distribution of {comparison.name}, real and sampled: {comparison.statistic} {comparison.value:.3f}, "
            f"between two halves of the real data {comparison.reference:.3f}."
        ),
    }


def _number(text: str) -> str:
    """Text with a minus sign instead of a hyphen before numbers."""
    return re.sub(r"(?<![\w-])-(?=\d)", "−", text)


def _write(path: Path, page: str) -> None:
    path.write_text(page, encoding="utf-8")
