"""KuaiRand-Pure (Gao et al., CIKM 2022; https://kuairand.com, CC BY-SA 4.0): a short-video log, read from a folder."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.datasets.base import Dataset, Impressions, runs

# The split of the authors of LFM4Ads, by China's calendar (UTC+8). The log's `date` and `hourmin` are that calendar's hour, but often
# the next one (18 % of rows), so we split on time_ms: of 228,329 rows, 179 and 116 fall on the other side than by `date`.
TRAIN_UNTIL = 1651507200.0  # 2022-05-03 00:00 +08:00
TEST_FROM = 1651766400.0  # 2022-05-06 00:00 +08:00

LOG_COLUMNS = ("user_id", "video_id", "time_ms", "is_click", "tab")
LABELS = ("long_view", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "is_profile_enter")
USER_NUMBERS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
USER_CATEGORIES = (
    "user_active_degree",
    "is_lowactive_period",
    "is_live_streamer",
    "is_video_author",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
    *(f"onehot_feat{i}" for i in range(18)),
)
ITEM_NUMBERS = ("video_duration", "server_width", "server_height")  # milliseconds, pixels, pixels
ITEM_CATEGORIES = ("author_id", "video_type", "upload_type", "visible_status", "music_id", "music_type", "tag", "upload_dt")


def load(folder: Path) -> Dataset:
    """The impressions of `log_standard_*_pure.parquet` (or `.csv`, as published) with the features of its users and videos.

    Impressions are in event-time order, ties in log order. Every row is kept, exact duplicates too: the log has no event id that
    would tell a repeat from a resend, and the same event sent twice is two events to whoever consumes the stream.
    scenario = `tab`, ad = the video's type is "AD", clicked = `is_click`, labels = those of LABELS that all files have.
    Users and items are those of the log or of the feature files, by ascending id. Counts, durations and sizes are floats; every
    other feature is the file's text as a str, codes like "4.0" and "UNKNOWN" included; an empty field or an absent row is None.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"KuaiRand-Pure folder {str(folder)!r} does not exist; the data can be had at https://kuairand.com")
    log = _read_log(folder)
    users = _read_features(folder, "user_features_pure.csv", "user_id", USER_NUMBERS, USER_CATEGORIES)
    videos = _read_features(folder, "video_features_basic_pure.csv", "video_id", ITEM_NUMBERS, ITEM_CATEGORIES)

    order = np.argsort(log["time_ms"], kind="stable")
    user, item, tab = log["user_id"][order], log["video_id"][order], log["tab"][order]
    user_ids = np.union1d(user, users["user_id"])
    item_ids = np.union1d(item, videos["video_id"])
    tabs = np.unique(tab)
    labels = tuple(name for name in LABELS if name in log)
    item_features = _align(item_ids, videos, "video_id")
    item_index = np.searchsorted(item_ids, item)
    whole = Impressions(
        user=np.searchsorted(user_ids, user).astype(np.int32),
        item=item_index.astype(np.int32),
        event_time=log["time_ms"][order] / 1000.0,
        scenario=np.searchsorted(tabs, tab).astype(np.int16),
        ad=(item_features["video_type"] == "AD").astype(np.bool_)[item_index],
        clicked=log["is_click"][order] != 0,
        labels=np.array([log[name][order] != 0 for name in labels], dtype=np.bool_).reshape(len(labels), len(order)).T,
    )
    return Dataset(
        name="kuairand-pure",
        user_ids=[str(i) for i in user_ids.tolist()],
        item_ids=[str(i) for i in item_ids.tolist()],
        scenarios=[str(i) for i in tabs.tolist()],
        user_features=_align(user_ids, users, "user_id"),
        item_features=item_features,
        impressions=partial(runs, whole),
        size=len(whole),
        train_until=TRAIN_UNTIL,
        test_from=TEST_FROM,
        labels=labels,
        utc_offset=8.0,
    )


