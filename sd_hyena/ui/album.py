"""The pictures of this session: files where they were written, with small ones of those that are too large for a page."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from pathlib import Path

from sd_hyena.ui.job import Picture

MOST = 60  # pictures that the page shows
LARGE = 1536  # pixels of a side above which a small one stands in


class Album:
    """The newest first. Nothing is copied but what is too large to be looked at as it is."""

    def __init__(self, small: Path):
        self._small, self._lock = small, threading.Lock()
        self._pictures: deque[Picture] = deque(maxlen=MOST)
        self.count = 0  # of all that came

    def add(self, picture: Picture) -> None:
        with self._lock:
            self._pictures.appendleft(picture)
            self.count += 1

    @property
    def pictures(self) -> list[Picture]:
        """Those whose files are still there."""
        with self._lock:
            return [picture for picture in self._pictures if picture.path.is_file()]

    def find(self, path: str | None) -> Picture | None:
        """The one of a path that was shown, or of its name."""
        return next((one for one in self.pictures if path in (str(one.path), one.path.name)), None)

    def shown(self, path: Path) -> Path:
        """What a browser is given to look at: the file itself, or a small picture of it."""
        from PIL import Image

        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # ours may be 16384²
        try:
            with Image.open(path) as image:
                if max(image.size) <= LARGE:
                    return path
                name = hashlib.sha256(f"{path}{path.stat().st_mtime_ns}".encode()).hexdigest()[:20]
                small = self._small / f"{name}.jpg"
                if not small.is_file():
                    self._small.mkdir(parents=True, exist_ok=True)
                    image.thumbnail((LARGE, LARGE))
                    image.convert("RGB").save(small, quality=90)
                return small
        finally:
            Image.MAX_IMAGE_PIXELS = limit
