"""A log of impressions with the shape of KuaiRand-Pure (Gao et al., CIKM 2022), drawn, not recorded.

Users and videos have tastes and qualities of their own; a user clicks where the two meet, and everything else that a
user may do comes after a click, so those tasks have sample spaces of their own.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from ..scalars import check_count, check_seed

Array = np.ndarray[Any, Any]

RATES = {
    "is_click": 0.45,
    "long_view": 0.7,
    "finish": 0.37,
    "is_like": 0.039,
    "is_profile_enter": 0.042,
    "is_comment": 0.0057,
    "is_follow": 0.0029,
    "is_forward": 0.0019,
    "is_hate": 0.0008,
}
"""Of each signal, in KuaiRand-Pure: is_click and is_hate of all rows, the others of the rows that were clicked."""
OF_ALL = ("is_click", "is_hate")
TAGS = 60
TABS = 15
AUTHORS_PER_VIDEO = 0.6
TASTES = 8
DAYS = 14
ACTIVE = ("full_active", "high_active", "middle_active", "low_active")
UPLOADS = ("LongImport", "ShortImport", "Web", "LongCamera", "ShortCamera")
HISTORY = 10


def synthetic_log(
    num_rows: int = 200_000, *, num_users: int = 27_000, num_videos: int = 7_000, seed: int = 0
) -> dict[str, Any]:
    """Draws impressions of videos, in the order of time, with nine signals of the users and how long they watched.

    ====================  ==============================================================================================
    ``day``, ``hour``     int64, 0 to 13 and 0 to 23
    ``user_id``           int64, a few of them often; ``user_active``: text, how active the user is
    ``video_id``          int64, a few of them often; ``author_id``: int64; ``upload_type``: text
    ``tags``              lists of one to three ints, what the video is about
    ``history``           lists of up to ten ints: the videos that the user clicked before, the newest last
    ``tab``               int64, the page of the app
    ``duration_ms``       float64, of the video
    ``num_comments``      float64, which the user has read: none without a click, so the task ``is_click`` must not see
                          it
    ``is_click``, ...     the keys of ``RATES``, float64: 1 and 0, and NaN for what comes after a click that there was
                          not
    ``play_time_ms``      float64, NaN without a click
    ====================  ==============================================================================================

    Args:
        num_rows: impressions.
        num_users, num_videos: how many there are to draw from.
        seed: of a generator of its own; nobody else's is touched.

    Raises:
        TypeError: a size or seed that is no int.
        ValueError: a size below 1.
    """
    rows, users = check_count("num_rows", num_rows), check_count("num_users", num_users)
    videos = check_count("num_videos", num_videos)
    rng = np.random.default_rng(check_seed(seed))
    user, video = _popular(rng, users, rows), _popular(rng, videos, rows)
    second = np.sort(rng.integers(0, DAYS * 86_400, rows))
    tab = np.minimum(rng.geometric(0.35, rows) - 1, TABS - 1)

    taste, kind = rng.normal(size=(users, TASTES)), rng.normal(size=(videos, TASTES))
    num_tags = rng.integers(1, 4, videos)
    tags = [sorted(rng.choice(TAGS, count, replace=False).tolist()) for count in num_tags.tolist()]
    about = rng.normal(size=(TAGS, TASTES))
    kind += np.stack([about[own].mean(0) for own in tags])  # a tag says something of a video
    author = rng.integers(0, max(int(AUTHORS_PER_VIDEO * videos), 1), videos)
    quality, activity = 0.6 * rng.normal(size=videos), rng.normal(size=users)
    quality += 0.6 * rng.normal(size=author.max() + 1)[author]
    liked = 1.2 * rng.normal(size=TAGS)
    quality += np.array([liked[own].mean() for own in tags])
    duration = np.exp(rng.normal(10.3, 0.7, videos))  # half a minute, more or less
    meets = (taste[user] * kind[video]).sum(1) / np.sqrt(TASTES)
    common = 0.5 * meets + 0.8 * quality[video] + 0.9 * activity[user] + 0.6 * rng.normal(size=TABS)[tab]
    own = rng.normal(size=(len(RATES), 3))  # what each signal makes of the same things

    log: dict[str, Any] = {
        "day": second // 86_400,
        "hour": second % 86_400 // 3_600,
        "user_id": user,
        "user_active": np.array(ACTIVE)[np.digitize(-activity, (-0.8, 0.0, 0.8))][user],
        "video_id": video,
        "author_id": author[video],
        "upload_type": np.array(UPLOADS)[rng.integers(0, len(UPLOADS), videos)][video],
        "tags": [tags[place] for place in video.tolist()],
        "tab": tab,
        "duration_ms": duration[video],
    }
    signals: dict[str, Array] = {}
    for (name, rate), (of_quality, of_activity, of_length) in zip(RATES.items(), own, strict=True):
        apart = 0.5 * (of_quality * quality[video] + of_activity * activity[user])
        apart += 0.4 * of_length * (np.log(duration[video]) - 10.3)
        score = -common if name == "is_hate" else common
        inside = np.ones(rows, dtype=bool) if name in OF_ALL else signals["is_click"] == 1
        drawn = _drawn(rng, score + apart, rate, inside)
        signals[name] = np.where(inside, drawn, np.nan)
    clicked = signals["is_click"] == 1
    watched = duration[video] * np.exp(0.4 * common + rng.normal(-0.6, 0.5, rows)).clip(0, 3)
    log |= {
        "history": _histories(user, video, clicked),
        "num_comments": np.where(clicked, rng.poisson(2 + 3 * np.nan_to_num(signals["is_comment"])), 0.0),
        **signals,
        "play_time_ms": np.where(clicked, watched, np.nan),
    }
    return log


def _popular(rng: np.random.Generator, count: int, rows: int) -> Array:
    """``(rows,)`` of ``count`` ids, a few of them often: weights as of Zipf's law, flatter."""
    weights = 1 / (10 + np.arange(count)) ** 0.7
    return rng.permutation(count)[rng.choice(count, rows, p=weights / weights.sum())]


def _drawn(rng: np.random.Generator, score: Array, rate: float, inside: Array) -> Array:
    """0 and 1, more often where the score is high, a share ``rate`` of the rows ``inside``."""
    low, high = -30.0, 30.0
    for _ in range(60):  # the share grows with the bias
        bias = (low + high) / 2
        share = _chance(score[inside] + bias).mean() if inside.any() else rate
        low, high = (bias, high) if share < rate else (low, bias)
    return (rng.random(len(score)) < _chance(score + low)).astype(np.float64)


def _chance(score: Array) -> Array:
    chance: Array = 1 / (1 + np.exp(-score))
    return chance


def _histories(user: Array, video: Array, clicked: Array) -> list[list[int]]:
    """Of each row what its user clicked before it."""
    seen: dict[int, deque[int]] = {}
    found = []
    for who, what, is_click in zip(user.tolist(), video.tolist(), clicked.tolist(), strict=True):
        past = seen.setdefault(who, deque(maxlen=HISTORY))
        found.append(list(past))
        if is_click:
            past.append(what)
    return found
