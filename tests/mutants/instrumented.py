"""Imported by the server of recorded ranks: from here on, all that they fork records its scale factors."""

from tests.mutants import factors
from tests.mutants.recording import Record

RECORD = Record()  # of the rank that was forked
factors.instrument(RECORD.factor)