def _read_log(folder: Path) -> dict[str, NDArray[np.int64]]:
    """LOG_COLUMNS and what there is of LABELS as int64 arrays, the files end to end by name (any order between them: load() sorts)."""
    arrow = _arrow()
    files = sorted(folder.glob("log_standard_*_pure.parquet")) or sorted(folder.glob("log_standard_*_pure.csv"))
    if not files:
        raise FileNotFoundError(
            f"no log_standard_*_pure.parquet (or .csv) in {str(folder)!r}; KuaiRand-Pure can be had at https://kuairand.com"
        )
    headers = [_header(path) if path.suffix == ".csv" else arrow.parquet.read_schema(path).names for path in files]
    columns = (*LOG_COLUMNS, *(name for name in LABELS if all(name in header for header in headers)))
    parts = []
    for path, header in zip(files, headers):
        # First of all, so that an absent column is named by us and not by a stack of Arrow messages.
        _require(path, header, LOG_COLUMNS)
        if path.suffix == ".csv":
            table = _read_csv(path, dict.fromkeys(columns, arrow.int64()))
        else:
            table = arrow.parquet.read_table(path, columns=list(columns))
        parts.append({name: _integers(path, name, table[name]) for name in columns})
    return {name: np.concatenate([part[name] for part in parts]) for name in columns}


def _read_features(folder: Path, file: str, key: str, numbers: tuple[str, ...], categories: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """The id column as int64 and the others as object arrays of float, str or None, all in file order."""
    arrow = _arrow()
    path = folder / file
    if not path.is_file():
        raise FileNotFoundError(f"no {file} in {str(folder)!r}; KuaiRand-Pure can be had at https://kuairand.com")
    types = {key: arrow.int64(), **dict.fromkeys(numbers, arrow.float64()), **dict.fromkeys(categories, arrow.string())}
    table = _read_csv(path, types)
    columns: dict[str, NDArray[Any]] = {key: _integers(path, key, table[key])}
    if len(np.unique(columns[key])) != table.num_rows:
        raise ValueError(f"{path}: a {key} occurs more than once")
    for name in (*numbers, *categories):
        columns[name] = np.array(table[name].to_pylist(), dtype=object)
    return columns


def _align(ids: NDArray[np.int64], columns: dict[str, NDArray[Any]], key: str) -> dict[str, NDArray[np.object_]]:
    """The columns but `key`, one value per id of the sorted `ids`; None for an id that the file does not hold."""
    rows = np.searchsorted(ids, columns[key])
    aligned = {}
    for name, values in columns.items():
        if name != key:
            aligned[name] = np.full(len(ids), None, dtype=object)
            aligned[name][rows] = values
    return aligned


def _read_csv(path: Path, types: dict[str, Any]) -> Any:
    """The named columns as an Arrow table. Types are stated, not inferred: a slice of a file gives the same values as the whole."""
    arrow = _arrow()
    _require(path, _header(path), tuple(types))
    options = arrow.csv.ConvertOptions(column_types=types, include_columns=list(types), null_values=[""], strings_can_be_null=True)
    try:
        return arrow.csv.read_csv(path, convert_options=options)
    except arrow.ArrowInvalid as error:
        raise ValueError(f"{path}: {error}") from error


def _integers(path: Path, name: str, column: Any) -> NDArray[np.int64]:
    if column.null_count:
        raise ValueError(f"{path}: column {name} has {column.null_count} empty fields")
    try:
        values: NDArray[np.int64] = column.cast("int64").to_numpy()
    except _arrow().ArrowInvalid as error:
        raise ValueError(f"{path}: column {name} must hold integers: {error}") from error
    return values


def _header(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig") as lines:
        return [name.strip('"') for name in lines.readline().rstrip("\r\n").split(",")]


def _require(path: Path, names: list[str], wanted: tuple[str, ...]) -> None:
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ValueError(f"{path}: missing columns {', '.join(missing)}; found {', '.join(names)}")


def _arrow() -> Any:
    """pyarrow with its readers; imported late because only the data sets need it."""
    try:
        for name in ("pyarrow.csv", "pyarrow.parquet"):
            import_module(name)
        return import_module("pyarrow")
    except ImportError as error:
        raise ImportError("reading KuaiRand needs pyarrow: pip install 'crossrep[data]'") from error
