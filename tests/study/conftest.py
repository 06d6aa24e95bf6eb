"""A small folder of KuaiRand-Pure's form, for the studies that read one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.datasets.kuairand import ITEM_CATEGORIES, ITEM_NUMBERS, TRAIN_UNTIL, USER_CATEGORIES, USER_NUMBERS

DAY = 86_400
USERS, ITEMS, IMPRESSIONS = 80, 150, 4_000


@pytest.fixture(scope="session")
def kuairand_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen days; users and videos are of one of two tastes, which their features tell, and some videos are shown more than others."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    csv = pytest.importorskip("pyarrow.csv")
    folder, chance = tmp_path_factory.mktemp("kuairand"), np.random.default_rng(4)
    user, item = chance.integers(0, USERS - 4, IMPRESSIONS), ((ITEMS - 4) * chance.random(IMPRESSIONS) ** 2).astype(int)
    user[-120:-60], item[-60:] = chance.integers(USERS - 4, USERS, 60), chance.integers(ITEMS - 4, ITEMS, 60)  # new, on the last day
    liked = np.where(user % 2 == item % 2, 0.7, 0.2)
    log = {
        "user_id": user,
        "video_id": item,
        "time_ms": (1000 * (TRAIN_UNTIL + DAY * np.sort(chance.uniform(-8, 6, IMPRESSIONS)))).astype(np.int64),
        "is_click": (chance.random(IMPRESSIONS) < liked).astype(int),
        "tab": np.where(item % 3 == 0, 4, 1),
    }
    parquet.write_table(arrow.table(log), folder / "log_standard_4_25_to_5_08_pure.parquet")
    for file, key, count, numbers, categories in (
        ("user_features_pure.csv", "user_id", USERS, USER_NUMBERS, USER_CATEGORIES),
        ("video_features_basic_pure.csv", "video_id", ITEMS, ITEM_NUMBERS, ITEM_CATEGORIES),
    ):
        ids = np.arange(count)
        columns = (
            {key: ids} | {name: chance.integers(0, 5, count) for name in numbers} | {name: (ids % 2).astype(str) for name in categories}
        )
        if key == "video_id":
            columns["video_type"] = np.where(ids % 10 == 0, "AD", "NORMAL")
        csv.write_csv(arrow.table(columns), folder / file)
    return folder
