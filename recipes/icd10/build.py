"""Build the two models of this recipe: models/base, then models/finetuned.

    python recipes/icd10/build.py

About 30 seconds once the 93 MB wheel is in the cache ($ARMA_CACHE, default ~/.cache/arma_mergekit).
"""

import build_base
import build_finetuned

if __name__ == "__main__":
    build_base.build()
    build_finetuned.build()
