"""The vendored JavaScript is what its README says."""

import hashlib
import re
from pathlib import Path

from leeway import report
from leeway.report.page.page import VENDORED

FOLDER = Path(report.__file__).parent / "page" / "vendor"


def test_every_vendored_file_has_the_stated_hash():
    stated = dict(re.findall(r"\| (\S+\.js) \| \S+ \| ([0-9a-f]{64}) \|", (FOLDER / "README.md").read_text("utf-8")))
    assert set(stated) == {path.name for path in FOLDER.glob("*.js")} == {f"{name}.min.js" for name in VENDORED}
    assert {name: hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() for name in stated} == stated
    assert "University of Washington" in (FOLDER / "LICENSE").read_text("utf-8")


def test_no_vendored_file_can_end_its_script_element():
    assert not [path for path in FOLDER.glob("*.js") if re.search(r"</script|<!--", path.read_text("utf-8"), re.I)]
