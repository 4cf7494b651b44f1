"""Where optional test data lives: `MEGATRON_EAGLE_SHARED`, or `shared/` beside the repository."""

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("MEGATRON_EAGLE_SHARED", REPO.parent / "shared"))
GOLDEN = SHARED / "golden"
MEDIA = SHARED / "media"
SPEC = SHARED / "spec"

need_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden checkpoint (MEGATRON_EAGLE_SHARED)")
need_media = pytest.mark.skipif(not MEDIA.is_dir(), reason="no shared media (MEGATRON_EAGLE_SHARED)")
need_spec = pytest.mark.skipif(not SPEC.is_dir(), reason="no shared spec (MEGATRON_EAGLE_SHARED)")
