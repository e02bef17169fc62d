"""What is kept out of a saved recipe: see options/secrets.py."""

from orpo_dist.options.secrets import public_environment, without_secrets

__all__ = ["public_environment", "without_secrets"]
