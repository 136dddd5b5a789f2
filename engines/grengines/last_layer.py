"""Rows of the last layer. Keys and values are made of every token, and all else of the rows that are read, or of all.

Read are the candidates of a ranking, and the last token of a prompt. No torch import here: configs compose fast.
"""

from __future__ import annotations

from enum import Enum

WHOLE = "last_layer_whole"  # among the details of a batch, 1.0: its last layer computed rows that nothing reads


class LastLayer(Enum):
    """The rows of which an engine computes u, q, attention and the output in the last layer."""

    EVERY = "every row"
    READ = "the rows that are read"
    HALF = "the rows that are read, where they are at most half of a batch's"
    # Beyond half, fewer rows still are fewer operations: by count 2% (hstu_0p2b) to 6% (dlrm_v3) of a request with two
    # thirds candidates, and none where all rows are. Gathers and separate products take time, which was not measured.

    def skips(self, rows: int, read: int) -> bool:
        """Return whether it leaves out rows that nothing reads, of a batch with these rows."""
        return self is LastLayer.READ or (self is LastLayer.HALF and 2 * read <= rows)

    def rows(self, new: int, read: int) -> int:
        """Return how many of a request's `new` rows it computes, if batches are like this request."""
        return min(read, new) if self.skips(new, read) else new
