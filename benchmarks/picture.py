"""Take the picture of a report that the README shows: the demo's, in Chromium.

``python benchmarks/picture.py`` needs ``chromium`` and writes ``docs/report.png``.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from report import DOCS

PICTURE = DOCS / "report.png"
SIZE = (1080, 1500)
COLORS = 96
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
)


def main() -> None:
    """Run the demo, open its report and save the upper part of it.

    Raises:
        SystemExit: there is no Chromium.
    """
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("no Chromium here: apt-get install chromium")
    with tempfile.TemporaryDirectory() as scratch:
        demo = (sys.executable, "-m", "qat2int8", "demo", "--quiet", "--output", "demo")
        subprocess.run(demo, cwd=scratch, check=True)
        shot = Path(scratch) / "shot.png"
        page = (Path(scratch) / "demo" / "report.html").as_uri()
        size = ",".join(map(str, SIZE))
        places = (f"--user-data-dir={scratch}/profile", f"--window-size={size}", f"--screenshot={shot}")
        subprocess.run((browser, *FLAGS, *places, page), check=True, capture_output=True)
        with Image.open(shot) as image:
            image.convert("RGB").quantize(COLORS).save(PICTURE, optimize=True)
    print(f"{PICTURE}: {PICTURE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
