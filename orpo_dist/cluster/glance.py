"""The path by which job scripts of earlier versions ask for a run's folder; see recipe/preview.py."""

import sys

from orpo_dist.recipe.preview import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
