"""Alias of recipe/preview.py for job scripts rendered by earlier versions."""

import sys

from orpo_dist.recipe.preview import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
